"""The activation-bit controller: one plan a prompt, made before the first step, followed by timestep."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from .adapter import Installed, ModelReader, load_backend, load_base_quantizer, load_correction
from .budget import Costs, LinearCost
from .embeddings import EmbeddingSource, source_for
from .errors import BitsError, IncompatibleModelError
from .families import Call, Conditioning, denoiser_of, family_of, read_call, scheduled
from .grids import Ranges
from .layers import controlled, count_by_kind
from .metrics import Cost, MacCounts, Visits, cost_of, count_macs, mean_cost
from .plan import BitPlan
from .recipe import (
    FULL_PRECISION,
    Budget,
    PolicyController,
    QlipController,
    RangesSection,
    Recipe,
    StaticController,
    TableController,
)
from .state import CalibratedState
from .step_policy import StepPolicy
from .text_to_bits import TextToBits


class Planner(Protocol):
    """Makes the plan of a batch of prompts.

    `layers` are the quantizers it sets; `by_prompt` says whether rows can differ.
    """

    layers: tuple[str, ...]
    by_prompt: bool

    def widths(self, layer: str) -> frozenset[int]:
        """The widths that one of its layers may be given."""
        ...

    def plan(self, text: Conditioning, timesteps: tuple[float, ...], costs: Costs) -> BitPlan:
        """The plan of P prompts at S distinct timesteps.

        `costs` says what plans cost here, to planners that keep to a budget.
        """
        ...

    def digest(self) -> str:
        """SHA-256 of all that its plans depend on, given the text states."""
        ...

    def remove(self) -> None:
        """Leave the pipeline as it was."""
        ...


class FixedPlanner:
    """The same widths for every prompt: a static width, or a given table."""

    def __init__(self, layers: tuple[str, ...], bits: Mapping[str, int]) -> None:
        self.layers = layers
        self.by_prompt = False
        self._bits = bits
        self._row = torch.tensor([bits[name] for name in layers], dtype=torch.uint8)

    def widths(self, layer: str) -> frozenset[int]:
        """See `Planner.widths`."""
        return frozenset((self._bits[layer],))

    def plan(self, text: Conditioning, timesteps: tuple[float, ...], costs: Costs) -> BitPlan:
        """See `Planner.plan`."""
        shape = (len(text), len(timesteps), len(self.layers))
        return BitPlan(self._row.expand(shape).clone(), timesteps, self.layers)

    def digest(self) -> str:
        """See `Planner.digest`."""
        return hashlib.sha256(json.dumps([self.layers, self._row.tolist()]).encode()).hexdigest()

    def remove(self) -> None:
        """See `Planner.remove`."""


class TablePlanner:
    """A given plan: of one prompt, followed for every prompt, or of as many as a batch has."""

    def __init__(self, table: BitPlan, known: Container[str]) -> None:
        strange = [name for name in table.layers if name not in known]
        if strange:
            raise IncompatibleModelError(
                f"the plan sets {len(strange)} quantizers that this base has not: {', '.join(strange[:3])}"
            )
        self._table = table
        self.layers = table.layers
        self.by_prompt = table.prompts > 1

    def widths(self, layer: str) -> frozenset[int]:
        """See `Planner.widths`."""
        column = self._table.bits[:, :, self.layers.index(layer)]
        return frozenset(int(width) for width in column.unique())

    def plan(self, text: Conditioning, timesteps: tuple[float, ...], costs: Costs) -> BitPlan:
        """See `Planner.plan`."""
        prompts = len(text)
        if self._table.prompts not in (1, prompts):
            raise BitsError(
                f"the plan holds {self._table.prompts} prompts, the batch {prompts}: generate as many, or save the "
                "plan of one, `plan.only(0).save(...)`"
            )
        rows = torch.stack([self._table.at(timestep) for timestep in timesteps], dim=1)
        return BitPlan(rows.expand(prompts, -1, -1).clone(), timesteps, self.layers)

    def digest(self) -> str:
        """See `Planner.digest`."""
        return self._table.digest()

    def remove(self) -> None:
        """See `Planner.remove`."""


class PolicyPlanner:
    """A step policy: every layer alike, by the place of the step."""

    def __init__(self, layers: tuple[str, ...], policy: StepPolicy, native: int, a16: int) -> None:
        self.layers = layers
        self.by_prompt = False
        self._policy = policy
        self._widths = (native, a16)

    def widths(self, layer: str) -> frozenset[int]:
        """See `Planner.widths`."""
        return frozenset(self._widths)

    def plan(self, text: Conditioning, timesteps: tuple[float, ...], costs: Costs) -> BitPlan:
        """See `Planner.plan`."""
        found = self._policy.plan(costs.calls, self.layers, *self._widths)
        # Timesteps before the loop's first iteration are not visited.
        rows = [found.bits[:, 0] if t not in found.timesteps else found.at(t) for t in timesteps]
        return BitPlan(torch.stack(rows, dim=1).expand(len(text), -1, -1).clone(), timesteps, self.layers)

    def digest(self) -> str:
        """See `Planner.digest`."""
        found = [self.layers, self._policy.model_dump(mode="json"), self._widths]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def remove(self) -> None:
        """See `Planner.remove`."""


class PromptPlanner:
    """T2Q and Q2B: each prompt has its own plan."""

    def __init__(
        self, text_to_bits: TextToBits, source: EmbeddingSource, budget: Budget | None = None
    ) -> None:
        self._text_to_bits = text_to_bits
        self._source = source
        self._budget = budget
        self.layers = text_to_bits.config.layers
        self.by_prompt = True

    def widths(self, layer: str) -> frozenset[int]:
        """See `Planner.widths`."""
        return frozenset(self._text_to_bits.config.menu.widths)

    def plan(self, text: Conditioning, timesteps: tuple[float, ...], costs: Costs) -> BitPlan:
        """See `Planner.plan`."""
        embeddings = self._source.embed(text)
        if embeddings.shape[1] != self._text_to_bits.config.embedding_dim:
            raise IncompatibleModelError(
                f"the controller reads embeddings of length {self._text_to_bits.config.embedding_dim}, this "
                f"pipeline's have {embeddings.shape[1]}"
            )
        return self._text_to_bits.plan(embeddings, timesteps, self._budget, costs)

    def digest(self) -> str:
        """See `Planner.digest`."""
        digest = self._text_to_bits.digest()
        if self._budget is None:
            return digest
        return hashlib.sha256((digest + self._budget.model_dump_json()).encode()).hexdigest()

    def remove(self) -> None:
        """See `Planner.remove`."""
        self._source.remove()


@dataclass(frozen=True)
class Report:
    """What the last generation cost. Counted from the plan; no latency is measured.

    Args:
        prompts: the cost of each prompt.
        mean: the mean over the prompts.
        calls: calls of the denoiser.
        steps: distinct timesteps.
        controlled: K by kind of layer.
        plan_digest: SHA-256 of the plan.
        scheduler: class of the one that sampled.
        replaced_scheduler: class of the pipeline's own, where a correction put the other in its place.
        range_losses: quantizer -> width -> shares clipped and zeroed, since the recipe was applied, at
            widths that had to keep the calibrated range.
        remarks: what a reader of the figures should know of the base and its backend.
    """

    prompts: list[Cost]
    mean: Cost
    calls: int
    steps: int
    controlled: dict[str, int]
    plan_digest: str
    scheduler: str
    replaced_scheduler: str | None
    range_losses: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"bitops_are": "simulated: counted from the plan, not measured", **asdict(self)}

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.controlled.items()) or "none"
        lines = [
            f"K = {sum(self.controlled.values())} controlled quantizers ({kinds})",
            f"{self.steps} steps, {self.calls} calls of the denoiser; BitOPs are simulated",
            *(
                [f"sampled with {self.scheduler} in place of {self.replaced_scheduler}"]
                if self.replaced_scheduler
                else []
            ),
            "prompt  quality     FAB  FAB by MACs  BitOPs paper (T)  BitOPs full (T)",
            *(_row(str(index), cost) for index, cost in enumerate(self.prompts)),
        ]
        if len(self.prompts) > 1:
            lines.append(_row("mean", self.mean))
        for width, (clipped, zeroed, worst) in self._worst_losses().items():
            lines.append(
                f"calibrated ranges kept at {width} bits: up to {clipped:.1%} clipped, {zeroed:.1%} zeroed ({worst})"
            )
        return "\n".join([*lines, *self.remarks])

    def _worst_losses(self) -> dict[int, tuple[float, float, str]]:
        worst: dict[int, tuple[float, float, str]] = {}
        for name, widths in self.range_losses.items():
            for width, loss in widths.items():
                found = (loss["clipped"], loss["zeroed"], name)
                worst[width] = max(
                    worst.get(width, (0.0, 0.0, "")), found, key=lambda item: item[0] + item[1]
                )
        return dict(sorted(worst.items()))


def _row(name: str, cost: Cost) -> str:
    def number(value: float | None, form: str, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}{form}}"

    return (
        f"{name:>6}  {number(cost.quality, '.4f', 7)}  {number(cost.fab, '.2f', 6)}  "
        f"{number(cost.fab_mac_weighted, '.2f', 11)}  {cost.bitops_paper:16.6g}  {cost.bitops_full:15.6g}"
    )


class _Steering:
    """The denoiser's forward pre-hook. A copy of the denoiser gets one that refuses to run."""

    def __init__(self, controller: BitController) -> None:
        self._controller = controller

    def __deepcopy__(self, memo: dict[int, Any]) -> _Orphan:
        return _Orphan()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._controller.before_call(module, args, kwargs)


class _Orphan:
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise IncompatibleModelError(
            f"this {type(module).__name__} is a copy of one that a recipe steers; its bits would be whatever the "
            "original's were. Remove the recipe before copying, or apply it to the copy's own pipeline"
        )


class BitController:
    """Sets the plan's bits before each call of a pipeline's denoiser; made by `apply`.

    Leaving its `with` block, or `remove()`, gives the pipeline back as it was.
    """

    def __init__(
        self,
        pipe: Any,
        state: CalibratedState,
        quantizers: Installed,
        planner: Planner,
        ranges: Ranges | None = None,
    ) -> None:
        self.quantizers = quantizers
        self.pipe = pipe
        self.family = family_of(pipe)
        self._denoiser = self.family.denoiser_of(pipe)
        self.state = state
        self.planner = planner
        self.ranges = ranges or Ranges()
        self.removed = False
        self._schedulers: tuple[Any, Any] | None = None
        self._plan: BitPlan | None = None
        self._seen: tuple[Any, Any] = (None, None)
        self._columns: dict[tuple[float, int], list[int | Tensor]] = {}
        self._visits: Visits = Counter()
        self._call: Any = None
        self._first: tuple[float, Tensor] | None = None
        self._begin = 0
        self._handle = self._denoiser.register_forward_pre_hook(_Steering(self), with_kwargs=True)

    @property
    def plan(self) -> BitPlan | None:
        """The plan of the last generation, a row for each image; None before the first."""
        return self._plan

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take everything off the pipeline; a second call does nothing."""
        self.removed = True
        self._handle.remove()
        self.uncorrect()
        self.planner.remove()
        self.quantizers.remove()

    def follow(self, plan: BitPlan) -> None:
        """Follow a given plan from now on, in place of the planner at hand; the quantizers stay installed.

        Args:
            plan: of one prompt, followed for every prompt, or of as many as a batch has.

        Raises:
            IncompatibleModelError: it sets quantizers that this base has not.
        """
        planner = TablePlanner(plan, self.quantizers)
        self.planner.remove()
        # What the other planner set, and this plan leaves alone, must not stay as it was.
        for quantizer in self.quantizers.values():
            quantizer.set_bits(quantizer.base_bits)
        self.planner, self._plan, self._seen, self._columns = planner, None, (None, None), {}
        self._first = None

    def plan_for(self, text: Conditioning) -> BitPlan:
        """The plan of P prompts, for generations like the last one.

        Raises:
            BitsError: nothing has been generated yet.
        """
        costs = self.costs()
        return self.planner.plan(text, tuple(dict.fromkeys(costs.calls)), costs)

    def costs(self) -> GenerationCosts:
        """What decisions cost, in generations like the last one.

        Raises:
            BitsError: nothing has been generated yet.
        """
        self._check_generated()
        return self._costs([timestep for timestep, _ in self._visits.elements()])

    def _costs(self, calls: list[float]) -> GenerationCosts:
        return GenerationCosts(
            self.counts, self.state.weight_bits(), self.base_bits(), self.planner.layers, calls
        )

    @property
    def visits(self) -> Visits:
        """The calls of the last generation."""
        return Counter(self._visits)

    def costs_of(self, plan: BitPlan) -> list[Cost]:
        """What each prompt of a plan costs, in a generation like the last one.

        Raises:
            BitsError: nothing has been generated yet, or the plan is of other timesteps.
        """
        self._check_generated()
        return cost_of(plan, self.counts(), self.state.weight_bits(), self.base_bits(), self._visits)

    def _check_generated(self) -> None:
        if not self._visits:
            raise BitsError("nothing has been generated under this recipe yet, so there is nothing to report")

    def correct(self, scheduler: Any) -> None:
        """Let the pipeline sample with another scheduler until `remove` or `uncorrect`."""
        self._schedulers = (self.pipe.scheduler, scheduler)
        self.pipe.scheduler = scheduler

    def uncorrect(self) -> None:
        """Let the pipeline sample with its own scheduler again; without `correct` before, nothing happens."""
        if self._schedulers is not None and self.pipe.scheduler is self._schedulers[1]:
            self.pipe.scheduler = self._schedulers[0]
        self._schedulers = None

    def report(self) -> Report:
        """What the last generation cost.

        Raises:
            BitsError: nothing has been generated yet.
        """
        self._check_generated()
        assert self._plan is not None  # it was made before the first call
        costs = self.costs_of(self._plan)
        return Report(
            prompts=costs,
            mean=mean_cost(costs),
            calls=sum(self._visits.values()),
            steps=len({timestep for timestep, _ in self._visits}),
            controlled=count_by_kind(self._plan.layers),
            plan_digest=self._plan.digest(),
            scheduler=type(self.pipe.scheduler).__name__,
            replaced_scheduler=self._schedulers and type(self._schedulers[0]).__name__,
            range_losses=self._range_losses(),
            remarks=remarks_on(self.state, self.quantizers),
        )

    def before_call(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the bits of one call of the denoiser, by its timestep."""
        call = read_call(self.family, denoiser, args, kwargs)
        copies = self._copies(call)
        again = self._is_guiding_call(call)
        self._call = _one_row(_shapes_of(call.arguments), call.rows)
        if not again:
            self._decide(call, copies)
        timestep = self._scheduled(call)
        if (timestep, copies) not in self._columns:
            self._columns[timestep, copies] = self._columns_at(timestep, copies)
        for name, bits in zip(self.planner.layers, self._columns[timestep, copies], strict=True):
            self.quantizers[name].set_bits(bits)
        self._first = None if again else (timestep, call.sample)
        if again:
            # Both calls of a guided step count as one with two rows, as where guidance is one call.
            self._visits[timestep, 1] -= 1
            self._visits += Counter({(timestep, 2): 1})
        else:
            self._visits[timestep, copies] += 1

    def _scheduled(self, call: Call) -> float:
        assert self._plan is not None  # _decide has run
        return self._among(call, list(self._plan.timesteps))

    def _among(self, call: Call, known: list[float]) -> float:
        """The one of the scheduler's timesteps that a call means."""
        given = call.arguments["timestep"]
        now = getattr(self.pipe, "_current_timestep", None)
        return scheduled(
            self.family,
            call.timestep,
            known,
            given.dtype if isinstance(given, Tensor) else torch.float64,
            None if now is None else float(now),
        )

    def _is_guiding_call(self, call: Call) -> bool:
        """Whether this is the second of two calls of a guided step: the same samples, at the same timestep."""
        seen_timesteps, _ = self._seen
        if self.family.guidance != "calls" or self._first is None:
            return False
        if self.pipe.scheduler.timesteps is not seen_timesteps:
            return False
        timestep, sample = self._first
        same = call.sample is sample or (
            call.sample.shape == sample.shape and torch.equal(call.sample, sample)
        )
        return same and self._scheduled(call) == timestep

    def _copies(self, call: Call) -> int:
        """2 where the call's rows are [uncond, cond] halves, else 1.

        The pipeline says whether it guides, and the rows must agree: under guidance both halves denoise
        the same samples. A pipeline that shares this denoiser, or lays its rows out in another way, is
        found out so, instead of giving rows another prompt's bits.
        """
        sample, rows, texts = call.sample, call.rows, call.states.shape[0]
        if self.family.guidance == "calls":
            if texts != rows and self.planner.by_prompt:
                raise IncompatibleModelError(
                    f"which of the call's {rows} rows belong to which prompt is unclear: there are {texts} text states"
                )
            return 1
        halves_equal = rows % 2 == 0 and torch.equal(sample[: rows // 2], sample[rows // 2 :])
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if not self.planner.by_prompt:
            return 2 if (halves_equal if guided is None else guided) and rows % 2 == 0 else 1
        # Prompts of one batch may share their noise; then the word of the pipeline that is calling counts.
        same_noise = guided is False and halves_equal and is_calling(self.pipe)
        agreed = guided is not None and (bool(guided) == halves_equal or same_noise)
        if not agreed or texts != rows:
            said = (
                "does not say whether it guides"
                if guided is None
                else f"says that guidance is {bool(guided)}"
            )
            raise IncompatibleModelError(
                f"which of the call's {rows} rows belong to which prompt is unclear: {type(self.pipe).__name__} "
                f"{said}, the two halves of the samples are {'equal' if halves_equal else 'not equal'}, and there "
                f"are {texts} text states. Apply the recipe to the pipeline that you call"
            )
        return 2 if guided else 1

    def _decide(self, call: Call, copies: int) -> None:
        """Make a plan when a generation begins: the pipeline then has new timesteps and text states."""
        timesteps = self.pipe.scheduler.timesteps
        seen_timesteps, seen_states = self._seen
        if timesteps is seen_timesteps and call.states is seen_states and self._plan is not None:
            return
        if timesteps is None:
            raise IncompatibleModelError(
                f"{type(self.pipe.scheduler).__name__} has no timesteps yet: call the pipeline, or set_timesteps()"
            )
        self.quantizers.verify()
        if self._schedulers is not None and self.pipe.scheduler is not self._schedulers[1]:
            raise IncompatibleModelError(
                f"the pipeline's scheduler has been replaced by {type(self.pipe.scheduler).__name__}, and the recipe's "
                "correction lies in the one it had: set it before the recipe is applied, or apply one without a "
                "`correction:`"
            )
        calls = [float(timestep) for timestep in timesteps.tolist()]
        # Image to image starts late: the loop's first iteration is the call at hand, as far as costs and policies go.
        if timesteps is not seen_timesteps:
            self._begin = calls.index(self._among(call, list(dict.fromkeys(calls))))
        costs = self._costs(calls[self._begin :])
        plan = self.planner.plan(call.conditioning(copies), tuple(dict.fromkeys(calls)), costs)
        # A callback may swap the text states in mid-run (to end guidance, say): the same generation.
        if timesteps is not seen_timesteps or self._plan is None or plan.digest() != self._plan.digest():
            self._visits = Counter()
        self._plan, self._seen, self._columns = plan, (timesteps, call.states), {}

    def _columns_at(self, timestep: float, copies: int) -> list[int | Tensor]:
        """What to set on each layer: one width, or one for each row of the batch, guidance halves alike."""
        assert self._plan is not None  # _decide has run
        columns = self._plan.at(timestep).int().repeat(copies, 1).unbind(1)
        return [int(c[0]) if bool((c == c[0]).all()) else c for c in columns]

    def base_bits(self) -> dict[str, int]:
        """The base width of every activation quantizer."""
        return {name: quantizer.base_bits for name, quantizer in self.quantizers.items()}

    def counts(self) -> MacCounts:
        """MACs of one row of the last call, counted on a twin without data."""
        # Making the twin must not move the random numbers that pictures are drawn with.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            denoiser: Any = self._denoiser
            twin = type(denoiser).from_config(denoiser.config)
        return with_splits(count_macs(twin, _on_meta(self._call)), self.state)

    def _range_losses(self) -> dict[str, dict[int, dict[str, float]]]:
        return {
            name: {
                width: {"clipped": clipped / seen, "zeroed": zeroed / seen}
                for width, (seen, clipped, zeroed) in losses.items()
            }
            for name, quantizer in self.quantizers.items()
            if (losses := quantizer.losses())
        }


def remarks_on(state: CalibratedState, quantizers: Installed) -> list[str]:
    """What a base has beyond the quantizers that are counted, and what its backend cannot express."""
    found = [
        f"{count} quantizers are run by plain torch, not by the backend's framework: {reason}"
        for reason, count in Counter(quantizers.not_expressed.values()).items()
    ]
    found += [
        f"{count} quantizers of {state.format} stay as they are, and no plan sets them: {what}"
        for what, count in Counter(state.left.values()).items()
    ]
    branches = sum(layer.low_rank is not None for layer in state.layers.values())
    if branches:
        found.append(f"{branches} layers have low-rank branches in floating point, which BitOPs do not count")
    return found


@dataclass(frozen=True)
class GenerationCosts:
    """See `budget.Costs`.

    Args:
        counts: gives the MACs of one call; asked only where a cost is needed.
        weight_bits: by layer.
        base_bits: of every activation quantizer.
        layers: K, those that a plan sets.
        calls: the timesteps of the generation's calls.
    """

    counts: Callable[[], MacCounts]
    weight_bits: Mapping[str, int]
    base_bits: Mapping[str, int]
    layers: tuple[str, ...]
    calls: list[float]

    def bitops(self) -> LinearCost:
        """See `budget.Costs.bitops`."""
        return LinearCost.bitops(self.counts(), self.weight_bits, self.base_bits, self.layers, self.calls)

    def base_bitops(self) -> float:
        """See `budget.Costs.base_bitops`."""
        row = torch.tensor([self.base_bits[name] for name in self.layers])
        cost = self.bitops()
        return float(cost.of(row.expand(1, *cost.per_bit.shape)))


def with_splits(counts: MacCounts, state: CalibratedState) -> MacCounts:
    """MACs, with what a base says of inputs that it splits."""
    first_parts = {name: layer.split / layer.shape[1] for name, layer in state.layers.items() if layer.split}
    return replace(counts, first_parts=first_parts)


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    dtype: torch.dtype


def is_calling(pipe: Any) -> bool:
    """Whether a method of `pipe` is among the callers, so that what it says of itself is not stale."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("self") is pipe:
            return True
        frame = frame.f_back
    return False


def _shapes_of(value: Any) -> Any:
    """Arguments with every tensor replaced by its shape, so that none is kept alive."""
    if isinstance(value, Tensor):
        return _Shape(tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return {key: _shapes_of(item) for key, item in value.items() if key != "self"}
    if isinstance(value, list | tuple):
        return type(value)(_shapes_of(item) for item in value)
    return value


def _one_row(value: Any, rows: int) -> Any:
    """The same shapes for a batch of one."""
    if isinstance(value, _Shape):
        return _Shape((1, *value.size[1:]), value.dtype) if value.size[:1] == (rows,) else value
    if isinstance(value, Mapping):
        return {key: _one_row(item, rows) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_one_row(item, rows) for item in value)
    return value


def _on_meta(value: Any) -> Any:
    if isinstance(value, _Shape):
        # The twin is float32, whatever the model that was called.
        dtype = torch.float32 if value.dtype.is_floating_point else value.dtype
        return torch.empty(value.size, dtype=dtype, device="meta")
    if isinstance(value, Mapping):
        return {key: _on_meta(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_meta(item) for item in value)
    return value


def apply(pipe: Any, recipe: Recipe | str | Path) -> BitController:
    """Put a recipe on a diffusers pipeline, in place: every generation then follows its bits.

    Args:
        pipe: a pipeline of a known family (`families.py`), such as `StableDiffusionPipeline`, `FluxPipeline`.
        recipe: the recipe, its file, or the name of a shipped one.

    Returns:
        The controller; leave its `with` block, or call `remove()`, to have the pipeline back.

    Raises:
        RecipeError: the recipe is wrong.
        ArtefactError: a file it names is missing or damaged.
        IncompatibleModelError: base, controller, ranges and pipeline do not belong together. The
            pipeline is then as it was.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    denoiser = denoiser_of(pipe)
    if any(isinstance(hook, _Steering) for hook in denoiser._forward_pre_hooks.values()):
        raise IncompatibleModelError(
            f"a recipe is applied to this {type(denoiser).__name__} already: remove() its controller first"
        )
    return apply_base(pipe, recipe, load_base(recipe, denoiser))


def apply_base(pipe: Any, recipe: Recipe, state: CalibratedState) -> BitController:
    """Put a recipe on a pipeline whose base has been read and checked already; see `apply`."""
    planner = make_planner(pipe, recipe, state)
    try:
        ranges = load_ranges(recipe.ranges, state)
        check_ranges(ranges, recipe, state, planner)
        quantizers = load_backend(recipe.backend).install(denoiser_of(pipe), state, ranges)
    except BaseException:
        planner.remove()
        raise
    controller = BitController(pipe, state, quantizers, planner, ranges)
    if recipe.correction is not None:
        try:
            correction = load_correction(recipe.correction.adapter)
            controller.correct(correction.scheduler(recipe.correction, recipe, controller))
        except BaseException:
            controller.remove()
            raise
    return controller


def load_base(recipe: Recipe, denoiser: nn.Module) -> CalibratedState:
    """The base that a recipe names, checked against the denoiser it is for.

    Raises:
        ArtefactError: the checkpoint is missing, damaged, or contradicts the recipe.
        IncompatibleModelError: it was calibrated on another model.
    """
    adapter = load_base_quantizer(recipe.base.adapter)
    if isinstance(adapter, ModelReader) and (found := adapter.read(recipe.base, denoiser)) is not None:
        return found
    state = adapter.load(recipe.base)
    state.check_fits(denoiser)
    state.check_same_weights(denoiser)
    return state.completed(denoiser)


def load_ranges(section: RangesSection | None, state: CalibratedState) -> Ranges:
    """The ranges that a recipe asks for.

    Raises:
        ArtefactError: the table is missing or damaged.
        IncompatibleModelError: it was fitted on another base.
    """
    if section is None or section.table is None:
        return Ranges(keep_calibrated=section is not None)
    ranges = Ranges.load(section.table)
    if ranges.fingerprint != state.fingerprint:
        raise IncompatibleModelError(
            f"{section.table}: fitted on the base {ranges.fingerprint[:12]}..., this base is "
            f"{state.fingerprint[:12]}...: fit ranges for this one (`qlip-plugins fit-ranges`)"
        )
    return ranges


def make_planner(pipe: Any, recipe: Recipe, state: CalibratedState) -> Planner:
    """The planner that a recipe's `controller:` section describes.

    Raises:
        ArtefactError: its file is missing or damaged.
        IncompatibleModelError: it belongs to another base, or the base has nothing to control.
    """
    section = recipe.controller
    known = {name: grid.bits for name, grid in state.activations.items()}
    layers = controlled(known, **recipe.controls)
    if isinstance(section, StaticController):
        if section.bits == "base":
            return FixedPlanner(layers, known)
        check_something_to_control(layers, state)
        return FixedPlanner(layers, dict.fromkeys(layers, section.bits))
    check_something_to_control(layers, state)
    if isinstance(section, TableController):
        return TablePlanner(BitPlan.load(section.plan), known)
    if isinstance(section, PolicyController):
        return PolicyPlanner(layers, StepPolicy.load(section.path), section.native, section.a16)
    return _prompt_planner(pipe, section, recipe, state, layers)


def _prompt_planner(
    pipe: Any, section: QlipController, recipe: Recipe, state: CalibratedState, layers: tuple[str, ...]
) -> PromptPlanner:
    text_to_bits = TextToBits.from_pretrained(section.path)
    text_to_bits.check_made_for(state.fingerprint, recipe.activation_bits, layers)
    return PromptPlanner(text_to_bits, source_for(pipe, text_to_bits.config.pooling), section.budget)


def check_something_to_control(layers: tuple[str, ...], state: CalibratedState) -> None:
    """Check that K is not empty.

    Raises:
        IncompatibleModelError: it is: the base quantizes no activations.
    """
    if not layers:
        raise IncompatibleModelError(
            f"{state.source}: the base quantizes no activations, so there are no bits to control. Give a base with "
            "activation quantizers, or `controller: {kind: static, bits: base}`"
        )


def check_ranges(ranges: Ranges, recipe: Recipe, state: CalibratedState, planner: Planner) -> None:
    """With a table given, a width that it lacks is an error now, not at some step of some prompt.

    Raises:
        IncompatibleModelError: the table lacks a width of the planner's.
    """
    check_widths(ranges, recipe, state, {name: planner.widths(name) for name in planner.layers})


def check_widths(
    ranges: Ranges, recipe: Recipe, state: CalibratedState, widths: Mapping[str, Collection[int]]
) -> None:
    """The same for any widths of some quantizers.

    Raises:
        IncompatibleModelError: the table lacks one.
    """
    if recipe.ranges is None or recipe.ranges.table is None:
        return
    for name, wanted in widths.items():
        needed = set(wanted) - {FULL_PRECISION, state.activations[name].bits}
        lacking = sorted(needed - set(ranges.fitted.get(name, {})))
        if lacking:
            raise IncompatibleModelError(
                f"{recipe.ranges.table}: no range of {name} for {', '.join(map(str, lacking))} bits: fit ranges "
                "for this menu (`qlip-plugins fit-ranges`)"
            )
