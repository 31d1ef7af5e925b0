"""What is brevitas's alone: its quantizers, its state dicts, its traps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from golden_model import GoldenModel
from hosts import by_brevitas, needs
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.errors import ArtefactError, ForeignFormatError, IncompatibleModelError
from qlip_plugins.grids import Ranges
from qlip_plugins.state import CalibratedState

pytestmark = needs("brevitas")

Adapter: Any = load_base_quantizer("brevitas")
SHIFTED = "ShiftedUint8ActPerTensorFloat"


def read(unet: nn.Module) -> CalibratedState:
    state: CalibratedState = Adapter.read(Adapter.config_class(), unet)
    return state


def quantizer(name: str) -> Any:
    import brevitas.quant

    return getattr(brevitas.quant, name)


def dynamic() -> Any:
    from brevitas_examples.common.generative.quantizers import Int8DynamicActPerTensorFloat

    return Int8DynamicActPerTensorFloat


# Made when they are wanted: the framework may be missing.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "quantized bias": (lambda: {"bias_quant": quantizer("Int32Bias")}, "bias_quant=None"),
    "weights alone": (lambda: {"input_quant": None}, "it quantizes weights alone"),
    "quantized tensors": (lambda: {"return_quant_tensor": True}, "return_quant_tensor=False"),
    "inputs alone": (lambda: {"weight_quant": None}, "its input is quantized and its weight is not"),
    "dynamic": (
        lambda: {"input_quant": dynamic()},
        "input_quant is dynamic: it has no calibrated range",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_widths_to_choose_is_refused(case: str, model: GoldenModel) -> None:
    options, message = REFUSED[case]
    with pytest.raises(IncompatibleModelError, match=message):
        read(by_layers(model.unet(), options()).eval())


def by_layers(unet: nn.Module, changes: dict[str, Any]) -> Any:
    """A quantized model, uncalibrated, with some quantizers changed."""
    import brevitas.nn as qnn
    from brevitas.graph.quantize import layerwise_quantize

    options = {
        "weight_quant": quantizer("Int8WeightPerChannelFloat"),
        "input_quant": quantizer("Int8ActPerTensorFloat"),
        "bias_quant": None,
        "return_quant_tensor": False,
        **changes,
    }
    layers = {nn.Conv2d: (qnn.QuantConv2d, dict(options)), nn.Linear: (qnn.QuantLinear, dict(options))}
    return layerwise_quantize(unet, compute_layer_map=layers)


def test_training_mode_is_refused(model: GoldenModel, calibrate: Callable[[nn.Module], None]) -> None:
    with pytest.raises(IncompatibleModelError, match=r"call \.eval\(\)"):
        read(by_brevitas(model.unet(), calibrate).train())


def test_frozen_models_are_refused(model: GoldenModel, calibrate: Callable[[nn.Module], None]) -> None:
    """`quant_inference_mode` freezes scales and widths: a later choice would do nothing, in silence."""
    from brevitas.export.inference import quant_inference_mode

    quantized = by_brevitas(model.unet(), calibrate)
    state = read(quantized)
    with torch.no_grad(), quant_inference_mode(quantized):
        quantized(**model.call(0))
        with pytest.raises(IncompatibleModelError, match="quant_inference_mode"):
            read(quantized)
    fresh = by_brevitas(model.unet(), calibrate)
    handles = load_backend("brevitas").install(fresh, state, Ranges(keep_calibrated=True))
    with torch.no_grad(), quant_inference_mode(fresh):
        fresh(**model.call(0))
        with pytest.raises(IncompatibleModelError, match="no choice has an effect"):
            handles.verify()
    handles.remove()


def test_zero_points(model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path) -> None:
    quantized = by_brevitas(model.unet(), calibrate, SHIFTED)
    state = read(quantized)
    assert any(grid.zero_point for grid in state.activations.values())
    with torch.no_grad():
        expected = quantized(**model.call(5)).sample
        handles = load_backend("brevitas").install(quantized, state, Ranges(keep_calibrated=True))
        assert torch.equal(quantized(**model.call(5)).sample, expected)
        for handle in handles.values():
            handle.set_bits(32)
        assert not torch.equal(quantized(**model.call(5)).sample, expected)
        handles.remove()
    path = tmp_path / "unet.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in quantized.state_dict().items()}, path)
    found = Adapter.inspect(path)
    assert (found.base["input_quant"], found.unknown) == (SHIFTED, ("weight_bits", "activation_bits"))
    options = {"checkpoint": path, "weight_bits": 4, "activation_bits": 8}
    assert Adapter.load(Adapter.config_class(**options, input_quant=SHIFTED)).fingerprint == state.fingerprint
    with pytest.raises(ArtefactError, match="Name the quantizers it was saved with"):
        Adapter.load(Adapter.config_class(**options))
    with pytest.raises(ArtefactError, match=f"did you mean '{SHIFTED}'"):
        Adapter.load(Adapter.config_class(**options, input_quant="ShiftedUint8ActPerTensor"))


def test_quantized_outputs_stay_and_are_told_of(
    model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    outputs = quantizer("Int8ActPerTensorFloat")
    state = read(by_brevitas(model.unet(), calibrate, output_quant=outputs))
    assert len(state.left) == len(state.layers)
    with pytest.raises(IncompatibleModelError, match="only its own framework can run"):
        load_backend("torch").install(model.unet(), state)


def test_options_of_a_file() -> None:
    with pytest.raises(ValidationError, match="give weight_bits and activation_bits"):
        Adapter.config_class(checkpoint=Path("unet.pth"))
    with pytest.raises(ValidationError, match="the model says its widths and quantizers itself"):
        Adapter.config_class(weight_bits=4)
    with pytest.raises(ArtefactError, match="none is named"):
        Adapter.load(Adapter.config_class())


def test_foreign_files(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ForeignFormatError, match="no quantizer of brevitas among its"):
        Adapter.inspect(golden / "qdiffusion" / "w4a8" / "ckpt.pth")
    with pytest.raises(ForeignFormatError, match="no such file"):
        Adapter.inspect(tmp_path / "nothing")


def test_another_base_than_the_model_s_own_is_(
    model: GoldenModel, states: dict[str, CalibratedState], calibrate: Callable[[nn.Module], None]
) -> None:
    quantized = by_brevitas(model.unet(), calibrate)
    with pytest.raises(IncompatibleModelError, match="they are not this base's"):
        load_backend("brevitas").install(quantized, states["w4a8"])
    with pytest.raises(IncompatibleModelError, match="of brevitas inside"):
        load_backend("torch").install(quantized, read(quantized))


def test_a_range_without_its_lowest_code(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    """In one batch with another width, too."""
    narrow = {
        name: replace(grid, zero_point=0, low_code=-127, high_code=127, kept="high")
        for name, grid in states["w8a8"].activations.items()
        if not name.endswith((".skip", ".q", ".k", ".v", ".softmax"))
    }
    layers = {
        name: replace(layer, inputs=(narrow[name],) * len(layer.inputs))
        for name, layer in states["w8a8"].layers.items()
    }
    state = replace(states["w8a8"], layers=layers, operands={})
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for backend in ("torch", "brevitas"):
        unet = model.unet()
        handles = load_backend(backend).install(unet, state, Ranges(keep_calibrated=True))
        handles["conv_in"].set_bits(torch.tensor([8, 6]))
        found.append(unet.conv_in(x))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-5)


def test_half_precision_rounds_as_full_precision_does(
    model: GoldenModel, states: dict[str, CalibratedState]
) -> None:
    """16-bit codes fit neither float16 nor a scale that it has rounded."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    unet: Any = model.unet().half()
    load_backend("brevitas").install(unet, states["w4a16"])
    grid = states["w4a16"].activations["conv_in"]
    found = unet.conv_in.input_quant(x)
    assert found.dtype == torch.float16
    codes = (x.float() / grid.scale).round() + grid.zero_point
    exact = (codes.clamp(grid.low_code, grid.high_code) - grid.zero_point) * grid.scale
    assert torch.all(
        (found.float() - exact).abs() <= exact.abs() * 2**-11 + grid.scale
    )  # a step, and half's rounding


def test_what_calibration_never_reached_is_(
    model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    with pytest.raises(ArtefactError, match="calibration never reached it"):
        read(by_layers(model.unet(), {}).eval())


def test_weights_in_half_precision_have_brevitas_s_own_codes(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    weights = type("W8", (quantizer("ShiftedUint8WeightPerChannelFloat"),), {})
    quantized = by_brevitas(model.unet(), calibrate, weight_quant=weights).bfloat16()
    state = read(quantized)
    for name, layer in state.layers.items():
        own = quantized.get_submodule(name).weight.float()
        step = layer.weight[0].scale
        assert bool(((layer.dequantized() - own).abs() <= 2 * step).all()), (
            name
        )  # wrapped codes lie 255 steps away
    torch.save(quantized.state_dict(), tmp_path / "unet.pth")
    options = {"weight_bits": 8, "activation_bits": 8, "weight_quant": "ShiftedUint8WeightPerChannelFloat"}
    loaded = Adapter.load(Adapter.config_class(checkpoint=tmp_path / "unet.pth", **options))
    assert loaded.fingerprint == state.fingerprint
    with pytest.raises(ArtefactError, match="not those it was saved with"):
        Adapter.load(
            Adapter.config_class(checkpoint=tmp_path / "unet.pth", fingerprint="0123456789abcdef", **options)
        )


def test_other_zero_points_under_a_recipe(model: GoldenModel, calibrate: Callable[[nn.Module], None]) -> None:
    quantized = by_brevitas(model.unet(), calibrate, SHIFTED)
    handles = load_backend("brevitas").install(quantized, read(quantized))
    handles.verify()
    with pytest.raises(IncompatibleModelError, match="a recipe is applied to this"):
        read(quantized)
    for name, parameter in quantized.named_parameters():
        if "zero_point_impl" in name:
            parameter.data.mul_(0.3)
    with pytest.raises(IncompatibleModelError, match="its zero point"):
        handles.verify()


def test_the_fingerprint_of_a_model_in_memory_is_compared(
    model: GoldenModel, calibrate: Callable[[nn.Module], None]
) -> None:
    quantized = by_brevitas(model.unet(), calibrate)
    named = Adapter.config_class(fingerprint=read(quantized).fingerprint[:12])
    assert Adapter.read(named, quantized).fingerprint.startswith(named.fingerprint)
    with pytest.raises(ArtefactError, match=r"base\.fingerprint is 0123456789ab"):
        Adapter.read(Adapter.config_class(fingerprint="0123456789abcdef"), quantized)


def test_a_file_beside_its_own_model(
    model: GoldenModel, calibrate: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    """The pipeline holds the quantized model already: the state fits it, and its own quantizers run."""
    quantized = by_brevitas(model.unet(), calibrate)
    torch.save(quantized.state_dict(), tmp_path / "unet.pth")
    options = {"checkpoint": tmp_path / "unet.pth", "weight_bits": 4, "activation_bits": 8}
    state = Adapter.load(Adapter.config_class(**options))
    state.check_fits(quantized)
    state.check_same_weights(quantized)
    expected = quantized(**model.call(5)).sample
    handles = load_backend("brevitas").install(quantized, state)
    assert torch.equal(quantized(**model.call(5)).sample, expected)
    handles.remove()
