"""What `qlip-plugins compare` does: two allocations, of one run or of two, picture by picture."""

from __future__ import annotations

import base64
import html
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ..errors import GateFailedError, IncompatibleModelError, RecipeError
from ..files import check_replaceable, folder_written_whole
from ..schema import nearest
from .bootstrap import mean_interval
from .protocol import differences
from .run import PRIMARY, Run, in_order

COMPARISON_FORMAT = "qlip-plugins comparison"
COMPARISON_VERSION = 1
COMPARISON_NAME = "comparison.json"
PAGE_NAME = "index.html"
DEFAULT_ALLOCATION = "recipe"
WORST = 10

_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_GATE = re.compile(r"\s*(?P<figure>.+?)\s*(?P<operator><=|>=|<|>)\s*(?P<bound>\S+)\s*")
_MOST_FIELDS = 8


@dataclass(frozen=True)
class Gate:
    """A bound on a figure of a comparison.

    Args:
        text: as it was given.
        figure: its name.
        operator: `<=`, `>=`, `<` or `>`.
        bound: what the figure is held against.
    """

    text: str
    figure: str
    operator: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether a value lies on the right side; NaN lies on neither."""
        return bool(_OPERATORS[self.operator](value, self.bound))


def parse_gate(text: str) -> Gate:
    """A gate as the command line has it, `FIGURE<=NUMBER`.

    Raises:
        RecipeError: it is not of that form.
    """
    found = _GATE.fullmatch(text)
    try:
        bound = float(found["bound"]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise RecipeError(
            f"--gate {text!r}: expected FIGURE<=NUMBER (or >=, <, >), such as error_led.difference<=0"
        )
    return Gate(text, found["figure"], found["operator"], bound)


@dataclass(frozen=True)
class Case:
    """One picture of one prompt under both allocations.

    Args:
        prompt: the text.
        noise: its seed.
        first: metric -> value.
        second: likewise.
        pictures: the two files, None where a run did not keep it.
    """

    prompt: str
    noise: int
    first: Mapping[str, float]
    second: Mapping[str, float]
    pictures: tuple[Path | None, Path | None]


@dataclass(frozen=True)
class Comparison:
    """Two allocations side by side.

    Args:
        names: of the two, `RUN:ALLOCATION`.
        fingerprints: of their protocols.
        differing: the fields in which the protocols differ.
        pairs: pictures with the same prompt and noise.
        figures: metric -> `a`, `b` (means), `difference` (interval of b - a) and `ratio` (b / a).
        sets: distance -> `label`, `a`, `b` (with intervals) and `difference`.
        gates: with the value of the figure and whether it is met.
        worst: the cases whose primary error rises most.
    """

    names: tuple[str, str]
    fingerprints: tuple[str, str]
    differing: Sequence[str]
    pairs: int
    figures: Mapping[str, Any]
    sets: Mapping[str, Any]
    gates: Sequence[tuple[Gate, float, bool]]
    worst: Sequence[Case]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "format": COMPARISON_FORMAT,
            "version": COMPARISON_VERSION,
            "a": {"name": self.names[0], "fingerprint": self.fingerprints[0]},
            "b": {"name": self.names[1], "fingerprint": self.fingerprints[1]},
            "differing": list(self.differing),
            "pairs": self.pairs,
            "figures": dict(self.figures),
            "sets": dict(self.sets),
            "gates": [{"gate": gate.text, "value": value, "met": met} for gate, value, met in self.gates],
            "worst": [
                {
                    "prompt": case.prompt,
                    "noise_seed": case.noise,
                    "a": dict(case.first),
                    "b": dict(case.second),
                }
                for case in self.worst
            ],
        }


def compare(first: str, second: str, force: bool = False, gates: Sequence[Gate] = ()) -> Comparison:
    """Compare two allocations.

    Args:
        first: `RUN` or `RUN:ALLOCATION`.
        second: likewise; differences are second minus first.
        force: compare although the protocols differ.
        gates: to hold the figures against.

    Raises:
        ArtefactError: a run is missing or damaged.
        RecipeError: an allocation or a gate's figure is unknown.
        IncompatibleModelError: the protocols differ, or no picture has the same prompt and noise.
    """
    sides = [_Side.open(text) for text in (first, second)]
    a, b = sides
    differing = differences(a.run.facts["protocol"], b.run.facts["protocol"])
    if differing and not force:
        more = f"\n  and {len(differing) - _MOST_FIELDS} more" if len(differing) > _MOST_FIELDS else ""
        raise IncompatibleModelError(
            f"{a.name} and {b.name} were measured by different protocols ({a.run.fingerprint}, {b.run.fingerprint}), "
            "so their numbers are not comparable; --force compares them all the same. They differ in\n  "
            + "\n  ".join(differing[:_MOST_FIELDS])
            + more
        )
    pairing = _Pairing(a, b)
    figures, sets = pairing.figures(), _sets(a, b)
    flat = flat_figures(figures, sets)
    return Comparison(
        names=(a.name, b.name),
        fingerprints=(a.run.fingerprint, b.run.fingerprint),
        differing=differing,
        pairs=len(pairing.places),
        figures=figures,
        sets=sets,
        gates=[(gate, value := _looked_up(gate, flat), gate.met(value)) for gate in gates],
        worst=pairing.worst(),
    )


def check_gates(found: Comparison) -> None:
    """Check that every gate is met.

    Raises:
        GateFailedError: one is not; the message names all of them.
    """
    failed = [f"{gate.text}: found {value:.6g}" for gate, value, met in found.gates if not met]
    if failed:
        raise GateFailedError(f"{len(failed)} of {len(found.gates)} gates failed: " + "; ".join(failed))


def flat_figures(figures: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, float]:
    """Every number that a gate can name, such as `error_led.difference.high`; None counts as NaN."""
    flat: dict[str, float | None] = {}
    for name, found in figures.items():
        flat |= {f"{name}.{part}": found[part] for part in ("a", "b", "ratio")}
        flat[f"{name}.difference"] = found["difference"]["mean"]
        flat |= {f"{name}.difference.{end}": found["difference"][end] for end in ("low", "high")}
    for name, found in sets.items():
        flat |= {f"{name}.{part}": found[part]["value"] for part in ("a", "b")}
        flat[f"{name}.difference"] = found["difference"]
    return {name: math.nan if value is None else float(value) for name, value in flat.items()}


def _looked_up(gate: Gate, flat: Mapping[str, float]) -> float:
    if gate.figure not in flat:
        raise RecipeError(
            f"--gate {gate.text!r}: no figure {gate.figure!r}{nearest(gate.figure, flat)} (known: METRIC.difference, "
            f"METRIC.difference.low and .high, METRIC.ratio, METRIC.a and METRIC.b, of "
            f"{', '.join(sorted({name.rpartition('.')[0] for name in flat if name.endswith('.a')}))})"
        )
    return flat[gate.figure]


@dataclass(frozen=True)
class _Side:
    run: Run
    allocation: str

    @classmethod
    def open(cls, text: str) -> _Side:
        folder, colon, allocation = text.rpartition(":")
        if not colon or Path(text).is_dir():
            folder, allocation = text, DEFAULT_ALLOCATION
        run = Run.load(Path(folder))
        run.check_has(allocation)
        return cls(run, allocation)

    @property
    def name(self) -> str:
        return f"{self.run.folder.name}:{self.allocation}"

    def places(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Prompt and noise -> row and seed."""
        return {
            (prompt, noise): (row, seed)
            for row, (prompt, noises) in enumerate(
                zip(self.run.prompts, self.run.results["noises"].tolist(), strict=True)
            )
            for seed, noise in enumerate(noises)
        }


class _Pairing:
    """The pictures that two allocations have in common."""

    def __init__(self, first: _Side, second: _Side) -> None:
        self.sides = (first, second)
        ours, theirs = first.places(), second.places()
        self.places = [(key, ours[key], theirs[key]) for key in ours if key in theirs]
        if not self.places:
            raise IncompatibleModelError(
                f"{first.name} and {second.name} have no picture of the same prompt and noise, so nothing is paired"
            )
        values = [side.run.of(side.allocation) for side in self.sides]
        names = [name for name in values[0] if name in values[1]]
        self.values = {
            name: tuple(self._picked(side[name], which) for which, side in enumerate(values))
            for name in names
        }
        rows = [place[1][0] for place in self.places]
        distinct = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        self._prompt = torch.tensor([distinct[row] for row in rows])
        clusters = first.run.facts["clusters"]
        self._clusters = [clusters[row] for row in distinct]

    def _picked(self, values: Tensor, side: int) -> Tensor:
        """The values of the paired pictures, `(pairs,)`, float64."""
        rows, seeds = (torch.tensor([place[1 + side][axis] for place in self.places]) for axis in (0, 1))
        return (values[rows] if values.ndim == 1 else values[rows, seeds]).double()

    def _by_prompt(self, values: Tensor) -> Tensor:
        zeros = torch.zeros(len(self._clusters), dtype=torch.float64)
        sums = zeros.index_add(0, self._prompt, values)
        return sums / zeros.index_add(0, self._prompt, torch.ones_like(values))

    def figures(self) -> dict[str, Any]:
        return {name: self._figure(*self.values[name]) for name in in_order(self.values)}

    def _figure(self, first: Tensor, second: Tensor) -> dict[str, Any]:
        a, b = (float(self._by_prompt(values).mean()) for values in (first, second))
        return {
            "a": a,
            "b": b,
            "difference": mean_interval(self._by_prompt(second - first), self._clusters).to_dict(),
            "ratio": b / a if a else None,
        }

    def worst(self) -> list[Case]:
        """The cases whose primary error rises most, the worst first; those where it falls are none."""
        first, second = self.values[PRIMARY]
        rise = second - first
        order = [index for index in rise.argsort(descending=True).tolist() if rise[index] > 0]
        return [self._case(index) for index in order[:WORST]]

    def _case(self, index: int) -> Case:
        (prompt, noise), *places = self.places[index]
        paths = [
            side.run.picture(side.allocation, *place) for side, place in zip(self.sides, places, strict=True)
        ]
        kept = tuple(path if path.is_file() else None for path in paths)
        first, second = (
            {name: float(pair[side][index]) for name, pair in self.values.items()} for side in (0, 1)
        )
        return Case(prompt, noise, first, second, (kept[0], kept[1]))


def _sets(first: _Side, second: _Side) -> dict[str, Any]:
    a, b = (side.run.facts["allocations"][side.allocation]["sets"] for side in (first, second))
    return {
        name: {
            "label": a[name]["label"],
            "a": a[name],
            "b": b[name],
            "difference": b[name]["value"] - a[name]["value"],
        }
        for name in a
        if name in b
    }


def as_text(found: Comparison) -> str:
    """The tables of a comparison, the primary metric first."""
    from .command import aligned

    rows = [["metric", "A", "B", "B - A", "95% interval", "B / A"]]
    for name, figure in found.figures.items():
        change = figure["difference"]
        interval = "-" if change["low"] is None else f"[{change['low']:.4g}, {change['high']:.4g}]"
        ratio = "-" if figure["ratio"] is None else f"{figure['ratio']:.4g}"
        rows.append(
            [name, f"{figure['a']:.4g}", f"{figure['b']:.4g}", f"{change['mean']:.4g}", interval, ratio]
        )
    n, clusters = next((f["difference"]["n"], f["difference"]["clusters"]) for f in found.figures.values())
    lines = [*_heading(found, n, clusters), "", *aligned(rows)]
    if found.sets:
        rows = [["distance to the references", "A", "B", "B - A"]]
        rows += [
            [each["label"], _with_ends(each["a"]), _with_ends(each["b"]), f"{each['difference']:.4g}"]
            for each in found.sets.values()
        ]
        lines += ["", *aligned(rows)]
    for gate, value, met in found.gates:
        lines.append(f"gate {gate.text}: {'met' if met else 'FAILED'} ({value:.6g})")
    if found.worst:
        lines += ["", f"largest rises of {PRIMARY}:"]
        lines += [
            f"  {case.first[PRIMARY]:.4g} -> {case.second[PRIMARY]:.4g}  {case.prompt}"
            for case in found.worst
        ]
    return "\n".join(lines)


def _heading(found: Comparison, prompts: int, clusters: int) -> list[str]:
    lines = [
        f"A = {found.names[0]}, protocol {found.fingerprints[0]}",
        f"B = {found.names[1]}, protocol {found.fingerprints[1]}",
        f"{found.pairs} pairs of pictures of {prompts} prompts, {clusters} clusters; paired differences, bootstrap by "
        "cluster",
    ]
    if found.differing:
        lines.append(f"warning: the protocols differ in {len(found.differing)} fields, compared as told to:")
        lines += [f"  {field}" for field in found.differing]
    return lines


def _with_ends(distance: Mapping[str, Any]) -> str:
    if distance["low"] is None:
        return f"{distance['value']:.4g}"
    return f"{distance['value']:.4g} [{distance['low']:.4g}, {distance['high']:.4g}]"


def write_comparison(found: Comparison, out: Path) -> None:
    """Write `comparison.json` and `index.html`, a page that needs no other file, all or nothing.

    Raises:
        ArtefactError: the folder holds something else, or cannot be written.
    """
    check_replaceable(out.resolve(), COMPARISON_FORMAT, COMPARISON_NAME, PAGE_NAME)
    with folder_written_whole(out, COMPARISON_FORMAT, COMPARISON_NAME, PAGE_NAME) as folder:
        text = json.dumps(found.to_dict(), indent=2) + "\n"
        (folder / COMPARISON_NAME).write_text(text, encoding="utf-8")
        (folder / PAGE_NAME).write_text(_page(found), encoding="utf-8")


def _page(found: Comparison) -> str:
    template = files("qlip_plugins.evaluation").joinpath("comparison_page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(f"{found.names[1]} against {found.names[0]}"),
        tables=html.escape(as_text(found)),
        first=html.escape(found.names[0]),
        second=html.escape(found.names[1]),
        count=str(len(found.worst)),
        cases="\n".join(_case_row(case) for case in found.worst),
    )


def _case_row(case: Case) -> str:
    cells = "".join(
        f"<td>{_inlined(path)}<br>{PRIMARY} {values[PRIMARY]:.4g}{_bits(values)}</td>"
        for path, values in zip(case.pictures, (case.first, case.second), strict=True)
    )
    return f"<tr><td class='prompt'>{html.escape(case.prompt)}<br><small>noise {case.noise}</small></td>{cells}</tr>"


def _bits(values: Mapping[str, float]) -> str:
    return f", FAB {values['fab']:.2f}" if "fab" in values else ""


def _inlined(path: Path | None) -> str:
    if path is None:
        return "<em>picture not kept by the run</em>"
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'>"
