"""What `qlip-plugins evaluate` does: several allocations of one base, measured alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..allocations import static_width
from ..artefacts import read_tensors, write_tensors
from ..errors import ArtefactError, IncompatibleModelError, RecipeError
from ..files import check_replaceable, folder_written_whole, written_whole
from ..generation import Settings, load_pipeline, placed
from ..image_features import open_features
from ..pictures import PictureFolder
from ..plan import BitPlan
from ..plotting import new_figure
from ..processes import Processes, launched
from ..progress import counted, progress
from ..prompts import PromptSet
from ..quality import open_quality
from ..quality_metrics import metric_config
from ..recipe import Recipe
from ..work import WorkFolder
from .bootstrap import clusters_of, mean_interval
from .distances import (
    FEW,
    LEAST_PICTURES,
    SetDistance,
    check_torchmetrics,
    frechet_distance,
    kernel_distance,
    label,
)
from .drawing import draw_grid, draw_pareto
from .errors import Batch, Judges, Measured, Measuring, Pair, batches, noises_of, paired
from .protocol import fingerprint_of, protocol_of
from .run import (
    COSTS,
    FULL,
    OWNED,
    RESULTS_NAME,
    RUN_FORMAT,
    RUN_NAME,
    RUN_VERSION,
    UNITS,
    file_name,
    in_order,
    picture_name,
)
from .wanted import Wanted, alike, allocations_of, described

WORK = "evaluation"
DEFAULT_ALLOCATIONS = ("base", "recipe")
DEFAULT_FEATURES = ("demo",)
DEFAULT_PICTURES = 8

_COST_APART = 0.005
_REFERENCE_BATCH = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@=+-]*")
_SET_ONLY = ("features.", "spatial.", "pictures")


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be evaluated.

    Args:
        recipe: names pipeline, base and controller.
        prompts: distinct ones, with tags.
        prompts_file: where they come from, for the record.
        settings: how to sample.
        out: folder to write.
        work: folder for what is finished.
        seeds: noises of each prompt.
        batch: prompts at a time.
        features: extractors, `NAME` or `NAME=PATH`; None for `DEFAULT_FEATURES`.
        references: folder of pictures that sets are compared with.
        metrics: of single pictures, name -> options.
        wanted: allocations; full precision is always among the results.
        skip: `own` or `pictures`, as of `Measuring`.
        pictures: of how many prompts pictures are kept; None for `DEFAULT_PICTURES`.
    """

    recipe: Recipe
    prompts: PromptSet
    prompts_file: Path
    settings: Settings
    out: Path
    work: Path
    seeds: int = 4
    batch: int = 16
    features: tuple[str, ...] | None = None
    references: Path | None = None
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    wanted: Wanted = field(default_factory=lambda: Wanted(DEFAULT_ALLOCATIONS))
    skip: tuple[str, ...] = ()
    pictures: int | None = None


def evaluate(what: EvaluationRequest, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Evaluate, and write the run folder; can be interrupted and resumed, and shared by launched processes.

    Args:
        what: to evaluate.
        say: called with remarks.

    Returns:
        What `evaluation.json` holds; None in a process other than the main one.

    Raises:
        QlipError: any; what can be known beforehand is checked before the work.
    """
    _check(what)
    with launched(what.settings.device) as processes:
        pipe = placed(load_pipeline(what.recipe), replace(what.settings, device=processes.device))
        judges, references = _judges(what, pipe, processes.device)
        with paired(pipe, what.recipe, what.prompts.prompts, what.settings) as pair:
            plans = allocations_of(pair, what.wanted, clusters_of(what.prompts))
            run = _Evaluation(what, pair, judges, references, plans)
            folder = _work_folder(run, processes)
            run.measure(folder, processes, say)
            if not processes.main:
                return None
            facts = run.write(folder)
            folder.remove()
    return facts


def _check(what: EvaluationRequest) -> None:
    kept = what.pictures or 0
    if what.seeds < 1 or what.batch < 1 or kept < 0:
        raise RecipeError(
            f"--seeds {what.seeds}, --batch-size {what.batch}, --pictures {kept}: expected at least one of the first "
            "two, and no negative number of pictures"
        )
    for name in (*what.wanted.names, *(what.wanted.controllers or ())):
        if not _NAME.fullmatch(name):
            raise RecipeError(
                f"--allocations: {name!r} is no name: letters, digits, space and ._@=+- are allowed"
            )
    what.wanted.check()
    _check_pictures(what)
    for name, options in what.metrics.items():
        metric_config(name, options)
    if len(what.wanted.names) > 1:
        new_figure("pareto.png", 1, 1)  # before the work, in case it cannot be drawn
    check_replaceable(what.out.resolve(), RUN_FORMAT, RUN_NAME, *OWNED)


def _check_pictures(what: EvaluationRequest) -> None:
    if "pictures" in what.skip:
        given = {
            "--references": what.references,
            "--metric": what.metrics,
            "--features": what.features,
            "--pictures": what.pictures,
        }
        unused = [option for option, value in given.items() if value]
        if unused:
            raise RecipeError(
                f"--skip pictures: then there are none to judge or keep, leave out {', '.join(unused)}"
            )
    if what.references is not None:
        check_torchmetrics()


def _judges(what: EvaluationRequest, pipe: Any, device: str) -> tuple[Judges, PictureFolder | None]:
    if "pictures" in what.skip:
        return Judges({}, {}), None
    if getattr(pipe, "vae", None) is None:
        if what.references is not None or what.metrics or what.features or what.pictures:
            raise IncompatibleModelError(
                f"{what.recipe.model.pipeline}: {type(pipe).__name__} has no decoder, so there are no pictures to "
                "judge or keep: leave out --references, --metric, --features and --pictures"
            )
        return Judges({}, {}), None
    references = None if what.references is None else PictureFolder(what.references)
    count = len(what.prompts.prompts) * what.seeds
    if references is not None and len(references) < LEAST_PICTURES:
        raise ArtefactError(
            f"{what.references}: {len(references)} pictures, distances of sets need at least {LEAST_PICTURES}"
        )
    if references is not None and count < LEAST_PICTURES:
        raise RecipeError(
            f"--references: {count} pictures ({len(what.prompts.prompts)} prompts, --seeds {what.seeds}), their "
            f"distances need at least {LEAST_PICTURES}"
        )
    named = DEFAULT_FEATURES if what.features is None else what.features
    features = {text.partition("=")[0]: open_features(text, device) for text in named}
    scores = {
        name: open_quality(name, options, pipe, what.prompts, device)
        for name, options in what.metrics.items()
    }
    return Judges(features, scores), references


def _work_folder(run: _Evaluation, processes: Processes) -> WorkFolder:
    identity = {
        "protocol": run.protocol,
        "recipe": run.what.recipe.model_dump(mode="json"),
        "allocations": {name: plan.digest() for name, plan in run.plans.items()},
        "pictures": run.kept,
        "skip": sorted(run.what.skip),
    }
    if not processes.main:
        processes.wait()  # for the main process to have made the folder
    folder = WorkFolder(run.what.work, WORK, RUN_VERSION, identity)
    if processes.main:
        processes.wait()
    return folder


class _Evaluation:
    def __init__(
        self,
        what: EvaluationRequest,
        pair: Pair,
        judges: Judges,
        references: PictureFolder | None,
        plans: Mapping[str, BitPlan],
    ) -> None:
        self.what = what
        self.pair = pair
        self.judges = judges
        self.references = references
        self.plans = plans
        for name, plan in plans.items():
            pair.check(name, plan)
        self.protocol = protocol_of(pair, what.prompts, what.seeds, what.batch, judges, references)
        self.fingerprint = fingerprint_of(self.protocol)
        self.batches = batches(len(what.prompts.prompts), what.seeds, what.batch)
        self.names = [FULL, *plans]
        self.kept = DEFAULT_PICTURES if what.pictures is None else what.pictures

    def measure(self, folder: WorkFolder, processes: Processes, say: Callable[[str], None]) -> None:
        """Measure this process's share of what is not finished; returns when all processes have."""
        open_batches = [batch for batch in self.batches if self._missing(folder, batch)]
        processes.wait()  # all must see the same batches as unfinished
        if processes.main:
            finished = len(self.batches) - len(open_batches)
            say(
                f"{len(self.what.prompts.prompts)} prompts, {self.what.seeds} noises each, in {len(self.batches)} "
                f"batches; {len(self.plans)} allocations; protocol {self.fingerprint}"
                + (f"; {finished} batches were finished before" if finished else "")
                + (f"; {processes.count} processes" if processes.count > 1 else "")
            )
        mine = open_batches[processes.index :: processes.count]
        total = sum(len(self._missing(folder, batch)) for batch in mine)
        with counted(total if processes.main else 0, "evaluating") as done:
            for batch in mine:
                self._measure_batch(folder, batch, done)
        processes.wait()

    def _missing(self, folder: WorkFolder, batch: Batch) -> list[str]:
        return [name for name in self.names if not _part(folder, name, batch).exists()]

    def _measure_batch(self, folder: WorkFolder, batch: Batch, done: Callable[[str], None]) -> None:
        missing = self._missing(folder, batch)
        measuring = Measuring(self.pair, self.judges, batch, self.what.skip)
        for name in missing:
            found = measuring.full_precision() if name == FULL else measuring.allocation(self.plans[name])
            if "pictures" in found:
                kept = max(0, self.kept - batch.rows.start)
                found["pictures"] = found["pictures"][:kept]
            if self.references is None:
                found = {key: value for key, value in found.items() if not key.startswith("spatial.")}
            write_tensors(_part(folder, name, batch), WORK, RUN_VERSION, found, timesteps=measuring.timesteps)
            done(f"{name} {batch.name}")

    def write(self, folder: WorkFolder) -> dict[str, Any]:
        """Compute what the table holds, and write the run folder, all or nothing."""
        described = self._described_references()
        results: dict[str, Tensor] = {"noises": self._noises()}
        allocations: dict[str, Any] = {}
        with folder_written_whole(self.what.out, RUN_FORMAT, RUN_NAME, *OWNED) as out:
            for name in self.names:
                found, timesteps = self._collected(folder, name)
                self._save_pictures(out, name, found)
                found |= self._costs(name)
                allocations[name] = {
                    "plan_digest": None if name == FULL else self.plans[name].digest(),
                    "figures": self._figures(found),
                    "sets": self._sets(folder, name, found, described),
                    "calls": {
                        "timesteps": timesteps,
                        **{
                            kind: found[kind].mean((0, 1)).tolist()
                            for kind in ("error_led", "error_own")
                            if kind in found
                        },
                    },
                }
                results |= {
                    f"{name}/{key}": value for key, value in found.items() if not key.startswith(_SET_ONLY)
                }
            for name, plan in self.plans.items():
                (out / "plans").mkdir(exist_ok=True)
                plan.save(out / "plans" / f"{file_name(name)}.safetensors")
            facts = self._facts(allocations)
            write_tensors(out / RESULTS_NAME, RUN_FORMAT, RUN_VERSION, results, fingerprint=self.fingerprint)
            draw_pareto(facts, out / "pareto.png")
            draw_grid(facts, out)
            (out / RUN_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return facts

    def _facts(self, allocations: Mapping[str, Any]) -> dict[str, Any]:
        what = self.what
        pictures = len(what.prompts.prompts) * what.seeds
        wanted, remarks = described(what.wanted, what.recipe, what.prompts.prompts, what.settings)
        remarks += [*alike(self.plans), *off_cost(allocations)]
        notes = ["BitOPs and FAB are counted from the plan (simulated); no latency is measured"]
        if self.references is not None and pictures < FEW:
            notes.append(
                f"{pictures} pictures, fewer than {FEW}: FID is biased upwards by that; read KID beside it"
            )
        return {
            "format": RUN_FORMAT,
            "version": RUN_VERSION,
            "fingerprint": self.fingerprint,
            "protocol": self.protocol,
            "recipe": what.recipe.model_dump(mode="json"),
            "prompts_file": what.prompts_file.name,
            "prompts": list(what.prompts.prompts),
            "clusters": list(clusters_of(what.prompts)),
            "settings": asdict(what.settings),
            "wanted": {**wanted, "skip": sorted(what.skip)},
            "notes": [*notes, *remarks],
            "allocations": allocations,
        }

    def _noises(self) -> Tensor:
        prompts, seed = self.what.prompts.prompts, self.what.settings.seed
        return torch.tensor([noises_of(prompts, seed, number) for number in range(self.what.seeds)]).T

    def _collected(self, folder: WorkFolder, name: str) -> tuple[Measured, list[float]]:
        """All that was measured of an allocation, `(n, S, ...)`; pictures of the first prompts alone."""
        by_seed: list[Measured] = []
        timesteps: list[float] = []
        for seed in range(self.what.seeds):
            parts = []
            for batch in self.batches:
                if batch.seed == seed:
                    tensors, facts = read_tensors(_part(folder, name, batch), WORK, RUN_VERSION)
                    _check_rows(_part(folder, name, batch), tensors, len(batch.rows))
                    parts.append(tensors)
                    timesteps = list(facts["timesteps"])
            by_seed.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        return {key: torch.stack([one[key] for one in by_seed], dim=1) for key in by_seed[0]}, timesteps

    def _save_pictures(self, out: Path, name: str, found: Measured) -> None:
        for row, pictures in enumerate(found.get("pictures", ())):
            for seed, picture in enumerate(pictures):
                path = out / "pictures" / file_name(name) / picture_name(row, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)

    def _costs(self, name: str) -> Measured:
        costs = self.pair.full_precision_costs() if name == FULL else self.pair.costs(self.plans[name])
        return {
            kind: torch.tensor([getattr(cost, kind) for cost in costs], dtype=torch.float64)
            for kind in COSTS
            if getattr(costs[0], kind) is not None
        }

    def _figures(self, found: Measured) -> dict[str, Any]:
        clusters = clusters_of(self.what.prompts)
        return {
            key: mean_interval(
                value.double().flatten(1).mean(1) if value.ndim > 1 else value, clusters
            ).to_dict()
            for key, value in found.items()
            if not key.startswith(_SET_ONLY)
        }

    def _sets(self, folder: WorkFolder, name: str, found: Measured, described: Measured) -> dict[str, Any]:
        """FID, sFID and KID to the references, for each extractor."""
        path = folder.file(f"sets-{file_name(name)}.json")
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        sets: dict[str, Any] = {}
        clusters = [cluster for cluster in clusters_of(self.what.prompts) for _ in range(self.what.seeds)]
        for extractor in self.judges.features if self.references is not None else ():
            pooled, spatial = (
                (found[key].flatten(0, 1).to(described[key].device), described[key])
                for key in (f"features.{extractor}", f"spatial.{extractor}")
            )
            distances: dict[str, SetDistance] = {
                "fid": frechet_distance(*pooled, clusters),
                "sfid": frechet_distance(*spatial, clusters),
                "kid": kernel_distance(*pooled),
            }
            for kind, distance in distances.items():
                sets[f"{kind}.{extractor}"] = {"label": label(kind, extractor), **distance.to_dict()}
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(sets), encoding="utf-8")
        return sets

    def _described_references(self) -> Measured:
        """The features of the references, on the device, float64."""
        if self.references is None:
            return {}
        found: dict[str, list[Tensor]] = {}
        for images in progress(self.references.batches(_REFERENCE_BATCH), "references"):
            for name, features in self.judges.features.items():
                found.setdefault(f"features.{name}", []).append(features(images).float())
                found.setdefault(f"spatial.{name}", []).append(features.spatial(images).float())
        return {key: torch.cat(parts) for key, parts in found.items()}


def _part(folder: WorkFolder, name: str, batch: Batch) -> Path:
    return folder.file(f"{file_name(name)}-{batch.name}.safetensors")


def _check_rows(path: Path, tensors: Measured, rows: int) -> None:
    wrong = [key for key, value in tensors.items() if key != "pictures" and len(value) != rows]
    if wrong or "error_led" not in tensors:
        raise ArtefactError(f"{path}: not what this batch of {rows} prompts gives; remove it")


def off_cost(allocations: Mapping[str, Any]) -> list[str]:
    """Remarks on controls that cannot express the cost of the recipe's plans: fewer decisions, coarser costs."""
    remarks = []
    for name, found in allocations.items():
        plain, at, budget = name.partition("@")
        recipe = allocations.get(f"recipe{at}{budget}")
        if recipe is None or plain in ("base", "recipe", FULL) or static_width(plain) is not None:
            continue
        ratio = found["figures"]["bitops_paper"]["mean"] / recipe["figures"]["bitops_paper"]["mean"]
        if abs(ratio - 1) > _COST_APART:
            remarks.append(f"{name} costs {ratio:.3f} of the BitOPs of recipe{at}{budget}: its nearest plan")
    return remarks


def as_text(facts: Mapping[str, Any]) -> str:
    """The tables of a run, the primary metric first."""
    allocations = facts["allocations"]
    columns = in_order({key for found in allocations.values() for key in found["figures"]})
    errors, costs = (
        [key for key in columns if key.startswith("error_")],
        [key for key in columns if key in COSTS],
    )
    pictured = [key for key in columns if key not in (*errors, *costs)]
    n = len(facts["prompts"])
    seeds = facts["protocol"]["noises"]["per_prompt"]
    lines = [
        f"protocol {facts['fingerprint']}: {n} prompts, {seeds} noises each, {len(set(facts['clusters']))} clusters; "
        "means with 95% intervals, bootstrap by cluster",
        "",
        *_table(allocations, [*errors, *costs]),
        *(["", *_table(allocations, pictured)] if pictured else []),
    ]
    sets = {key: found["label"] for each in allocations.values() for key, found in each["sets"].items()}
    if sets:
        references = facts["protocol"]["references"]["n"]
        lines += [
            "",
            f"{n * seeds} pictures against {references} references, with intervals (docs/evaluation.md)",
        ]
        lines += _set_table(allocations, sets)
    return "\n".join([*lines, "", *(f"note: {note}" for note in facts["notes"])])


def _table(allocations: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    rows = [["allocation", *(f"{key} ({UNITS[key]})" if key in UNITS else key for key in keys)]]
    for name, found in allocations.items():
        rows.append([name, *(_interval(found["figures"].get(key), "mean") for key in keys)])
    return aligned(rows)


def _set_table(allocations: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
    rows = [["allocation", *labels.values()]]
    for name, found in allocations.items():
        rows.append([name, *(_interval(found["sets"].get(key), "value") for key in labels)])
    return aligned(rows)


def _interval(found: Mapping[str, Any] | None, middle: str) -> str:
    if found is None:
        return "-"
    value, *ends = (
        "" if number is None else f"{number:.4g}" for number in (found[middle], found["low"], found["high"])
    )
    return value if ends[0] in ("", ends[1]) else f"{value} [{', '.join(ends)}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table with their columns in line."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
