"""Forecasts agree with what generating does; step policies are written and read back equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from family_models import call_options, make, qlip_recipe
from qlip_plugins import Recipe, apply
from qlip_plugins.cli import main
from qlip_plugins.errors import ArtefactError, BitsError
from qlip_plugins.forecast import forecast
from qlip_plugins.generation import Settings, load_text_side
from qlip_plugins.plan import BitPlan
from qlip_plugins.recipe import PolicyController
from qlip_plugins.step_policy import StepPolicy, collapsed

PROMPTS = ["a red fox", "the quick brown dog"]
CALLS = [900.0, 700.0, 500.0, 300.0, 100.0]


def test_a_policy_counts_the_loop_s_own_iterations(tmp_path: Path) -> None:
    """Image to image starts late: its first steps are those that it takes."""
    pipe = make("sd", tmp_path)
    recipe = qlip_recipe("sd", pipe, tmp_path)
    StepPolicy.first_last(2, 0).save(tmp_path / "policy.json", {})
    section = PolicyController(kind="policy", path=tmp_path / "policy.json", native=4, a16=8)
    late = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    late.set_progress_bar_config(disable=True)
    with apply(late, recipe.model_copy(update={"controller": section})) as controller:
        options: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 8, "guidance_scale": 1.0}
        late(prompt="a fox", image=torch.rand(1, 3, 16, 16), output_type="latent", **options)
        plan, visits = controller.plan, controller.visits
    assert plan is not None
    taken = [float(t) for t in plan.timesteps if (t, 1) in visits]
    assert [int(plan.at(t).max()) for t in taken] == [8, 8, 4, 4]


@pytest.mark.parametrize("name", ["sd", "bk-sdm", "sdxl"])
def test_a_forecast_is_what_generating_does(name: str, tmp_path: Path) -> None:
    pipe = make(name, tmp_path)
    recipe = qlip_recipe(name, pipe, tmp_path)
    found = forecast(recipe, PROMPTS, Settings(steps=4, guidance_scale=3.0))
    with apply(pipe, recipe) as controller:
        options: dict[str, Any] = {**call_options(name), "num_inference_steps": 4, "guidance_scale": 3.0}
        options |= {"height": None, "width": None}
        pipe(prompt=PROMPTS, **options)
        assert controller.plan is not None
        assert found.plan.digest() == controller.plan.digest()
        assert list(found.costs) == controller.report().prompts
        assert found.base_bitops == controller.costs().base_bitops()
    denoiser = load_text_side(recipe.model).unet
    assert all(parameter.is_meta for parameter in denoiser.parameters()), "no weights are loaded"


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("a blue car\n")
    out = tmp_path / "out"
    command = ["forecast", "retro camera", "--prompts", str(listed), "--guidance", "3", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "no picture was made" in shown
    assert "retro camera" in shown
    found = json.loads((out / "forecast.json").read_text())
    assert [row["prompt"] for row in found["prompts"]] == ["retro camera", "a blue car"]
    assert found["quality_error"] > 0, "the shipped controller says how far its predictions lie off"
    assert (out / "001-bits.png").read_bytes()[:4] == b"\x89PNG"
    assert BitPlan.load(out / "plan.safetensors").prompts == 2
    assert main(["forecast", "x", "--budget", "relative=0.89", "--json"]) == 0
    assert main(["forecast"]) == 2
    assert "no prompt" in capsys.readouterr().err


def policy_file(path: Path, **changes: Any) -> Path:
    policy = StepPolicy.first_last(2, 1).model_dump(mode="json")
    policy |= {key: value for key, value in changes.items() if value is not None}
    policy = {key: value for key, value in policy.items() if key not in changes or changes[key] is not None}
    path.write_text(json.dumps({"quantization_config": {"runtime": {"diffusion_step_policy": policy}}}))
    return path


def test_a_policy_is_read_as_its_other_readers_read_it(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "diffusers.pipelines.cosmos.mixed_precision", reason="diffusers has no such policy"
    )
    policy = StepPolicy.load(policy_file(tmp_path / "config.json"))
    parsed = reader.parse_diffusion_step_policy(policy.model_dump(mode="json"))
    assert (parsed.first_steps, parsed.last_steps, parsed.overlap) == (2, 1, "a16")
    theirs = reader.Cosmos3MixedPrecisionConfig(format="fp8", first_steps=2, last_steps=1)
    for calls in (1, 2, 3, 5):
        expected = [theirs.use_high_precision(index, calls) for index in range(calls)]
        assert policy.wide(calls) == expected
    bits = policy.plan(CALLS, ("a", "b"), native=8, a16=16).bits[0]
    assert bits.tolist() == [[16, 16], [16, 16], [8, 8], [8, 8], [16, 16]]
    native = StepPolicy.load(policy_file(tmp_path / "n.json", first_steps={"count": 2, "mode": "native"}))
    assert native.wide(5) == [False] * 4 + [True]
    narrow = policy.model_copy(update={"overlap": "native"})
    assert narrow.wide(2) == [True, False], "the second step is first and last"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": None}, "overlap: Field required"),
        ({"type": "bisection"}, "type: Input should be 'first_last_n'"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"scope": ["transformer", "vae"]}, "scope"),
        ({"first_steps": {"count": 2}}, "first_steps.mode: Field required"),
        ({"more": 1}, "more"),
    ],
)
def test_another_schema_fails_closed(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        StepPolicy.load(policy_file(tmp_path / "config.json", **changes))


def test_a_config_without_a_policy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(ArtefactError, match=r"holds no quantization_config.runtime.diffusion_step_policy"):
        StepPolicy.load(tmp_path / "config.json")


def test_the_nearest_policy_is_found() -> None:
    made = StepPolicy.first_last(2, 1)
    plan = made.plan(CALLS, ("a", "b", "c"), 8, 16)
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert collapsed(plan, CALLS, weights, 8, 16) == made
    # A few layers that go against the rest change nothing, or everything where they hold the MACs.
    bits = plan.bits.clone()
    bits[:, :, 0] = 8
    other = BitPlan(bits, plan.timesteps, plan.layers)
    assert collapsed(other, CALLS, weights, 8, 16) == made
    alone = collapsed(other, CALLS, torch.tensor([1e9, 1.0, 1.0]), 8, 16)
    assert (alone.first_steps.count, alone.last_steps.count) == (0, 0)


def test_iterations_that_share_a_timestep_stay_together() -> None:
    twice = [900.0, 900.0, 500.0, 100.0]
    with pytest.raises(BitsError, match="two calls at timestep 900 different widths"):
        StepPolicy.first_last(1, 0).plan(twice, ("a",), 8, 16)
    plan = StepPolicy.first_last(2, 0).plan(twice, ("a",), 8, 16)
    found = collapsed(plan, twice, torch.ones(1), 8, 16)
    assert found.first_steps.count == 2


def test_a_recipe_follows_what_was_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make("sd", tmp_path)
    recipe = qlip_recipe("sd", pipe, tmp_path)
    listed, out = tmp_path / "prompts.txt", tmp_path / "policy.json"
    listed.write_text("\n".join(PROMPTS))
    command = ["export-policy", str(tmp_path / "recipe.yaml"), "--prompts", str(listed), "--out", str(out)]
    sampling = ["--steps", "5", "--guidance", "1"]
    assert main([*command, "--native", "4", "--a16", "8", "--measure", "2", *sampling]) == 0
    assert "policy: FAB" in capsys.readouterr().out
    section = PolicyController(kind="policy", path=out, native=4, a16=8)
    policy = StepPolicy.load(out)
    facts = json.loads(out.read_text())["qlip_plugins"]["plans"]
    with apply(pipe, recipe.model_copy(update={"controller": section})) as controller:
        pipe(prompt=PROMPTS, num_inference_steps=5, guidance_scale=1.0, output_type="latent")
        plan = controller.plan
        assert plan is not None
        calls = [float(t) for t in pipe.scheduler.timesteps]
        assert torch.equal(plan.bits[1:], policy.plan(calls, plan.layers, 4, 8).bits)
        assert controller.report().mean.fab == pytest.approx(facts["policy"]["fab"])
    assert main([*command, "--native", "8", "--a16", "8", *sampling]) == 2


def test_a_forecast_needs_no_more_than_the_text_side() -> None:
    recipe = Recipe.load("demo-qlip-468-solved")
    found = forecast(recipe, ["retro camera"], Settings(steps=3, guidance_scale=3.0))
    assert found.costs[0].quality == found.plan.quality[0]  # type: ignore[index]
    assert found.seconds < 5
