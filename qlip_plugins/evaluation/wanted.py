"""The plans that a user names: the base, the recipe's and other controllers' at each budget, and the controls."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..allocations import CONTROLS, Situation, made, static_width
from ..embeddings import MeanOfStates
from ..errors import IncompatibleModelError, RecipeError
from ..files import file_digest
from ..generation import Settings
from ..plan import BitPlan
from ..recipe import Budget, QlipController, Recipe
from ..sensitivity import Sensitivity
from ..text_to_bits import TRAINING_NAME, TextToBits
from .errors import Pair
from .run import FULL, file_name

_OF = " of "


@dataclass(frozen=True)
class Wanted:
    """What is to be allocated.

    Args:
        names: `base`, static widths such as `A6`, `recipe`, a name of `controllers`, a control of
            `qlip_plugins.allocations`, or `CONTROL of CONTROLLER`.
        budgets: at which the recipe's controller is compared with the others; none: as trained.
        controllers: name -> folder of another controller of the same base and widths.
        sensitivity: file, for controls that are solved from it.
    """

    names: Sequence[str]
    budgets: Sequence[Budget] = ()
    controllers: Mapping[str, Path] | None = None
    sensitivity: Path | None = None

    def check(self) -> None:
        """Check that each name stands for one allocation with files of its own, and that every controller has one.

        Raises:
            RecipeError: it is not so.
        """
        budgets: Sequence[Budget | None] = self.budgets or [None]
        titles = [FULL] + [
            title(name, None if _is_fixed(name) else budget, len(self.budgets))
            for name in self.names
            if name != FULL
            for budget in (budgets[:1] if _is_fixed(name) else budgets)
        ]
        files = Counter(map(file_name, titles))
        twice = [one for one in titles if files[file_name(one)] > 1]
        if twice:
            raise RecipeError(
                f"--allocations: {' and '.join(map(repr, twice))} would write the same files: name each once, and each "
                "budget"
            )
        owners = {name.rpartition(_OF)[2] for name in self.names}
        for name, folder in (self.controllers or {}).items():
            if _is_reserved(name):
                raise RecipeError(f"--controller {name}={folder}: the name has a meaning already")
            if name not in owners:
                raise RecipeError(
                    f"--controller {name}={folder}: no allocation uses it, name {name!r} in --allocations"
                )


def _is_fixed(name: str) -> bool:
    """Whether an allocation has a cost of its own, whatever the budget."""
    return name == "base" or static_width(name) is not None


def _is_reserved(name: str) -> bool:
    return name in ("recipe", FULL, *CONTROLS) or _is_fixed(name) or _OF in name


def alike(plans: Mapping[str, BitPlan]) -> list[str]:
    """Remarks on allocations that are the same plan under two names, as fitted controls can be."""
    by_plan: dict[str, list[str]] = {}
    for name, plan in plans.items():
        # One row for all prompts, or the same row for each, is the same plan.
        alone = plan.only(0) if bool((plan.bits == plan.bits[:1]).all()) else plan
        by_plan.setdefault(alone.digest(), []).append(name)
    return [f"{' and '.join(names)} are the same plan" for names in by_plan.values() if len(names) > 1]


def title(name: str, budget: Budget | None, number: int) -> str:
    """The name of an allocation at one of `number` budgets: with more than one, NAME@KIND=AMOUNT."""
    if budget is None or number < 2:
        return name
    (kind, amount), *_ = budget.model_dump(exclude_none=True, exclude={"per"}).items()
    per = "" if budget.per == "population" else f" per {budget.per}"
    return f"{name}@{kind}={amount:g}{per}"


def described(
    wanted: Wanted, recipe: Recipe, prompts: Sequence[str], settings: Settings
) -> tuple[dict[str, Any], list[str]]:
    """What was asked for, with the digests of the files it names; and notes on what a part was made from."""
    notes = []
    known = set(prompts)
    facts: dict[str, Any] = {
        "names": list(wanted.names),
        "budgets": [budget.model_dump(exclude_none=True) for budget in wanted.budgets],
        "controllers": {
            name: TextToBits.from_pretrained(folder).digest()
            for name, folder in (wanted.controllers or {}).items()
        },
        "sensitivity": None,
    }
    if wanted.sensitivity is not None:
        facts["sensitivity"] = file_digest(wanted.sensitivity)
        shared = len(known & set(Sensitivity.load(wanted.sensitivity).prompts))
        if shared:
            notes.append(f"{shared} of these prompts are among those that the sensitivities were measured on")
    folders = dict(wanted.controllers or {})
    if isinstance(recipe.controller, QlipController):
        folders["recipe"] = recipe.controller.path
    for name, folder in folders.items():
        if (folder / TRAINING_NAME).is_file():
            record = json.loads((folder / TRAINING_NAME).read_text("utf-8"))
            notes += _remarks(name, record, known, settings)
    return facts, notes


def _remarks(name: str, record: Mapping[str, Any], prompts: set[str], settings: Settings) -> list[str]:
    """What `training.json` of a controller says against this use of it."""
    notes = []
    shared = len(prompts & set(record["prompts"]))
    if shared:
        notes.append(f"{shared} of these prompts are among those that {name!r} was trained on")
    for key in ("steps", "guidance_scale"):
        made, here = record["settings"][key], getattr(settings, key)
        if made != here:
            notes.append(f"{name!r} was made for {key} {made:g}, here it is {here:g}")
    return notes


def allocations_of(pair: Pair, wanted: Wanted, clusters: Sequence[str]) -> dict[str, BitPlan]:
    """The plans that a user names, each of all prompts or of one for all.

    At each budget all but `base` and static widths have the mean cost (BitOPs, profile `paper`) that the
    recipe's own plans of these prompts have.

    Args:
        pair: the models, with the recipe's plan and the base's.
        wanted: what is named.
        clusters: the concept of each prompt.

    Raises:
        RecipeError: a name is unknown, or lacks what it is made from.
        IncompatibleModelError: a controller or the sensitivities do not belong to the base.
        BitsError: a cost is out of reach.
    """
    maker = _Maker(pair, wanted, clusters)
    found: dict[str, BitPlan] = {}
    fixed = [name for name in wanted.names if _is_fixed(name)]
    for name in fixed:
        found[name] = pair.base_plan if name == "base" else made(name, maker.situation(pair.recipe_plan))
    others = [name for name in wanted.names if name not in (*fixed, FULL)]
    budgets: Sequence[Budget | None] = wanted.budgets or [None]
    for budget in budgets:
        recipe_plan = maker.recipe_plan(budget)
        for name in others:
            found[title(name, budget, len(wanted.budgets))] = maker.made(name, recipe_plan)
    return found


class _Maker:
    def __init__(self, pair: Pair, wanted: Wanted, clusters: Sequence[str]) -> None:
        self._pair = pair
        self._clusters = clusters
        self._costs = pair.controller.costs()
        self._bitops = self._costs.bitops()
        section, self._own = pair.recipe.controller, None
        state = pair.controller.state
        layers = pair.recipe_plan.layers
        if isinstance(section, QlipController):
            self._own = TextToBits.from_pretrained(section.path)
        elif wanted.budgets:
            raise RecipeError(
                f"--budget: needs a recipe with a controller of kind qlip, this one is {section.kind}, with fixed bits"
            )
        self._others = {}
        for name, folder in (wanted.controllers or {}).items():
            other = TextToBits.from_pretrained(folder)
            other.check_made_for(state.fingerprint, pair.recipe.activation_bits, layers)
            other.check_order(layers)
            self._others[name] = other
        self._table = None
        if wanted.sensitivity is not None:
            self._table = Sensitivity.load(wanted.sensitivity)
            where = wanted.sensitivity
            self._table.check_made_for(where, state, pair.controller.ranges, layers)
            self._table.check_measured_on(where, pair.teacher, pair.settings, pair.recipe_plan.timesteps)

    def recipe_plan(self, budget: Budget | None) -> BitPlan:
        """The recipe's own plan of all prompts."""
        if budget is None or self._own is None:
            return self._pair.recipe_plan
        return self._own.plan(self._embeddings(self._own), self._timesteps, budget, self._costs)

    @property
    def _timesteps(self) -> tuple[float, ...]:
        return self._pair.recipe_plan.timesteps

    def _embeddings(self, controller: TextToBits) -> Tensor:
        prompts = self._pair.prompts
        if controller.config.pooling == "mean" != prompts.pooling:
            return MeanOfStates().embed(prompts.conditioning)
        if controller.config.pooling != prompts.pooling:
            raise IncompatibleModelError(
                f"a controller reads embeddings of pooling {controller.config.pooling!r}, these prompts have "
                f"{prompts.pooling!r}"
            )
        return prompts.embeddings.double()

    def situation(self, plan: BitPlan, own: TextToBits | None = None) -> Situation:
        """What controls of a plan are made from."""
        return Situation(
            plan=plan,
            cost=self._bitops,
            menu=self._pair.recipe.activation_bits.widths,
            clusters=self._clusters,
            table=self._table,
            q2b=None if own is None else own.q2b,
        )

    def made(self, name: str, recipe_plan: BitPlan) -> BitPlan:
        """An allocation at the cost of the recipe's plan."""
        if name == "recipe":
            return recipe_plan
        control, of, owner = name.partition(_OF)
        if not of and name not in self._others:
            return made(name, self.situation(recipe_plan, self._own))
        owner = owner or name
        if owner not in self._others:
            raise RecipeError(f"--allocations {name}: no controller {owner!r} (--controller {owner}=FOLDER)")
        other = self._others[owner]
        target = self.situation(recipe_plan).target
        equal = Budget(bitops=target, per="batch")
        plan = other.plan(self._embeddings(other), self._timesteps, equal, self._costs)
        return plan if not of else made(control, self.situation(plan, other))
