"""The budget dial: thresholds, exactness, monotony, and the way from a recipe to a report."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlip_plugins.budget import LinearCost, shift_for, thresholds, widths_at, widths_for
from qlip_plugins.cli import main
from qlip_plugins.controller import apply
from qlip_plugins.errors import BitsError, RecipeError
from qlip_plugins.generation import Settings, load_pipeline, sample
from qlip_plugins.q2b import Q2B, choose
from qlip_plugins.recipe import Budget, Recipe, StaticController

MENU = (4, 6, 8)
STEPS = (900.0, 600.0, 300.0, 1.0)


def random_q2b(seed: int, layers: int = 7, group: int = 1, early: int = 0) -> Q2B:
    generator = torch.Generator().manual_seed(seed)
    q2b = Q2B(layers, STEPS, group, early)
    for parameter in q2b.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 3
    return q2b.double()


def chosen(q2b: Q2B, quality: Tensor, shift: float = 0.0) -> Tensor:
    q2b.offset.data += shift
    bits = torch.tensor(MENU, dtype=torch.uint8)[choose(q2b(quality, STEPS))]
    q2b.offset.data -= shift
    return bits


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_say_what_q2b_chooses_at_every_shift(seed: int) -> None:
    q2b = random_q2b(seed, group=1 + seed % 3, early=seed % 2)
    quality = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    low, high = thresholds(q2b, quality, STEPS)
    for shift in (-30.0, -4.0, -1.0, 0.0, 0.5, 3.0, 30.0):
        assert torch.equal(widths_at(low, high, MENU, shift), chosen(q2b, quality, shift))


def test_a_neutral_controller_is_medium_until_it_is_turned() -> None:
    q2b = Q2B(2, STEPS).double()
    low, high = thresholds(q2b, torch.tensor([0.7], dtype=torch.float64), STEPS)
    for shift in (-20.0, 0.0, 20.0):
        assert widths_at(low, high, MENU, shift).unique().tolist() == [6]


def prefix_costs(low: Tensor, high: Tensor, cost: LinearCost) -> list[float]:
    """The mean cost after each decision, taken one by one in their order; written out, for the test."""
    bits = torch.full(low.shape, MENU[0], dtype=torch.uint8)
    order = sorted(
        itertools.product(range(2), *map(range, low.shape)),
        key=lambda at: float((low, high)[at[0]][at[1:]]),
    )
    found = [float(cost.of(bits).mean())]
    for rise, *where in order:
        if (low, high)[rise][tuple(where)] == torch.inf:
            break
        bits[tuple(where)] = MENU[rise + 1]
        found.append(float(cost.of(bits).mean()))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_is_met_to_the_nearest_attainable_cost(seed: int) -> None:
    q2b = random_q2b(seed, layers=3)
    quality = torch.tensor([0.2, 0.9], dtype=torch.float64)
    low, high = thresholds(q2b, quality, STEPS)
    macs = torch.rand(len(STEPS), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cost = LinearCost(macs, 1.5, "T")
    fixed = int((torch.stack([low, high]) == -torch.inf).sum())
    attainable = torch.tensor(prefix_costs(low, high, cost)[fixed:], dtype=torch.float64)
    ends = float(attainable[0]), float(attainable[-1])
    for target in torch.linspace(*ends, 17, dtype=torch.float64).tolist():
        got = float(cost.of(widths_for(low, high, MENU, cost, target)).mean())
        assert abs(got - target) <= float((attainable - target).abs().min()) + 1e-12


def test_more_budget_never_narrows_anything() -> None:
    low, high = thresholds(random_q2b(3), torch.linspace(0, 1, 9, dtype=torch.float64), STEPS)
    cost = LinearCost.fab(len(STEPS), 7)
    least, most = (float(cost.of(widths_at(low, high, MENU, end)).mean()) for end in (-1e9, 1e9))
    plans = [
        widths_for(low, high, MENU, cost, target)
        for target in torch.linspace(least, most, 30, dtype=torch.float64).tolist()
    ]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(plans))
    for plan, target in zip(
        plans, torch.linspace(least, most, 30, dtype=torch.float64).tolist(), strict=True
    ):
        # One shift cannot split decisions that are taken at the same one.
        shifted = widths_at(low, high, MENU, shift_for(low, high, MENU, cost, target))
        assert int((shifted != plan).sum()) <= 1


@pytest.mark.parametrize("target", [3.9, 8.1, float("nan")])
def test_a_budget_out_of_reach_is_refused_with_what_is_in_reach(target: float) -> None:
    low, high = thresholds(random_q2b(0), torch.tensor([0.5], dtype=torch.float64), STEPS)
    with pytest.raises(BitsError, match=r"FAB .* menu \(4, 6, 8\) reaches 4"):
        widths_for(low, high, MENU, LinearCost.fab(len(STEPS), 7), target)


@pytest.mark.parametrize(
    ("budget", "mean"),
    [("relative=0.92,per=batch", 0.92), ("relative=0.87,per=prompt", 0.87), ("fab=6.5,per=batch", 6.5)],
)
def test_a_budget_of_the_demo_shows_in_its_report(budget: str, mean: float) -> None:
    kind, amount = budget.split(",", maxsplit=1)[0].split("=")
    per = budget.rpartition("=")[2]
    wanted = Budget.model_validate({kind: float(amount), "per": per})
    recipe = Recipe.load("demo-qlip-468").within(wanted)
    pipe = load_pipeline(recipe)
    settings = Settings(steps=2, guidance_scale=3.0)
    prompts = ["rocket", "a castle on a hill"]
    with apply(pipe, recipe.model_copy(update={"controller": Recipe.load("demo-w4a8").controller})) as base:
        sample(pipe, recipe, prompts, settings)
        at_base = base.report().mean.bitops_paper
    with apply(pipe, recipe) as controller:
        sample(pipe, recipe, prompts, settings)
        report = controller.report()
    found = [
        cost.fab if kind == "fab" else cost.bitops_paper / at_base
        for cost in (report.prompts if per == "prompt" else [report.mean])
    ]
    assert found == pytest.approx([mean] * len(found), abs=0.02 if kind == "fab" else 2e-3)


def test_a_population_budget_gives_a_prompt_the_same_bits_in_any_batch() -> None:
    from qlip_plugins.text_to_bits import TextToBits

    recipe = Recipe.load("demo-qlip-468")
    assert recipe.controller.kind == "qlip"
    controller = TextToBits.from_pretrained(recipe.controller.path)
    controller.config = controller.config.model_copy(update={"population": (0.1, 0.4, 0.5, 0.8)})
    quality = torch.tensor([0.1, 0.4, 0.5, 0.8], dtype=torch.float64)
    budget = Budget(fab=5.5)
    steps = controller.config.timesteps
    plan = controller.plan_of(quality, steps, budget, NoCosts())
    assert sum(plan.fab()) / 4 == pytest.approx(5.5, abs=0.02)
    assert len(set(plan.fab())) == 4
    alone = controller.plan_of(quality[2:3], steps, budget, NoCosts())
    assert torch.equal(alone.bits[0], plan.bits[2])


class NoCosts:
    calls = ()

    def bitops(self) -> LinearCost:
        raise AssertionError("FAB needs no BitOPs")

    def base_bitops(self) -> float:
        raise AssertionError("FAB needs no BitOPs")


def test_without_a_population_its_budget_is_refused() -> None:
    from qlip_plugins.text_to_bits import TextToBits

    recipe = Recipe.load("demo-qlip-468")
    assert recipe.controller.kind == "qlip"
    controller = TextToBits.from_pretrained(recipe.controller.path)
    controller.config = controller.config.model_copy(update={"population": ()})
    with pytest.raises(BitsError, match="per: prompt"):
        controller.plan_of(
            torch.tensor([0.5], dtype=torch.float64), controller.config.timesteps, Budget(fab=5.5), NoCosts()
        )


def test_a_recipe_without_a_dial_refuses_a_budget() -> None:
    with pytest.raises(RecipeError, match="kind qlip"):
        Recipe.load("demo-w4a8").within(Budget(fab=5.0))


@pytest.mark.parametrize(
    "text", ["0.8", "relative=", "relative=0.8,fab=5", "fab=99", "relative=0.8,per=day", "relative=nan"]
)
def test_a_wrong_budget_is_a_usage_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "demo-qlip-468", "--prompt", "x", "--budget", text, "--out", str(tmp_path / "o")])
    assert stop.value.code == 2
    assert "--budget" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["base", "controlled"])
def test_the_linear_cost_is_the_cost_of_the_report(attention: str) -> None:
    """Also where attention's operands are steered, whose bits profile `paper` does not count."""
    recipe = Recipe.load("golden-w4a8-static").model_copy(
        update={"controller": StaticController(kind="static", bits=16), "attention": attention}
    )
    pipe = load_pipeline(recipe)
    with apply(pipe, recipe) as controller:
        sample(pipe, recipe, ["row 1"], Settings(steps=3, guidance_scale=2.0))
        plan = controller.plan
        assert plan is not None
        cost = controller.costs().bitops()
        generator = torch.Generator().manual_seed(0)
        drawn = torch.tensor([8, 16, 32])[torch.randint(3, plan.bits.shape, generator=generator)]
        (expected,) = controller.costs_of(replace(plan, bits=drawn.to(torch.uint8)))
    assert float(cost.of(drawn)) == pytest.approx(expected.bitops_paper, rel=1e-9)
