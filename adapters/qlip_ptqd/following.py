"""Which statistics a step is corrected with: those of the widths that each picture is computed at.

The rule (ours; PTQD knows one width): between two widths of the menu, a plan whose controlled quantizers
have m bits on average at a timestep is taken to err as a model at m bits would: slope and bias linear in m,
the deviation geometric. Averaging over the quantizers instead, by how many have each width, goes further
wrong: plans give few bits to layers that bear it (docs/ptqd.md compares both with the plans' own errors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlip_plugins.controller import is_calling
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.recipe import FULL_PRECISION, Recipe

from .statistics import CorrectionStatistics, Validity

if TYPE_CHECKING:
    from qlip_plugins.controller import BitController

_LEAST = 1e-30
"""Stands for a deviation of 0, which has no logarithm."""


@dataclass(frozen=True)
class Rows:
    """The statistics of one timestep, for each row of a batch or, with N = 1, for all alike.

    Args:
        slope: `(N, 1, 1, 1)` float32, as it was fitted.
        deviation: `(N, 1, 1, 1)` float32.
        bias: `(N, C, 1, 1)` float32.
    """

    slope: Tensor
    deviation: Tensor
    bias: Tensor

    def corrected(self, prediction: Tensor) -> Tensor:
        """`(prediction - bias) / (1 + max(slope, 0))`, `(N, C, h, w)`."""
        return (prediction - self.bias) / (1 + self.slope.relu())

    def noise(self) -> Tensor:
        """Deviation of the noise that is left in the corrected prediction, `(N, 1, 1, 1)`."""
        return self.deviation / (1 + self.slope.relu())


class Following:
    """Gives the statistics of each step.

    Args:
        statistics: what there is.
        bits: the width to take where no recipe steers the bits; None: the only one.
    """

    def __init__(self, statistics: CorrectionStatistics, bits: int | None) -> None:
        if bits is not None and None in statistics.widths:
            raise IncompatibleModelError(
                f"{statistics.source}: one set of statistics whatever the bits, so leave `bits` out, found {bits}"
            )
        if bits is not None and bits not in statistics.widths:
            raise IncompatibleModelError(
                f"{statistics.source}: no statistics for {bits} bits, only for {_listed(statistics)}"
            )
        self._statistics = statistics
        self._bits = bits
        self.validity = Validity()
        self._controller: BitController | None = None

    def follow(self, recipe: Recipe, controller: BitController) -> None:
        """Take the widths from a controller from now on.

        Raises:
            IncompatibleModelError: there are no statistics for one of its widths.
        """
        self.validity, self._controller = validity_of(recipe, controller), controller
        if None in self._statistics.widths:
            return
        widths = {width for layer in controller.planner.layers for width in controller.planner.widths(layer)}
        lacking = sorted((widths or {FULL_PRECISION}) - set(self._statistics.widths))
        if lacking:
            raise IncompatibleModelError(
                f"{self._statistics.source}: no statistics for {', '.join(map(str, lacking))} bits, only for "
                f"{_listed(self._statistics)}: collect them for this recipe's widths (`qlip-plugins fit-correction`)"
            )

    def found(self) -> Validity:
        """What is known of the present use; nothing but by a recipe.

        Raises:
            IncompatibleModelError: the recipe has been removed, or another pipeline is calling.
        """
        if self._controller is None:
            return self.validity
        if self._controller.removed:
            raise IncompatibleModelError(
                "this scheduler corrects the error of a recipe that has been removed: take another scheduler"
            )
        if self._statistics.validity.guidance_scale is not None and not is_calling(self._controller.pipe):
            raise IncompatibleModelError(
                f"{self._statistics.source}: holds for guidance {self._statistics.validity.guidance_scale:g}, and the "
                "guidance of this call is not known: call the pipeline that the recipe was applied to"
            )
        return replace(self.validity, guidance_scale=guidance_of(self._controller.pipe))

    def rows(self, timestep: int, prediction: Tensor) -> Rows:
        """The statistics of one step.

        Args:
            timestep: of the schedule.
            prediction: `(N, C, h, w)`, what will be corrected.

        Raises:
            IncompatibleModelError: there are none for it, or other channels, or other rows than the plan has.
        """
        statistics, channels = self._statistics, prediction.shape[1]
        if channels != statistics.channels:
            raise IncompatibleModelError(
                f"{statistics.source}: statistics of {statistics.channels} channels, the prediction has {channels}"
            )
        widths = tuple(statistics.widths)
        found = [statistics.widths[width].at(timestep) for width in widths]
        slope, deviation, bias = (torch.stack(part) for part in zip(*found, strict=True))
        weights = self._weights(widths, timestep, prediction.shape[0])
        logarithm = deviation.clamp(min=_LEAST).log()
        mixed = (weights @ slope[:, None], (weights @ logarithm[:, None]).exp(), weights @ bias)
        return Rows(*(part.to(prediction.device, torch.float32)[:, :, None, None] for part in mixed))

    def _weights(self, widths: tuple[int | None, ...], timestep: int, rows: int) -> Tensor:
        """Weight of each width's statistics, `(N or 1, W)` float64; they sum to 1."""
        if self._controller is None or len(widths) == 1:
            return self._one_width(widths)
        plan = self._controller.plan
        if plan is None or plan.prompts != rows:
            has = "no plan yet" if plan is None else f"a plan of {plan.prompts} pictures"
            raise IncompatibleModelError(f"the scheduler steps {rows} pictures, the recipe has {has}")
        known = [width for width in widths if width is not None]
        if not plan.layers:
            return interpolation(torch.tensor([float(FULL_PRECISION)]), known)
        return interpolation(plan.at(timestep).double().mean(1), known)

    def _one_width(self, widths: tuple[int | None, ...]) -> Tensor:
        if len(widths) > 1 and self._bits is None:
            raise IncompatibleModelError(
                f"{self._statistics.source}: statistics for {_listed(self._statistics)} bits, and nothing says which: "
                "name the width (`bits=`), or let a recipe make the scheduler (`correction:`)"
            )
        chosen = widths[0] if len(widths) == 1 else self._bits
        return torch.tensor([[width == chosen for width in widths]]).double()


def interpolation(bits: Tensor, widths: Sequence[int]) -> Tensor:
    """Weights of the two widths around each number of bits, `(N, W)` float64; beyond the ends, the end's.

    Args:
        bits: `(N,)`, such as the mean width of a plan at a timestep.
        widths: W of them, in any order.
    """
    ascending = sorted(widths)
    columns = {}
    for place, width in enumerate(ascending):
        rising = falling = torch.ones_like(bits, dtype=torch.float64)
        if place > 0:
            rising = (bits - ascending[place - 1]) / (width - ascending[place - 1])
        if place < len(ascending) - 1:
            falling = (ascending[place + 1] - bits) / (ascending[place + 1] - width)
        columns[width] = torch.minimum(rising, falling).clamp(0, 1)
    return torch.stack([columns[width] for width in widths], dim=1).double()


def validity_of(recipe: Recipe, controller: BitController) -> Validity:
    """What the error's statistics depend on, but for guidance and schedule."""
    return Validity(
        base_fingerprint=controller.state.fingerprint,
        ranges_digest=controller.ranges.digest(),
        attention=recipe.attention,
        time_layers=recipe.time_layers,
        plan=controller.planner.digest(),
    )


def guidance_of(pipe: Any) -> float | None:
    """The scale that a pipeline guides with, 1 without guidance; None where it does not say.

    Raises:
        IncompatibleModelError: it rescales what it guides, which no statistics are collected under.
    """
    if getattr(pipe, "guidance_rescale", 0):
        raise IncompatibleModelError(
            f"guidance_rescale is {pipe.guidance_rescale}: the correction's statistics hold without it"
        )
    scale = getattr(pipe, "guidance_scale", None)
    return None if scale is None else max(1.0, float(scale))


def _listed(statistics: CorrectionStatistics) -> str:
    return ", ".join("any" if width is None else str(width) for width in statistics.widths)
