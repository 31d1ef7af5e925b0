"""How sensitive a model is: the error that each width of each quantizer causes at each step, for each prompt.

The table is what allocations are solved from, blind to the prompt (`allocations.py`) or with the prompt's
quality: `start_q2b` writes the solution into Q2B's own parameters (docs/method.md, From sensitivities).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .adapter import load_backend
from .artefacts import read_tensors, write_tensors
from .budget import LinearCost, shift_for
from .controller import BitController, TablePlanner, check_widths, load_base, load_ranges
from .embeddings import EncodedPrompts, encode
from .errors import ArtefactError, IncompatibleModelError, RecipeError
from .families import denoiser_of
from .generation import Settings, load_pipeline, noise_seeds, placed, sample_encoded
from .grids import Ranges
from .layers import controlled
from .plan import BitPlan
from .progress import counted
from .q2b import Q2B
from .recipe import FULL_PRECISION, Recipe
from .recording import Course, recording
from .state import CalibratedState
from .work import WorkFolder, identity_of, pipeline_digest

SENSITIVITY_FORMAT = "qlip-plugins sensitivity"
SENSITIVITY_VERSION = 2

_PART_FORMAT = "qlip-plugins sensitivity part"
_GROUP = 8
"""Quantizers that are measured between two saves."""

_LEAST_ERROR = 1e-12
_LARGEST_LOGIT = 30.0


@dataclass(frozen=True)
class Sensitivity:
    """Errors of single quantizers.

    An entry is the mean squared difference that one quantizer at one width makes to the prediction, after
    guidance, all other activations unquantized, at the samples that the full-precision model visits; summed
    over the calls of a timestep.

    Args:
        errors: `(P, S, K, W)` float32.
        prompts: P.
        timesteps: S.
        layers: K, the controlled quantizers.
        widths: W, ascending, without 32.
        base_fingerprint: of the base.
        ranges_digest: of the ranges of its widths.
        pipeline: digest of the pipeline they were measured on (`work.pipeline_digest`).
        guidance_scale: it was sampled with.
        eta: likewise.
    """

    errors: Tensor
    prompts: tuple[str, ...]
    timesteps: tuple[float, ...]
    layers: tuple[str, ...]
    widths: tuple[int, ...]
    base_fingerprint: str
    ranges_digest: str
    pipeline: str
    guidance_scale: float
    eta: float

    def __post_init__(self) -> None:
        expected = tuple(map(len, (self.prompts, self.timesteps, self.layers, self.widths)))
        if tuple(self.errors.shape) != expected or not self.errors.isfinite().all():
            raise ValueError(f"errors of shape {tuple(self.errors.shape)}, expected {expected}, all finite")

    def of_menu(self, menu: Sequence[int]) -> Tensor:
        """The errors `(P, S, K, 3)`, float64, of a menu's widths; 32 bits cause none.

        Raises:
            IncompatibleModelError: a width was not measured.
        """
        absent = [width for width in menu if width != FULL_PRECISION and width not in self.widths]
        if absent:
            raise IncompatibleModelError(
                f"the sensitivities are of {', '.join(map(str, self.widths))} bits, {absent[0]} was not measured: "
                f"measure them with `qlip-plugins sensitivity --widths {' '.join(map(str, menu))}`"
            )
        none = torch.zeros(self.errors.shape[:3], dtype=torch.float64)
        columns = [
            none if width == FULL_PRECISION else self.errors[..., self.widths.index(width)].double()
            for width in menu
        ]
        return torch.stack(columns, dim=-1)

    def check_made_for(
        self, where: Path, state: CalibratedState, ranges: Ranges, layers: tuple[str, ...]
    ) -> None:
        """Check that the errors are those of a base with its ranges, and of the quantizers that are controlled.

        `where` is the table's file, for messages.

        Raises:
            IncompatibleModelError: they are not; says which part differs.
        """
        if self.base_fingerprint != state.fingerprint:
            raise IncompatibleModelError(
                f"{where}: the sensitivities are of the base {self.base_fingerprint[:12]}..., this base is "
                f"{state.fingerprint[:12]}...: measure them on this one (`qlip-plugins sensitivity`)"
            )
        if self.ranges_digest != ranges.only(self.widths).digest():
            raise IncompatibleModelError(
                f"{where}: the sensitivities were measured with other ranges of {', '.join(map(str, self.widths))} "
                "bits than the recipe's: measure them with these (`qlip-plugins sensitivity`)"
            )
        if self.layers != layers:
            odd = sorted(set(self.layers) ^ set(layers))
            raise IncompatibleModelError(
                f"{where}: the sensitivities are of {len(self.layers)} quantizers, {len(layers)} are controlled "
                f"(differing: {', '.join(odd[:3]) or 'their order'}): was `attention:` or `time_layers:` changed?"
            )

    def check_measured_on(
        self, where: Path, pipe: Any, settings: Settings, timesteps: tuple[float, ...]
    ) -> None:
        """Check that the errors were measured on a pipeline as it is to be sampled.

        Args:
            where: the table's file, for messages.
            pipe: without a recipe.
            settings: how it is to be sampled.
            timesteps: that it visits.

        Raises:
            IncompatibleModelError: they were not; says which part differs.
        """
        again = "measure them so (`qlip-plugins sensitivity`)"
        if self.timesteps != timesteps:
            raise IncompatibleModelError(
                f"{where}: the sensitivities are of {len(self.timesteps)} timesteps, here are {len(timesteps)}, or "
                f"others: {again}"
            )
        if (self.guidance_scale, self.eta) != (settings.guidance_scale, settings.eta):
            raise IncompatibleModelError(
                f"{where}: the sensitivities were measured at guidance {self.guidance_scale:g} and eta {self.eta:g}, "
                f"here are {settings.guidance_scale:g} and {settings.eta:g}: {again}"
            )
        if self.pipeline != pipeline_digest(pipe):
            raise IncompatibleModelError(
                f"{where}: the sensitivities were measured on another pipeline (weights or scheduler differ): {again}"
            )

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        write_tensors(
            path,
            SENSITIVITY_FORMAT,
            SENSITIVITY_VERSION,
            {"errors": self.errors},
            prompts=self.prompts,
            timesteps=self.timesteps,
            layers=self.layers,
            widths=self.widths,
            base_fingerprint=self.base_fingerprint,
            ranges_digest=self.ranges_digest,
            pipeline=self.pipeline,
            guidance_scale=self.guidance_scale,
            eta=self.eta,
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, damaged, or no sensitivities.
        """
        tensors, facts = read_tensors(path, SENSITIVITY_FORMAT, SENSITIVITY_VERSION)
        try:
            return cls(
                errors=tensors["errors"],
                prompts=tuple(facts["prompts"]),
                timesteps=tuple(facts["timesteps"]),
                layers=tuple(facts["layers"]),
                widths=tuple(facts["widths"]),
                base_fingerprint=str(facts["base_fingerprint"]),
                ranges_digest=str(facts["ranges_digest"]),
                pipeline=str(facts["pipeline"]),
                guidance_scale=float(facts["guidance_scale"]),
                eta=float(facts["eta"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"{path}: no sensitivities, or those of a development version ({error}): measure them again"
            ) from None


def measure_sensitivity(
    pipe: Any,
    recipe: Recipe,
    prompts: EncodedPrompts,
    settings: Settings,
    widths: Sequence[int],
    batch: int = 8,
    work: WorkFolder | None = None,
) -> Sensitivity:
    """Run the model once for each quantizer and width along the full-precision model's own way.

    Args:
        pipe: a float pipeline without a recipe; it is moved to the device and type of `settings`.
        recipe: its base, backend, ranges and attention are taken.
        prompts: P to measure on.
        settings: how to sample.
        widths: W, without 32.
        batch: prompts at a time; a call has batch x W rows, twice that under guidance.
        work: keeps what is finished, a file for each batch and group of quantizers.

    Raises:
        ArtefactError: a file that the recipe names is missing or damaged.
        IncompatibleModelError: base, ranges and pipeline do not belong together.
    """
    pipe = placed(pipe, settings)
    digest = pipeline_digest(pipe)
    state = load_base(recipe, denoiser_of(pipe))
    state.check_plain(denoiser_of(pipe))
    layers = controlled(state.activations, **recipe.controls)
    ranges = load_ranges(recipe.ranges, state)
    widths = sorted(set(widths) - {FULL_PRECISION})
    check_widths(ranges, recipe, state, dict.fromkeys(layers, widths))
    starts = range(0, len(prompts.prompts), batch)
    noises = noise_seeds(prompts.prompts, settings.seed)
    parts: list[Tensor] = []
    timesteps: tuple[float, ...] = ()
    with counted(len(starts) * len(layers), "measuring sensitivities") as done:
        for start in starts:
            rows = range(start, min(start + batch, len(noises)))
            one = _Batch(pipe, prompts.only(rows), settings, [noises[row] for row in rows], widths)
            groups = [layers[first : first + _GROUP] for first in range(0, len(layers), _GROUP)]
            kept = _Kept(work, start, len(rows), len(widths))
            missing = [group for group in groups if kept.of(group) is None]
            for group in groups:
                for layer in group if group not in missing else ():
                    done(layer)
            if missing:
                _measure(one, recipe, state, ranges, missing, kept, done)
            found, timesteps = kept.all_of(groups)
            parts.append(found)
    return Sensitivity(
        errors=torch.cat(parts),
        prompts=prompts.prompts,
        timesteps=timesteps,
        layers=layers,
        widths=tuple(widths),
        base_fingerprint=state.fingerprint,
        ranges_digest=ranges.only(widths).digest(),
        pipeline=digest,
        guidance_scale=settings.guidance_scale,
        eta=settings.eta,
    )


def _measure(
    one: _Batch,
    recipe: Recipe,
    state: CalibratedState,
    ranges: Ranges,
    groups: Sequence[tuple[str, ...]],
    kept: _Kept,
    done: Callable[[str], None],
) -> None:
    """Measure groups of quantizers on one batch, and keep each as it is finished."""
    float_course = one.run()
    timesteps = tuple(dict.fromkeys(float_course.timesteps))
    quantizers = load_backend(recipe.backend).install(denoiser_of(one.pipe), state, ranges)
    names = tuple(quantizers)
    planner = TablePlanner(one.plan(names, timesteps, None), quantizers)
    with BitController(one.pipe, state, quantizers, planner) as controller:
        untouched = one.run(float_course.samples)
        for group in groups:
            columns = []
            for layer in group:
                controller.follow(one.plan(names, timesteps, layer))
                errors = one.errors(float_course, untouched, timesteps)
                if not bool(errors.isfinite().all()):
                    raise IncompatibleModelError(
                        f"{layer}: with it quantized a prediction is NaN or infinite, prompts "
                        f"{one.prompts.prompts[0]!r} and following"
                    )
                columns.append(errors)
                done(layer)
            kept.keep(group, torch.stack(columns, dim=2), timesteps)


class _Kept:
    """What has been measured on one batch, by group of quantizers: in a work folder, or in memory."""

    def __init__(self, work: WorkFolder | None, start: int, prompts: int, widths: int) -> None:
        self._work = work
        self._start = start
        self._ends = (prompts, widths)
        self._found: dict[tuple[str, ...], tuple[Tensor, tuple[float, ...]]] = {}

    def of(self, group: tuple[str, ...]) -> tuple[Tensor, tuple[float, ...]] | None:
        """Errors `(P, S, k, W)` of a group of k quantizers, and their S timesteps; None where not measured."""
        path = self._path(group)
        if group not in self._found and path is not None and path.exists():
            tensors, facts = read_tensors(path, _PART_FORMAT, SENSITIVITY_VERSION)
            timesteps = tuple(facts.get("timesteps", ()))
            prompts, widths = self._ends
            expected = (prompts, len(timesteps), len(group), widths)
            errors = tensors.get("errors", torch.empty(0))
            if tuple(errors.shape) != expected or not bool(errors.isfinite().all()):
                raise ArtefactError(f"{path}: not what this batch of {prompts} prompts gives; remove it")
            self._found[group] = errors, timesteps
        return self._found.get(group)

    def keep(self, group: tuple[str, ...], errors: Tensor, timesteps: tuple[float, ...]) -> None:
        """Keep what was measured of a group."""
        self._found[group] = errors, timesteps
        path = self._path(group)
        if path is not None:
            write_tensors(
                path, _PART_FORMAT, SENSITIVITY_VERSION, {"errors": errors}, timesteps=list(timesteps)
            )

    def all_of(self, groups: Sequence[tuple[str, ...]]) -> tuple[Tensor, tuple[float, ...]]:
        """Errors of all groups, `(P, S, K, W)`, and the timesteps."""
        found = [self._found[group] for group in groups]
        return torch.cat([errors for errors, _ in found], dim=2), found[0][1]

    def _path(self, group: tuple[str, ...]) -> Path | None:
        if self._work is None:
            return None
        return self._work.file(f"prompts-{self._start:06d}-{group[0]}.safetensors")


@dataclass(frozen=True)
class SensitivityRequest:
    """What is to be measured.

    Args:
        recipe: names pipeline, base, backend, ranges and attention.
        prompts: distinct ones.
        widths: to measure; 32 causes no error, and is left out.
        settings: how to sample.
        out: file to write.
        work: folder for what is finished.
        batch: prompts at a time.
    """

    recipe: Recipe
    prompts: tuple[str, ...]
    widths: tuple[int, ...]
    settings: Settings
    out: Path
    work: Path
    batch: int = 8


def sensitivity(what: SensitivityRequest) -> dict[str, Any]:
    """Measure sensitivities and write them; can be interrupted and resumed.

    Returns:
        Facts for people: the mean error of each width, summed over steps and quantizers.

    Raises:
        QlipError: any; what can be known beforehand is checked before the work.
    """
    widths = sorted(set(what.widths) - {FULL_PRECISION})
    if what.out.suffix != ".safetensors" or what.out.is_dir():
        raise RecipeError(f"--out {what.out}: sensitivities are a .safetensors file")
    if not widths or what.batch < 1:
        raise RecipeError(
            f"--widths {widths}, --batch-size {what.batch}: expected a width below 32, and a prompt"
        )
    pipe = placed(load_pipeline(what.recipe), what.settings)
    state = load_base(what.recipe, denoiser_of(pipe))
    ranges = load_ranges(what.recipe.ranges, state)
    prompts = encode(pipe, what.recipe.model.prompt_embeddings, what.prompts)
    identity = {
        **identity_of(pipe, what.recipe.model, what.prompts),
        "base": state.fingerprint,
        "ranges": ranges.only(widths).digest(),
        "backend": what.recipe.backend,
        "controls": what.recipe.controls,
        "widths": widths,
        "batch": what.batch,
        "settings": asdict(what.settings.unnumbered()),
    }
    work = WorkFolder(what.work, "sensitivity table", SENSITIVITY_VERSION, identity)
    found = measure_sensitivity(pipe, what.recipe, prompts, what.settings, widths, what.batch, work)
    found.save(what.out)
    work.remove()
    errors = found.errors.double().sum((1, 2)).mean(0)
    return {
        "file": str(what.out),
        "prompts": len(found.prompts),
        "quantizers": len(found.layers),
        "timesteps": len(found.timesteps),
        **{
            f"error at {width} bits, summed over steps and quantizers": f"{float(error):.3e}"
            for width, error in zip(widths, errors, strict=True)
        },
    }


@dataclass(frozen=True)
class _Batch:
    """Some prompts with their noises; `widths` are tried side by side, as copies of the batch."""

    pipe: Any
    prompts: EncodedPrompts
    settings: Settings
    noises: list[int]
    widths: Sequence[int]

    def run(self, along: Sequence[Tensor] | None = None) -> Course:
        """Sample the prompts once."""
        return self._sampled(self.prompts, self.noises, along)

    def _sampled(
        self, prompts: EncodedPrompts, noises: Sequence[int], along: Sequence[Tensor] | None
    ) -> Course:
        with recording(self.pipe, along) as course:
            sample_encoded(self.pipe, prompts, self.settings, noises, "latent")
        return course

    def plan(self, names: tuple[str, ...], timesteps: tuple[float, ...], layer: str | None) -> BitPlan:
        """Every quantizer at 32 bits but `layer`, which has one of the widths in each copy."""
        copies = 1 if layer is None else len(self.widths) * len(self.noises)
        bits = torch.full((copies, len(timesteps), len(names)), FULL_PRECISION, dtype=torch.uint8)
        if layer is not None:
            for part, width in zip(bits.chunk(len(self.widths)), self.widths, strict=True):
                part[:, :, names.index(layer)] = width
        return BitPlan(bits, timesteps, names)

    def errors(self, float_course: Course, untouched: Course, timesteps: tuple[float, ...]) -> Tensor:
        """`(P, S, W)` of the quantizer that the plan at hand sets."""
        copies = len(self.widths)
        rows = list(range(len(self.noises))) * copies
        course = self._sampled(
            self.prompts.only(rows),
            self.noises * copies,
            [sample.repeat(copies, *[1] * (sample.ndim - 1)) for sample in float_course.samples],
        )
        found = torch.zeros(len(self.noises), len(timesteps), copies)
        for timestep, ours, theirs in zip(
            course.timesteps, course.predictions, untouched.predictions, strict=True
        ):
            difference = ours.float().unflatten(0, (copies, -1)) - theirs.float()
            found[:, timesteps.index(timestep)] += difference.square().flatten(2).mean(2).T.cpu()
        return found


def log_prices(errors: Tensor, cost: LinearCost, menu: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The prices of cost, as logarithms, at which each decision buys medium, and high.

    At a price L the plan of least `error + L * cost` is low above the first, high below the second. Where
    medium never pays, the two are equal; where more width does not lower the error, they are minus infinity.

    Args:
        errors: `(S, K, 3)` of low, medium and high.
        cost: of a plan.
        menu: the three widths.

    Returns:
        Two tensors `(S, K)`, the first at least as great as the second.
    """
    low, medium, high = errors.unbind(-1)
    rises = [width * cost.per_bit for width in (menu[1] - menu[0], menu[2] - menu[1], menu[2] - menu[0])]
    first, second, both = (
        _price(worse - better, rise)
        for worse, better, rise in zip((low, medium, low), (medium, high, high), rises, strict=True)
    )
    at_once = second > first
    return torch.where(at_once, both, first).log(), torch.where(at_once, both, second).log()


def _price(gain: Tensor, rise: Tensor) -> Tensor:
    """What one unit of cost buys; infinite where a gain costs nothing."""
    free = torch.where(gain > 0, torch.inf, 0.0).to(gain)
    return torch.where(rise > 0, gain / rise.clamp(min=torch.finfo(gain.dtype).tiny), free).clamp(min=0)


def quality_slopes(errors: Tensor, quality: Tensor) -> Tensor:
    """How the error of each quantizer moves with the prompt's quality: d ln(error) / dq, `(K,)`.

    A regression for each quantizer, over the error of low and medium in all steps, drawn towards the slope of
    the whole error as far as the quantizers' slopes differ by no more than chance (empirical Bayes).

    Args:
        errors: `(P, S, K, 3)`.
        quality: `(P,)`, predicted by T2Q.
    """
    q = quality.double() - quality.double().mean()
    spread = q.square().sum()
    if not bool(spread > 0) or len(q) < 3:
        return torch.zeros(errors.shape[2], dtype=torch.float64)

    def slope(logs: Tensor) -> tuple[Tensor, Tensor]:
        centred = logs - logs.mean(0)
        found = q @ centred / spread
        residual = (centred - q[:, None] * found).square().sum(0) / (len(q) - 2)
        return found, residual / spread

    parts = errors[..., :2].sum((1, 3)).clamp(min=_LEAST_ERROR)
    whole, _ = slope(parts.sum(1, keepdim=True).log())
    each, variance = slope(parts.log())
    between = ((each - whole).square().mean() - variance.mean()).clamp(min=0)
    return whole + (each - whole) * between / (between + variance).clamp(min=_LEAST_ERROR)


@torch.no_grad()
def start_q2b(
    q2b: Q2B,
    table: Sensitivity,
    quality: Tensor,
    population: Tensor,
    menu: tuple[int, int, int],
    cost: LinearCost,
    target: float,
) -> None:
    """Set a Q2B, in place, to the plans of least error at a mean cost.

    With errors D(q) = D exp(s (q - mean q)) the cheapest plan takes each width up to a price, and the price
    moves with q as the logit of p_q does: the slope is `quality_slopes`, and p_m and p_h of each step are
    those whose thresholds (`budget.thresholds`) are the prices. One layer's thresholds can lie on either side
    of its offset by at most ln 2 on the wrong one; those that do not fit are moved to that edge.

    Args:
        q2b: with group 1 and no early steps.
        table: measured on P prompts.
        quality: `(P,)`, their predicted qualities.
        population: `(R,)`, predicted qualities of the prompts whose mean cost is to meet the target.
        menu: the three widths.
        cost: of a plan.
        target: in its unit.

    Raises:
        IncompatibleModelError: the table lacks a width, or Q2B shares parameters between steps.
        BitsError: the target is out of reach.
    """
    if q2b.group != 1 or q2b.early:
        raise IncompatibleModelError(
            f"sensitivities decide for each step: need group 1 and early 0, found {q2b.group} and {q2b.early}"
        )
    if q2b.timesteps != table.timesteps:
        raise IncompatibleModelError(
            f"the sensitivities are of {len(table.timesteps)} timesteps, Q2B has {len(q2b.timesteps)}, or others"
        )
    if not bool((cost.per_bit > 0).all()):
        raise IncompatibleModelError(
            f"{cost.unit} counts nothing for {int((cost.per_bit == 0).any(0).sum())} of the controlled quantizers "
            "(such as attention's operands), so no price can decide their widths: give the budget as fab"
        )
    errors = table.of_menu(menu)
    slope = quality_slopes(errors, quality)
    middle = float(quality.double().mean())
    buys_medium, buys_high = log_prices(errors.mean(0), cost, menu)
    moved = ((population.double()[:, None] - middle) * slope)[:, None, :]
    price = -shift_for(-buys_medium - moved, -buys_high - moved, menu, cost, target)
    centre = _centres(buys_medium, buys_high, price)
    first, second = _fitting(centre - buys_medium, centre - buys_high)
    medium, high = _logits(first, second)
    q2b.slope.copy_(slope)
    q2b.medium_logit.copy_(medium)
    q2b.high_logit.copy_(high)
    low, high = first - centre - moved, second - centre - moved
    turned = shift_for(low, high, menu, cost, target)
    q2b.offset.copy_(centre + turned - (middle - 0.5) * slope)


def _centres(buys_medium: Tensor, buys_high: Tensor, price: float) -> Tensor:
    """For each layer the price, as a logarithm, where its ln r is 0, `(K,)`.

    It is the price at hand, or the nearest around which all the layer's thresholds fit, where there is one:
    decisions within a factor of 2 of the price at hand are then exact, and mostly all others.
    """
    edge = math.log(2)
    least, most = buys_high.amax(0) - edge, buys_medium.amin(0) + edge
    at_hand = torch.full_like(least, price)
    return torch.where(least <= most, at_hand.clamp(least, most), at_hand)


def _fitting(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds of ln r that some p_m and p_h have: ln r1 < ln 2 and ln r2 > -ln 2."""
    edge = math.log(2) - 1e-6
    return first.clamp(max=edge), second.clamp(min=-edge)


def _logits(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """p_m and p_h, as logits, from the thresholds ln r1 <= ln r2.

    From r1 = (1 - 2a) / (1 - b) and r2 = a / (2b - 1): b = (1 + 2 r2 - r1) / (4 r2 - r1).
    """
    r1, r2 = first.exp(), second.clamp(max=_LARGEST_LOGIT).exp()
    b = (1 + 2 * r2 - r1) / (4 * r2 - r1)
    a = r2 * (2 * b - 1)
    limit = 1e-9
    return a.clamp(limit, 1 - limit).logit(), b.clamp(limit, 1 - limit).logit()
