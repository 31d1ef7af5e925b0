"""What is ModelOpt's alone: its algorithms, its formats, its traps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from golden_model import GoldenModel
from hosts import by_modelopt, modelopt_config, needs
from qlip_plugins import apply, load_backend, load_base_quantizer
from qlip_plugins.adapter import BaseQuantizer
from qlip_plugins.errors import ArtefactError, ForeignFormatError, IncompatibleModelError
from qlip_plugins.grids import Ranges
from qlip_plugins.packed import read_packed, write_packed
from qlip_plugins.recipe import Recipe
from qlip_plugins.sharing import convert
from qlip_plugins.state import CalibratedState

pytestmark = needs("modelopt")

Adapter: Any = load_base_quantizer("modelopt")


def read(unet: nn.Module) -> CalibratedState:
    state: CalibratedState = Adapter.read(Adapter.config_class(), unet)
    return state


def preset(name: str) -> Any:
    import modelopt.torch.quantization as mtq

    return getattr(mtq, name)


# Made when they are wanted: the framework may be missing.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "FP8": (lambda: preset("FP8_DEFAULT_CFG"), "a floating-point format, FP8"),
    "FP8 behind integer weights": (lambda: preset("W4A8_AWQ_BETA_CFG"), "a floating-point format, FP8"),
    "sequence": (lambda: modelopt_config([4, 8]), "a sequence of quantizers"),
    "weights alone": (lambda: preset("INT4_AWQ_CFG"), "it quantizes weights alone"),
    "smooths nothing": (
        lambda: modelopt_config(4, "smoothquant"),
        r"a range for each of \d+ channels.*wants 8-bit weights",
    ),
    "no range": (lambda: {**modelopt_config(), "algorithm": None}, "dynamic: it has no calibrated range"),
    "nothing": (
        lambda: {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None},
        "no convolution or linear is quantized",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_integer_widths_is_(
    case: str, model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    config, message = REFUSED[case]
    quantized = by_modelopt(model.unet(), calibrate, config())
    with pytest.raises(IncompatibleModelError, match=message):
        read(quantized)


def test_another_backend_is_refused(model: GoldenModel, calibrate: Callable[[nn.Module], None]) -> None:
    quantized = by_modelopt(model.unet(), calibrate)
    quantized.conv_in.input_quantizer.backend = "theirs"
    with pytest.raises(IncompatibleModelError, match="run by another backend, 'theirs'"):
        read(quantized)


ALGORITHMS = {
    "mse": modelopt_config(4, "mse"),
    "gptq": modelopt_config(4, "gptq"),
    "awq": modelopt_config(4, "awq_lite"),
    "svdquant": modelopt_config(4, "svdquant"),
    "smoothquant": modelopt_config(8, "smoothquant"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_alive_from_a_file_and_packed(
    name: str, model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    import modelopt.torch.opt as mto

    quantized = by_modelopt(model.unet(), calibrate, ALGORITHMS[name])
    state = read(quantized)
    assert sum(layer.smoothing is not None for layer in state.layers.values()) == (
        50 if name in ("awq", "svdquant", "smoothquant") else 0
    )
    assert sum(layer.low_rank is not None for layer in state.layers.values()) == 50 * (name == "svdquant")
    mto.save(quantized, tmp_path / "unet.pth")
    loaded = Adapter.load(Adapter.config_class(checkpoint=tmp_path / "unet.pth"))
    assert loaded.fingerprint == state.fingerprint
    loaded.check_same_weights(model.unet())  # smoothed or moved weights are not held against the pipeline
    plain = loaded.with_activations({})
    write_packed(tmp_path / "packed", plain, {8: loaded.activations}, {}, "a test")
    packed = read_packed(tmp_path / "packed", 8)
    assert packed.fingerprint == state.fingerprint
    assert packed.moved == loaded.moved
    with torch.no_grad():
        expected = quantized(**model.call(5)).sample
        handles = load_backend("modelopt").install(quantized, state)
        assert torch.equal(quantized(**model.call(5)).sample, expected)
        handles.remove()
        for backend in ("torch", "modelopt"):
            unet = model.unet()
            load_backend(backend).install(unet, packed)
            found = unet(**model.call(5)).sample
            assert float((found - expected).norm() / expected.norm()) < 5e-2


def test_quantizers_outside_the_layers_stay_and_are_told_of(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """Its presets quantize the inputs of LayerNorm, too."""
    import modelopt.torch.opt as mto

    pipe: Any = model.pipe()
    pipe.unet = by_modelopt(pipe.unet, calibrate, preset("INT8_DEFAULT_CFG"))
    state = read(pipe.unet)
    assert len(state.left) == 12
    assert set(state.left.values()) == {"an input of a normalization, 8 bits"}
    recipe = tmp_path / "r.yaml"
    table = "package://qlip_recipes/golden_w4a8/prompt_embeddings.safetensors"
    recipe.write_text(
        "schema_version: 1\n"
        f"model: {{pipeline: somewhere/else, prompt_embeddings: '{table}'}}\n"
        "base: {adapter: modelopt}\nbackend: modelopt\n"
        "activation_bits: {low: 4, medium: 6, high: 32}\nranges: {keep_calibrated: true}\n"
        "controller: {kind: static, bits: 6}\n"
    )
    with apply(pipe, Recipe.load(recipe)) as controller:
        embeddings = torch.randn(1, 8, 32)
        pipe(
            prompt_embeds=embeddings,
            negative_prompt_embeds=embeddings,
            num_inference_steps=2,
            output_type="latent",
        )
        assert "12 quantizers of modelopt stay as they are" in str(controller.report())
    mto.save(pipe.unet, tmp_path / "unet.pth")
    loaded = Adapter.load(Adapter.config_class(checkpoint=tmp_path / "unet.pth"))
    with pytest.raises(IncompatibleModelError, match="12 quantizers that only its own framework can run"):
        load_backend("torch").install(model.unet(), loaded)
    assert "only ModelOpt can run" in Adapter.inspect(tmp_path / "unet.pth").notes[0]


def test_folded_weights_have_the_same_codes(
    model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    import modelopt.torch.quantization as mtq

    quantized = by_modelopt(model.unet(), calibrate)
    state = read(quantized)
    mtq.fold_weight(quantized)
    folded = read(quantized)
    assert folded.moved
    for name, layer in state.layers.items():
        assert torch.equal(folded.layers[name].weight[0].codes, layer.weight[0].codes), name


def test_a_weight_on_no_grid_is_refused(model: GoldenModel, calibrate: Callable[[nn.Module], None]) -> None:
    quantized = by_modelopt(model.unet(), calibrate)
    quantized.conv_in.weight_quantizer.disable()
    with pytest.raises(IncompatibleModelError, match="conv_in: its weight quantizer is off"):
        read(quantized)


def test_its_own_quantizers_hold_the_grids(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    """A Q-Diffusion base, zero points and all: without our backend they give what they give with it."""
    unet = model.unet()
    handles = load_backend("modelopt").install(unet, states["w8a8"])
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    host = unet.conv_in.input_quantizer
    ours = host(x)
    host.backend = None
    assert torch.equal(host(x), ours)
    assert host.bias_value is not None
    host.backend = "qlip"
    handles.remove()
    assert type(unet.conv_in) is nn.Conv2d


def test_the_backend_s_name_without_a_recipe(
    model: GoldenModel, states: dict[str, CalibratedState], calibrate: Callable[[nn.Module], None]
) -> None:
    load_backend("modelopt").install(model.unet(), states["w4a8"]).remove()  # registers it
    quantized = by_modelopt(model.unet(), calibrate)
    quantized.conv_in.input_quantizer.backend = "qlip"
    with pytest.raises(IncompatibleModelError, match="no recipe is applied"):
        quantized(**model.call(0))


def test_another_base_than_the_model_s_own_is_(
    model: GoldenModel, states: dict[str, CalibratedState], calibrate: Callable[[nn.Module], None]
) -> None:
    quantized = by_modelopt(model.unet(), calibrate)
    with pytest.raises(IncompatibleModelError, match="they are not this base's"):
        load_backend("modelopt").install(quantized, states["w4a8"])
    with pytest.raises(IncompatibleModelError, match="TensorQuantizer of modelopt inside"):
        load_backend("torch").install(quantized, states["w4a8"])


def test_a_folder_of_safetensors(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """As `save_pretrained` writes it under `enable_huggingface_checkpointing`."""
    import modelopt.torch.opt as mto

    quantized = by_modelopt(model.unet(), calibrate)
    save_file(quantized.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save(mto.modelopt_state(quantized), tmp_path / "modelopt_state.pth")
    found = Adapter.inspect(tmp_path)
    assert (found.weight_bits, found.activation_bits, found.details["modes"]) == (
        4,
        8,
        "quantize, max_calibrate",
    )
    loaded = Adapter.load(Adapter.config_class.model_validate(found.base, strict=False))
    assert loaded.fingerprint == read(quantized).fingerprint
    (tmp_path / "modelopt_state.pth").unlink()
    with pytest.raises(ForeignFormatError, match=r"no modelopt_state\.pth"):
        Adapter.inspect(tmp_path)


def saved(
    tmp_path: Path, model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> tuple[Path, dict[str, Any]]:
    import modelopt.torch.opt as mto

    path = tmp_path / "unet.pth"
    mto.save(by_modelopt(model.unet(), calibrate), path)
    return path, torch.load(path, weights_only=True)


def test_damaged_files_are_named(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path, golden: Path
) -> None:
    adapter: BaseQuantizer = Adapter
    path, content = saved(tmp_path, model, calibrate)
    broken = copy.deepcopy(content)
    broken["model_state_dict"]["conv_in.input_quantizer._amax"].zero_()
    torch.save(broken, path)
    with pytest.raises(ArtefactError, match=r"conv_in\.input_quantizer has the range 0\.0"):
        adapter.load(Adapter.config_class(checkpoint=path))
    broken = copy.deepcopy(content)
    broken["modelopt_state"]["modelopt_state_dict"] = []
    torch.save(broken, path)
    with pytest.raises(ArtefactError, match="holds no quantizers"):
        adapter.load(Adapter.config_class(checkpoint=path))
    with pytest.raises(ForeignFormatError, match="without modelopt_state"):
        adapter.inspect(golden / "qdiffusion" / "w4a8" / "ckpt.pth")
    with pytest.raises(ArtefactError, match="none is named"):
        adapter.load(Adapter.config_class())


def test_a_range_without_its_lowest_code(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    import modelopt.torch.opt as mto

    config = modelopt_config()
    config["quant_cfg"][2]["cfg"]["narrow_range"] = True
    quantized = by_modelopt(model.unet(), calibrate, config)
    mto.save(quantized, tmp_path / "unet.pth")
    state = Adapter.load(Adapter.config_class(checkpoint=tmp_path / "unet.pth"))
    assert {grid.low_code for grid in state.activations.values()} == {-127}
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 9  # beyond the range
    for width in (8, 5):
        quantized.conv_in.input_quantizer.num_bits = width
        expected = quantized.conv_in(x)
        for backend in ("torch", "modelopt"):
            unet = model.unet()
            handles = load_backend(backend).install(unet, state, Ranges(keep_calibrated=True))
            handles["conv_in"].set_bits(width)
            assert torch.allclose(unet.conv_in(x), expected, rtol=0, atol=1e-4), (backend, width)


def test_half_precision_rounds_as_full_precision_does(
    model: GoldenModel, states: dict[str, CalibratedState]
) -> None:
    """16-bit codes fit neither float16 nor an amax that it has rounded."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    unet = model.unet().half()
    load_backend("modelopt").install(unet, states["w4a16"])
    grid = states["w4a16"].activations["conv_in"]
    found = unet.conv_in.input_quantizer(x)
    assert found.dtype == torch.float16
    codes = (x.float() / grid.scale).round() + grid.zero_point
    exact = (codes.clamp(grid.low_code, grid.high_code) - grid.zero_point) * grid.scale
    assert torch.all(
        (found.float() - exact).abs() <= exact.abs() * 2**-11 + grid.scale
    )  # a step, and half's rounding


@pytest.mark.parametrize("name", ["awq", "svdquant"])
def test_smoothing_and_branches_in_half_precision(
    name: str, model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    state = read(by_modelopt(model.unet(), calibrate, ALGORITHMS[name]))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    full, half = model.unet(), model.unet().half()
    for unet in (full, half):
        load_backend("modelopt").install(unet, state)
    x = torch.randn(
        2, 8, full.get_submodule(path).in_features, generator=torch.Generator().manual_seed(1)
    ).half()
    with torch.no_grad():
        expected = full.get_submodule(path)(x.float())
        found = half.get_submodule(path)(x)
    assert found.dtype == torch.float16
    assert float((found.float() - expected).norm() / expected.norm()) < 1e-2


def test_a_layer_that_is_smoothed_and_switched_off(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """Its weight has been divided by a factor that ModelOpt still multiplies its input with."""
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq

    quantized = by_modelopt(model.unet(), calibrate, ALGORITHMS["smoothquant"])
    mtq.disable_quantizer(quantized, "*to_q*")
    expected = quantized(**model.call(5)).sample
    state = read(quantized)
    assert set(state.left.values()) == {"changes a layer whose quantizers are off"}
    handles = load_backend("modelopt").install(quantized, state)
    assert torch.equal(quantized(**model.call(5)).sample, expected)
    handles.remove()
    mto.save(quantized, tmp_path / "unet.pth")
    loaded = Adapter.load(Adapter.config_class(checkpoint=tmp_path / "unet.pth"))
    with pytest.raises(IncompatibleModelError, match="only its own framework can run"):
        load_backend("torch").install(model.unet(), loaded)
    with pytest.raises(IncompatibleModelError, match="only its own framework can run"):
        convert(Adapter.config_class(checkpoint=tmp_path / "unet.pth"), "a/b", tmp_path / "packed")


def test_a_quantizer_that_is_switched_off_under_a_recipe(
    model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    import modelopt.torch.quantization as mtq

    quantized = by_modelopt(model.unet(), calibrate, ALGORITHMS["awq"])
    handles = load_backend("modelopt").install(quantized, read(quantized))
    handles.verify()
    factor = quantized.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").input_quantizer
    factor._pre_quant_scale.mul_(2)
    with pytest.raises(IncompatibleModelError, match="pre_quant_scale is not the one"):
        handles.verify()
    factor._pre_quant_scale.mul_(0.5)
    mtq.disable_quantizer(quantized, "*input_quantizer")
    with pytest.raises(IncompatibleModelError, match="switched off"):
        handles.verify()


def test_another_model_s_weights_are_(model: GoldenModel, calibrate: Callable[[nn.Module], None]) -> None:
    """Smoothed weights are not the pipeline's; they point the same way, and others do not."""
    other = model.unet()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std())
    state = read(by_modelopt(other, calibrate, ALGORITHMS["awq"]))
    with pytest.raises(IncompatibleModelError, match="are not those the checkpoint was calibrated on"):
        state.check_same_weights(model.unet())


@pytest.mark.parametrize(("kind", "bits"), [(torch.float16, 4), (torch.float16, 8), (torch.bfloat16, 4)])
def test_folded_weights_in_half_precision(
    kind: torch.dtype, bits: int, model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    import modelopt.torch.quantization as mtq

    quantized = by_modelopt(model.unet(), calibrate, modelopt_config(bits))
    state = read(quantized)
    mtq.fold_weight(quantized)
    found = read(quantized.to(kind))
    for name, layer in state.layers.items():
        assert torch.equal(found.layers[name].weight[0].codes, layer.weight[0].codes), name


def test_a_file_with_weights_in_blocks_is_refused_for_that(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """Such a file holds slices, which are read without ModelOpt, too."""
    import modelopt.torch.opt as mto

    mto.save(by_modelopt(model.unet(), calibrate, preset("INT4_AWQ_CFG")), tmp_path / "unet.pth")
    with pytest.raises(IncompatibleModelError, match="it quantizes weights alone"):
        Adapter.load(Adapter.config_class(checkpoint=tmp_path / "unet.pth"))
