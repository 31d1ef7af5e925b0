"""Allocations that a controller has to beat: plans made without the prompt, or with the wrong one, at a cost.

All that is fitted here comes from a table of sensitivities measured on training prompts; the prompts at hand
are only what the cost is counted over. See docs/evaluation.md, Controls.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .budget import LinearCost, shift_for, thresholds, widths_at, widths_for
from .errors import BitsError, RecipeError
from .plan import BitPlan
from .q2b import Q2B
from .recipe import FULL_PRECISION
from .schema import nearest
from .sensitivity import Sensitivity, log_prices

_STATIC = re.compile(r"A(\d+)")
_SEED = 0
_LOOKS, _REFINEMENTS = 60, 3
_MOST_MISSED = 0.02
_WIDTHS = (*range(2, 25), FULL_PRECISION)


@dataclass(frozen=True)
class Situation:
    """What controls are made from.

    Args:
        plan: what they are compared with, of n prompts; its mean cost is theirs.
        cost: of a plan's decisions.
        menu: the three widths.
        clusters: the concept of each prompt.
        table: sensitivities measured on training prompts, or None.
        q2b: of the controller that made the plan from predicted qualities, or None.
    """

    plan: BitPlan
    cost: LinearCost
    menu: tuple[int, int, int]
    clusters: Sequence[str]
    table: Sensitivity | None = None
    q2b: Q2B | None = None

    @property
    def target(self) -> float:
        """The mean cost of the plan."""
        return float(self.cost.of(self.plan.bits).mean())

    def with_bits(self, bits: Tensor) -> BitPlan:
        """A plan of the same decisions with other widths `(P, S, K)`."""
        return replace(self.plan, bits=bits.to(torch.uint8), quality=None)


def static(what: Situation, width: int) -> BitPlan:
    """Every decision at one width."""
    return what.with_bits(torch.full_like(what.plan.bits[:1], width))


def mixture(what: Situation) -> BitPlan:
    """Every prompt at one of two neighbouring widths of the menu, drawn by chance, as many as the cost allows."""
    prompts = len(what.plan.bits)
    fixed = [float(what.cost.of(static(what, width).bits)) for width in what.menu]
    upper = 1 if what.target <= fixed[1] else 2
    span = fixed[upper] - fixed[upper - 1]
    count = round((what.target - fixed[upper - 1]) / span * prompts)
    chosen = torch.randperm(prompts, generator=torch.Generator().manual_seed(_SEED))[: max(count, 0)]
    bits = torch.full_like(what.plan.bits, what.menu[upper - 1])
    bits[chosen] = what.menu[upper]
    return what.with_bits(bits)


def by_chance(what: Situation) -> BitPlan:
    """Every decision by chance, for each prompt anew; low, medium and high mixed as the cost allows."""
    generator = torch.Generator().manual_seed(_SEED)
    first, second = (
        torch.rand(what.plan.bits.shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    return what.with_bits(widths_for(low, high, what.menu, what.cost, what.target))


def solved(what: Situation, over: tuple[int, ...] = ()) -> BitPlan:
    """The plan, one for all prompts, of least summed sensitivity at the cost.

    Args:
        what: with a table of sensitivities.
        over: axes along which a decision is shared: 0 steps, 1 quantizers.
    """
    assert what.table is not None  # `made` sees to it
    errors = what.table.of_menu(what.menu).mean(0)
    per_bit = what.cost.per_bit
    for axis in over:
        errors, per_bit = errors.sum(axis, keepdim=True), per_bit.sum(axis, keepdim=True)
    shared = LinearCost(per_bit, what.cost.fixed, what.cost.unit)
    first, second = log_prices(errors, shared, what.menu)
    steps, layers = what.cost.per_bit.shape
    low, high = (-prices.expand(steps, layers)[None] for prices in (first, second))
    return what.with_bits(widths_for(low, high, what.menu, what.cost, what.target))


def same_quality(what: Situation) -> BitPlan:
    """The controller's plan at one quality for all prompts: the quality that costs the same, the dial as it is."""
    assert what.q2b is not None  # `made` sees to both
    assert what.plan.quality is not None
    q2b, timesteps = copy.deepcopy(what.q2b).double(), what.plan.timesteps
    known = torch.tensor(what.plan.quality, dtype=torch.float64)
    shift = shift_for(*thresholds(q2b, known, timesteps), what.menu, what.cost, what.target)

    def widths(quality: Tensor) -> Tensor:
        return widths_at(*thresholds(q2b, quality, timesteps), what.menu, shift)

    span = float(known.max() - known.min()) + 1e-3
    low, high, best = float(known.min()) - span, float(known.max()) + span, 0.0
    # The cost need not be monotone in the quality, slopes can have both signs: a grid, then a finer one.
    for _ in range(_REFINEMENTS):
        grid = torch.linspace(low, high, _LOOKS, dtype=torch.float64)
        best = float(grid[(what.cost.of(widths(grid)) - what.target).abs().argmin()])
        reach = (high - low) / (_LOOKS - 1)
        low, high = best - reach, best + reach
    bits = widths(torch.tensor([best], dtype=torch.float64))
    missed = float(what.cost.of(bits).mean()) / what.target - 1
    if abs(missed) > _MOST_MISSED:
        raise BitsError(
            f"constant-q: no single quality costs what the prompts' plans do; the nearest, {best:.3f}, is off by "
            f"{missed:.1%}"
        )
    return what.with_bits(bits)


def shuffled(what: Situation) -> BitPlan:
    """The plans of the prompts, each given to a prompt of another concept."""
    names = list(what.clusters)
    # By chance: concepts that stand side by side in an alphabet can look alike.
    drawn = sorted(set(names))
    random.Random(_SEED).shuffle(drawn)
    place = {name: number for number, name in enumerate(drawn)}
    order = sorted(range(len(names)), key=lambda row: (place[names[row]], row))
    most = max(names.count(name) for name in set(names))
    if 2 * most > len(names):
        raise RecipeError(
            "--allocations shuffled: most prompts are of one concept, so plans cannot change concepts"
        )
    # Grouped by concept, a turn by the largest concept's size meets no prompt of the same one.
    turned = order[most:] + order[:most]
    rows = torch.empty(len(names), dtype=torch.long)
    rows[order] = torch.tensor(turned)
    return what.with_bits(what.plan.bits[rows])


_OF_TABLE: Mapping[str, tuple[int, ...]] = {"sensitivity": (), "step-only": (1,), "layer-only": (0,)}
_OTHERS: Mapping[str, Callable[[Situation], BitPlan]] = {
    "mixture": mixture,
    "random": by_chance,
    "shuffled": shuffled,
}
CONTROLS = (*_OTHERS, *_OF_TABLE, "constant-q")
"""Names of controls that meet the cost of the recipe's plans."""


def static_width(name: str) -> int | None:
    """The width of an allocation `A6`; None for another name."""
    found = _STATIC.fullmatch(name)
    return int(found[1]) if found else None


def made(name: str, what: Situation) -> BitPlan:
    """A control.

    Args:
        name: one of `CONTROLS`, or `A` with a width.
        what: it is made from.

    Raises:
        RecipeError: there is no such control, or it lacks what it is made from.
        BitsError: it cannot meet the cost.
        IncompatibleModelError: a width of the menu is missing in the table.
    """
    width = static_width(name)
    if width is not None:
        if width not in _WIDTHS:
            raise RecipeError(f"--allocations {name}: expected a width from 2 to 24, or {FULL_PRECISION}")
        return static(what, width)
    if name in _OTHERS:
        return _OTHERS[name](what)
    if name in _OF_TABLE:
        if what.table is None:
            raise RecipeError(f"--allocations {name}: needs --sensitivity FILE (`qlip-plugins sensitivity`)")
        return solved(what, _OF_TABLE[name])
    if name != "constant-q":
        raise RecipeError(
            f"--allocations: no allocation {name!r}{nearest(name, ['base', 'recipe', *CONTROLS])} (known: base, "
            f"recipe, {', '.join(CONTROLS)}, and static widths such as A6)"
        )
    if what.q2b is None or what.plan.quality is None:
        raise RecipeError(f"--allocations {name}: the recipe's controller does not go by a predicted quality")
    return same_quality(what)
