"""The plainest base: weights rounded to the nearest code, activation ranges from one call.

It shows that a model's structure can be quantized and steered, at its true size within seconds. For pictures
that anyone should look at, calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..grids import ActGrid
from ..state import CalibratedLayer, CalibratedState, WeightPart, weight_sample

_LAYERS = (nn.Conv2d, nn.Linear)


@torch.no_grad()
def nearest_state(
    denoiser: nn.Module, call: Mapping[str, Any], weight_bits: int, activation_bits: int
) -> CalibratedState:
    """Quantize every convolution and linear layer of a denoiser; the denoiser itself is left as it is.

    Args:
        denoiser: on any device; the codes lie there, too.
        call: keyword arguments of one call, whose layers' inputs give the activation ranges.
        weight_bits: of every layer, one grid an output channel.
        activation_bits: of every layer's input, one grid a tensor.
    """
    ranges = _input_ranges(denoiser, call)
    layers = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, _LAYERS):
            low, high = ranges[name]
            grid = ActGrid.over(activation_bits, min(low, 0.0), max(high, low + 1e-6, 1e-6))
            layers[name] = CalibratedLayer((_nearest(module.weight, weight_bits),), (grid,))
    others = {
        name: parameter.detach()
        for name, parameter in denoiser.named_parameters()
        if name.removesuffix(".weight") not in layers
    }
    samples = {name: weight_sample(denoiser.get_parameter(f"{name}.weight").detach()) for name in layers}
    return CalibratedState(
        "nearest", layers, float_parameters=others, weight_samples=samples, source=type(denoiser).__name__
    )


def _nearest(weight: Tensor, bits: int) -> WeightPart:
    rows = weight.detach().float().flatten(1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero_point = (-low / scale).round()
    shape = (-1, *[1] * (weight.ndim - 1))
    codes = (weight.detach().float() / scale.view(shape)).round() + zero_point.view(shape)
    return WeightPart(
        codes.clamp(0, 2**bits - 1).to(torch.uint8), scale.view(shape), zero_point.view(shape), bits
    )


def _input_ranges(denoiser: nn.Module, call: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}

    def seen_by(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            low, high = (float(value) for value in torch.aminmax(args[0].float()))
            before = found.get(name, (low, high))
            found[name] = min(before[0], low), max(before[1], high)

        return note

    handles = [
        module.register_forward_pre_hook(seen_by(name))
        for name, module in denoiser.named_modules()
        if isinstance(module, _LAYERS)
    ]
    try:
        denoiser(**call)
    finally:
        for handle in handles:
            handle.remove()
    return found
