"""What `qlip-plugins demo` does: one set of prompts in full precision, at the base's widths, and under QLIP."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from .artefacts import versions
from .controller import Report, apply
from .demo_drawing import BitMaps, Caption, PictureGrid, Tile
from .families import denoiser_of
from .files import folder_written_whole
from .generation import Settings, load_pipeline, noise_seeds, placed, sample_model
from .metrics import Cost
from .plan import BitPlan
from .progress import counted
from .recipe import FULL_PRECISION, Recipe

REPORT_NAME = "report.json"
REPORT_FORMAT = "qlip-plugins demo"
_OWNED = ("grid.png", "bits.png", "index.html", "plan.safetensors")

KNOWN_PROMPTS = {
    "rocket": "trained concept, by its name",
    "hamburger": "trained concept, by its name",
    "a glossy 3D render of octopus, sea animal, with soft shading, smooth plastic surface and rounded volume, "
    "mostly pink with peach and magenta": "trained concept, rich caption",
    "castle": "not trained on (but “Japanese castle” was)",
}
"""The prompts shown where none is given, and what is known of each."""


@dataclass(frozen=True)
class Column:
    """One way to run the model.

    Args:
        name: as tables and reports call it.
        detail: widths of weights and activations, in words.
        recipe: a shipped recipe; None runs the pipeline as it is.
    """

    name: str
    detail: str
    recipe: str | None


FULL = Column("full precision", "no quantizer, 32 bits", None)
BASE = Column("W4A8 base", "8 bits for every prompt", "demo-w4a8")
QLIP = Column("QLIP {4,6,8}", "on W4A8, by the prompt", "demo-qlip-468-solved")
QLIP_PAPER = Column("QLIP {8,16,32}", "on W4A16, by the prompt", "demo-qlip-81632")
COLUMNS = (FULL, BASE, QLIP, QLIP_PAPER)


@dataclass(frozen=True)
class Run:
    """What one column gave.

    Args:
        pictures: P of them, 64 x 64.
        report: the cost; None in full precision, as all that follows.
        plan: P prompts.
        fingerprint: of the base.
        description: the recipe's own.
    """

    pictures: list[Image.Image]
    report: Report | None = None
    plan: BitPlan | None = None
    fingerprint: str | None = None
    description: str | None = None

    def shares(self, prompt: int) -> dict[int, float]:
        """Width -> share of the controlled layers and steps of one prompt."""
        if self.plan is None:
            return {FULL_PRECISION: 1.0}
        widths, counts = self.plan.bits[prompt].unique(return_counts=True)
        total = int(counts.sum())
        return {int(width): int(count) / total for width, count in zip(widths, counts, strict=True)}


Runs = dict[Column, Run]


def make_demo(
    prompts: Sequence[str], settings: Settings, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the demo's folder, all or nothing.

    Args:
        prompts: P texts.
        settings: how to sample, in every column.
        out: the folder; an earlier demo there is replaced.
        say: called with remarks.

    Returns:
        The report as it stands in `report.json`.

    Raises:
        ArtefactError: `out` holds something else, or a file of the demo model is damaged.
        HostError: the device cannot be used.
    """
    with folder_written_whole(out, REPORT_FORMAT, REPORT_NAME, *_OWNED) as folder:
        runs, ignored = run_columns(prompts, settings)
        for prompt, rest in ignored.items():
            say(f"note: {_short(prompt)!r} is longer than the text encoder reads; ignored: {rest!r}")
        report = _report(prompts, settings, runs, ignored)
        _grid(prompts, runs).image().save(folder / "grid.png", optimize=True)
        plan = runs[QLIP].plan
        assert plan is not None  # its column has a recipe
        _bit_maps(prompts, plan, report).image().save(folder / "bits.png", optimize=True)
        plan.save(folder / "plan.safetensors")
        (folder / "index.html").write_text(_page(report), encoding="utf-8")
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def run_columns(prompts: Sequence[str], settings: Settings) -> tuple[Runs, dict[str, str]]:
    """Generate every prompt in every column, from the same noise.

    Returns:
        The runs, and for each prompt that the text encoder does not read to its end, what it ignores.
    """
    recipes = {column: Recipe.load(column.recipe) for column in COLUMNS if column.recipe is not None}
    with _quiet_hosts():
        pipe = placed(load_pipeline(recipes[BASE]), settings)
        pipe.set_progress_bar_config(disable=True)
        with _counted_calls(denoiser_of(pipe), len(COLUMNS) * settings.steps):
            runs = {
                column: _run(pipe, recipes.get(column), recipes[BASE], prompts, settings)
                for column in COLUMNS
            }
    return runs, _ignored(pipe.tokenizer, prompts)


def _run(pipe: Any, recipe: Recipe | None, base: Recipe, prompts: Sequence[str], settings: Settings) -> Run:
    if recipe is None:
        return Run(sample_model(pipe, base.model, prompts, settings, "pil"))
    with apply(pipe, recipe) as controller:
        pictures = sample_model(pipe, recipe.model, prompts, settings, "pil")
        return Run(
            pictures, controller.report(), controller.plan, controller.state.fingerprint, recipe.description
        )


@contextmanager
def _counted_calls(denoiser: Any, total: int) -> Iterator[None]:
    """One progress bar over all calls of the denoiser."""
    with counted(total, "denoiser calls") as done:
        handle = denoiser.register_forward_hook(lambda *_: done(""))
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _quiet_hosts() -> Iterator[None]:
    """Without the hosts' bars, and without their warning of a cut prompt, which would come in every run."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = diffusers_logging.get_verbosity()
    drawing = [host for host in (diffusers_logging, transformers_logging) if host.is_progress_bar_enabled()]
    diffusers_logging.set_verbosity_error()
    for host in drawing:
        host.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for host in drawing:
            host.enable_progress_bar()


def _ignored(tokenizer: Any, prompts: Sequence[str]) -> dict[str, str]:
    """Prompt -> the part of it beyond the tokenizer's last token, where there is one."""
    kept = tokenizer.model_max_length - 1  # the end-of-text token takes the last place
    tokens = {prompt: tokenizer(prompt).input_ids[:-1] for prompt in prompts}
    return {
        prompt: tokenizer.decode(found[kept:]).strip()
        for prompt, found in tokens.items()
        if len(found) > kept
    }


def pixel_error(picture: Image.Image, reference: Image.Image) -> float:
    """Mean squared difference of two RGB pictures of one size, channels in 0..1."""
    one, other = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (picture, reference))
    return float(((one - other) ** 2).mean())


def _report(
    prompts: Sequence[str], settings: Settings, runs: Runs, ignored: dict[str, str]
) -> dict[str, Any]:
    seeds = noise_seeds(prompts, settings.seed)
    return {
        "format": REPORT_FORMAT,
        "bitops_are": "simulated: counted from the plan, not measured",
        "pixel_error_is": "mean squared difference to full precision on this run's 8-bit RGB picture, 0..1",
        "versions": versions(),
        "settings": asdict(settings),
        "columns": {column.name: _column_facts(column, run) for column, run in runs.items()},
        "prompts": [
            {
                "prompt": prompt,
                "known": KNOWN_PROMPTS.get(prompt),
                "ignored": ignored.get(prompt),
                "noise_seed": seeds[index],
                "columns": _prompt_facts(runs, index),
            }
            for index, prompt in enumerate(prompts)
        ],
        "mean": _mean_facts(runs),
    }


def _column_facts(column: Column, run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = {"recipe": column.recipe, "detail": column.detail}
    if run.report is not None:
        facts |= {
            "description": run.description,
            "base_fingerprint": run.fingerprint,
            "controlled": run.report.controlled,
            "steps": run.report.steps,
            "calls": run.report.calls,
            "plan_digest": run.report.plan_digest,
        }
    return facts


def _prompt_facts(runs: Runs, index: int) -> dict[str, Any]:
    reference = runs[FULL].pictures[index]
    return {
        column.name: {
            **asdict(run.report.prompts[index]),
            "pixel_error": pixel_error(run.pictures[index], reference),
            "bit_shares": run.shares(index),
        }
        for column, run in runs.items()
        if run.report is not None
    }


def _mean_facts(runs: Runs) -> dict[str, Any]:
    references = runs[FULL].pictures
    facts = {}
    for column, run in runs.items():
        if run.report is not None:
            errors = [pixel_error(*pair) for pair in zip(run.pictures, references, strict=True)]
            facts[column.name] = {**asdict(run.report.mean), "pixel_error": sum(errors) / len(errors)}
    return facts


def _grid(prompts: Sequence[str], runs: Runs) -> PictureGrid:
    """The picture grid of the runs, not yet drawn."""
    return PictureGrid(
        headers=[(column.name, column.detail) for column in runs],
        captions=[_caption(prompt, runs[QLIP], index) for index, prompt in enumerate(prompts)],
        tiles=[[_tile(run, index) for run in runs.values()] for index in range(len(prompts))],
    )


def _tile(run: Run, index: int) -> Tile:
    cost: Cost | None = None if run.report is None else run.report.prompts[index]
    label = "32 bits" if cost is None else f"FAB {cost.fab:.2f}"
    return Tile(run.pictures[index], label, run.shares(index))


def _caption(prompt: str, run: Run, index: int) -> Caption:
    known = (KNOWN_PROMPTS[prompt],) if prompt in KNOWN_PROMPTS else ()
    assert run.report is not None  # its column has a recipe
    return Caption(_shown(prompt), (f"predicted quality {run.report.prompts[index].quality:.2f}", *known))


def _bit_maps(prompts: Sequence[str], plan: BitPlan, report: dict[str, Any]) -> BitMaps:
    rows = [entry["columns"][QLIP.name] for entry in report["prompts"]]
    notes = [f"predicted quality {row['quality']:.3f}, FAB {row['fab']:.2f}" for row in rows]
    return BitMaps(
        plan, [Caption(_shown(prompt), (note,)) for prompt, note in zip(prompts, notes, strict=True)]
    )


def _shown(prompt: str) -> str:
    return " ".join(prompt.split()) or "(empty prompt)"


def _short(prompt: str) -> str:
    shown = _shown(prompt)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


_HEADINGS = ("", "quality", "FAB", "FAB by MACs", "BitOPs (G)", "pixel error")


_REMARKS = (
    "quality is predicted from the text; bits and BitOPs (profile `paper`) are simulated and counted, not measured;",
    "pixel error is the mean squared difference to full precision, of one picture each: it illustrates, it proves "
    "nothing",
)


def _groups(report: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """The table: for each prompt, then for their mean, a row of cells a column of the grid."""
    entries = [(_shown(entry["prompt"]), entry["columns"]) for entry in report["prompts"]]
    if len(entries) > 1:
        entries.append(("mean of the prompts", report["mean"]))
    for title, columns in entries:
        yield title, [(name, *_cells(row)) for name, row in columns.items()]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        "-" if row["quality"] is None else f"{row['quality']:.3f}",
        f"{row['fab']:.2f}",
        f"{row['fab_mac_weighted']:.2f}",
        f"{1000 * row['bitops_paper']:.2f}",
        f"{row['pixel_error']:.5f}",
    )


def as_text(report: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = ["{:16}{:>9}{:>7}{:>13}{:>12}{:>13}".format(*_HEADINGS)]
    for title, rows in _groups(report):
        lines.append(_short(title))
        lines += ["  {:14}{:>9}{:>7}{:>13}{:>12}{:>13}".format(*cells) for cells in rows]
    return "\n".join([*lines, *_REMARKS])


def _page(report: dict[str, Any]) -> str:
    """The page that ties the folder together, as HTML without outside resources."""
    settings = report["settings"]
    template = Template(files(__package__).joinpath("demo_page.html").read_text(encoding="utf-8"))
    return template.substitute(
        headings="".join(f"<th>{html.escape(heading)}</th>" for heading in _HEADINGS),
        rows="\n".join(_html_rows(report)),
        steps=settings["steps"],
        guidance=f"{settings['guidance_scale']:g}",
        seed=settings["seed"],
        recipes="\n".join(_html_recipes(report)),
        versions=html.escape(", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    )


def _html_rows(report: dict[str, Any]) -> Iterator[str]:
    notes = [_html_note(entry) for entry in report["prompts"]]
    for index, (title, rows) in enumerate(_groups(report)):
        note = notes[index] if index < len(notes) else ""
        yield f'<tr class="prompt"><th colspan="{len(_HEADINGS)}">{html.escape(title)}{note}</th></tr>'
        for name, *cells in rows:
            yield f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _html_note(entry: dict[str, Any]) -> str:
    notes = [entry["known"]] if entry["known"] else []
    if entry["ignored"]:
        notes.append(f"too long for the text encoder, ignored: {entry['ignored']}")
    return "".join(f" <small>{html.escape(note)}</small>" for note in notes)


def _html_recipes(report: dict[str, Any]) -> Iterator[str]:
    for name, facts in report["columns"].items():
        if facts["recipe"] is not None:
            yield (
                f"<li><b>{html.escape(name)}</b>: <code>{html.escape(facts['recipe'])}</code>, "
                f"{html.escape(facts['description'])}</li>"
            )
