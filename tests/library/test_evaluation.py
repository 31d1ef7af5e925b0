"""`qlip-plugins evaluate`: what it measures, writes, refuses and resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip_plugins import apply
from qlip_plugins.artefacts import write_tensors
from qlip_plugins.cli import main
from qlip_plugins.errors import BitsError, IncompatibleModelError
from qlip_plugins.evaluation import command
from qlip_plugins.evaluation.drawing import draw_pareto
from qlip_plugins.evaluation.errors import Batch, Judges, Measuring, batches, noises_of, paired
from qlip_plugins.evaluation.protocol import fingerprint_of
from qlip_plugins.evaluation.run import Run
from qlip_plugins.families import Conditioning
from qlip_plugins.generation import Settings, load_pipeline, noise_seeds, sample_model
from qlip_plugins.plan import BitPlan
from qlip_plugins.recipe import Recipe
from qlip_plugins.recording import Course, recording
from qlip_plugins.work import flat

pytest.importorskip("torchmetrics", reason="extra `evaluation`")
pytest.importorskip("matplotlib", reason="extra `evaluation`")

PROMPTS = ("row 1", "row 2", "row 3")
SETTINGS = Settings(steps=3, guidance_scale=2.0)
NO_JUDGES = Judges({}, {})


def golden_command(prompts: Path, out: Path, *more: str) -> list[str]:
    given = ["evaluate", "golden-w4a8", "--prompts", str(prompts), "--out", str(out)]
    return [*given, "--seeds", "2", "--steps", "3", "--guidance", "2", "--batch-size", "2", *more]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_errors_are_those_computed_directly() -> None:
    """Of the base: led along the float model's samples, and the float model along the base's."""
    recipe = Recipe.load("golden-w4a8")
    with paired(load_pipeline(recipe), recipe, PROMPTS, SETTINGS) as pair:
        measuring = Measuring(pair, NO_JUDGES, Batch(0, range(3)))
        found = measuring.allocation(pair.base_plan)
        mixed = measuring.allocation(pair.recipe_plan)
        costs = pair.costs(pair.recipe_plan)
    static = Recipe.load("golden-w4a8-static")
    pipe = load_pipeline(static)

    def run(along: Any = None) -> Any:
        with recording(pipe, along) as course:
            latents = sample_model(pipe, static.model, PROMPTS, SETTINGS, "latent")
        return course, latents

    full, float_latents = run()
    with apply(pipe, static):
        led, _ = run(full.samples)
        own, latents = run()
    along, _ = run(own.samples)
    for name, first, second in (("error_led", led, full), ("error_own", own, along)):
        expected = [
            ((a - b) ** 2).mean(dim=(1, 2, 3))
            for a, b in zip(first.predictions, second.predictions, strict=True)
        ]
        torch.testing.assert_close(found[name], torch.stack(expected, 1).double())
        assert bool((found[name] > 0).all())
    expected_mse = (latents - float_latents).double().square().flatten(1).mean(1)
    torch.testing.assert_close(found["picture_mse"], expected_mse)
    # The recipe's own plans, as the recipe itself makes and reports them.
    whole = load_pipeline(recipe)
    with apply(whole, recipe) as controller, recording(whole, full.samples) as course:
        sample_model(whole, recipe.model, PROMPTS, SETTINGS, "latent")
        assert costs == [
            type(cost)(**{**vars(cost), "quality": None}) for cost in controller.report().prompts
        ]
    torch.testing.assert_close(mixed["error_led"], course.error(full))


def test_the_float_model_has_no_error_along_its_own_samples() -> None:
    recipe = Recipe.load("golden-w4a8")
    pipe = load_pipeline(recipe)
    courses: list[Course] = []
    for along in (False, True):
        with recording(pipe, courses[0].samples if along else None) as course:
            sample_model(pipe, recipe.model, PROMPTS, SETTINGS, "latent")
        courses.append(course)
    assert float(courses[1].error(courses[0]).abs().max()) == 0


def test_a_pair_leaves_the_pipeline_as_it_was() -> None:
    recipe = Recipe.load("golden-w4a8")
    pipe = load_pipeline(recipe)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with paired(pipe, recipe, PROMPTS, SETTINGS) as pair:
        full = pair.full_precision_costs()[0]
        assert (full.fab, full.bitops_paper > pair.costs(pair.base_plan)[0].bitops_paper) == (32, True)
        assert pair.controller.pipe.unet is not pipe.unet
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert not pipe.unet._forward_pre_hooks


def test_a_plan_leaves_nothing_behind_for_the_next() -> None:
    """A plan of some layers alone: the others are at base width again, whatever the plan before."""
    recipe = Recipe.load("golden-w4a8")
    with paired(load_pipeline(recipe), recipe, PROMPTS, SETTINGS) as pair:
        measuring = Measuring(pair, NO_JUDGES, Batch(1, range(2)))
        base = pair.base_plan
        first = measuring.allocation(base)
        measuring.allocation(BitPlan(torch.full_like(base.bits, 32), base.timesteps, base.layers))
        some = BitPlan(base.bits[:, :, :1], base.timesteps, base.layers[:1])
        again = measuring.allocation(some)
        assert torch.equal(first["error_led"], again["error_led"])
        with pytest.raises(IncompatibleModelError, match="a plan of 2 prompts, there are 3"):
            pair.check("x", BitPlan(base.bits.repeat(2, 1, 1), base.timesteps, base.layers))
        with pytest.raises(IncompatibleModelError, match="of 1 timesteps, the sampler visits 3"):
            pair.check("x", BitPlan(base.bits[:, :1], base.timesteps[:1], base.layers))
        with pytest.raises(IncompatibleModelError, match="quantizers that this base has not: nowhere"):
            pair.check("x", BitPlan(base.bits[:, :, :1], base.timesteps, ("nowhere",)))
        with pytest.raises(BitsError, match="nothing has been generated"):
            apply(load_pipeline(recipe), recipe).plan_for(Conditioning(torch.zeros(1, 1, 1)))


def test_noises_are_those_of_generate() -> None:
    assert [noises_of(("a", "b"), 5, number) for number in range(2)] == [
        noise_seeds(("a", "b"), 5),
        noise_seeds(("a", "b", "a", "b"), 5)[2:],
    ]
    assert [batch.name for batch in batches(3, 2, 2)] == [
        *("000-000000", "000-000002", "001-000000", "001-000002")
    ]


def test_the_verb_writes_a_run(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(golden_command(prompts, out, "--json")) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert json.loads((out / "evaluation.json").read_text()) == facts
    assert facts["fingerprint"] == fingerprint_of(facts["protocol"])
    assert f"2 allocations; protocol {facts['fingerprint']}" in printed.err
    assert sorted(path.name for path in out.iterdir()) == [
        *("evaluation.json", "pareto.png", "plans", "results.safetensors")
    ]
    run = Run.load(out)
    assert run.results["recipe/error_led"].shape == (
        3,
        2,
        len(facts["allocations"]["base"]["calls"]["timesteps"]),
    )
    values = run.of("recipe")
    figures = facts["allocations"]["recipe"]["figures"]
    for name in ("error_led", "error_own", "picture_mse", "fab", "bitops_paper"):
        assert figures[name]["mean"] == pytest.approx(float(values[name].mean()))
        assert figures[name]["n"] == 3
    assert figures["error_led"]["low"] < figures["error_led"]["mean"] < figures["error_led"]["high"]
    assert facts["allocations"]["full precision"]["figures"]["error_own"]["mean"] == 0
    plan = BitPlan.load(out / "plans" / "recipe.safetensors")
    assert plan.digest() == facts["allocations"]["recipe"]["plan_digest"]
    assert main(golden_command(prompts, out)) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^protocol {facts['fingerprint']}: 3 prompts, 2 noises each, 3 clusters", text)
    assert re.search(r"^allocation +error_led +error_own +fab_mac_weighted", text, re.M)
    assert re.search(r"^recipe +[\d.e-]+ \[[\d.e-]+, [\d.e-]+\]", text, re.M)


def test_an_interrupted_run_goes_on_where_it_stopped(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(golden_command(prompts, whole)) == 0
    write, written = write_tensors, list[str]()

    def interrupted(path: Path, *arguments: Any, **facts: Any) -> None:
        write(path, *arguments, **facts)
        written.append(path.name)
        if len(written) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "write_tensors", interrupted)
        assert main(golden_command(prompts, out)) == 130
    assert not out.exists()
    assert main(golden_command(prompts, out, "--seed", "1")) == 2
    assert "begun otherwise (protocol.noises.seed: 0, now 1)" in capsys.readouterr().err
    assert main(golden_command(prompts, out)) == 0
    assert "in 4 batches; 2 allocations" in (said := capsys.readouterr().err)
    assert "; 1 batches were finished before" in said
    for name in ("evaluation.json", "results.safetensors", "plans/recipe.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "run", "whole"]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--allocations", "recipe,bass"], 2, "no allocation 'bass'.*base"),
        (["--allocations", "a/b"], 2, "'a/b' is no name"),
        (["--seeds", "0"], 2, "at least one"),
        (["--set", "k=3"], 2, "there is no --metric"),
        (["--references", "nowhere"], 4, "has no decoder"),
        (["--pictures", "2"], 4, "has no decoder"),
        (["--features", "demo"], 4, "has no decoder"),
        (["--metric", "knn"], 2, "no quality metric 'knn'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    assert main(golden_command(prompts, tmp_path / "run", *more)) == code
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_not_replaced(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    assert main(golden_command(prompts, tmp_path / "run")) == 3
    assert "holds 'thesis.tex'" in capsys.readouterr().err


def test_pictures_are_judged_kept_and_compared_with_references(
    tmp_path: Path, demo_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_pipeline", lambda recipe: demo_pipe)
    random = np.random.default_rng(0)
    (tmp_path / "references").mkdir()
    for number in range(8):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "references" / f"{number}.png")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{word} fox", "concept": "fox"} for word in ("red", "green", "old")]
    prompts.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "a cat", "concept": "cat"}])))
    out = tmp_path / "run"
    arguments = ["evaluate", "demo-w4a8", "--prompts", str(prompts), "--out", str(out), "--steps", "1"]
    arguments += ["--guidance", "1", "--seeds", "2", "--allocations", "base", "--pictures", "1"]
    arguments += ["--metric", "demo-clip-score", "--references", str(tmp_path / "references")]
    assert main(arguments) == 0
    facts = Run.load(out).facts
    found = facts["allocations"]["base"]
    assert found["figures"]["error_led"]["clusters"] == 2
    assert set(found["figures"]) >= {"psnr", "distance.demo", "score.demo-clip-score"}
    assert {name: each["label"] for name, each in found["sets"].items()} == {
        "fid.demo": "FID-lite (demo)",
        "sfid.demo": "sFID-lite (demo)",
        "kid.demo": "KID-lite (demo)",
    }
    assert (found["sets"]["fid.demo"]["n"], found["sets"]["fid.demo"]["references"]) == (8, 8)
    assert facts["notes"][1].startswith("8 pictures, fewer than 5000")
    assert facts["protocol"]["references"]["n"] == 8
    kept = sorted(str(path.relative_to(out / "pictures")) for path in (out / "pictures").rglob("*.png"))
    assert kept == [f"{name}/0000-0{seed}.png" for name in ("base", "full-precision") for seed in (0, 1)]
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 128
    with Image.open(out / "pictures" / "base" / "0000-00.png") as ours:
        drawn = np.array(ours, dtype=float) / 255
    with Image.open(out / "pictures" / "full-precision" / "0000-00.png") as theirs:
        reference = np.array(theirs, dtype=float) / 255
    mse = Run.load(out).of("base")["picture_mse"][0, 0]
    assert float(mse) == pytest.approx(((drawn - reference) ** 2).mean(), rel=1e-4)


def test_the_fingerprint_is_of_the_protocol_and_not_of_the_allocations(prompts: Path, tmp_path: Path) -> None:
    runs = []
    for name, recipe, more in (
        ("a", "golden-w4a8", []),
        ("b", "golden-w4a8", ["--allocations", "base"]),
        ("c", "golden-w4a8", ["--steps", "2"]),
    ):
        arguments = golden_command(prompts, tmp_path / name, *more)
        arguments[1] = recipe
        assert main([*arguments, "--seeds", "1", "--batch-size", "3"]) == 0
        runs.append(Run.load(tmp_path / name))
    a, b, c = (run.fingerprint for run in runs)
    assert a == b != c
    assert flat({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}
    assert not (tmp_path / "b" / "pareto.png").exists(), "one quantized allocation makes no curve"


def test_the_plot_has_every_allocation(tmp_path: Path) -> None:
    """Forty of them, with the tiny plot's names beside it."""

    def figures(number: int) -> dict[str, Any]:
        error = {"mean": 1 / number, "low": 0.9 / number, "high": None if number == 3 else 1.2 / number}
        cost = {"mean": float(number), "low": None, "high": None}
        return {"figures": {"error_led": error, "bitops_paper": cost, "fab": cost}}

    facts = {
        "fingerprint": "0" * 12,
        "prompts": ["a"],
        "protocol": {"noises": {"per_prompt": 1}},
        "allocations": {f"static {number}": figures(number) for number in range(1, 41)},
    }
    draw_pareto(facts, tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.height > 1000
