"""What `qlip-plugins export-policy` does: a controller collapsed to a step policy, and what the collapse costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import RecipeError
from .evaluation.errors import Batch, Judges, Measuring, Pair, paired
from .generation import Settings, load_pipeline, placed
from .metrics import mean_cost
from .plan import BitPlan
from .recipe import FULL_PRECISION, Recipe
from .step_policy import collapsed


@dataclass(frozen=True)
class PolicyRequest:
    """What is to be exported.

    Args:
        recipe: whose plans are collapsed.
        prompts: whose mean plan it is.
        settings: how to sample.
        native: the width of the steps that the policy leaves to the checkpoint's quantizers.
        a16: the width that stands for 16-bit activations.
        measured: on how many of the prompts, the first, errors are measured.
        out: JSON file to write.
    """

    recipe: Recipe
    prompts: Sequence[str]
    settings: Settings
    native: int
    a16: int
    measured: int
    out: Path


def export_policy(what: PolicyRequest) -> dict[str, Any]:
    """Collapse, measure and write.

    Returns:
        The policy, and for the recipe's plans, the policy and the base FAB, BitOPs and the error of the
        prediction, led along full precision.

    Raises:
        RecipeError: widths or numbers that make no policy.
        QlipError: as of `evaluate`.
    """
    if not 2 <= what.native < what.a16 <= FULL_PRECISION or what.measured < 1 or what.out.is_dir():
        raise RecipeError(
            f"--native {what.native}, --a16 {what.a16}, --measure {what.measured}, --out {what.out}: expected 2 to 32 "
            "bits, the first below the second, at least one prompt to measure, and a file"
        )
    pipe = placed(load_pipeline(what.recipe), what.settings)
    with paired(pipe, what.recipe, what.prompts, what.settings) as pair:
        plan, controller = pair.recipe_plan, pair.controller
        counts, calls = controller.counts(), list(controller.costs().calls)
        weights = torch.tensor([counts.of(name) for name in plan.layers], dtype=torch.float64)
        policy = collapsed(plan, calls, weights, what.native, what.a16)
        plans = {
            "recipe": plan,
            "policy": policy.plan(calls, plan.layers, what.native, what.a16),
            "base": pair.base_plan,
        }
        for name, one in plans.items():
            pair.check(name, one)
        facts = {
            "recipe": what.recipe.description,
            "prompts": len(what.prompts),
            "native": what.native,
            "a16": what.a16,
            "calls": len(calls),
            "costs are": "simulated: counted from the plans",
            "errors are": f"measured on {what.settings.device}, {min(what.measured, len(what.prompts))} prompts: mean "
            "squared difference of the prediction, along full precision",
            "plans": _judged(pair, plans, what.measured),
        }
    policy.save(what.out, facts)
    return {"policy": policy.model_dump(mode="json"), **facts}


def _judged(pair: Pair, plans: dict[str, BitPlan], measured: int) -> dict[str, dict[str, Any]]:
    rows = range(min(measured, len(pair.prompts.prompts)))
    measuring = Measuring(pair, Judges({}, {}), Batch(0, rows), ("own", "pictures"))
    found = {}
    for name, plan in plans.items():
        cost = asdict(mean_cost(pair.costs(plan)))
        found[name] = {
            **{key: cost[key] for key in ("fab", "fab_mac_weighted", "bitops_paper")},
            "error_led": float(measuring.allocation(plan)["error_led"].mean()),
        }
    return found
