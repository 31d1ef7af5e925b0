"""PTQD's scheme on the golden pipeline: what is quantized and how, and that learning, resuming and packing hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from calibration_fixtures import PROMPTS, SETTINGS, SMALL, command, golden_section, small
from golden_model import GoldenModel
from qlip_plugins import load_backend
from qlip_plugins.calibration import Calibration, CalibrationSettings, calibrate
from qlip_plugins.calibration.gathering import UnitSamples
from qlip_plugins.calibration.run import to_nearest
from qlip_plugins.calibration.schemes import SCHEMES, LayerSpec
from qlip_plugins.calibration.units import Unit, find_units, layer_specs
from qlip_plugins.calibration.weights import WeightGrid, find_grids, learn_rounding
from qlip_plugins.calibration.work import CalibrationFolder
from qlip_plugins.cli import main
from qlip_plugins.contract import BackendCase, exact_at_base
from qlip_plugins.errors import IncompatibleModelError, RecipeError
from qlip_plugins.generation import load_model
from qlip_plugins.grids import Ranges
from qlip_plugins.layers import kind_of
from qlip_plugins.ldm_names import ldm_names
from qlip_plugins.metrics import call_bitops, count_macs
from qlip_plugins.packed import PackedConfig, read_packed, write_packed

PTQD = replace(SETTINGS, scheme="ptqd")
FLOATING = (  # in the public code's names, as in its own files of this model
    "input_blocks.2.0.op",
    "input_blocks.3.0.skip_connection",
    *(f"output_blocks.{number}.0.skip_connection" for number in range(4)),
)
KEPT = ("time_embedding.linear_1", "conv_in", "conv_out")


@dataclass(frozen=True)
class Made:
    """A calibration under PTQD's scheme, its packed folder, and the pipeline."""

    pipe: Any
    calibration: Calibration
    folder: Path
    config: PackedConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    pipe = load_model(golden_section())
    root = tmp_path_factory.mktemp("ptqd")
    found, work = calibrate(pipe, golden_section(), PROMPTS, PTQD, root / "work")
    config = write_packed(root / "out", found.weights, found.grids, found.report, "a test")
    work.remove()
    return Made(pipe, found, root / "out", config)


def floating(model: GoldenModel) -> set[str]:
    return {model.modules[name] for name in FLOATING}


# What is quantized


def test_layers_and_widths(made: Made, model: GoldenModel) -> None:
    """77 layers, six in floating point; 8 bits for the first, third and last that the public code counts."""
    layers = [
        name.removesuffix(".weight") for name, p in made.pipe.unet.named_parameters() if p.ndim in (2, 4)
    ]
    weights = made.calibration.weights
    assert len(weights.layers) == 77
    assert set(layers) - set(weights.layers) == floating(model)
    assert {n: bits for n, bits in weights.weight_bits().items() if bits != 4} == dict.fromkeys(KEPT, 8)
    in_their_order = [name for name in ldm_names(layers) if name in weights.layers]
    assert tuple(in_their_order[place] for place in (0, 2, -1)) == KEPT
    assert in_their_order[1] == "time_embedding.linear_2"
    assert not any(layer.split for layer in weights.layers.values())


@pytest.mark.parametrize("bits", [8, 16])
def test_inputs(made: Made, bits: int) -> None:
    """Every quantized layer's input at the asked width, those three at 8; attention's operands at none."""
    state = made.calibration.state(bits)
    assert not state.operands
    assert {name: grid.bits for name, grid in state.activations.items()} == {
        name: 8 if name in KEPT else bits for name in state.layers
    }
    assert all(grid.scale > 0 for grid in state.activations.values())


def test_one_step_a_layer(made: Made) -> None:
    for name, layer in made.calibration.weights.layers.items():
        (part,) = layer.weight
        assert part.scale.shape == (layer.shape[0], *[1] * (len(layer.shape) - 1)), name
        assert part.scale.shape == part.zero_point.shape
        assert part.scale.unique().numel() == part.zero_point.unique().numel() == 1


@pytest.mark.parametrize(
    ("name", "bits", "scale", "zero_point"),
    [
        ("time_embed.0", 8, 0.0058682928793132305, 155),
        ("time_embed.2", 4, 0.06714296340942383, 6),
        ("input_blocks.0.0", 8, 0.004789027851074934, 128),
        ("middle_block.1.transformer_blocks.0.attn2.to_k", 4, 0.05228479951620102, 8),
        ("output_blocks.1.1.conv", 4, 0.02389480359852314, 7),
        ("out.2", 8, 0.0043285908177495, 128),
    ],
)
def test_steps_are_those_of_ptqd(
    name: str, bits: int, scale: float, zero_point: int, model: GoldenModel
) -> None:
    """What its own code found on the same weights."""
    found = layer_specs(model.unet(), SCHEMES["ptqd"], 4)[model.modules[name]]
    assert found.bits == bits
    weight = model.unet().get_parameter(f"{found.name}.weight").detach()
    grid = WeightGrid.found(found, weight)
    (part,) = grid.layer(grid.nearest()).weight
    assert part.scale.flatten()[0].item() == pytest.approx(scale, rel=1e-6)
    assert part.zero_point.flatten()[0].item() == zero_point


def test_float_layers_are_left_alone(made: Made, model: GoldenModel) -> None:
    unet = made.pipe.unet
    hooks = {name: dict(unet.get_submodule(name)._forward_pre_hooks) for name in floating(model)}
    processors = dict(unet.attn_processors)
    before = {name: unet.get_submodule(name).weight for name in hooks}
    installed = load_backend("torch").install(unet, made.calibration.state(8))
    assert all(unet.get_submodule(name).weight is weight for name, weight in before.items())
    assert {name: dict(unet.get_submodule(name)._forward_pre_hooks) for name in hooks} == hooks
    assert unet.attn_processors == processors
    installed.remove()


def test_installed_it_computes_what_it_says(made: Made, model: GoldenModel) -> None:
    """Layer by layer, against the definition written out."""
    state = made.calibration.state(16)
    backend = load_backend("torch")
    exact_at_base(
        BackendCase(backend, model.unet, state, model.call(0), Ranges(keep_calibrated=True), (16, 32))
    )


def test_units_hold_what_is_quantized(model: GoldenModel) -> None:
    """The downsampler, all of whose layers stay in floating point, is no unit."""
    unet = model.unet()
    specs = layer_specs(unet, SCHEMES["ptqd"], 4)
    units = find_units(unet, specs, False, {key: tensor[:1] for key, tensor in model.call(0).items()})
    assert {spec.name for unit in units for spec in unit.layers} == set(specs)
    assert "down_blocks.0.downsamplers.0.conv" not in [unit.name for unit in units]
    assert len(units) == 25
    assert not any(unit.attentions for unit in units)


# What is learned


def test_learning_pays(made: Made) -> None:
    report = made.calibration.report
    rows = {unit["name"]: unit for unit in report["units"]}
    phases = [{n: row["weights"] for n, row in rows.items()}]
    phases += [{n: row["activations"][bits] for n, row in rows.items()} for bits in ("8", "16")]
    assert len(rows) == 25
    for phase, least in zip(phases, (16, 6, 5), strict=True):
        assert all(unit["after"] <= unit["before"] for unit in phase.values())
        assert sum(unit["after"] < unit["before"] for unit in phase.values()) >= least
    errors = report["errors"]
    assert 0 < errors["weights"] < errors["weights rounded to nearest"]
    for bits in (8, 16):
        assert errors[f"weights, activations at {bits} bits"] < 1.5 * errors["weights"]


def test_the_three_are_rounded_to_nearest(made: Made) -> None:
    weights = made.calibration.weights
    nearest = to_nearest(weights)
    unlearned = {
        n for n, layer in weights.layers.items() if torch.equal(codes(layer), codes(nearest.layers[n]))
    }
    assert unlearned >= set(KEPT)
    assert len(unlearned) < 20
    rows = {unit["name"]: unit["weights"] for unit in made.calibration.report["units"]}
    assert all(rows[name]["before"] == rows[name]["after"] for name in KEPT)


def codes(layer: Any) -> torch.Tensor:
    found: torch.Tensor = layer.weight[0].codes
    return found


def test_a_unit_may_be_learned_in_part() -> None:
    """The layers without a grid to learn on keep the weights they have, in learning, too."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    x = torch.randn(64, 8, generator=generator)
    with torch.no_grad():
        samples = UnitSamples({0: x}, {}, module(x), torch.device("cpu"), batch=16)
    specs = (LayerSpec("unit.0", 8, learned=False), LayerSpec("unit.1", 3, per_tensor=True))
    unit = Unit("unit", specs, (), 12)
    grids = find_grids(unit, nn.ModuleDict({"unit": module}))
    first = {name: weight.clone() for name, weight in module.state_dict().items()}
    ups = learn_rounding(unit, module, grids[1:], samples, error=0.05, iterations=50, seed=0)
    assert [up.shape for up in ups] == [(4, 8)]
    assert all(torch.equal(weight, first[name]) for name, weight in module.state_dict().items())


# The whole


def stop_saving(patch: pytest.MonkeyPatch, method: str, after: int) -> None:
    original: Any = getattr(CalibrationFolder, method)
    saved: list[Any] = []

    def save(folder: CalibrationFolder, *args: Any) -> None:
        if len(saved) == after:
            raise KeyboardInterrupt
        saved.append(args)
        original(folder, *args)

    patch.setattr(CalibrationFolder, method, save)


def test_interrupted_runs_end_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while a unit's weights, then while a unit's grids are saved: in the end the same bytes."""
    settings = replace(SMALL, scheme="ptqd")
    whole = small(tmp_path / "whole", settings)
    for method, kept, after in (("save_weights", "weights-*", 9), ("save_grids", "activations-*", 4)):
        with monkeypatch.context() as patch:
            stop_saving(patch, method, after)
            with pytest.raises(KeyboardInterrupt):
                small(tmp_path / "parts", settings)
        assert len(list((tmp_path / "parts").glob(kept))) == after
    assert small(tmp_path / "parts", settings) == whole


def test_a_scheme_does_not_resume_another(tmp_path: Path) -> None:
    described = {name: replace(SMALL, scheme=name).described() for name in SCHEMES}
    CalibrationFolder(tmp_path / "work", described["qdiffusion"])
    with pytest.raises(RecipeError, match="scheme: 'qdiffusion', now 'ptqd'"):
        CalibrationFolder(tmp_path / "work", described["ptqd"])


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_packed_round_trip(made: Made, bits: int | None) -> None:
    """Equal fingerprints and outputs; both widths on one set of weights."""
    found, expected = read_packed(made.folder, bits), made.calibration.state(bits)
    assert (made.config.version, made.config.weight_bits) == (2, 4)
    assert found.fingerprint == expected.fingerprint
    assert found.weight_bits() == {name: expected.weight_bits()[name] for name in found.layers}
    weights = made.calibration.weights.layers
    assert all(torch.equal(codes(layer), codes(weights[name])) for name, layer in found.layers.items())
    call = {
        "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([701, 701]),
        "encoder_hidden_states": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1)),
    }
    outputs = []
    for state in (expected, found):
        installed = load_backend("torch").install(made.pipe.unet, state)
        with torch.no_grad():
            outputs.append(made.pipe.unet(**call)[0])
        installed.remove()
    assert torch.equal(*outputs)


def test_settings_are_recorded(made: Made) -> None:
    settings = json.loads((made.folder / "config.json").read_text())["settings"]
    assert (settings["scheme"], settings["softmax_bits"], settings["activation_start"]) == (
        "ptqd",
        None,
        "mse",
    )
    assert [table.softmax_bits for table in made.config.activations] == [None, None]
    settings = SETTINGS.described()
    assert (settings["scheme"], settings["softmax_bits"], settings["activation_start"]) == (
        "qdiffusion",
        16,
        "running",
    )


def test_inspect(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(made.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weight_bits"], found["activation_bits"], found["quantized_layers"]) == (4, 8, 77)
    assert found["details"]["other_weight_bits"] == dict.fromkeys(KEPT, 8)
    assert found["details"]["attention_operands"] == 0
    assert "softmax_bits" not in found["details"]


def test_float_layers_cost_32_bits(made: Made, model: GoldenModel) -> None:
    state = made.calibration.state(16)
    counts = count_macs(model.unet(), model.call(0))
    inputs = {name: grid.bits for name, grid in state.activations.items()}
    expected = sum(1024 * 2 * macs for macs in counts.products.values()) + 1024 * counts.norms
    for name, macs in counts.layers.items():
        expected += macs * (1024 if name in floating(model) else 64 if name in KEPT else 4 * 16)
    found = call_bitops(counts, state.weight_bits().get, inputs.get, "full")
    assert found == pytest.approx(expected / 1024 / 1e12)
    assert all(kind_of(name) in ("shortcut", "downsample") for name in floating(model))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--scheme", "ptqd", "--activation-bits", "16")) == 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text(capsys.readouterr().out)
    out = tmp_path / "picture"
    sampling = ["--steps", "1", "--guidance", "1"]
    assert main(["generate", str(recipe), "--prompt", "row 9", *sampling, "--out", str(out)]) == 0


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"softmax_bits": 16},
            "softmax bits: ptqd leaves the products of attention in floating point, found 16",
        ),
        ({"activation_start": "running"}, "activation start: expected mse under ptqd, found running"),
    ],
)
def test_settings_without_a_meaning(change: dict[str, Any], message: str) -> None:
    make: Any = CalibrationSettings
    with pytest.raises(RecipeError, match=message):
        make(SETTINGS.sampling, scheme="ptqd", **change)
    assert make(SETTINGS.sampling, scheme="ptqd", activation_start="mse").start == "mse"
    with pytest.raises(RecipeError, match="scheme: expected qdiffusion or ptqd, found gptq"):
        make(SETTINGS.sampling, scheme="gptq")
    assert make(SETTINGS.sampling, **change).described() == make(SETTINGS.sampling).described()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--softmax-bits", "8"], "softmax bits: ptqd leaves"),
        (["--activation-start", "running"], "expected mse under ptqd"),
        (
            ["--native", "native"],
            "--native native: PTQD's files hold neither steps of weights nor zero points",
        ),
    ],
)
def test_command_errors(
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is loaded: the pipeline does not exist."""
    monkeypatch.chdir(tmp_path)
    arguments = command(tmp_path, "--scheme", "ptqd", *more)
    arguments[1] = "no/such/pipeline"
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def tiny_unet(**more: Any) -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"class_embed_type": "timestep"}, "class_embedding.linear_1"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 32,
            },
            "add_embedding.linear_1",
        ),
        ({"time_cond_proj_dim": 8}, "time_embedding.cond_proj"),
    ],
)
def test_unets_whose_positions_shift(options: dict[str, Any], layer: str, tmp_path: Path) -> None:
    """Refused before the work, by PTQD's scheme alone; a class table shifts nothing."""
    pipe = load_model(golden_section())
    pipe.unet = unet = tiny_unet(**options)
    with pytest.raises(IncompatibleModelError, match=f"the UNet has {layer}: ptqd keeps its first, third"):
        calibrate(pipe, golden_section(), PROMPTS, PTQD, tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert layer in layer_specs(unet, SCHEMES["qdiffusion"], 4)
    assert set(KEPT) < set(layer_specs(tiny_unet(num_class_embeds=3), SCHEMES["ptqd"], 4))
