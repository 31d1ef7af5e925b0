"""The arithmetic of calibration against references written out, and what it is calibrated on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from calibration_fixtures import PROMPTS, SETTINGS, golden_section
from golden_model import GoldenModel
from qlip_plugins.calibration.activations import ActStep, UnitActivations, learn_steps, start_grids
from qlip_plugins.calibration.gathering import UnitSamples
from qlip_plugins.calibration.grid_search import range_grid, search_grid
from qlip_plugins.calibration.inputs import DenoiserInputs, collect, place, stride
from qlip_plugins.calibration.schemes import SCHEMES, LayerSpec
from qlip_plugins.calibration.settings import CalibrationSettings
from qlip_plugins.calibration.units import Unit, find_units, layer_specs, shortcut_splits
from qlip_plugins.calibration.weights import (
    WeightGrid,
    find_grids,
    learn_rounding,
    soft_rounding,
    start_alpha,
)
from qlip_plugins.errors import ArtefactError, IncompatibleModelError, RecipeError
from qlip_plugins.generation import Settings, load_model
from qlip_plugins.grids import ActGrid
from qlip_plugins.state import CalibratedState


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The grid search


def searched(row: Tensor, bits: int) -> tuple[float, float]:
    """BRECQ's search, one candidate after the other."""
    best, found = math.inf, (0.0, 0.0)
    for i in range(80):
        high, low = row.max() * (1 - 0.01 * i), row.min() * (1 - 0.01 * i)
        delta = (high - low) / (2**bits - 1)
        zero = torch.round(-low / delta)
        codes = torch.clamp(torch.round(row / delta) + zero, 0, 2**bits - 1)
        score = float(((codes - zero) * delta - row).abs().pow(2.4).mean())
        if score < best:
            best, found = score, (float(delta), float(zero))
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_is_that_of_brecq(bits: int) -> None:
    rows = torch.randn(6, 50, generator=generator()) * torch.tensor([1, 3, 0.1, 1, 1, 5])[:, None]
    rows[3] += 10  # all positive: the zero point lies off the codes
    scale, zero = search_grid(rows, rows.amin(1), rows.amax(1), bits)
    for row, found in zip(rows, zip(scale.tolist(), zero.tolist(), strict=True), strict=True):
        assert found == pytest.approx(searched(row, bits), rel=1e-6)


def test_rows_of_one_value_are_held_exactly() -> None:
    rows = torch.tensor([[0.0, 0, 0], [0.3, 0.3, 0.3], [-0.7, -0.7, -0.7]])
    ends = (rows.amin(1), rows.amax(1))
    for scale, zero in (search_grid(rows, *ends, 4), range_grid(*ends, 4)):
        codes = ((rows / scale[:, None]).round() + zero[:, None]).clamp(0, 15)
        assert torch.equal((codes - zero[:, None]) * scale[:, None], rows)


@pytest.mark.parametrize(("case", "bits"), [("w4a8", 4), ("w8a8", 8)])
def test_weight_grids_are_those_of_q_diffusion(
    states: dict[str, CalibratedState], case: str, bits: int
) -> None:
    """Bit for bit the steps and zero points that its own code found on the same weights, splits included."""
    for name, layer in states[case].layers.items():
        weight = states[case].float_parameters[f"{name}.weight"]
        grid = WeightGrid.found(LayerSpec(name, bits, layer.split), weight)
        for ours, theirs in zip(grid.layer(grid.nearest()).weight, layer.weight, strict=True):
            assert torch.equal(ours.scale, theirs.scale), name
            assert torch.equal(ours.zero_point, theirs.zero_point), name


# Rounding


def test_soft_rounding() -> None:
    fraction = torch.linspace(0, 0.999, 50)
    assert torch.allclose(soft_rounding(start_alpha(fraction)), fraction, atol=1e-6)
    alpha = torch.tensor([-9.0, -1.0, 0.0, 0.5, 9.0])
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in alpha.tolist()]
    assert soft_rounding(alpha).tolist() == pytest.approx(expected, abs=1e-6)
    assert soft_rounding(alpha).tolist()[0] == 0
    assert soft_rounding(alpha).tolist()[-1] == 1


def test_hard_rounding() -> None:
    weight = torch.randn(5, 6, generator=generator())
    grid = WeightGrid.found(LayerSpec("layer", 3, split=2), weight)
    up = torch.rand(5, 6, generator=generator(1)) < 0.5
    layer = grid.layer(up)
    assert layer.split == 2
    start = 0
    for part in layer.weight:
        piece = slice(start, start + part.codes.shape[1])
        start = piece.stop
        codes = torch.floor(weight[:, piece] / part.scale) + up[:, piece].float() + part.zero_point
        assert torch.equal(part.codes.float(), codes.clamp(0, 7))
        assert part.codes.dtype == torch.uint8
    nearest = grid.layer(grid.nearest())
    first = nearest.weight[0]
    expected = (torch.round(weight[:, :2] / first.scale) + first.zero_point).clamp(0, 7)
    assert torch.equal(first.codes.float(), expected)


class Correlated(nn.Module):
    """A layer whose inputs are all alike, so that the errors of single weights can cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 4)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(4, 16, generator=generator()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def correlated_samples(module: nn.Module) -> UnitSamples:
    common = torch.randn(64, 1, generator=generator(2)) + 1
    x = common + 0.1 * torch.randn(64, 16, generator=generator(3))
    with torch.no_grad():
        target = module(x)
    return UnitSamples({0: x}, {}, target, torch.device("cpu"), batch=16)


def test_rounding_together_beats_rounding_to_nearest() -> None:
    module = Correlated()
    samples = correlated_samples(module)
    unit = Unit("unit", (LayerSpec("unit.inner", 3, None),), (), 20)
    holder = nn.ModuleDict({"unit": module})
    grids = find_grids(unit, holder)
    weight = module.inner.weight.detach().clone()
    ups = learn_rounding(unit, module, grids, samples, error=0.05, iterations=200, seed=0)
    assert torch.equal(module.inner.weight, weight), "learning left a trace"
    errors = []
    for up in (grids[0].nearest(), ups[0]):
        with torch.no_grad():
            module.inner.weight.copy_(grids[0].layer(up).dequantized())
        errors.append(samples.error(module))
    assert errors[1] < 0.7 * errors[0]
    assert (ups[0] != grids[0].nearest()).any()


# Activation steps


@pytest.mark.parametrize("bits", [4, 16])
def test_a_poor_step_is_learned(bits: int) -> None:
    """From a step four times too wide; and a 16-bit step, far smaller than the rate, keeps its sign."""
    module = Correlated()
    samples = correlated_samples(module)
    unit = Unit("unit", (LayerSpec("unit.inner", 8, None),), (), 20)
    activations = UnitActivations(unit, nn.ModuleDict({"unit": module}), bits, 16)
    start_grids(activations, module, samples, "mse")
    step = activations.steps[0]
    assert step.scale is not None
    assert step.zero_point is not None
    first = float(step.scale)
    step.place(step.scale * 4, (step.zero_point / 4).round())
    poor = samples.error(module)
    learn_steps(activations, module, samples, poor, iterations=200, seed=0)
    learned = samples.error(module)
    activations.remove()
    if bits == 4:
        assert learned < 0.4 * poor
    assert 0.5 * first < float(step.scale) < 8 * first
    assert not module.inner._forward_pre_hooks


def started(start: Any, step: ActStep, samples: UnitSamples) -> ActGrid:
    """The first grid of a quantizer that sees the samples themselves."""
    module = nn.Identity()
    module.register_forward_pre_hook(lambda module, args: (step(args[0]),))
    activations = UnitActivations(Unit("unit", (), (), 0), nn.ModuleDict(), 8, 8)
    activations.steps.append(step)
    start_grids(activations, module, samples, start)
    return step.grid()


def noise(count: int = 40) -> UnitSamples:
    x = torch.randn(count, 30, generator=generator()) * torch.linspace(1, 2, count)[:, None] + 0.5
    return UnitSamples({0: x}, {}, x, torch.device("cpu"), batch=2)


def test_running_extremes() -> None:
    """An exponential mean over batches, as Q-Diffusion's `--running_stat`; here of two."""
    samples = noise()
    low = high = None
    for batch in samples.tensors[0].split(2):
        low = batch.min() if low is None else 0.95 * low + 0.05 * batch.min()
        high = batch.max() if high is None else 0.95 * high + 0.05 * batch.max()
    assert low is not None
    assert high is not None
    grid = started("running", ActStep("layer", 6, from_zero=False), samples)
    assert grid.scale == pytest.approx(float(high - low) / 63, rel=1e-6)
    assert grid.zero_point == round(float(-low / (high - low)) * 63)


def test_least_error_on_a_few_samples() -> None:
    samples = noise(16)  # as many as are looked at
    x = samples.tensors[0].flatten()
    grid = started("mse", ActStep("layer", 6, from_zero=False), samples)
    assert (grid.scale, grid.zero_point) == pytest.approx(searched(x, 6), rel=1e-6)


@pytest.mark.parametrize("start", ["mse", "running"])
def test_a_softmax_has_its_zero_point_at_zero(start: str) -> None:
    x = torch.rand(4, 100, generator=generator()) * 0.5 + 0.2
    samples = UnitSamples({0: x}, {}, x, torch.device("cpu"), 4)
    grid = started(start, ActStep("attn.softmax", 8, from_zero=True), samples)
    assert grid.zero_point == 0
    assert grid.high == pytest.approx(float(x.max()), rel=0.05)


def test_a_quantizer_that_sees_nothing_is_refused() -> None:
    activations = UnitActivations(Unit("unit", (), (), 0), nn.ModuleDict(), 8, 8)
    activations.steps.append(ActStep("layer", 8, from_zero=False))
    with pytest.raises(IncompatibleModelError, match="layer: its quantizer sees nothing"):
        start_grids(activations, nn.Identity(), noise(), "running")


# Units


def concatenated(unet: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Channels of decoder and skip of every concatenation in a call, in order."""
    seen = []
    cat = torch.cat

    def watch(tensors: Any, dim: int = 0, **others: Any) -> Tensor:
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            seen.append((tensors[0].shape[1], tensors[1].shape[1]))
        return cat(tensors, dim, **others)

    monkeypatch.setattr(torch, "cat", watch)
    with torch.no_grad():
        unet(**call)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize(
    ("channels", "layers", "mid"),
    [
        ((8, 16), 1, True),
        ((8, 16, 16), 2, True),
        ((8, 24, 16), 3, True),
        ((8, 16), 1, False),
        ((8,), 2, True),
    ],
)
def test_split_points_are_where_the_decoder_concatenates(
    channels: tuple[int, ...], layers: int, mid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=["DownBlock2D"] * (len(channels) - 1) + ["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"] + ["UpBlock2D"] * (len(channels) - 1),
        mid_block_type="UNetMidBlock2DCrossAttn" if mid else None,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    call = {
        "sample": torch.zeros(1, 4, 8, 8),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.zeros(1, 3, 8),
    }
    seen = concatenated(unet, call, monkeypatch)
    resnets = [
        (f"up_blocks.{level}.resnets.{index}.conv_shortcut", resnet)
        for level, block in enumerate(unet.up_blocks)
        for index, resnet in enumerate(block.resnets)
    ]
    assert len(seen) == len(resnets)
    expected = {name: h for (name, resnet), (h, _) in zip(resnets, seen, strict=True) if resnet.conv_shortcut}
    assert shortcut_splits(unet) == expected


def test_units_of_the_golden_model(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    """Every layer of Q-Diffusion's own file once, with its split, in the order of the calls."""
    unet = model.unet()
    specs = layer_specs(unet, SCHEMES["qdiffusion"], 4)
    units = find_units(unet, specs, True, {key: tensor[:1] for key, tensor in model.call(0).items()})
    layers = {spec.name: spec for unit in units for spec in unit.layers}
    assert sum(len(unit.layers) for unit in units) == len(layers) == 83
    assert {name: spec.split for name, spec in layers.items()} == {
        name: layer.split for name, layer in states["w4a8"].layers.items()
    }
    operands = {
        f"{path}.{o}" for unit in units for path in unit.attentions for o in ("q", "k", "v", "softmax")
    }
    assert operands == set(states["w4a8"].operands)
    names = [unit.name for unit in units]
    assert names[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    assert names[-1] == "conv_out"
    assert names.index("mid_block.resnets.0") < names.index("mid_block.attentions.0.proj_in")
    assert names.index("down_blocks.0.resnets.0") < names.index("down_blocks.0.downsamplers.0.conv")


def test_other_denoisers_are_refused() -> None:
    with pytest.raises(IncompatibleModelError, match="Linear is neither a UNet of diffusers"):
        layer_specs(nn.Linear(2, 2), SCHEMES["qdiffusion"], 4)


# Inputs


@pytest.mark.parametrize(
    ("calls", "prompts", "wanted"),
    [(11, 28, 64), (25, 10, 250), (5, 3, 4), (50, 1, 7), (50, 12, 32), (50, 32, 32)],
)
def test_every_timestep_is_met_equally_often(calls: int, prompts: int, wanted: int) -> None:
    every = stride(calls, prompts, wanted)
    places = [place(prompt, prompts, every) for prompt in range(prompts)]
    taken = [call for p in places for call in range(calls) if (call + p) % every == 0]
    assert len(taken) <= wanted
    assert every == 1 or len(taken) > wanted / 3
    counts = [taken.count(call) for call in range(calls)]
    assert max(counts) - min(counts) <= 1
    covered = sorted(set(taken))
    gaps = [late - early for early, late in pairwise([-1, *covered, calls])]
    assert max(gaps) <= -(-every // prompts) + 1  # no part of the trajectory is left out


def collected(rows: int, batch: int, prompts: list[str] = PROMPTS, guidance: float = 3.0) -> DenoiserInputs:
    settings = Settings(steps=5, guidance_scale=guidance)
    return collect(load_model(golden_section()), golden_section(), prompts, settings, rows, batch)


def test_inputs_are_what_the_sampler_gives() -> None:
    """Both halves, all timesteps, the same whatever the batch; a repeated prompt has other noise."""
    inputs = collected(rows=24, batch=8)
    times = inputs.tensors["timestep"].tolist()
    assert 16 <= len(inputs) <= 24
    assert len(set(times)) >= 5
    assert {name: tensor.shape[1:] for name, tensor in inputs.tensors.items()} == {
        "sample": (4, 8, 8),
        "timestep": (),
        "encoder_hidden_states": (8, 32),
    }
    empty = golden_embeddings([""])[0]
    unguided = [torch.equal(states, empty) for states in inputs.tensors["encoder_hidden_states"]]
    assert sum(unguided) * 2 == len(inputs)
    pairs = sorted(inputs.tensors["sample"].flatten(1).tolist())
    assert pairs[::2] == pairs[1::2], "each latent stands once in each half"
    alone = collected(rows=24, batch=2)
    assert sorted(alone.tensors["timestep"].tolist()) == sorted(times)
    found = sorted(alone.tensors["sample"].flatten(1).tolist())
    assert torch.allclose(torch.tensor(found), torch.tensor(pairs), atol=1e-4)
    twice = collected(rows=100, batch=2, prompts=["row 1", "row 1"])
    assert not torch.equal(twice.tensors["sample"][0], twice.tensors["sample"][len(twice) // 2])
    assert len(collected(rows=3, batch=8, guidance=1.0)) == 3


def golden_embeddings(prompts: list[str]) -> Tensor:
    from qlip_plugins.embeddings import PromptEmbeddings

    table = golden_section().prompt_embeddings
    assert table is not None
    return PromptEmbeddings.load(table).of(prompts)


def test_damaged_inputs(tmp_path: Any) -> None:
    DenoiserInputs({"sample": torch.zeros(3, 1), "timestep": torch.zeros(2)}).save(tmp_path / "i.safetensors")
    with pytest.raises(ArtefactError, match="no rows of denoiser calls"):
        DenoiserInputs.load(tmp_path / "i.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 9}, "weight bits: expected 2 to 8, found 9"),
        ({"activation_bits": (8, 1)}, "activation bits: expected 2 to 16, found 1"),
        ({"activation_bits": (8, 8)}, "lists a width twice"),
        ({"softmax_bits": 17}, "softmax bits: expected 2 to 16"),
        ({"samples": 1}, "samples: expected 2 or more"),
        ({"batch_size": 0}, "batch size: expected 1 or more"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    make: Callable[..., CalibrationSettings] = replace
    with pytest.raises(RecipeError, match=message):
        make(SETTINGS, **change)
