"""Tables and figures of docs/allocation.md: what the controllers of the demo do, beside every control.

    python scripts/demo_model/allocation.py fair RUN...                  # paired differences, Pareto plot
    python scripts/demo_model/allocation.py premise RUN LABELS           # errors by full-precision quality
    python scripts/demo_model/allocation.py drop RUN                     # quality lost, by full-precision quality
    python scripts/demo_model/allocation.py paired RUN                   # recipe against others, by every figure
    python scripts/demo_model/allocation.py ladder LABELS NAME=FOLDER... # bits by caption level
    python scripts/demo_model/allocation.py predicted LABELS T2Q         # quality against predicted quality
    python scripts/demo_model/allocation.py maps RUN                     # bit maps of two prompts
    python scripts/demo_model/allocation.py spread RUN SENSITIVITY NAME=FOLDER...  # what differs by how much
    python scripts/demo_model/allocation.py sums SENSITIVITY             # errors of all quantizers at a width
    python scripts/demo_model/allocation.py pictures RUN                 # the table of a run that judged pictures

A RUN is a folder of `qlip-plugins evaluate`. Each step writes its numbers as JSON or CSV, and its figure, into
docs/allocation; docs/allocation.md names the commands that made the runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from make_qlip import write_json
from qlip_plugins.allocations import static_width
from qlip_plugins.embeddings import EncodedPrompts
from qlip_plugins.evaluation.bootstrap import mean_interval
from qlip_plugins.evaluation.run import COSTS, FULL, PRIMARY, Run, in_order
from qlip_plugins.generation import load_pipeline
from qlip_plugins.labels import Labels, pearson, rank_normalise, spearman
from qlip_plugins.plan import BitPlan
from qlip_plugins.recipe import Recipe
from qlip_plugins.sensitivity import Sensitivity
from qlip_plugins.text_to_bits import TextToBits
from qlip_plugins.training import TrainedT2Q, rows_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "allocation"
BINS = 5
LEVELS = "12345"
FILLER = (
    "a picture , as one may well say , of some thing or other that is shown here , namely",
    "here we have , for what it is worth and as far as anybody can tell , an image of",
    "this is meant to be , all in all and without going into any detail , just a plain",
)
UNINFORMED = 200
COST = "bitops_paper"


def fair(options: argparse.Namespace) -> None:
    """Every allocation of some runs: cost, error, and what the recipe and its rival gain on it."""
    tables = {}
    for folder in options.runs:
        run = Run.load(folder)
        tables[folder.name] = _compared(run)
        _write_prompts(run, options.to / f"{folder.name}.csv")
    name, to = options.name, options.to
    write_json(to / f"{name}.json", tables)
    (to / f"{name}.md").write_text("\n".join(_as_markdown(tables)) + "\n", encoding="utf-8")
    _draw_fair(tables, to / f"{name}.png")
    print((to / f"{name}.md").read_text(encoding="utf-8"))


def _compared(run: Run) -> dict[str, Any]:
    clusters = run.facts["clusters"]
    errors = {name: run.of(name)[PRIMARY].double().mean(1) for name in run.facts["allocations"]}
    rows = {}
    for name, error in errors.items():
        costs = run.of(name)
        rows[name] = {
            "error": mean_interval(error, clusters).to_dict(),
            "bitops": float(costs[COST].mean()),
            "fab": float(costs["fab"].mean()),
        }
        for mine in ("recipe", "errors"):
            if mine in errors and name not in (mine, FULL):
                found = mean_interval(errors[mine] - error, clusters).to_dict()
                rows[name][f"{mine} minus this, of this"] = {
                    part: None if found[part] is None else found[part] / float(error.mean())
                    for part in ("mean", "low", "high")
                }
    return {
        "fingerprint": run.fingerprint,
        "prompts": len(run.prompts),
        "noises": run.facts["protocol"]["noises"]["per_prompt"],
        "clusters": len(set(clusters)),
        "device": run.facts["protocol"]["device"],
        "rows": rows,
    }


def _write_prompts(run: Run, path: Path) -> None:
    """The error and the FAB of each prompt under each allocation: the raw results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in run.facts["allocations"] if name != FULL]
    found = {name: run.of(name) for name in names}
    with path.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(
            ["prompt", "concept", *(f"{name} {kind}" for name in names for kind in ("error", "fab"))]
        )
        for row, prompt in enumerate(run.prompts):
            values = [
                value
                for name in names
                for value in (
                    f"{float(found[name][PRIMARY][row].mean()):.6f}",
                    f"{float(found[name]['fab'][row]):.4f}",
                )
            ]
            writer.writerow([prompt, run.facts["clusters"][row], *values])


def _as_markdown(tables: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, table in tables.items():
        ours = [mine for mine in ("recipe", "errors") if mine in table["rows"]]
        lines += [
            f"**{name}**: {table['prompts']} prompts of {table['clusters']} concepts, {table['noises']} "
            f"noise(s) each, on {table['device']}; protocol `{table['fingerprint']}`",
            "",
            f"| allocation | BitOPs (T) | FAB | error, led |{''.join(f' `{mine}` is lower by |' for mine in ours)}",
            "|---|---|---|---|" + "---|" * len(ours),
        ]
        for allocation, row in sorted(table["rows"].items(), key=lambda item: item[1]["error"]["mean"]):
            if allocation != FULL:
                lines.append(
                    f"| {allocation} | {row['bitops']:.6f} | {row['fab']:.2f} | {row['error']['mean']:.5f} | "
                    + " | ".join(_gain(row.get(f"{mine} minus this, of this")) for mine in ours)
                    + " |"
                )
        lines.append("")
    return lines


def _gain(found: dict[str, float] | None) -> str:
    if found is None or found["low"] is None:
        return "-"
    mean, low, high = (-100 * found[part] for part in ("mean", "high", "low"))
    return f"{mean:.2f} % [{low:.2f}, {high:.2f}]"


def _draw_fair(tables: dict[str, Any], path: Path) -> None:
    names = dict.fromkeys(name for table in tables.values() for name in table["rows"] if name != FULL)
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for number, name in enumerate(names):
        points = sorted(
            (table["rows"][name]["bitops"], table["rows"][name]["error"]["mean"])
            for table in tables.values()
            if name in table["rows"]
        )
        across = [cost for cost, _ in points]
        ours = name == "recipe"
        axes.plot(
            across,
            [error for _, error in points],
            label=name,
            color="red" if ours else colours(number % 20),
            linewidth=1,
            marker="*" if ours else "o",
            markersize=11 if ours else 5,
        )
    axes.set_yscale("log")
    axes.set_xlabel("BitOPs (T, profile paper, simulated)")
    axes.set_ylabel("MSE of the noise prediction, led along full precision")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left", frameon=False)
    figure.savefig(path, dpi=110)


def premise(options: argparse.Namespace) -> None:
    """Errors at static widths, by the quality of full-precision pictures of another noise."""
    run, labels = Run.load(options.run), Labels.load(options.labels)
    place = {prompt: row for row, prompt in enumerate(labels.prompts)}
    rows = [place[prompt] for prompt in run.prompts]
    quality = rank_normalise(labels.scores[rows, 0])
    clusters = run.facts["clusters"]
    widths = _widths(run)
    bins = (quality * BINS).long().clamp(max=BINS - 1)
    found: dict[str, Any] = {"prompts": len(rows), "fingerprint": run.fingerprint, "widths": {}}
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name in widths:
        error = run.of(name)[PRIMARY].double().mean(1)
        ratio = error / error.mean()
        by_bin = []
        for number in range(BINS):
            chosen = (bins == number).nonzero().flatten().tolist()
            by_bin.append(mean_interval(ratio[chosen], [clusters[row] for row in chosen]).to_dict())
        found["widths"][name] = {
            "mean_error": float(error.mean()),
            "srocc_with_quality": spearman(quality, error),
            "deviation_of_ln_error": float(error.log().std()),
            "relative_error_by_quality_bin": by_bin,
        }
        _errorbar(axes, by_bin, name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("fifth of the prompts by quality in full precision (5: best), one noise")
    axes.set_ylabel("error over its mean, another noise")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(OUT / "premise.png", dpi=110)
    write_json(OUT / "premise.json", found)
    for name, entry in found["widths"].items():
        shown = ", ".join(f"{one['mean']:.3f}" for one in entry["relative_error_by_quality_bin"])
        print(
            f"{name}: SROCC {entry['srocc_with_quality']:.3f}, deviation of ln error "
            f"{entry['deviation_of_ln_error']:.3f}; by fifth of quality {shown}"
        )


def drop(options: argparse.Namespace) -> None:
    """How much quality the pictures themselves lose at static widths, by quality in full precision.

    Bins come from the first noise, drops from the others: else chance alone would make the best lose most.
    """
    run = Run.load(options.run)
    clusters = run.facts["clusters"]
    found: dict[str, Any] = {
        "prompts": len(run.prompts),
        "noises": run.facts["protocol"]["noises"]["per_prompt"],
        "fingerprint": run.fingerprint,
        "metrics": {},
    }
    names = [name for name in ("base", "recipe") if name in run.facts["allocations"]] + _widths(run)
    metrics = sorted(name for name in run.of(FULL) if name.startswith("score."))
    if not metrics or found["noises"] < 2:
        raise SystemExit(f"{options.run}: needs a run with --metric and at least two noises a prompt")
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(6.5 * len(metrics), 4), layout="constrained", squeeze=False
    )
    for metric, one in zip(metrics, axes[0], strict=True):
        scores = {name: run.of(name)[metric].double() for name in (FULL, *names)}
        bins = (rank_normalise(scores[FULL][:, 0]) * BINS).long().clamp(max=BINS - 1)
        deviation = float(scores[FULL][:, 0].std())
        rows = {}
        for name in names:
            lost = (scores[FULL] - scores[name])[:, 1:].mean(1) / deviation
            by_bin = []
            for number in range(BINS):
                chosen = (bins == number).nonzero().flatten().tolist()
                by_bin.append(mean_interval(lost[chosen], [clusters[row] for row in chosen]).to_dict())
            rows[name] = {
                "mean": mean_interval(lost, clusters).to_dict(),
                "srocc_with_quality": spearman(scores[FULL][:, 0], lost),
                "by_quality_bin": by_bin,
            }
            _errorbar(one, by_bin, name)
            shown = ", ".join(f"{entry['mean']:+.3f}" for entry in by_bin)
            print(
                f"{metric} {name}: SROCC {rows[name]['srocc_with_quality']:.3f}; by fifth of quality {shown}"
            )
        found["metrics"][metric] = rows
        one.axhline(0, color="grey", linewidth=0.8)
        one.set_title(metric)
        one.set_xlabel("fifth of the prompts by quality in full precision (5: best), one noise")
        one.set_ylabel("quality lost (1: a deviation between prompts)")
        one.legend(frameon=False)
        one.grid(alpha=0.3)
    figure.savefig(OUT / "drop.png", dpi=110)
    write_json(OUT / "drop.json", found)


def _errorbar(axes: Any, by_bin: Sequence[dict[str, Any]], name: str) -> None:
    middles = [entry["mean"] for entry in by_bin]
    ends = [
        [entry["mean"] - entry["low"] for entry in by_bin],
        [entry["high"] - entry["mean"] for entry in by_bin],
    ]
    axes.errorbar(
        [f"{number + 1}" for number in range(BINS)], middles, ends, label=name, capsize=3, marker="o"
    )


def paired(options: argparse.Namespace) -> None:
    """The recipe's mean of each figure, and what it lies above each other allocation, prompt by prompt."""
    run = Run.load(options.run)
    clusters, name = run.facts["clusters"], options.run.name
    ours = run.of("recipe")
    figures = [key for key in in_order(ours) if key not in COSTS]
    found: dict[str, Any] = {
        "fingerprint": run.fingerprint,
        "prompts": len(run.prompts),
        "noises": run.facts["protocol"]["noises"]["per_prompt"],
        "device": run.facts["protocol"]["device"],
        "recipe minus": {},
    }
    lines = [f"| recipe minus | BitOPs (T) | {' | '.join(figures)} |", "|---" * (len(figures) + 2) + "|"]
    for other in run.facts["allocations"]:
        if other in (FULL, "recipe"):
            continue
        theirs = run.of(other)
        rows = {
            key: mean_interval((ours[key] - theirs[key]).double().mean(1), clusters).to_dict()
            for key in figures
        }
        found["recipe minus"][other] = rows
        shown = (f"{row['mean']:.4g} [{row['low']:.3g}, {row['high']:.3g}]" for row in rows.values())
        lines.append(f"| {other} | {float(theirs[COST].mean()):.6f} | {' | '.join(shown)} |")
    means = (f"{float(ours[key].double().mean()):.4g}" for key in figures)
    lines.append(f"| (the recipe itself) | {float(ours[COST].mean()):.6f} | {' | '.join(means)} |")
    write_json(OUT / f"{name}-paired.json", found)
    print("\n".join(lines))


def _widths(run: Run) -> list[str]:
    """The static widths among a run's allocations."""
    return [name for name in run.facts["allocations"] if static_width(name) is not None]


def ladder(options: argparse.Namespace) -> None:
    """FAB by caption level: over all held-out prompts, within one style, and of long captions that say little."""
    labels = Labels.load(options.labels)
    held = [row for row, split in enumerate(labels.tags["split"]) if split == "held"]
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    short = [row for row in held if labels.tags["level"][row] == "1"]
    short = random.Random(0).sample(short, min(UNINFORMED, len(short)))
    padded = [f"{FILLER[number % len(FILLER)]} {labels.prompts[row]}" for number, row in enumerate(short)]
    empty_talk = EncodedPrompts.from_pipeline(pipe, padded, "eos").embeddings
    found: dict[str, Any] = {}
    figure, all_axes = plt.subplots(
        1,
        len(options.controllers),
        figsize=(4.6 * len(options.controllers), 4),
        layout="constrained",
        squeeze=False,
    )
    for axes, text in zip(all_axes[0], options.controllers, strict=True):
        name, _, folder = text.partition("=")
        controller = TextToBits.from_pretrained(folder)
        values = _fab(controller, labels.embeddings[held])
        found[name] = _ladder(labels, held, values)
        found[name]["long captions that say little"] = _spread(
            _fab(controller, empty_talk), [labels.tags["concept"][row] for row in short]
        )
        found[name]["the same prompts, short"] = _spread(
            _fab(controller, labels.embeddings[short]), [labels.tags["concept"][row] for row in short]
        )
        _draw_ladder(axes, name, labels, held, values, found[name])
    figure.savefig(OUT / "ladder.png", dpi=110)
    write_json(OUT / "ladder.json", found)
    for name, entry in found.items():
        print(name)
        for key, value in entry.items():
            print(f"  {key}: {value}")


def _fab(controller: TextToBits, embeddings: Tensor) -> Tensor:
    return torch.tensor(controller.plan(embeddings, controller.config.timesteps).fab(), dtype=torch.float64)


def _spread(values: Tensor, concepts: Sequence[str]) -> dict[str, float | None]:
    found = mean_interval(values, concepts)
    return {
        "fab": round(found.mean, 3),
        "low": None if found.low is None else round(found.low, 3),
        "high": None if found.high is None else round(found.high, 3),
        "deviation": round(float(values.std()), 3),
        "prompts": found.n,
    }


def _ladder(labels: Labels, held: Sequence[int], values: Tensor) -> dict[str, Any]:
    concepts = [labels.tags["concept"][row] for row in held]
    found: dict[str, Any] = {}
    styles = sorted(set(labels.tags["style"]))
    for style in ("all styles", *styles):
        for level in LEVELS:
            chosen = [
                number
                for number, row in enumerate(held)
                if labels.tags["level"][row] == level and style in ("all styles", labels.tags["style"][row])
            ]
            if len(chosen) > 1:
                found[f"{style}, level {level}"] = _spread(
                    values[chosen], [concepts[number] for number in chosen]
                )
    return found


def _draw_ladder(
    axes: Any, name: str, labels: Labels, held: Sequence[int], values: Tensor, found: dict[str, Any]
) -> None:
    by_level = [
        [float(values[number]) for number, row in enumerate(held) if labels.tags["level"][row] == level]
        for level in LEVELS
    ]
    axes.boxplot(by_level, tick_labels=list(LEVELS), showfliers=False)
    for style in sorted(set(labels.tags["style"])):
        entries = [found.get(f"{style}, level {level}") for level in LEVELS]
        axes.plot(
            range(1, len(LEVELS) + 1),
            [float("nan") if entry is None else entry["fab"] for entry in entries],
            marker="o",
            markersize=3,
            linewidth=0.9,
            label=style,
        )
    axes.axhline(
        found["long captions that say little"]["fab"], color="grey", linestyle=":", label="long, says little"
    )
    axes.set_title(name)
    axes.set_xlabel("caption level (5: richest)")
    axes.set_ylabel("FAB")
    axes.legend(fontsize=7, frameon=False)


def predicted(options: argparse.Namespace) -> None:
    """Quality against predicted quality, on the prompts that T2Q did not see."""
    labels, trained = Labels.load(options.labels), TrainedT2Q.from_pretrained(options.t2q)
    _, held = rows_of(trained.config.split, labels)
    with torch.no_grad():
        guess = trained.t2q(labels.embeddings[held])
    truth = labels.targets[held]
    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.scatter(guess, truth, s=3, alpha=0.4)
    axes.set_xlabel("predicted quality")
    axes.set_ylabel("quality (rank of KNN-GIQA, mean of the noises)")
    axes.set_title(f"{len(held)} unseen prompts, SROCC {spearman(guess, truth):.3f}")
    figure.savefig(OUT / f"{options.name}.png", dpi=110)


def maps(options: argparse.Namespace) -> None:
    """The bit maps of the prompts with the least and the greatest FAB of a run."""
    plan = BitPlan.load(options.run / "plans" / "recipe.safetensors")
    prompts, fab = Run.load(options.run).prompts, plan.fab()
    order = sorted(range(len(fab)), key=lambda row: fab[row])
    for name, row in (("least", order[0]), ("most", order[-1])):
        plan.draw(row, f"{prompts[row]}  (FAB {fab[row]:.2f})").save(OUT / f"map-{name}.png", optimize=True)
        print(name, prompts[row], fab[row])


def spread(options: argparse.Namespace) -> None:
    """How far sensitivities differ, what each controller's prediction says of errors, and its mean slope."""
    run, errors = Run.load(options.run), Sensitivity.load(options.sensitivity).errors.double().mean(0)
    least, most = (float(errors[..., 0].quantile(share)) for share in (0.05, 0.95))
    found: dict[str, Any] = {
        "sensitivity_at_lowest_width": {"percentile_5": least, "percentile_95": most, "ratio": most / least},
        "controllers": {},
    }
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    embeddings = EncodedPrompts.from_pipeline(pipe, run.prompts, "eos").embeddings
    for text in options.controllers:
        name, _, folder = text.partition("=")
        controller = TextToBits.from_pretrained(folder)
        quality = controller.quality(embeddings)
        found["controllers"][name] = {
            "mean_slope": float(controller.q2b.slope.mean()),
            "srocc_with_error": {
                width: spearman(quality, run.of(width)[PRIMARY].double().mean(1)) for width in _widths(run)
            },
        }
    own, given = (run.of(name)["fab"].double() for name in ("recipe", "shuffled"))
    found["correlation_of_fab_with_that_of_shuffled"] = pearson(own, given)
    write_json(OUT / "spread.json", found)
    print(json.dumps(found, indent=1))


def sums(options: argparse.Namespace) -> None:
    """What each width would add to the error if all quantizers had it and errors added up, mean over calls."""
    table = Sensitivity.load(options.sensitivity)
    summed = table.errors.double().mean(0).sum(1).mean(0)
    found = {f"A{width}": float(value) for width, value in zip(table.widths, summed, strict=True)}
    write_json(
        OUT / "sums.json", {"prompts": len(table.prompts), "quantizers": len(table.layers), "errors": found}
    )
    print(found)


def pictures(options: argparse.Namespace) -> None:
    """Costs, errors, distances and scores of a run, without the paths of the machine that made it."""
    facts = Run.load(options.run).facts
    kept = {key: facts[key] for key in ("fingerprint", "protocol", "settings", "notes", "allocations")}
    write_json(OUT / f"{options.run.name}.json", kept)
    shown = {name: {**found["figures"], **found["sets"]} for name, found in facts["allocations"].items()}
    columns = list(dict.fromkeys(key for found in shown.values() for key in found))
    lines = [f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    lines += [
        f"| {key} | {' | '.join(_with_interval(found.get(key)) for found in shown.values())} |"
        for key in columns
    ]
    (OUT / f"{options.run.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _with_interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    middle, low, high = found.get("mean", found.get("value")), found["low"], found["high"]
    return f"{middle:.4g}" if low is None or low == high else f"{middle:.4g} [{low:.4g}, {high:.4g}]"


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(required=True)
    for step in (fair, premise, drop, paired, ladder, predicted, maps, spread, sums, pictures):
        one = steps.add_parser(step.__name__)
        one.set_defaults(run_step=step)
        if step is fair:
            one.add_argument("runs", type=Path, nargs="+")
            one.add_argument("--name", default="fair")
            one.add_argument("--to", type=Path, default=OUT)
        if step in (premise, drop, paired, maps, spread, pictures):
            one.add_argument("run", type=Path)
        if step in (premise, ladder, predicted):
            one.add_argument("labels", type=Path)
        if step in (spread, sums):
            one.add_argument("sensitivity", type=Path)
        if step in (ladder, spread):
            one.add_argument("controllers", nargs="+", metavar="NAME=FOLDER")
        if step is predicted:
            one.add_argument("t2q", type=Path)
            one.add_argument("--name", default="predicted")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    options.run_step(options)


if __name__ == "__main__":
    main()
