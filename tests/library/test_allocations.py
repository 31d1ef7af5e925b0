"""Controls: what each is made of, at the cost of the plan it is compared with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlip_plugins.allocations import CONTROLS, Situation, made
from qlip_plugins.budget import LinearCost, thresholds, widths_at
from qlip_plugins.cli import main
from qlip_plugins.errors import RecipeError
from qlip_plugins.evaluation.run import Run
from qlip_plugins.evaluation.wanted import Wanted, alike
from qlip_plugins.plan import BitPlan
from qlip_plugins.q2b import Q2B
from qlip_plugins.recipe import Budget
from qlip_plugins.sensitivity import Sensitivity

MENU = (4, 6, 8)
TIMESTEPS = tuple(float(t) for t in range(5, 0, -1))
LAYERS = tuple("abcdef")
PROMPTS = 12


@pytest.fixture
def situation() -> Situation:
    generator = torch.Generator().manual_seed(0)
    q2b = Q2B(6, TIMESTEPS).double()
    with torch.no_grad():
        for parameter in q2b.parameters():
            parameter.normal_(generator=generator)
        q2b.slope.copy_(torch.linspace(-2, -1, 6))
    quality = torch.rand(PROMPTS, generator=generator).double()
    bits = widths_at(*thresholds(q2b, quality, TIMESTEPS), MENU)
    plan = BitPlan(bits, TIMESTEPS, LAYERS, tuple(quality.tolist()))
    errors = torch.rand(1, 5, 6, 3, generator=generator).sort(descending=True).values
    table = Sensitivity(errors, ("p",), TIMESTEPS, LAYERS, MENU, "f", "r", "p", 1.0, 0.0)
    cost = LinearCost(torch.rand(5, 6, generator=generator).double(), 1.0, "a unit")
    clusters = [f"c{row // 3}" for row in range(PROMPTS)]
    return Situation(plan, cost, MENU, clusters, table, q2b)


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_costs_the_same(situation: Situation, name: str) -> None:
    plan = made(name, situation)
    # A mixture can only change whole prompts, a constant quality only what it can reach.
    slack = {"mixture": 1 / PROMPTS, "constant-q": 0.02}.get(name, 0.005)
    assert float(situation.cost.of(plan.bits).mean()) == pytest.approx(situation.target, rel=slack)
    assert set(plan.bits.unique().tolist()) <= set(MENU)
    assert plan.prompts in (1, PROMPTS)
    assert made(name, situation).digest() == plan.digest()


def test_what_ignores_the_prompt_is_one_plan(situation: Situation) -> None:
    for name in ("sensitivity", "step-only", "layer-only", "constant-q", "A5"):
        assert made(name, situation).prompts == 1
    assert made("A5", situation).bits.unique().tolist() == [5]
    step_only = made("step-only", situation).bits[0]
    layer_only = made("layer-only", situation).bits[0]
    # All but the group in which the budget ends are of one width.
    assert sum(len(row.unique()) > 1 for row in step_only) <= 1
    assert sum(len(column.unique()) > 1 for column in layer_only.T) <= 1


def test_constant_quality_is_a_plan_of_the_same_controller(situation: Situation) -> None:
    plan = made("constant-q", situation)
    assert situation.q2b is not None
    grid = torch.linspace(-1, 2, 3001).double()
    plans = widths_at(*thresholds(situation.q2b, grid, TIMESTEPS), MENU)
    assert bool((plans == plan.bits).flatten(1).all(1).any())


def test_shuffled_gives_every_prompt_another_concept_s_plan(situation: Situation) -> None:
    plan = made("shuffled", situation)
    names = list(situation.clusters)
    for row, bits in enumerate(plan.bits):
        donors = [other for other in range(PROMPTS) if torch.equal(situation.plan.bits[other], bits)]
        assert any(names[other] != names[row] for other in donors)
    assert sorted(row.tolist() for row in plan.bits.flatten(1)) == sorted(
        row.tolist() for row in situation.plan.bits.flatten(1)
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sensitive", {}, "did you mean 'sensitivity'"),
        ("A25", {}, "from 2 to 24"),
        ("sensitivity", {"table": None}, "needs --sensitivity FILE"),
        ("constant-q", {"q2b": None}, "does not go by a predicted quality"),
        ("shuffled", {"clusters": ["one"] * PROMPTS}, "most prompts are of one concept"),
    ],
)
def test_what_cannot_be_made_is_refused(
    situation: Situation, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        made(name, replace(situation, **changes))


def test_evaluate_compares_them_at_each_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchmetrics", reason="extra `evaluation`")
    pytest.importorskip("matplotlib", reason="extra `evaluation`")
    rows = [{"prompt": f"row {row}", "concept": f"c{row // 2}"} for row in range(1, 7)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    shared = ("--prompts", str(prompts), "--steps", "2", "--guidance", "1")
    table = tmp_path / "s.safetensors"
    assert main(["sensitivity", "golden-w4a8", *shared, "--out", str(table), "--batch-size", "6"]) == 0
    controller = Path("recipes/qlip_recipes/golden_w4a8/controller").resolve()
    names = ["base", "A8", "recipe", "mixture", "random", "shuffled", "constant-q", "sensitivity", "other"]
    command = [
        *("evaluate", "golden-w4a8", *shared, "--out", str(tmp_path / "run"), "--seeds", "1"),
        *("--skip", "own", "--skip", "pictures", "--sensitivity", str(table)),
        *(
            "--budget",
            "fab=12,per=batch",
            "--budget",
            "fab=14,per=prompt",
            "--controller",
            f"other={controller}",
        ),
        *("--allocations", ",".join([*names, "constant-q of other"])),
    ]
    assert main(command) == 0
    assert "error_own" not in capsys.readouterr().out
    run = Run.load(tmp_path / "run")
    assert any("costs" in note and "its nearest plan" in note for note in run.facts["notes"]), (
        "6 prompts mix coarsely"
    )
    known = run.facts["allocations"]
    assert {
        "base",
        "A8",
        "recipe@fab=12 per batch",
        "recipe@fab=14 per prompt",
        "other@fab=12 per batch",
    } <= set(known)
    for budget in ("fab=12 per batch", "fab=14 per prompt"):
        cost = run.of(f"recipe@{budget}")["bitops_paper"].mean()
        for name in (*names[4:], "constant-q of other"):
            ours = run.of(f"{name}@{budget}")["bitops_paper"].mean()
            assert float(ours) == pytest.approx(float(cost), rel=0.03), name
    assert float(run.of("recipe@fab=14 per prompt")["fab"].max()) == pytest.approx(14, abs=0.1)
    assert float(run.of("A8")["fab"].mean()) == 8
    for wrong, message in (
        (["--allocations", "elsewhere,other"], "no allocation 'elsewhere'"),
        (["--controller", f"base={controller}"], "has a meaning already"),
        (["--controller", "other"], "expected NAME=FOLDER"),
        (["--controller", f"other={controller}"], "given twice"),
        (["--controller", f"unused={controller}"], "no allocation uses it"),
        (["--budget", "fab=12,per=batch"], "would write the same files"),
        (["--features", "demo", "--pictures", "2"], "leave out --features, --pictures"),
        (["--guidance", "3"], "measured at guidance 1 and eta 0, here are 3 and 0"),
    ):
        assert main([*command, *wrong, "--out", str(tmp_path / "none")]) in (2, 4)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(("base", "full-precision"), controllers={"full-precision": Path("c")}),
        Wanted(("recipe",), (Budget(fab=12), Budget(fab=12.0000001))),
        Wanted(
            ("constant-q of a", "constant-q-of-a"), controllers={"a": Path("c"), "constant-q-of-a": Path("d")}
        ),
    ],
)
def test_names_that_would_share_their_files_are_refused(wanted: Wanted) -> None:
    with pytest.raises(RecipeError, match="would write the same files"):
        wanted.check()


def test_equal_plans_under_two_names_are_told() -> None:
    one = BitPlan(torch.full((1, 2, 3), 8, dtype=torch.uint8), (2.0, 1.0), ("a", "b", "c"))
    other = BitPlan(one.bits + 8, one.timesteps, one.layers)
    assert alike({"x": one, "y": other, "z": one}) == ["x and z are the same plan"]
