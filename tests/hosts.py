"""The optional frameworks, and tiny models that they have quantized in their own way."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.adapter import NeedsHost
from qlip_plugins.contract import ModelReaderCase
from qlip_plugins.errors import HostError

HOSTS = ("brevitas", "modelopt")
_IMPORTED = {
    "brevitas": ("brevitas.nn", "brevitas.graph.quantize", "brevitas.graph.calibrate", "brevitas.quant"),
    "modelopt": ("modelopt.torch.quantization", "modelopt.torch.opt"),
}
OWN = "QLIP_TEST_HOST"
"""Names the framework that an environment of tox is for: there its absence fails."""


@cache
def missing(name: str) -> str:
    """Why a framework cannot be used here; empty where it can, and in its own environment."""
    backend = load_backend(name)
    if not isinstance(backend, NeedsHost):
        return ""
    try:
        backend.check_host()
    except HostError as error:
        if os.environ.get(OWN) == name:
            raise
        return str(error)
    # What it warns of while it is imported is not ours, and as an error would leave it half imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _IMPORTED[name]:
            importlib.import_module(module)
    return ""


def with_hosts(names: tuple[str, ...]) -> list[Any]:
    """Parameters that are skipped, with the reason, where their framework is missing."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=missing(name)))
        for name in names
    ]


def needs(name: str) -> pytest.MarkDecorator:
    """The mark of tests that are skipped where a framework is missing."""
    return pytest.mark.skipif(bool(missing(name)), reason=missing(name))


Calibrate = Callable[[nn.Module], None]
WIDTHS = (4, 6, 32)


def modelopt_config(weight_bits: int | list[int] = 4, algorithm: Any = "max") -> dict[str, Any]:
    """W4A8 on convolutions and linears; ModelOpt would also quantize the inputs of LayerNorm."""
    several = weight_bits if isinstance(weight_bits, list) else []
    in_turn = [{"num_bits": bits, "axis": 0} for bits in several]
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": in_turn or {"num_bits": weight_bits, "axis": 0},
            },
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
            {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},
        ],
        "algorithm": algorithm,
    }


def by_modelopt(denoiser: nn.Module, calibrate: Calibrate, config: Any = None) -> Any:
    """A model that ModelOpt quantizes in place."""
    import modelopt.torch.quantization as mtq

    return mtq.quantize(denoiser, config or modelopt_config(), calibrate)


def by_brevitas(
    denoiser: nn.Module, calibrate: Calibrate, input_quant: str = "Int8ActPerTensorFloat", **options: Any
) -> Any:
    """A model that brevitas quantizes; W4A8."""
    import brevitas.nn as qnn
    import brevitas.quant
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    weights = type("W4", (brevitas.quant.Int8WeightPerChannelFloat,), {"bit_width": 4})
    extremes = {"scaling_stats_op": "max"} if input_quant.startswith("Int8") else {}
    inputs = type("A8", (getattr(brevitas.quant, input_quant),), {"bit_width": 8, **extremes})
    options = {
        "weight_quant": weights,
        "input_quant": inputs,
        "bias_quant": None,
        "return_quant_tensor": False,
        **options,
    }
    layers = {nn.Conv2d: (qnn.QuantConv2d, dict(options)), nn.Linear: (qnn.QuantLinear, dict(options))}
    quantized = layerwise_quantize(denoiser, compute_layer_map=layers)
    with torch.no_grad(), calibration_mode(quantized):
        calibrate(quantized)
    return quantized.eval()


def _switch_modelopt(denoiser: nn.Module, bits: int) -> None:
    for name, module in denoiser.named_modules():
        if name.endswith("input_quantizer") and module.is_enabled:
            module.num_bits = bits


def _switch_brevitas(denoiser: nn.Module, bits: int) -> None:
    for name, module in denoiser.named_modules():
        if name.endswith("input_quant") and module.is_quant_enabled:
            quantizer: Any = module.fused_activation_quant_proxy
            quantizer.tensor_quant.msb_clamp_bit_width_impl.bit_width.value.fill_(bits)


def model_reader_case(
    name: str, make_float: Callable[[], nn.Module], inputs: Mapping[str, Any]
) -> ModelReaderCase:
    """A framework's case on one float model."""

    def calibrate(denoiser: nn.Module) -> None:
        with torch.no_grad():
            denoiser(**inputs)

    file = "model.pth"
    if name == "modelopt":
        import modelopt.torch.opt as mto

        quantized = by_modelopt(make_float(), calibrate)
        switch, options = _switch_modelopt, {}

        def save(denoiser: nn.Module, folder: Path) -> None:
            mto.save(denoiser, folder / file)

        def restore(folder: Path) -> nn.Module:
            restored: nn.Module = mto.restore(make_float(), folder / file)
            return restored
    else:
        quantized = by_brevitas(make_float(), calibrate)
        switch, options = _switch_brevitas, {"weight_bits": 4, "activation_bits": 8}

        def save(denoiser: nn.Module, folder: Path) -> None:
            torch.save(denoiser.state_dict(), folder / file)

        def restore(folder: Path) -> nn.Module:
            fresh: nn.Module = by_brevitas(make_float(), lambda _: None)
            fresh.load_state_dict(torch.load(folder / file, weights_only=True))
            return fresh

    return ModelReaderCase(
        adapter=load_base_quantizer(name),
        backend=load_backend(name),
        make_denoiser=lambda: copy.deepcopy(quantized),
        make_float=make_float,
        inputs=inputs,
        widths=WIDTHS,
        switch=switch,
        save=save,
        restore=restore,
        options=lambda folder: {"checkpoint": folder / file, **options},
    )
