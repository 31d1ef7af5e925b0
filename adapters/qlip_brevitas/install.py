"""Activation quantizers of brevitas under a controller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.utils import StatelessBuffer
from brevitas.inject import ExtendedInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjector
from torch import Tensor, nn

from qlip_plugins.adapter import Installed
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.grids import ActGrid, Ranges
from qlip_plugins.state import CalibratedLayer, CalibratedState
from qlip_torch.framework import InstalledInPlace, InstalledOnFramework
from qlip_torch.install import install as install_torch

from .models import read
from .quantizer import BrevitasActQuantizer, Choose
from .reading import is_quantized


def _take(proxy: Any, quantizer: BrevitasActQuantizer) -> tuple[Choose, Callable[[], None]]:
    """Let a quantizer of ours choose for one of brevitas's; gives what undoes it, too."""
    hook = Choose(quantizer)
    handle = proxy.register_forward_hook(hook)
    before = proxy.disable_quant
    proxy.disable_quant = True

    def give_back() -> None:
        handle.remove()
        proxy.disable_quant = before

    return hook, give_back


def _check_taken(name: str, proxy: Any, hook: Choose) -> None:
    if hook not in proxy._forward_hooks.values() or not proxy.disable_quant:
        raise IncompatibleModelError(f"{name}: its activation quantizer has been taken out")
    if proxy.export_mode:
        raise IncompatibleModelError(
            f"{name}: its scales and widths are frozen (quant_inference_mode, or an export), so that no choice has an "
            "effect: leave that mode first"
        )


class InstalledBrevitas(InstalledOnFramework):
    """A calibrated state on a float denoiser, with layers of brevitas in place of its own."""

    operands = "attention operands: brevitas has no quantizers inside diffusers' attention"

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self._taken: list[tuple[str, Any, Choose]] = []

    def verify(self) -> None:
        """See `Installed.verify`."""
        super().verify()
        for name, module, hook in self._taken:
            if self._denoiser.get_submodule(name) is not module:
                raise IncompatibleModelError(f"{name}: its layer has been replaced")
            _check_taken(name, module.input_quant, hook)

    def cannot_express(self, name: str, layer: CalibratedLayer, ranges: Ranges) -> str:
        """See `InstalledOnFramework.cannot_express`."""
        if layer.split is not None:
            return "a split input: brevitas has one quantizer for it, the checkpoint two"
        if any(grid.scale <= 0 for grid in (*layer.inputs, *ranges.fitted.get(name, {}).values())):
            return "a step that training drove below zero: brevitas's scales are above"
        return ""

    def place(self, name: str, module: nn.Module, layer: CalibratedLayer, ranges: Ranges) -> nn.Module:
        """See `InstalledOnFramework.place`."""
        made: Any = _layer_of_brevitas(module, layer.inputs[0])
        self._smooth(made, layer)
        parent, _, last = name.rpartition(".")
        holder = self._denoiser.get_submodule(parent)
        setattr(holder, last, made)
        self._undo.append(lambda: setattr(holder, last, module))
        quantizer = BrevitasActQuantizer(name, layer.inputs[0], ranges, own=False)
        hook, give_back = _take(made.input_quant, quantizer)
        self._undo.append(give_back)
        self._quantizers[name] = quantizer
        self._taken.append((name, made, hook))
        placed: nn.Module = made
        return placed


def _layer_of_brevitas(module: Any, grid: ActGrid) -> nn.Module:
    """A quantized layer on a float layer's own parameters."""
    options: dict[str, Any] = {
        "input_quant": _injector(grid),
        "weight_quant": None,  # the weight is on its grid already
        "bias_quant": None,
        "return_quant_tensor": False,
        "bias": module.bias is not None,
        "device": module.weight.device,
        "dtype": module.weight.dtype,
    }
    if isinstance(module, nn.Conv2d):
        options |= {
            part: getattr(module, part)
            for part in ("stride", "padding", "dilation", "groups", "padding_mode")
        }
        made = qnn.QuantConv2d(module.in_channels, module.out_channels, module.kernel_size, **options)
    else:
        made = qnn.QuantLinear(module.in_features, module.out_features, **options)
    made.weight, made.bias = module.weight, module.bias
    placed: nn.Module = made.to(module.weight.device).train(module.training)
    return placed


class _Fixed(nn.Module):
    """A scale or zero point that no input moves."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = StatelessBuffer(torch.tensor(value))

    def forward(self, *ignored: Tensor) -> Tensor:
        out: Tensor = self.value()
        return out


def _injector(grid: ActGrid) -> type[ExtendedInjector]:
    """How brevitas is told of a grid."""
    signed = grid.low_code < 0
    narrow = signed and grid.low_code == -grid.high_code
    quantizer = RescalingIntQuant(
        int_quant=IntQuant(narrow_range=narrow, signed=signed, input_view_impl=nn.Identity()),
        scaling_impl=_Fixed(grid.scale),
        int_scaling_impl=_Fixed(1.0),
        zero_point_impl=_Fixed(float(grid.zero_point)),
        bit_width_impl=BitWidthConst(grid.bits),
    )
    parts = {
        "proxy_class": ActQuantProxyFromInjector,
        "tensor_quant": quantizer,
        "signed": signed,
        "narrow_range": narrow,
        "bit_width": grid.bits,
    }
    return type("Grid", (ExtendedInjector,), parts)


class InstalledBrevitasModel(InstalledInPlace):
    """A controller on a model that brevitas itself has quantized."""

    def __init__(self, state: CalibratedState) -> None:
        super().__init__(state)
        self._hosts: list[tuple[str, Any, Choose]] = []

    def take(self, denoiser: nn.Module, ranges: Ranges) -> None:
        """See `InstalledInPlace.take`."""
        for name, grid in self._state.activations.items():
            quantizer = BrevitasActQuantizer(name, grid, ranges, own=True)
            layer: Any = denoiser.get_submodule(name)
            proxy = layer.input_quant
            hook, give_back = _take(proxy, quantizer)
            self._undo.append(give_back)
            self._hosts.append((name, proxy, hook))
            self._quantizers[name] = quantizer

    @torch.no_grad()
    def verify(self) -> None:
        """See `Installed.verify`."""
        for name, proxy, hook in self._hosts:
            _check_taken(name, proxy, hook)
            base = self._state.activations[name]
            quantizer = proxy.fused_activation_quant_proxy.tensor_quant
            bits = quantizer.msb_clamp_bit_width_impl()
            like = torch.zeros(1, device=bits.device)
            scale = quantizer.scaling_impl(like, quantizer.int_scaling_impl(bits))
            zero = float(quantizer.zero_point_impl(like, scale, bits))
            off = (1e-5 + torch.finfo(scale.dtype).eps) * base.scale
            same = abs(float(scale) - base.scale) <= off and round(zero) == base.zero_point
            if not same or int(bits) != base.bits:
                raise IncompatibleModelError(
                    f"{name}: brevitas's step is {float(scale):.5g}, its zero point {zero:g} at {int(bits)} bits now; "
                    f"they were {base.scale:.5g} and {base.zero_point} at {base.bits} when the recipe was applied. "
                    "Remove the recipe before calibrating or loading"
                )


def install(denoiser: nn.Module, state: CalibratedState, ranges: Ranges | None) -> Installed:
    """See `qlip_plugins.adapter.Backend.install`."""
    if not is_quantized(denoiser):
        return install_torch(denoiser, state, ranges, InstalledBrevitas)
    return InstalledBrevitasModel.install(denoiser, state, read(denoiser), ranges)
