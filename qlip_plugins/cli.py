"""The `qlip-plugins` program: each verb a few lines over the library.

stdout is data, stderr is talk. Exit codes: 0 ok, 2 usage or recipe, 3 bad artefact, 4 incompatible
model or host, 5 a gate of a comparison failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .adapter import (
    BASE_QUANTIZERS,
    CorrectionFit,
    Inspection,
    installed,
    load_base_quantizer,
    load_correction,
)
from .errors import INSTALL_HINT, ArtefactError, ForeignFormatError, HostError, QlipError, RecipeError
from .prompts import read_prompts
from .quality_metrics import parse_options
from .recipe import Budget, Recipe, dump, find_recipe, json_schema, shipped_recipes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    # A progress bar where nobody watches is noise; set before the hub libraries read it.
    if os.environ.get("CI") or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except QlipError as error:
        _say(f"error: {error}")
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _HEAVY:
            raise
        _say(f"error: {error.name} is not installed: {INSTALL_HINT}")
        return HostError.exit_code
    except BrokenPipeError:
        # The reader of a pipe has enough; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _say(
            "interrupted; nothing was left half-written (long work goes on where it stopped, when run again)"
        )
        return 130
    return code


_HEAVY = {"torch", "diffusers", "transformers", "safetensors", "numpy", "PIL", "tqdm", "accelerate"}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print(data: Any, text: str, as_json: bool) -> None:
    print(json.dumps(data, indent=2, default=str) if as_json else text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlip-plugins",
        description="Text-conditioned activation bits (QLIP) for quantized diffusion models.",
        epilog="exit codes: 0 ok, 2 usage or recipe, 3 bad artefact, 4 incompatible model or host, 5 gate failed",
    )
    parser.add_argument(
        "--version", action="version", version=f"qlip-plugins {metadata.version('qlip-plugins')}"
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    demo = verbs.add_parser(
        "demo", parents=[common], help="show it on the embedded model: pictures and a page"
    )
    demo.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given repeatedly (default: four of our own)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        help="folder to write (default demo-out); an earlier demo is replaced",
    )
    _add_sampler(demo, guidance=3.0)
    demo.set_defaults(run=_demo, dtype="float32", eta=0.0)

    inspect = verbs.add_parser(
        "inspect", parents=[common], help="say what a checkpoint is, and how to load it"
    )
    inspect.add_argument("checkpoint", type=Path)
    inspect.set_defaults(run=_inspect)

    _add_recipe_verbs(verbs, common)

    generate = verbs.add_parser("generate", parents=[common], help="make pictures under a recipe")
    _add_sampling(generate)
    generate.add_argument(
        "--eta",
        type=_share,
        default=0.0,
        help="share of fresh noise a step, of DDIM samplers, 0 to 1 (default 0)",
    )
    _add_budget(generate)
    generate.add_argument(
        "--out", type=Path, required=True, help="folder to write; an earlier result is replaced"
    )
    generate.set_defaults(run=_generate)

    fit = verbs.add_parser("fit-ranges", parents=[common], help="fit activation ranges for a recipe's menu")
    _add_sampling(fit)
    fit.add_argument(
        "--out", type=Path, required=True, help="safetensors file to write; an earlier one is replaced"
    )
    fit.set_defaults(run=_fit_ranges, eta=0.0)

    _add_calibrate(verbs, common)

    correction = verbs.add_parser(
        "fit-correction",
        parents=[common],
        help="collect the statistics of a recipe's error that a corrected sampler needs; can be resumed",
    )
    correction.add_argument("recipe", help="file, or name of a shipped recipe")
    _add_set(correction)
    correction.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line, or .jsonl"
    )
    correction.add_argument(
        "--out", type=Path, required=True, help="safetensors file to write; an earlier one is replaced"
    )
    correction.add_argument(
        "--own-plan",
        action="store_true",
        help="follow the recipe's own plans (default: each width of its menu by itself)",
    )
    correction.add_argument("--method", default="ptqd", help="of correction (default ptqd)")
    correction.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default 8)")
    _add_work(correction)
    _add_sampler(correction)
    correction.set_defaults(run=_fit_correction, dtype="float32", eta=0.0)

    _add_label(verbs, common)
    _add_sensitivity(verbs, common)
    _add_train(verbs, common)
    _add_forecast(verbs, common)
    _add_sharing(verbs, common)
    _add_export_policy(verbs, common)
    _add_evaluate(verbs, common)
    _add_compare(verbs, common)

    doctor = verbs.add_parser("doctor", parents=[common], help="say which hosts and adapters are usable")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_recipe_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    recipe = verbs.add_parser("recipe", help="check, list or show recipes")
    actions = recipe.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", parents=[common], help="report every problem of a recipe, with its line"
    )
    what = check.add_mutually_exclusive_group(required=True)
    what.add_argument("recipe", nargs="?", help="file, or name of a shipped recipe")
    _add_set(check)
    what.add_argument("--shipped", action="store_true", help="check every shipped recipe")
    check.set_defaults(run=_recipe_check)
    listing = actions.add_parser("list", parents=[common], help="the shipped recipes")
    listing.set_defaults(run=_recipe_list)
    show = actions.add_parser("show", parents=[common], help="print a recipe, or the JSON Schema of all")
    what = show.add_mutually_exclusive_group(required=True)
    what.add_argument("recipe", nargs="?", help="file, or name of a shipped recipe")
    what.add_argument("--schema", action="store_true", help="the JSON Schema, for editors")
    show.set_defaults(run=_recipe_show)


def _add_calibrate(verbs: Any, common: argparse.ArgumentParser) -> None:
    calibrate = verbs.add_parser(
        "calibrate",
        parents=[common],
        help="quantize a pipeline's denoiser as Q-Diffusion or PTQD does; can be resumed",
    )
    calibrate.add_argument("pipeline", help="folder, or hub id")
    calibrate.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line, or .jsonl"
    )
    calibrate.add_argument(
        "--out", type=Path, required=True, help="folder to write; an earlier one is replaced"
    )
    calibrate.add_argument(
        "--prompt-embeddings", metavar="FILE", help="for a pipeline without a text encoder"
    )
    calibrate.add_argument(
        "--scheme",
        choices=("qdiffusion", "ptqd"),
        default="qdiffusion",
        help="what is quantized, and on which grids (default qdiffusion)",
    )
    calibrate.add_argument("--weight-bits", type=int, default=4, metavar="BITS", help="2 to 8 (default 4)")
    calibrate.add_argument(
        "--activation-bits",
        type=int,
        nargs="*",
        default=[8],
        metavar="BITS",
        help="one or more of 2 to 16; none after it: weights only (default 8)",
    )
    calibrate.add_argument(
        "--softmax-bits",
        type=int,
        metavar="BITS",
        help="(default 16; ptqd leaves attention's products alone)",
    )
    calibrate.add_argument(
        "--samples", type=int, default=512, help="rows of denoiser calls to calibrate on (default 512)"
    )
    calibrate.add_argument(
        "--iterations", type=int, default=1000, help="of the rounding, for each unit (default 1000)"
    )
    calibrate.add_argument(
        "--activation-iterations", type=int, default=500, help="for each unit and width (default 500)"
    )
    calibrate.add_argument(
        "--activation-start",
        choices=("running", "mse"),
        help="the ranges that training starts from (default running; ptqd: mse, and nothing else)",
    )
    calibrate.add_argument(
        "--batch-size", type=int, default=32, help="samples an iteration; fewer need less memory (default 32)"
    )
    calibrate.add_argument(
        "--native",
        type=Path,
        metavar="FOLDER",
        help="write Q-Diffusion's own ckpt.pth into it, too (not with ptqd)",
    )
    _add_work(calibrate)
    _add_sampler(calibrate)
    calibrate.set_defaults(run=_calibrate)


def _add_label(verbs: Any, common: argparse.ArgumentParser) -> None:
    label = verbs.add_parser(
        "label",
        parents=[common],
        help="score a pipeline's full-precision pictures of prompts, for T2Q to learn from; can be resumed",
        description="Runs under `accelerate launch -m qlip_plugins label ...` on several GPUs, which share the work.",
    )
    label.add_argument(
        "recipe", help="file, or name of a shipped recipe; its pipeline is used, not its base or controller"
    )
    label.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="one prompt a line, or .jsonl with tags such as concept",
    )
    label.add_argument("--metric", required=True, help="of quality, such as knn-giqa")
    label.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the metric, or, as base.checkpoint=FILE, a value of the recipe; repeatable",
    )
    label.add_argument(
        "--out", type=Path, required=True, help="safetensors file to write; an earlier one is replaced"
    )
    label.add_argument(
        "--seeds",
        type=int,
        default=2,
        help="pictures of each prompt; 2 or more give a reliability (default 2)",
    )
    label.add_argument("--batch-size", type=int, default=16, help="pictures at a time (default 16)")
    label.add_argument(
        "--pooling",
        choices=("eos", "pooled", "mean"),
        help="of z (default: the pooled state; mean for a table of embeddings)",
    )
    label.add_argument(
        "--allow-within-prompt",
        action="store_true",
        help="take a metric whose scores of different prompts cannot be compared",
    )
    _add_work(label)
    _add_sampler(label)
    label.set_defaults(run=_label, dtype="float32", eta=0.0)


def _add_sensitivity(verbs: Any, common: argparse.ArgumentParser) -> None:
    sensitivity = verbs.add_parser(
        "sensitivity",
        parents=[common],
        help="measure the error of each quantizer at each width and step, all others unquantized; can be resumed",
    )
    sensitivity.add_argument("recipe", help="file, or name of a shipped recipe")
    _add_set(sensitivity)
    sensitivity.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line, or .jsonl"
    )
    sensitivity.add_argument(
        "--out", type=Path, required=True, help="safetensors file to write; an earlier one is replaced"
    )
    sensitivity.add_argument(
        "--widths",
        type=int,
        nargs="+",
        metavar="BITS",
        help="to measure; the recipe needs ranges for them (default: its menu)",
    )
    sensitivity.add_argument(
        "--batch-size",
        type=int,
        default=8,
        help="prompts at a time, each once for every width (default 8)",
    )
    _add_work(sensitivity)
    _add_sampler(sensitivity)
    sensitivity.set_defaults(run=_sensitivity, dtype="float32", eta=0.0)


def _add_train(verbs: Any, common: argparse.ArgumentParser) -> None:
    train = verbs.add_parser("train", help="train the parts of a controller: t2q, then q2b; can be resumed")
    parts = train.add_subparsers(required=True, metavar="PART")
    _add_train_t2q(parts.add_parser("t2q", parents=[common], help="prompt -> quality, on labels"))
    _add_train_q2b(parts.add_parser("q2b", parents=[common], help="quality -> bits, on a recipe's base"))


def _add_train_t2q(t2q: argparse.ArgumentParser) -> None:
    t2q.add_argument("recipe", help="file, or name of a shipped recipe; its pipeline's embeddings are read")
    _add_set(t2q)
    what = t2q.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", type=Path, metavar="FILE", help="what `qlip-plugins label` wrote")
    what.add_argument(
        "--errors-of",
        metavar="RUN:ALLOCATION",
        help="a run of `qlip-plugins evaluate`: predict how little an allocation errs, instead of the quality",
    )
    t2q.add_argument("--out", type=Path, required=True, help="folder to write; an earlier T2Q is replaced")
    held = t2q.add_mutually_exclusive_group()
    held.add_argument("--held", metavar="TAG=VALUE", help="hold these prompts out")
    held.add_argument(
        "--split-by",
        metavar="TAG",
        help="hold out a share of this tag's values (default concept; of the prompts, where there are no tags)",
    )
    t2q.add_argument(
        "--held-share", type=_share, default=0.25, help="of the values of --split-by (default 0.25)"
    )
    t2q.add_argument(
        "--stop-by",
        metavar="TAG",
        help="values of this tag are not torn apart to stop by (default: as --split-by, or concept)",
    )
    t2q.add_argument("--hidden", type=int, default=256, help="width of the inner layers (default 256)")
    t2q.add_argument("--train-steps", type=int, default=1000, help="of the optimiser, at most (default 1000)")
    t2q.add_argument("--lr", type=_scale, default=3e-4, help="learning rate (default 3e-4)")
    t2q.add_argument("--dropout", type=_scale, default=0.5, help="(default 0.5)")
    t2q.add_argument("--weight-decay", type=_scale, default=0.1, help="(default 0.1)")
    t2q.add_argument("--seed", type=int, default=0, help="of split, start, batches and dropout (default 0)")
    t2q.add_argument("--device", default="cpu", help="such as cuda (default cpu)")
    _add_work(t2q)
    t2q.set_defaults(run=_train_t2q)


def _add_train_q2b(q2b: argparse.ArgumentParser) -> None:
    q2b.add_argument("recipe", help="file, or name of a shipped recipe; its controller is not used")
    _add_set(q2b)
    q2b.add_argument("--t2q", type=Path, required=True, metavar="FOLDER", help="what `train t2q` wrote")
    q2b.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="to train on: one a line, .jsonl, or the label set of the T2Q, whose held-out prompts stay out",
    )
    q2b.add_argument("--limit", type=int, default=256, help="prompts drawn from them at most (default 256)")
    q2b.add_argument("--out", type=Path, required=True, help="folder to write; an earlier one is replaced")
    q2b.add_argument(
        "--start",
        default="medium",
        metavar="medium|sensitivity|FOLDER",
        help="medium everywhere; the solution of a table of sensitivities; or a controller to go on with",
    )
    q2b.add_argument("--sensitivity", type=Path, metavar="FILE", help="what `qlip-plugins sensitivity` wrote")
    _add_budget(q2b)
    q2b.add_argument(
        "--bit-weight",
        type=_scale,
        metavar="LAMBDA",
        help="relative squared error that one bit of mean width is worth; needed unless --trajectories 0",
    )
    q2b.add_argument("--trajectories", type=int, default=100, help="an optimiser step each (default 100)")
    q2b.add_argument("--batch-size", type=int, default=8, help="prompts of each (default 8)")
    q2b.add_argument("--lr", type=_scale, default=0.05, help="learning rate (default 0.05)")
    q2b.add_argument(
        "--cost",
        choices=("bits", "macs"),
        default="bits",
        help="bits: all quantizers alike, as published; macs: weighted by their MACs (default bits)",
    )
    q2b.add_argument(
        "--slope",
        choices=("free", "positive"),
        default="free",
        help="of bits with quality; positive: more quality never means fewer bits (default free)",
    )
    q2b.add_argument("--initial-slope", type=_scale, default=4.0, help="for --start medium (default 4)")
    q2b.add_argument(
        "--group", type=int, default=1, metavar="M", help="steps that share parameters (default 1)"
    )
    q2b.add_argument("--early", type=int, default=0, metavar="M", help="first steps with p_q = 1 (default 0)")
    _add_work(q2b)
    _add_sampler(q2b)
    q2b.set_defaults(run=_train_q2b, dtype="float32", eta=0.0)


def _add_evaluate(verbs: Any, common: argparse.ArgumentParser) -> None:
    evaluate = verbs.add_parser(
        "evaluate",
        parents=[common],
        help="measure allocations of a recipe's base against full precision; can be resumed",
        description="Runs under `accelerate launch -m qlip_plugins evaluate ...` on several GPUs, which share the "
        "work.",
    )
    evaluate.add_argument("recipe", help="file, or name of a shipped recipe")
    evaluate.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line, or .jsonl with tags"
    )
    evaluate.add_argument(
        "--out", type=Path, required=True, help="folder to write; an earlier run there is replaced"
    )
    evaluate.add_argument(
        "--references",
        type=Path,
        metavar="FOLDER",
        help="pictures that sets are compared with: FID, sFID, KID",
    )
    evaluate.add_argument(
        "--features",
        action="append",
        metavar="NAME[=PATH]",
        help="what describes pictures; may be given repeatedly (default demo)",
    )
    evaluate.add_argument("--metric", metavar="NAME", help="of single pictures, such as an image-text score")
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the metric, or, as base.checkpoint=FILE, a value of the recipe",
    )
    evaluate.add_argument("--seeds", type=int, default=4, help="noises of each prompt (default 4)")
    evaluate.add_argument(
        "--allocations",
        default="base,recipe",
        metavar="NAME,...",
        help="base: every controlled quantizer at the base's width; A6: all at 6 bits; recipe: the recipe's own plans; "
        "and at the same mean cost mixture, random, step-only, layer-only, sensitivity, constant-q, shuffled "
        "(docs/evaluation.md, Controls; default base,recipe)",
    )
    evaluate.add_argument(
        "--controller",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another controller of the same base and widths, for --allocations NAME, or `constant-q of NAME`",
    )
    evaluate.add_argument(
        "--sensitivity", type=Path, metavar="FILE", help="what `qlip-plugins sensitivity` wrote, for controls"
    )
    evaluate.add_argument(
        "--skip",
        action="append",
        default=[],
        choices=("own", "pictures"),
        help="leave out the errors on the plan's own way, or all about pictures; may be given repeatedly",
    )
    _add_budget(evaluate, action="append", default=[])
    evaluate.add_argument(
        "--pictures", type=int, metavar="N", help="of the first N prompts are kept (default 8)"
    )
    evaluate.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default 16)")
    _add_work(evaluate)
    _add_sampler(evaluate)
    evaluate.set_defaults(run=_evaluate, dtype="float32", eta=0.0)


def _add_compare(verbs: Any, common: argparse.ArgumentParser) -> None:
    compare = verbs.add_parser(
        "compare", parents=[common], help="compare two runs of evaluate, picture by picture"
    )
    compare.add_argument(
        "first", metavar="RUN_A[:ALLOCATION]", help="run folder (default allocation: recipe)"
    )
    compare.add_argument("second", metavar="RUN_B[:ALLOCATION]", help="compared with the first")
    compare.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="FIGURE<=NUMBER",
        help="such as error_led.difference.high<=0 or bitops_paper.ratio<=0.8; exit code 5 where it is not met; may be "
        "given repeatedly",
    )
    compare.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write the figures and a page of the worst cases"
    )
    compare.add_argument("--force", action="store_true", help="compare runs of different protocols")
    compare.set_defaults(run=_compare)


def _add_forecast(verbs: Any, common: argparse.ArgumentParser) -> None:
    forecast = verbs.add_parser(
        "forecast",
        parents=[common],
        help="say what a recipe will do to prompts, before any picture is made",
        allow_abbrev=False,
    )
    forecast.add_argument("prompt", nargs="*", metavar="PROMPT")
    forecast.add_argument(
        "--prompt", dest="more", action="append", default=[], metavar="TEXT", help="the same"
    )
    forecast.add_argument("--prompts", type=Path, metavar="FILE", help="more of them, one a line, or .jsonl")
    forecast.add_argument(
        "--recipe",
        default="demo-qlip-468-solved",
        help="file, or name of a shipped recipe (default demo-qlip-468-solved)",
    )
    _add_set(forecast)
    _add_budget(forecast)
    forecast.add_argument("--steps", type=_steps, default=25, help="inference steps (default 25)")
    forecast.add_argument(
        "--guidance", type=_scale, default=7.5, metavar="SCALE", help="1 or less: none (default 7.5)"
    )
    forecast.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write the plan, and its picture of each prompt"
    )
    forecast.set_defaults(run=_forecast)


def _add_export_policy(verbs: Any, common: argparse.ArgumentParser) -> None:
    policy = verbs.add_parser(
        "export-policy",
        parents=[common],
        help="collapse a recipe's plans to the step policy that diffusers, vllm-omni and sglang read",
    )
    policy.add_argument("recipe", help="file, or name of a shipped recipe")
    _add_set(policy)
    policy.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="one prompt a line, or .jsonl"
    )
    policy.add_argument("--out", type=Path, required=True, help="JSON file to write")
    policy.add_argument("--native", type=int, default=8, help="width of the steps in the middle (default 8)")
    policy.add_argument("--a16", type=int, default=16, help="width of the steps at the ends (default 16)")
    policy.add_argument(
        "--measure", type=int, default=4, metavar="N", help="errors on the first N prompts (default 4)"
    )
    _add_sampler(policy)
    policy.set_defaults(run=_export_policy, dtype="float32", eta=0.0)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a value of the recipe, such as base.checkpoint=FILE or controller=FOLDER; may be given repeatedly",
    )


def _add_sharing(verbs: Any, common: argparse.ArgumentParser) -> None:
    save = verbs.add_parser(
        "save", parents=[common], help="write a recipe with all that it names as one folder, to share"
    )
    save.add_argument("recipe", help="file, or name of a shipped recipe")
    _add_set(save)
    save.add_argument("--out", type=Path, required=True, help="folder to write; an earlier one is replaced")
    save.add_argument("--base-model", metavar="ID", help="the pipeline, as others can name it")
    save.set_defaults(run=_save)
    convert = verbs.add_parser(
        "convert",
        parents=[common],
        help="write a checkpoint of any known format as a folder that says all of itself",
    )
    convert.add_argument("checkpoint", type=Path)
    convert.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the file does not say, such as activation_bits=8; may be given repeatedly",
    )
    convert.add_argument("--pipeline", default="", metavar="ID", help="that was calibrated, for the record")
    convert.add_argument(
        "--out", type=Path, required=True, help="folder to write; an earlier one is replaced"
    )
    convert.set_defaults(run=_convert)


def _add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="for what is finished (default: beside --out)"
    )


def _add_budget(parser: argparse.ArgumentParser, **more: Any) -> None:
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="KIND=AMOUNT",
        help="what a qlip controller's plans may cost: relative=0.8 (of the base's BitOPs), fab=5.5 or bitops=0.02; "
        "with ,per=prompt or ,per=batch where not the mean of the controller's own prompts is to meet it"
        + ("; may be given repeatedly" if more else ""),
        **more,
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="file, or name of a shipped recipe")
    _add_set(parser)
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="may be given repeatedly"
    )
    _add_sampler(parser)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")


def _add_sampler(parser: argparse.ArgumentParser, guidance: float = 7.5) -> None:
    parser.add_argument("--steps", type=_steps, default=25, help="inference steps (default 25)")
    parser.add_argument(
        "--guidance",
        type=_scale,
        default=guidance,
        metavar="SCALE",
        help=f"1 or less: none (default {guidance:g})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default cpu)")


def _budget(text: str) -> Budget:
    pairs = [part.partition("=") for part in text.split(",")]
    values: dict[str, Any] = {key: value for key, _, value in pairs}
    for name in ("fab", "bitops", "relative"):
        if name in values:
            values[name] = _scale(values[name])
    try:
        return Budget.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise argparse.ArgumentTypeError(
            f"{text!r}: {where + ': ' if where else ''}{first['msg']}; expected such as relative=0.8, fab=5.5 or "
            "bitops=0.02, and ,per=prompt or ,per=batch if wanted"
        ) from None


def _steps(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1000, found {text!r}")
    return int(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return value


def _share(text: str) -> float:
    value = _scale(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, found {text!r}")
    return value


def _inspect(options: argparse.Namespace) -> int:
    found = _recognised(options.checkpoint)
    recipe = _recipe_for(found.base, {"pipeline": "path/to/the/calibrated/pipeline"})
    # Layer lists are long: they belong to --json.
    facts = {
        "format": found.format,
        "weight_bits": found.weight_bits,
        "activation_bits": found.activation_bits,
        "has_activations": found.has_activations,
        "quantized_layers": found.quantized_layers,
        "split_layers": found.split_layers,
        **{key: value for key, value in found.details.items() if not isinstance(value, list)},
    }
    notes = [
        *found.notes,
        *(f"{name} is in neither the file nor a record beside it: set it" for name in found.unknown),
    ]
    shown = [f"# {key}: {'unknown' if value is None else value}" for key, value in facts.items()]
    shown += [f"# note: {note}" for note in notes]
    head = "# This is a recipe. Name your pipeline in `model:`" + (", and see to the notes" if notes else "")
    text = "\n".join([*shown, head, recipe.rstrip()])
    _print({**asdict(found), "recipe": recipe}, text, options.json)
    return 0


def _recognised(checkpoint: Path) -> Inspection:
    """What the first adapter that knows the format says of a file."""
    reasons = []
    for name in installed(BASE_QUANTIZERS):
        try:
            return load_base_quantizer(name).inspect(checkpoint)
        except ForeignFormatError as error:
            reasons.append(f"\n  {name}: {error}")
        except ImportError as error:
            reasons.append(f"\n  {name}: the adapter cannot be imported: {error}")
    raise ForeignFormatError(f"{checkpoint}: no checkpoint of a known format{''.join(reasons)}")


def _recipe_for(base: Any, model: Any) -> str:
    return dump(
        {
            "schema_version": 1,
            "model": dict(model),
            "base": dict(base),
            "backend": "torch",
            "activation_bits": {"low": 8, "medium": 16, "high": 32},
            "controller": {"kind": "static", "bits": "base"},
        }
    )


def _recipe_check(options: argparse.Namespace) -> int:
    names = list(shipped_recipes()) if options.shipped else [options.recipe]
    missing: dict[str, list[str]] = {}
    needs: dict[str, list[str]] = {}
    for name in names:
        recipe, needs[name] = Recipe.with_needs(find_recipe(name), _given(options))
        missing[name] = [file for file in recipe.missing_files() if file.partition(":")[0] not in needs[name]]
    facts = {"ok": not any(missing.values()), "missing_files": missing, "needs": needs}
    _print(facts, _check_text(missing, needs), options.json)
    if any(missing.values()):
        for name, files in missing.items():
            for file in files:
                _say(f"error: {name}: {file}: no such file or folder")
        return ArtefactError.exit_code
    return 0


def _check_text(missing: dict[str, list[str]], needs: dict[str, list[str]]) -> str:
    lines = []
    for name, files in missing.items():
        state = "files are missing" if files else "ok"
        if needs[name]:
            state += "; to use it, give " + " ".join(f"--set {key}=..." for key in needs[name])
        lines.append(f"{name}: {state}")
    return "\n".join(lines)


def _recipe(options: argparse.Namespace, *unused: str) -> Recipe:
    """The recipe that a verb names; `unused` are sections that need not be complete for it."""
    return Recipe.load(options.recipe, _given(options), unused)


_WHOLE = ("controller", "backend", "attention", "time_layers", "description")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's values that `--set` gives; what else it gives is a metric's option, where the verb has one."""
    found = parse_options(options.set)
    ours = {key: value for key, value in found.items() if _is_of_recipe(key)}
    others = [key for key in found if key not in ours]
    if others and not hasattr(options, "metric"):
        raise RecipeError(
            f"--set {others[0]}=...: no value of a recipe; expected SECTION.KEY=VALUE with one of "
            f"{', '.join(Recipe.model_fields)}, or controller=FOLDER"
        )
    empty = [key for key, value in ours.items() if value is None or value == ""]
    if empty:
        raise RecipeError(f"--set {empty[0]}=: no value; expected KEY=VALUE")
    return ours


def _is_of_recipe(key: str) -> bool:
    section, dot, _ = key.partition(".")
    return key in _WHOLE or (bool(dot) and section in Recipe.model_fields)


def _metric_options(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in parse_options(options.set).items() if not _is_of_recipe(key)}


def _recipe_list(options: argparse.Namespace) -> int:
    recipes = {name: Recipe.with_needs(path)[0].description for name, path in shipped_recipes().items()}
    width = max(map(len, recipes), default=0)
    _print(recipes, "\n".join(f"{name:{width}}  {text}" for name, text in recipes.items()), options.json)
    return 0


def _recipe_show(options: argparse.Namespace) -> int:
    if options.schema:
        schema, broken = json_schema()
        for name, error in broken.items():
            _say(f"note: the options of {name!r} are missing, its adapter cannot be imported: {error}")
        print(json.dumps(schema, indent=2))
        return 0
    path = find_recipe(options.recipe)
    recipe, _ = Recipe.with_needs(path)
    _print(recipe.model_dump(mode="json"), path.read_text(encoding="utf-8").rstrip(), options.json)
    return 0


def _demo(options: argparse.Namespace) -> int:
    # Read as torch is loaded. Threads that spin while they wait take minutes where other work runs beside.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .demo import KNOWN_PROMPTS, as_text, make_demo

    report = make_demo(options.prompt or list(KNOWN_PROMPTS), _settings(options), options.out, _say)
    _print(report, as_text(report), options.json)
    _say(f"wrote {options.out}/; open {options.out / 'index.html'}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    recipe = _budgeted(options)
    from .generation import generate

    report = generate(recipe, options.prompt, _settings(options), options.out)
    _print(report, (options.out / "report.txt").read_text(encoding="utf-8").rstrip(), options.json)
    _say(f"wrote {options.out}/ ({len(options.prompt)} pictures, drawn plans, plan.safetensors, report.json)")
    return 0


def _budgeted(options: argparse.Namespace) -> Recipe:
    recipe = _recipe(options)
    return recipe if options.budget is None else recipe.within(options.budget)


def _settings(options: argparse.Namespace) -> Any:
    from .generation import Settings

    return Settings(
        steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        eta=options.eta,
    )


def _fit_ranges(options: argparse.Namespace) -> int:
    recipe = _recipe(options, "ranges", "controller", "correction")
    if options.out.suffix != ".safetensors":
        raise RecipeError(f"--out {options.out}: a ranges table is a .safetensors file")
    from .generation import fit_recipe_ranges

    ranges = fit_recipe_ranges(recipe, options.prompt, _settings(options))
    ranges.save(options.out)
    widths = sorted({width for grids in ranges.fitted.values() for width in grids})
    facts = {"file": str(options.out), "quantizers": len(ranges.fitted), "widths": widths}
    _print(facts, "\n".join(f"{key}: {value}" for key, value in facts.items()), options.json)
    _say(f"use it with `ranges: {{table: {options.out.resolve()}}}`")
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from .calibration.command import calibrate_pipeline
    from .calibration.settings import CalibrationSettings
    from .generation import Settings

    sampling = Settings(
        steps=options.steps, guidance_scale=options.guidance, seed=options.seed, device=options.device
    )
    settings = CalibrationSettings(
        sampling=sampling,
        scheme=options.scheme,
        weight_bits=options.weight_bits,
        activation_bits=tuple(options.activation_bits),
        softmax_bits=options.softmax_bits,
        samples=options.samples,
        iterations=options.iterations,
        activation_iterations=options.activation_iterations,
        batch_size=options.batch_size,
        activation_start=options.activation_start,
    )
    result = calibrate_pipeline(
        options.pipeline,
        options.prompt_embeddings,
        list(read_prompts(options.prompts).prompts),
        settings,
        out=options.out,
        native=options.native,
        work=_work(options),
        say=_say,
    )
    recipe = _recipe_for(result.base, result.model)
    lines = [
        f"# {name}: relative squared error {error:.3e}" for name, error in result.report["errors"].items()
    ]
    text = "\n".join([*lines, "# This is a recipe:", recipe.rstrip()])
    _print({**result.report, "recipe": recipe}, text, options.json)
    for path in result.written:
        _say(f"wrote {path}")
    return 0


def _fit_correction(options: argparse.Namespace) -> int:
    recipe = _recipe(options, "correction")
    out = options.out.resolve()
    what = CorrectionFit(
        recipe=recipe,
        prompts=list(read_prompts(options.prompts).prompts),
        settings=_settings(options),
        own_plan=options.own_plan,
        batch=options.batch_size,
        work=_work(options),
        out=options.out,
    )
    facts = load_correction(options.method).fit(what, _say)
    lines = [f"{key}: {value}" for key, value in facts.items() if not isinstance(value, dict)]
    tables = [value for value in facts.values() if isinstance(value, dict)]
    lines += [
        f"{name}: " + ", ".join(f"{part} {value:.2e}" for part, value in row.items())
        for table in tables
        for name, row in table.items()
    ]
    _print(facts, "\n".join(lines), options.json)
    _say(f"use it with `correction: {{adapter: {options.method}, statistics: {out}}}`")
    return 0


def _label(options: argparse.Namespace) -> int:
    recipe = _recipe(options, "ranges", "controller", "correction")
    prompts = read_prompts(options.prompts)
    prompts.check_distinct(options.prompts)
    from .labelling import LabelRequest, label

    what = LabelRequest(
        recipe=recipe,
        prompts=prompts,
        metric=options.metric,
        options=_metric_options(options),
        settings=_settings(options),
        out=options.out,
        work=_work(options),
        seeds=options.seeds,
        batch=options.batch_size,
        pooling=options.pooling,
        allow_within_prompt=options.allow_within_prompt,
    )
    facts = label(what, _say)
    if facts is not None:
        _print(facts, "\n".join(f"{key}: {value}" for key, value in facts.items()), options.json)
    return 0


def _sensitivity(options: argparse.Namespace) -> int:
    recipe = _recipe(options, "controller", "correction")
    prompts = read_prompts(options.prompts)
    prompts.check_distinct(options.prompts)
    from .sensitivity import SensitivityRequest, sensitivity

    what = SensitivityRequest(
        recipe=recipe,
        prompts=prompts.prompts,
        widths=tuple(options.widths or recipe.activation_bits.widths),
        settings=_settings(options),
        out=options.out,
        work=_work(options),
        batch=options.batch_size,
    )
    facts = sensitivity(what)
    _print(facts, "\n".join(f"{key}: {value}" for key, value in facts.items()), options.json)
    return 0


def _work(options: argparse.Namespace) -> Path:
    out: Path = options.out.resolve()
    work: Path | None = options.work
    return work or out.with_name(f"{out.name}.work")


def _train_t2q(options: argparse.Namespace) -> int:
    recipe = _recipe(options, "ranges", "controller", "correction")
    labels, allocation = options.labels, None
    if options.errors_of is not None:
        folder, _, allocation = options.errors_of.rpartition(":")
        if not folder or not allocation:
            raise RecipeError(f"--errors-of {options.errors_of}: expected RUN:ALLOCATION")
        labels = Path(folder)
    from .training import T2QTraining, as_text
    from .training.command import T2QRequest, split_for, train_t2q_for

    try:
        training = T2QTraining(
            hidden=options.hidden,
            steps=options.train_steps,
            lr=options.lr,
            weight_decay=options.weight_decay,
            dropout=options.dropout,
            seed=options.seed,
        )
    except ValueError as error:
        raise RecipeError(f"train t2q: {error}") from None
    what = T2QRequest(
        recipe=recipe,
        labels=labels,
        allocation=allocation,
        split=split_for(options.held, options.split_by, options.held_share, options.seed),
        stop_by=options.stop_by or options.split_by or "concept",
        training=training,
        out=options.out,
        work=_work(options),
        device=options.device,
    )
    report = train_t2q_for(what)
    _print(report, as_text(report), options.json)
    _say(f"wrote {options.out}/")
    return 0


def _train_q2b(options: argparse.Namespace) -> int:
    recipe = _recipe(options, "controller", "correction")
    if options.bit_weight is None and options.trajectories:
        raise RecipeError(
            "--bit-weight is needed where trajectories are trained on; see docs/method.md, Train"
        )
    from .training import Q2BTraining
    from .training.command import Q2BRequest, train_q2b_for

    try:
        training = Q2BTraining(
            bit_weight=options.bit_weight or 0.0,
            trajectories=options.trajectories,
            batch=options.batch_size,
            lr=options.lr,
            cost=options.cost,
            slope=options.slope,
        )
    except ValueError as error:
        raise RecipeError(f"train q2b: {error}") from None
    what = Q2BRequest(
        recipe=recipe,
        t2q=options.t2q,
        prompts_file=options.prompts,
        settings=_settings(options),
        training=training,
        out=options.out,
        work=_work(options),
        start=options.start,
        sensitivity=options.sensitivity,
        budget=options.budget,
        group=options.group,
        early=options.early,
        initial_slope=options.initial_slope,
        limit=options.limit,
    )
    facts = train_q2b_for(what)
    records = facts["records"]
    shown = [
        f"trajectory {record['trajectory'] + 1}: relative error {record['mse']:.4f}, FAB {record['fab']:.2f}, loss "
        f"{record['loss']:.4f}"
        for record in (records[:1] + records[-1:] if records else ())
    ]
    plans = facts["plans"]
    if not shown:
        solved = facts["start"] == "sensitivity"
        shown = ["solved from sensitivities" if solved else "nothing was trained: Q2B as it starts"]
    shown += [
        f"plans of {plans['prompts']} prompts (simulated): FAB {plans['fab']:.3f}, BitOPs (paper) "
        f"{plans['bitops_paper']:.6f} T, {plans['relative']:.4f} of the base; mean slope {plans['mean_slope']:.3f}, "
        f"{plans['negative_slopes']:.0%} negative",
        *(f"note: {note}" for note in facts["notes"]),
    ]
    _print(facts, "\n".join(shown), options.json)
    _say(f"wrote {options.out}/; use it with `controller: {{kind: qlip, path: {options.out.resolve()}}}`")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    if len(options.budget) == 1:
        recipe = recipe.within(options.budget[0])
    prompts = read_prompts(options.prompts)
    prompts.check_distinct(options.prompts)
    metric_options = _metric_options(options)
    if metric_options and options.metric is None:
        first = next(iter(metric_options))
        raise RecipeError(f"--set {first}=...: an option of a metric, and there is no --metric")
    controllers = [text.partition("=") for text in options.controller]
    for text, (_, equals, folder) in zip(options.controller, controllers, strict=True):
        if not equals or not folder:
            raise RecipeError(f"--controller {text}: expected NAME=FOLDER")
    named = Counter(name for name, _, _ in controllers)
    if any(count > 1 for count in named.values()):
        raise RecipeError(f"--controller {named.most_common(1)[0][0]}=...: given twice")
    from .evaluation.command import EvaluationRequest, as_text, evaluate
    from .evaluation.wanted import Wanted

    what = EvaluationRequest(
        recipe=recipe,
        prompts=prompts,
        prompts_file=options.prompts,
        settings=_settings(options),
        out=options.out,
        work=_work(options),
        seeds=options.seeds,
        batch=options.batch_size,
        features=None if options.features is None else tuple(options.features),
        references=options.references,
        metrics={} if options.metric is None else {options.metric: metric_options},
        wanted=Wanted(
            names=[name.strip() for name in options.allocations.split(",")],
            budgets=options.budget,
            controllers={name: Path(folder) for name, _, folder in controllers},
            sensitivity=options.sensitivity,
        ),
        skip=tuple(options.skip),
        pictures=options.pictures,
    )
    facts = evaluate(what, _say)
    if facts is not None:
        _print(facts, as_text(facts), options.json)
        _say(f"wrote {options.out}/")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .evaluation.comparison import as_text, check_gates, compare, parse_gate, write_comparison

    gates = [parse_gate(text) for text in options.gate]
    found = compare(options.first, options.second, force=options.force, gates=gates)
    if options.out is not None:
        write_comparison(found, options.out)
    _print(found.to_dict(), as_text(found), options.json)
    if options.out is not None:
        _say(f"wrote {options.out}/; open {options.out / 'index.html'}")
    check_gates(found)
    return 0


def _forecast(options: argparse.Namespace) -> int:
    recipe = _budgeted(options)
    prompts = [
        *options.prompt,
        *options.more,
        *(read_prompts(options.prompts).prompts if options.prompts else ()),
    ]
    if not prompts:
        raise RecipeError("forecast: no prompt: name some, or a file of them with --prompts")
    recipes = [prompt for prompt in options.prompt if prompt.endswith((".yaml", ".yml"))]
    if recipes:
        raise RecipeError(
            f"forecast: {recipes[0]!r} stands among the prompts: a recipe is given with --recipe"
        )
    from .forecast import forecast, write_forecast
    from .generation import Settings

    found = forecast(recipe, prompts, Settings(steps=options.steps, guidance_scale=options.guidance))
    if options.out is not None:
        write_forecast(found, options.out)
    _print(found.to_dict(), str(found), options.json)
    if options.out is not None:
        _say(f"wrote {options.out}/ ({len(prompts)} pictures of bits, plan.safetensors, forecast.json)")
    return 0


def _export_policy(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    prompts = read_prompts(options.prompts)
    prompts.check_distinct(options.prompts)
    from .policy_export import PolicyRequest, export_policy

    facts = export_policy(
        PolicyRequest(
            recipe=recipe,
            prompts=prompts.prompts,
            settings=_settings(options),
            native=options.native,
            a16=options.a16,
            measured=options.measure,
            out=options.out,
        )
    )
    policy = facts["policy"]
    lines = [
        f"first {policy['first_steps']['count']} and last {policy['last_steps']['count']} of {facts['calls']} calls at "
        f"{facts['a16']} bits, the others at {facts['native']}; mean plan of {facts['prompts']} prompts",
        f"costs are {facts['costs are']}; errors are {facts['errors are']}",
        *(
            f"{name}: FAB {row['fab']:.2f}, by MACs {row['fab_mac_weighted']:.2f}, BitOPs (paper) "
            f"{row['bitops_paper']:.6g} T, error {row['error_led']:.4g}"
            for name, row in facts["plans"].items()
        ),
    ]
    _print(facts, "\n".join(lines), options.json)
    _say(
        f"wrote {options.out}; read it with `controller: {{kind: policy, path: {options.out.resolve()}, native: "
        f"{options.native}, a16: {options.a16}}}`"
    )
    return 0


def _save(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    from .sharing import QlipModel

    model = QlipModel.from_recipe(recipe)
    model.save_pretrained(options.out, options.base_model)
    facts = {"folder": str(options.out), "base_fingerprint": model.base_fingerprint}
    _print(facts, "\n".join(f"{key}: {value}" for key, value in facts.items()), options.json)
    _say(f"wrote {options.out}/; use the folder as a recipe, or `QlipModel.from_pretrained`")
    return 0


def _convert(options: argparse.Namespace) -> int:
    found = _recognised(options.checkpoint)
    given = parse_options(options.set)
    unknown = [name for name in found.unknown if name not in given]
    if unknown:
        raise RecipeError(
            f"{options.checkpoint}: {', '.join(unknown)} stand in neither the file nor a record beside it: give each "
            "with --set KEY=VALUE"
        )
    base = {**found.base, **given}
    try:
        config = load_base_quantizer(str(base["adapter"])).config_class.model_validate(
            base, context={"base_dir": Path.cwd()}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--set: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    from .sharing import convert

    facts = convert(config, options.pipeline or str(options.checkpoint.name), options.out)
    shown = {key: value for key, value in facts.items() if key != "base"}
    text = "\n".join(
        [
            *(f"# {key}: {value}" for key, value in shown.items()),
            "base:",
            *(f"  {line}" for line in dump(facts["base"]).rstrip().splitlines()),
        ]
    )
    _print(facts, text, options.json)
    _say(f"wrote {options.out}/")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import as_text, diagnose

    found = diagnose()
    _print(found, as_text(found), options.json)
    return 0 if found["ok"] else HostError.exit_code
