"""Which statistics a step is corrected with: those of the widths that each picture is computed at.

The rule (ours; PTQD knows one width): the error of a plan at a timestep is that of the single widths,
averaged over the controlled quantizers. Slopes and biases are averaged as they are, deviations as squares,
since the errors of different layers hardly know of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.recipe import FULL_PRECISION, Recipe

from .statistics import CorrectionStatistics, Validity

if TYPE_CHECKING:
    from qlip_plugins.controller import BitController


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
        """What is known of the present use; nothing but by a recipe."""
        if self._controller is None:
            return self.validity
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
        shares = self._shares(widths, timestep, prediction.shape[0])
        mixed = (shares @ slope[:, None], (shares @ deviation[:, None].square()).sqrt(), shares @ bias)
        return Rows(*(part.to(prediction.device, torch.float32)[:, :, None, None] for part in mixed))

    def _shares(self, widths: tuple[int | None, ...], timestep: int, rows: int) -> Tensor:
        """Share of the controlled quantizers at each width, `(N or 1, W)` float64."""
        if self._controller is None or len(widths) == 1:
            return self._one_width(widths)
        plan = self._controller.plan
        if plan is None or plan.prompts != rows:
            has = "no plan yet" if plan is None else f"a plan of {plan.prompts} pictures"
            raise IncompatibleModelError(f"the scheduler steps {rows} pictures, the recipe has {has}")
        if not plan.layers:
            return torch.tensor([[width == FULL_PRECISION for width in widths]]).double()
        bits = plan.at(timestep)
        return torch.stack([bits.eq(width or 0).double().mean(1) for width in widths], dim=1)

    def _one_width(self, widths: tuple[int | None, ...]) -> Tensor:
        if len(widths) > 1 and self._bits is None:
            raise IncompatibleModelError(
                f"{self._statistics.source}: statistics for {_listed(self._statistics)} bits, and nothing says which: "
                "name the width (`bits=`), or let a recipe make the scheduler (`correction:`)"
            )
        chosen = widths[0] if len(widths) == 1 else self._bits
        return torch.tensor([[width == chosen for width in widths]]).double()


def validity_of(recipe: Recipe, controller: BitController) -> Validity:
    """What the error's statistics depend on, but for guidance and schedule."""
    return Validity(
        base_fingerprint=controller.state.fingerprint,
        ranges_digest=controller.ranges.digest(),
        attention=recipe.attention,
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
