"""The pictures of a run: cost against error, and a grid of what was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..plotting import new_figure
from .run import FULL, PRIMARY, file_name, picture_name

_COSTS = {"bitops_paper": "BitOPs (T, profile paper, simulated)", "fab": "FAB (bits)"}
_TILE = 128
_GAP = 8
_MARGIN = 16
_CAPTION = 220
_HEADER = 34
_MOST_ROWS = 8


def draw_pareto(facts: Mapping[str, Any], path: Path) -> None:
    """Draw every quantized allocation by cost and error; nothing with fewer than two of them.

    Args:
        facts: of a run.
        path: PNG file to write.

    Raises:
        HostError: matplotlib is not installed.
    """
    points = {name: found["figures"] for name, found in facts["allocations"].items() if name != FULL}
    if len(points) < 2:
        return
    figure = new_figure("pareto.png", 13, max(4.8, 2.2 + 0.26 * len(points)))
    for axes, (cost, label) in zip(figure.subplots(1, len(_COSTS)), _COSTS.items(), strict=True):
        _draw_costs(axes, {name: found for name, found in points.items() if cost in found}, cost)
        axes.set_xlabel(label)
        axes.set_ylabel("MSE of the noise prediction, led along full precision")
    n, seeds = len(facts["prompts"]), facts["protocol"]["noises"]["per_prompt"]
    figure.suptitle(
        f"Cost against error: {n} prompts, {seeds} noises each, 95% intervals by cluster; "
        f"protocol {facts['fingerprint']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _draw_costs(axes: Any, points: Mapping[str, Any], cost: str) -> None:
    """Numbered points, and the names in a list beside them: names on the points would overlap."""
    order = sorted(points, key=lambda name: points[name][cost]["mean"])
    for number, name in enumerate(order, 1):
        across, error = points[name][cost]["mean"], points[name][PRIMARY]
        low, high = (error["mean"] if error[end] is None else error[end] for end in ("low", "high"))
        colour = "tab:red" if name.partition("@")[0] == "recipe" else "tab:blue"
        axes.plot([across, across], [low, high], color=colour, alpha=0.45, linewidth=1.6)
        axes.plot([across], [error["mean"]], "o", color=colour, markersize=5, label=f"{number}  {name}")
        # To both sides in turn: neighbours by cost often have nearly the same error.
        offset = (6, 3) if number % 2 else (-6, 3)
        axes.annotate(
            str(number),
            (across, error["mean"]),
            xytext=offset,
            textcoords="offset points",
            ha="left" if number % 2 else "right",
            fontsize=8,
        )
    if order and min(points[name][PRIMARY]["mean"] for name in order) > 0:
        axes.set_yscale("log")
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.25, which="both")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, handletextpad=0.3)


def draw_grid(facts: Mapping[str, Any], folder: Path) -> None:
    """Draw what full precision, base and recipe made of the first prompts; nothing without kept pictures.

    Args:
        facts: of a run.
        folder: of the run, with its pictures; `grid.png` is written there.
    """
    names = [name for name in (FULL, "base", "recipe") if name in facts["allocations"]]
    rows = [
        row
        for row in range(min(len(facts["prompts"]), _MOST_ROWS))
        if all(_picture(folder, name, row).is_file() for name in names)
    ]
    if not rows:
        return
    width = _MARGIN * 2 + _CAPTION + len(names) * (_TILE + _GAP)
    height = _MARGIN * 2 + _HEADER + len(rows) * (_TILE + _GAP)
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    small, plain = (ImageFont.load_default(size) for size in (12, 14))
    for column, name in enumerate(names):
        left = _MARGIN + _CAPTION + column * (_TILE + _GAP)
        draw.text((left, _MARGIN), name, "black", plain)
        fab = facts["allocations"][name]["figures"].get("fab")
        if fab is not None:
            draw.text((left, _MARGIN + 17), f"FAB {fab['mean']:.2f}", "dimgrey", small)
        for place, row in enumerate(rows):
            with Image.open(_picture(folder, name, row)) as picture:
                tile = picture.convert("RGB").resize((_TILE, _TILE), Image.Resampling.NEAREST)
            grid.paste(tile, (left, _MARGIN + _HEADER + place * (_TILE + _GAP)))
    for place, row in enumerate(rows):
        top = _MARGIN + _HEADER + place * (_TILE + _GAP)
        for line in _wrapped(facts["prompts"][row], draw, small)[:8]:
            draw.text((_MARGIN, top), line, "black", small)
            top += 15
    draw.text(
        (_MARGIN, height - _MARGIN), f"one noise a row; protocol {facts['fingerprint']}", "dimgrey", small
    )
    grid.save(folder / "grid.png", optimize=True)


def _picture(folder: Path, name: str, row: int) -> Path:
    return folder / "pictures" / file_name(name) / picture_name(row, 0)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: Any) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font) <= _CAPTION - _GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
