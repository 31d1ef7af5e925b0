"""The budget dial: a trained controller's plan at a cost that the user names, without training.

Every decision of Q2B is two thresholds on one number, the logit of p_q (docs/method.md). A shift of that
number, the same for every layer and step, therefore turns one prompt's plan from all low to all high, one
decision at a time. The dial sorts the decisions by the shift at which they are taken, and takes as many of
them as the budget pays for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import BitsError
from .layers import OPERAND_KIND, kind_of, layer_of
from .metrics import KEPT_BY_PAPER, MacCounts, call_bitops
from .q2b import Q2B
from .recipe import FULL_PRECISION, Budget


@dataclass(frozen=True)
class LinearCost:
    """A cost that is linear in the widths of a plan: `fixed + sum of per_bit * bits`.

    Args:
        per_bit: `(S, K)` float64, what one bit of each decision costs.
        fixed: the cost of everything that the plan leaves alone.
        unit: for messages.
    """

    per_bit: Tensor
    fixed: float
    unit: str

    def of(self, bits: Tensor) -> Tensor:
        """The cost `(P,)` of widths `(P, S, K)`."""
        return self.fixed + (bits.double() * self.per_bit).sum((1, 2))

    @classmethod
    def fab(cls, steps: int, layers: int) -> LinearCost:
        """FAB: the mean width."""
        share = torch.full((steps, layers), 1 / (steps * layers), dtype=torch.float64)
        return cls(share, 0.0, "FAB")

    @classmethod
    def bitops(
        cls,
        counts: MacCounts,
        weight_bits: Mapping[str, float],
        base_bits: Mapping[str, float],
        layers: Sequence[str],
        calls: Sequence[float],
    ) -> LinearCost:
        """BitOPs in T, profile `paper`, of a whole generation.

        Args:
            counts: MACs of one call.
            weight_bits: by layer.
            base_bits: width of every activation quantizer that a plan leaves alone.
            layers: K names; the bits of kinds that the profile does not count cost nothing.
            calls: the timestep of each call of the denoiser.
        """
        of_timestep = Counter(calls)

        # Profile `paper` counts no products of attention, and holds some kinds at 32 bits.
        free = (*KEPT_BY_PAPER, OPERAND_KIND)
        one = torch.tensor(
            [
                0.0
                if kind_of(name) in free
                else counts.of(name) * weight_bits.get(layer_of(name), FULL_PRECISION)
                for name in layers
            ],
            dtype=torch.float64,
        ) / (FULL_PRECISION**2 * 1e12)
        untouched = {**base_bits, **dict.fromkeys(layers, FULL_PRECISION)}
        call = call_bitops(counts, weight_bits.get, untouched.get, "paper")
        fixed = call - FULL_PRECISION * float(one.sum())
        times = torch.tensor(list(of_timestep.values()), dtype=torch.float64)
        return cls(times[:, None] * one, len(calls) * fixed, "BitOPs (T, paper)")


@torch.no_grad()
def thresholds(q2b: Q2B, quality: Tensor, timesteps: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The shifts of p_q's logit from which on each width leaves low, and from which on it is high.

    In terms of r = p_q / (1 - p_q), a = p_m and b = p_h a width is low as long as
    r < min((1 - 2a) / (1 - b), (1 - a) / b), and high from max(a / (2b - 1), (1 - a) / b) on where b > 1/2.

    Args:
        q2b: in float64.
        quality: `(P,)` float64.
        timesteps: S timesteps of the scheduler.

    Returns:
        Two tensors `(P, S, K)`: minus infinity where the width is so at every shift, infinity where never.
        In the first steps with p_q = 1 nothing depends on a shift.
    """
    steps = torch.tensor([q2b.step_of(t) for t in timesteps], device=quality.device)
    a = torch.sigmoid(q2b.medium_logit)[steps // q2b.group]
    b = torch.sigmoid(q2b.high_logit)[steps // q2b.group]
    crossing = (1 - a) / b
    leaves_low = torch.minimum((1 - 2 * a).clamp(min=0) / (1 - b), crossing)
    gets_high = torch.where(b > 0.5, torch.maximum(a / (2 * b - 1), crossing), torch.inf)
    logit = ((quality[:, None] - 0.5) * q2b.slope + q2b.offset)[:, None, :]
    low, high = leaves_low.log() - logit, gets_high.log() - logit
    early = (steps < q2b.early)[None, :, None]
    low = torch.where(early, -torch.inf, low)
    high = torch.where(early, torch.where(b > 0.5, -torch.inf, torch.inf).to(high), high)
    return low, torch.maximum(low, high)


def widths_at(low: Tensor, high: Tensor, menu: tuple[int, int, int], shift: float | Tensor = 0.0) -> Tensor:
    """The widths `(P, S, K)` uint8 at a shift; what `q2b.choose` gives there, but for ties.

    Args:
        low: the first of `thresholds`.
        high: the second.
        menu: the three widths.
        shift: one number, or `(P, 1, 1)`.
    """
    chosen = (low < shift).long() + (high < shift).long()
    return torch.tensor(menu, dtype=torch.uint8)[chosen]


def widths_for(
    low: Tensor, high: Tensor, menu: tuple[int, int, int], cost: LinearCost, target: float
) -> Tensor:
    """The widths `(P, S, K)` uint8 whose mean cost over P prompts is nearest to `target`.

    Decisions are taken in the order of their thresholds, equal ones in the order of prompts, steps and
    layers: plans of a greater target hold those of a smaller one.

    Raises:
        BitsError: the target lies outside of what the menu can cost.
    """
    prompts = len(low)
    steps_up = torch.tensor([menu[1] - menu[0], menu[2] - menu[1]], dtype=torch.float64)
    at = torch.stack([low, high]).flatten()
    price = (steps_up[:, None, None, None] * cost.per_bit / prompts).expand(2, *low.shape).flatten()
    order = at.argsort(stable=True)
    order = order[at[order] < torch.inf]
    always = int((at == -torch.inf).sum())
    start = float(cost.of(torch.full((1, *low.shape[1:]), menu[0])))
    reached = start + torch.cat([torch.zeros(1, dtype=torch.float64), price[order].cumsum(0)])[always:]
    least, most = float(reached[0]), float(reached[-1])
    slack = 1e-9 * max(abs(most), 1.0)
    if not least - slack <= target <= most + slack:
        raise BitsError(
            f"a budget of {cost.unit} {target:.6g}: this controller with its menu {menu} reaches {least:.6g} to "
            f"{most:.6g} here"
        )
    taken = order[: always + int((reached - target).abs().argmin())]
    chosen = torch.zeros(at.numel(), dtype=torch.long)
    chosen[taken] = 1
    return torch.tensor(menu, dtype=torch.uint8)[chosen.reshape(2, *low.shape).sum(0)]


def shift_for(
    low: Tensor, high: Tensor, menu: tuple[int, int, int], cost: LinearCost, target: float
) -> float:
    """The shift at which the mean cost over P prompts is nearest to `target`; see `widths_for`.

    Raises:
        BitsError: the target lies outside of what the menu can cost.
    """
    bits = widths_for(low, high, menu, cost, target)
    taken = torch.stack([(bits > menu[0]), (bits > menu[1])])
    at = torch.stack([low, high])
    finite = at.isfinite()
    below = at[taken & finite]
    above = at[~taken & finite]
    if not len(below) or not len(above):
        edge = float(below.max() if len(below) else above.min()) if bool(finite.any()) else 0.0
        return edge + (1.0 if len(below) else -1.0)
    return float((below.max() + above.min()) / 2)


class Costs(Protocol):
    """What the plans of the generation at hand cost; counted only where it is asked for."""

    def bitops(self) -> LinearCost:
        """BitOPs, profile `paper`, of one prompt."""
        ...

    def base_bitops(self) -> float:
        """BitOPs, profile `paper`, of the base at its own widths."""
        ...

    @property
    def calls(self) -> Sequence[float]:
        """The timesteps of the generation's calls, in order."""
        ...


def resolved(budget: Budget, costs: Costs, steps: int, layers: int) -> tuple[LinearCost, float]:
    """The cost that a budget is about, and its target in that cost's unit."""
    if budget.fab is not None:
        return LinearCost.fab(steps, layers), budget.fab
    if budget.bitops is not None:
        return costs.bitops(), budget.bitops
    assert budget.relative is not None  # the schema has exactly one
    bitops, base = costs.bitops(), costs.base_bitops()
    return LinearCost(
        bitops.per_bit / base, bitops.fixed / base, "BitOPs, relative to the base,"
    ), budget.relative


@torch.no_grad()
def widths_within(
    q2b: Q2B,
    quality: Tensor,
    population: Tensor,
    timesteps: tuple[float, ...],
    menu: tuple[int, int, int],
    budget: Budget,
    costs: Costs,
) -> Tensor:
    """The widths `(P, S, K)` uint8 of P prompts within a budget.

    Args:
        q2b: in float64.
        quality: `(P,)` float64.
        population: `(R,)` float64, qualities that stand for all prompts.
        timesteps: S timesteps of the scheduler.
        menu: the three widths.
        budget: asked for.
        costs: of the generation at hand.

    Raises:
        BitsError: the budget lies outside of what the menu can cost, or is to be met by the population's
            mean and there is none.
    """
    cost, target = resolved(budget, costs, len(timesteps), len(q2b.slope))
    low, high = thresholds(q2b, quality, timesteps)
    if budget.per == "batch":
        return widths_for(low, high, menu, cost, target)
    if budget.per == "prompt":
        rows = zip(low.split(1), high.split(1), strict=True)
        return torch.cat([widths_for(one_low, one_high, menu, cost, target) for one_low, one_high in rows])
    if not len(population):
        raise BitsError(
            "the controller does not say which qualities its prompts have, so no mean over them can be met: ask for "
            "`per: prompt` or `per: batch` (--budget relative=0.8,per=batch)"
        )
    return widths_at(low, high, menu, shift_for(*thresholds(q2b, population, timesteps), menu, cost, target))
