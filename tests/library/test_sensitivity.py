"""Sensitivities: measured one quantizer at a time, and the controller that is solved from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins import Recipe, apply
from qlip_plugins.artefacts import write_tensors
from qlip_plugins.budget import LinearCost, thresholds, widths_at, widths_for
from qlip_plugins.cli import main
from qlip_plugins.controller import load_ranges
from qlip_plugins.embeddings import EncodedPrompts, PromptEmbeddings
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.generation import Settings, noise_seeds, sample_encoded
from qlip_plugins.plan import BitPlan
from qlip_plugins.q2b import Q2B
from qlip_plugins.recipe import TableController
from qlip_plugins.recording import recording
from qlip_plugins.sensitivity import (
    Sensitivity,
    log_prices,
    measure_sensitivity,
    quality_slopes,
    start_q2b,
)
from qlip_plugins.state import CalibratedState
from qlip_plugins.work import WorkFolder

SETTINGS = Settings(steps=3, guidance_scale=2.0)
MENU = (4, 6, 8)
FILE = Path("s.safetensors")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load("golden-w4a8")


@pytest.fixture(scope="module")
def prompts(recipe: Recipe) -> EncodedPrompts:
    assert recipe.model.prompt_embeddings is not None
    return EncodedPrompts.from_table(
        PromptEmbeddings.load(recipe.model.prompt_embeddings), ["row 1", "row 2", "row 3"]
    )


@pytest.fixture(scope="module")
def measured(recipe: Recipe, prompts: EncodedPrompts) -> Sensitivity:
    pipe = GoldenModel(Path(__file__).parents[1] / "golden").pipe()
    return measure_sensitivity(pipe, recipe, prompts, SETTINGS, [8, 16], batch=2)


def test_an_entry_is_the_error_of_one_quantizer_alone(
    model: GoldenModel, recipe: Recipe, prompts: EncodedPrompts, measured: Sensitivity, tmp_path: Path
) -> None:
    """Against the pipeline under a plan with that quantizer at 8 bits, and every other at 32."""
    pipe, rows = model.pipe(), prompts.only([1])
    noises = noise_seeds(rows.prompts, SETTINGS.seed)
    with recording(pipe) as full:
        sample_encoded(pipe, rows, SETTINGS, noises, "latent")
    found = []
    for width in (32, 8):
        bits = torch.full((1, len(measured.timesteps), len(measured.layers)), 32, dtype=torch.uint8)
        bits[:, :, 5] = width
        BitPlan(bits, measured.timesteps, measured.layers).save(tmp_path / "plan.safetensors")
        table = TableController(kind="table", plan=tmp_path / "plan.safetensors")
        asked = recipe.model_copy(update={"controller": table, "attention": "base"})
        with apply(pipe, asked) as controller, recording(pipe, full.samples) as led:
            # Attention's operands stand at 32 bits, too, while single quantizers are measured.
            for name, quantizer in controller.quantizers.items():
                if name not in measured.layers:
                    quantizer.set_bits(32)
            sample_encoded(pipe, rows, SETTINGS, noises, "latent")
        found.append(led)
    expected = torch.zeros(len(measured.timesteps))
    for timestep, one, other in zip(full.timesteps, found[0].predictions, found[1].predictions, strict=True):
        expected[measured.timesteps.index(timestep)] += (one - other).square().mean()
    torch.testing.assert_close(measured.errors[1, :, 5, 0], expected, rtol=1e-2, atol=1e-12)
    assert float(measured.errors[..., 0].sum()) > float(measured.errors[..., 1].sum()) > 0


def test_the_verb_writes_what_the_call_measures(
    recipe: Recipe, measured: Sensitivity, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("row 1\nrow 2\nrow 3\n")
    out = tmp_path / "s.safetensors"
    command = [
        *("sensitivity", "golden-w4a8", "--prompts", str(listed), "--out", str(out)),
        *("--steps", "3", "--guidance", "2", "--batch-size", "2"),
    ]
    assert main(command) == 0
    assert "error at 8 bits" in capsys.readouterr().out
    loaded = Sensitivity.load(out)
    assert torch.equal(loaded.errors, measured.errors)
    assert replace(loaded, errors=measured.errors) == replace(measured, errors=measured.errors)
    assert not (tmp_path / "s.safetensors.work").exists()
    assert main([*command, "--widths", "32"]) == 2
    assert main([*command[:-2], "--out", str(tmp_path / "s.txt")]) == 2


def test_a_table_belongs_to_how_it_was_sampled(measured: Sensitivity, model: GoldenModel) -> None:
    pipe = model.pipe()
    measured.check_measured_on(FILE, pipe, SETTINGS, measured.timesteps)
    with pytest.raises(IncompatibleModelError, match="measured at guidance 2 and eta 0, here are 3 and 0"):
        measured.check_measured_on(FILE, pipe, replace(SETTINGS, guidance_scale=3.0), measured.timesteps)
    with pytest.raises(IncompatibleModelError, match="of 3 timesteps, here are 2"):
        measured.check_measured_on(FILE, pipe, SETTINGS, measured.timesteps[1:])
    with torch.no_grad():
        next(pipe.unet.parameters()).add_(0.001)
    with pytest.raises(IncompatibleModelError, match="another pipeline"):
        measured.check_measured_on(FILE, pipe, SETTINGS, measured.timesteps)


def test_an_interrupted_measurement_goes_on_within_a_batch(
    recipe: Recipe, prompts: EncodedPrompts, measured: Sensitivity, model: GoldenModel, tmp_path: Path
) -> None:
    work = WorkFolder(tmp_path / "work", "sensitivity table", 2, {})
    found = measure_sensitivity(model.pipe(), recipe, prompts, SETTINGS, [8, 16], 2, work)
    parts = sorted(work.path.glob("prompts-*"))
    assert len(parts) > 4, "more than one part a batch"
    for part in parts[1::2]:
        part.unlink()
    again = measure_sensitivity(model.pipe(), recipe, prompts, SETTINGS, [8, 16], 2, work)
    assert torch.equal(again.errors, found.errors)
    assert torch.equal(again.errors, measured.errors)
    tensors = {"errors": torch.zeros(1, 3, 1, 2)}
    write_tensors(parts[0], "qlip-plugins sensitivity part", 2, tensors, timesteps=[1.0, 2.0, 3.0])
    with pytest.raises(ArtefactError, match="not what this batch of 2 prompts gives; remove it"):
        measure_sensitivity(model.pipe(), recipe, prompts, SETTINGS, [8, 16], 2, work)


def test_a_table_belongs_to_a_base_its_ranges_and_its_quantizers(
    recipe: Recipe, measured: Sensitivity, states: dict[str, CalibratedState]
) -> None:
    state = states["w4a8"]
    ranges = load_ranges(recipe.ranges, state)
    measured.check_made_for(FILE, state, ranges, measured.layers)
    with pytest.raises(IncompatibleModelError, match="of the base"):
        replace(measured, base_fingerprint="0" * 64).check_made_for(FILE, state, ranges, measured.layers)
    with pytest.raises(IncompatibleModelError, match="other ranges"):
        replace(measured, ranges_digest="0" * 64).check_made_for(FILE, state, ranges, measured.layers)
    with pytest.raises(IncompatibleModelError, match="are controlled"):
        measured.check_made_for(FILE, state, ranges, measured.layers[1:])
    with pytest.raises(IncompatibleModelError, match="4 was not measured"):
        measured.of_menu((4, 8, 16))
    assert float(measured.of_menu((8, 16, 32))[..., 2].abs().max()) == 0


def synthetic(prompts: int = 40, steps: int = 5, layers: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Errors D 16^-i exp(s (q - 1/2)), qualities, slopes."""
    generator = torch.Generator().manual_seed(0)
    quality = torch.rand(prompts, generator=generator).double()
    slope = torch.linspace(-1.5, 0.5, layers).double()
    scale = (0.7 * torch.randn(steps, layers, generator=generator).double()).exp()
    fall = torch.tensor([1.0, 1 / 16, 1 / 256]).double()
    moved = ((quality[:, None] - 0.5) * slope).exp()
    return scale[None, :, :, None] * moved[:, None, :, None] * fall, quality, slope


def test_prices_are_those_of_the_least_plan() -> None:
    errors, _, _ = synthetic()
    cost = LinearCost(torch.linspace(1, 3, 30).reshape(5, 6).double(), 0.0, "a unit")
    first, second = log_prices(errors.mean(0), cost, MENU)
    for price in (1e-3, 0.01, 0.1, 1.0):
        at = torch.tensor(MENU).double() * cost.per_bit[..., None] * price + errors.mean(0)
        best = torch.tensor(MENU)[at.argmin(-1)]
        ours = (first.exp() > price).long() + (second.exp() > price).long()
        assert torch.equal(torch.tensor(MENU)[ours], best)


def test_slopes_are_found() -> None:
    errors, quality, slope = synthetic()
    assert torch.allclose(quality_slopes(errors, quality), slope, atol=1e-6)
    assert torch.equal(quality_slopes(errors, torch.ones(40)), torch.zeros(6).double())
    noise = (0.5 * torch.randn(errors.shape[:3], generator=torch.Generator().manual_seed(1)).double()).exp()
    noisy = quality_slopes(errors * noise[..., None], quality)
    assert torch.allclose(noisy, slope, atol=0.6)


def test_a_solved_controller_makes_the_plans_of_least_error() -> None:
    """At the cost it is solved for: the plans of a common price, each prompt with its own errors."""
    errors, quality, _ = synthetic()
    timesteps = tuple(float(t) for t in range(5, 0, -1))
    table = Sensitivity(
        errors.float(),
        tuple(map(str, range(40))),
        timesteps,
        tuple("abcdef"),
        (4, 6, 8),
        "f",
        "r",
        "p",
        1.0,
        0.0,
    )
    q2b = Q2B(6, timesteps)
    cost = LinearCost.fab(5, 6)
    start_q2b(q2b, table, quality, quality, MENU, cost, 6.0)
    low, high = thresholds(q2b.double(), quality, timesteps)
    bits = widths_at(low, high, MENU)
    assert float(cost.of(bits).mean()) == pytest.approx(6.0, abs=0.05)
    ours = errors.gather(-1, ((bits.long() - 4) // 2)[..., None]).mean()
    # The least that any plan of this cost has: the same price for every decision of every prompt.
    first, second = zip(*(log_prices(one, cost, MENU) for one in errors), strict=True)
    best = widths_for_all(torch.stack(first), torch.stack(second), cost, float(cost.of(bits).mean()))
    least = errors.gather(-1, ((best.long() - 4) // 2)[..., None]).mean()
    assert float(least) <= float(ours) < 1.02 * float(least)
    fixed, fixed_high = log_prices(errors.mean(0), cost, MENU)
    blind = widths_for_all(fixed[None], fixed_high[None], cost, float(cost.of(bits).mean()))
    ignoring = errors.gather(-1, ((blind.long() - 4) // 2)[..., None].expand(40, -1, -1, -1)).mean()
    assert float(ours) < 0.98 * float(ignoring), "knowing the quality must pay"


def widths_for_all(first: Tensor, second: Tensor, cost: LinearCost, target: float) -> Tensor:
    return widths_for(-first, -second, MENU, cost, target)
