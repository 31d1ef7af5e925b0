"""What brevitas's quantizers say of themselves, as a `CalibratedState`.

Arithmetic of an integer quantizer (`brevitas.core.quant.IntQuant`): (clamp(round(x / s + z), lowest, highest) - z) s.
Another width of a signed one keeps s 2^(bits - 1), of an unsigned one s (2^bits - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.core.quant import IntQuant
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector, DynamicActQuantProxyFromInjector
from brevitas.quant_tensor import IntQuantTensor
from torch import Tensor, nn

from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.grids import ActGrid, Kept
from qlip_plugins.state import CalibratedLayer, CalibratedState, WeightPart

NAME = "brevitas"
LAYERS = (qnn.QuantConv2d, qnn.QuantLinear)
_PROXIES = ("input_quant", "weight_quant", "output_quant", "bias_quant")


def is_quantized(module: nn.Module) -> bool:
    """Whether a model has layers of brevitas."""
    return any(isinstance(part, LAYERS) for part in module.modules())


@torch.no_grad()
def state_of(
    layers: Mapping[str, Any], floats: Mapping[str, Tensor], left: Mapping[str, str], source: str
) -> CalibratedState:
    """The neutral record.

    Args:
        layers: brevitas's layers by module path.
        floats: the float parameters of the whole model.
        left: quantizers beside the layers' own.
        source: for messages.

    Raises:
        IncompatibleModelError: a quantizer has no integer widths to choose from; names it and says what it is.
        ArtefactError: a scale is no number above 0.
    """
    read = {name: _layer(f"{source}: {name}", module) for name, module in layers.items()}
    found = {name: layer for name, layer in read.items() if layer is not None}
    if not found:
        raise IncompatibleModelError(f"{source}: brevitas quantizes no convolution or linear in it")
    if not any(layer.inputs for layer in found.values()):
        raise IncompatibleModelError(
            f"{source}: it quantizes weights alone, so there are no activation bits to choose: give `input_quant`"
        )
    # GPTQ, bias correction and equalization all write into these, and leave no trace of it.
    moved = frozenset(f"{name}.{part}" for name in found for part in ("weight", "bias"))
    own = {name: tensor.detach().cpu() for name, tensor in floats.items() if tensor.is_floating_point()}
    return CalibratedState(
        NAME, found, float_parameters=own, source=source, moved=moved & set(own), left=left
    )


def _layer(name: str, module: Any) -> CalibratedLayer | None:
    entry, weight = module.input_quant, module.weight_quant
    if not entry.is_quant_enabled and not weight.is_quant_enabled:
        return None
    _check_running(name, module)
    if module.bias_quant.is_quant_enabled:
        raise IncompatibleModelError(
            f"{name}: its bias is quantized by the scale of its input, which has none at 32 bits: quantize with "
            "bias_quant=None"
        )
    if not weight.is_quant_enabled:
        raise IncompatibleModelError(
            f"{name}: its input is quantized and its weight is not: quantize both, or neither"
        )
    inputs = (_grid(f"{name}.input_quant", entry),) if entry.is_quant_enabled else ()
    return CalibratedLayer((_weight(name, module),), inputs)


def _check_running(name: str, module: Any) -> None:
    if module.training:
        raise IncompatibleModelError(
            f"{name}: it is in training mode, where its ranges follow what it sees: call .eval() on the model"
        )
    if module.return_quant_tensor:
        raise IncompatibleModelError(
            f"{name}: it returns quantized tensors, which carry one width to the next layer: quantize with "
            "return_quant_tensor=False"
        )
    for part in ("input_quant", "weight_quant"):
        if getattr(module, part).export_mode:
            raise IncompatibleModelError(
                f"{name}: its scales and widths are frozen (quant_inference_mode, or an export): leave that mode first"
            )


def _weight(name: str, module: Any) -> WeightPart:
    quantized = module.quant_weight()
    if not isinstance(quantized, IntQuantTensor):
        raise IncompatibleModelError(
            f"{name}: its weight is a {type(quantized).__name__}, expected integers, one grid an output channel"
        )
    bits, shape = int(quantized.bit_width), tuple(quantized.value.shape)
    per_channel = (shape[0], *[1] * (len(shape) - 1))
    scale, zero = (_per_channel(name, part, per_channel) for part in (quantized.scale, quantized.zero_point))
    int_quant = getattr(module.weight_quant.tensor_quant, "int_quant", None)
    if not isinstance(int_quant, IntQuant):
        raise IncompatibleModelError(
            f"{name}: its weight is rounded by a {type(int_quant).__name__}, not IntQuant"
        )
    # Its own codes: half-precision values, divided by the step again, may lie between two.
    codes = int_quant.to_int(
        quantized.scale, quantized.zero_point, quantized.bit_width, module.weight
    ).float()
    shift = 2 ** (bits - 1) if quantized.signed else 0
    kind = torch.uint8 if bits <= 8 else torch.int32
    return WeightPart((codes + shift).cpu().to(kind), scale.cpu(), zero.cpu() + shift, bits)


def _per_channel(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.numel() not in (1, shape[0]):
        raise IncompatibleModelError(
            f"{name}: its weight has {values.numel()} grids, expected 1 or {shape[0]}"
        )
    if not bool(values.isfinite().all()):
        raise ArtefactError(f"{name}: a scale of its weight is NaN or infinite")
    return values.detach().float().reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


def _grid(name: str, proxy: Any) -> ActGrid:
    quantizer = getattr(proxy.fused_activation_quant_proxy, "tensor_quant", None)
    integer = isinstance(getattr(quantizer, "int_quant", None), IntQuant)
    reason = ""
    if isinstance(proxy, DynamicActQuantProxyFromInjector):
        reason = "dynamic: it has no calibrated range"
    elif type(proxy) is not ActQuantProxyFromInjector or not integer:
        reason = f"a {type(proxy).__name__} over a {type(quantizer).__name__}"
    elif proxy.scale().numel() > 1:
        reason = f"a scale for each of {proxy.scale().numel()} channels"
    if reason:
        raise IncompatibleModelError(
            f"{name} is {reason}. Widths can be chosen where integers are: one static scale a tensor, such as "
            "Int8ActPerTensorFloat"
        )
    bits, scale, zero = int(proxy.bit_width()), float(proxy.scale()), round(float(proxy.zero_point()))
    if not 0 < scale < float("inf") or not 2 <= bits <= 24:
        raise ArtefactError(f"{name}: scale {scale} at {bits} bits: was it calibrated?")
    if getattr(getattr(quantizer, "scaling_impl", None), "counter", None) == 0:
        raise ArtefactError(f"{name}: calibration never reached it: its range is the one it was made with")
    narrow = bool(proxy.is_narrow_range)
    if not proxy.is_signed:
        return ActGrid(bits, scale, zero, 0, 2**bits - 1 - narrow)
    top = 2 ** (bits - 1) - 1
    kept: Kept = "ends" if zero else "high" if narrow else "low"
    return ActGrid(bits, scale, zero, -top if narrow else -top - 1, top, kept)


def left_of(denoiser: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """Quantizers that run and are neither a layer's weight's nor its input's."""
    own = {
        id(getattr(layer, part)) for layer in layers.values() for part in _PROXIES if part != "output_quant"
    }
    return {
        name: f"a {type(module).__name__} outside the inputs of convolutions and linears"
        for name, module in denoiser.named_modules()
        if id(module) not in own
        and getattr(module, "is_quant_enabled", False) is True
        and type(module).__module__.startswith("brevitas.proxy")
    }


def floats_of(denoiser: nn.Module, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The float parameters of a model, without those of quantizers."""
    inside = tuple(f"{name}.{part}." for name in layers for part in _PROXIES)
    return {name: p for name, p in denoiser.named_parameters() if not name.startswith(inside)}
