"""Activation quantizers of brevitas under a controller.

Its `IntQuant` takes scale, zero point and width as tensors, with a value for each row if need be. What is chosen
goes into these; brevitas's own width and range are never written to, so that they are there when the model is saved,
and a state dict that rebuilds its quantizers takes nothing of ours away: they are looked up at each call.
"""

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
from qlip_torch.install import InstalledTorch
from qlip_torch.install import install as install_torch
from qlip_torch.quantizer import TorchActQuantizer

from .models import read
from .reading import is_quantized, proxy_of

_OPERANDS = "attention operands: brevitas has no quantizers inside diffusers' attention"
_SPLIT = "a split input: brevitas has one quantizer for it, the checkpoint two"


class BrevitasActQuantizer(TorchActQuantizer):
    """An activation quantizer whose rounding is brevitas's; see `qlip_plugins.adapter.ActQuantizer`.

    `own` says that brevitas calibrated it, so that the base width is whatever brevitas makes of it. Otherwise its
    scale is ours, a buffer that half precision would round, and the grid's float32 counts.
    """

    def __init__(self, name: str, base: ActGrid, ranges: Ranges, own: bool) -> None:
        super().__init__(name, base, ranges)
        self._own = own
        self._host: Any = None

    def run(self, x: Tensor, host: Any) -> Tensor:
        """Quantize `x` at the selected widths by `host`, a `FusedActivationQuantProxy`."""
        self._host = host
        try:
            return self(x)
        finally:
            self._host = None

    def _quantized(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        if self._own and widths == (self.base_bits,):
            own: Tensor = self._host(x)[0]
            return own
        table = self._table(widths, x)
        scale, zero_point, low_code, high_code = table.values
        int_quant = self._host.tensor_quant.int_quant
        codes = high_code - low_code + 1
        bits = codes.log2().ceil()
        # A signed quantizer has its codes around 0, and may leave out the lowest: ours are moved there.
        lowest = 2 ** (bits - 1) - codes if int_quant.signed else torch.zeros_like(bits)
        out: Tensor = int_quant(scale, zero_point - low_code + lowest, bits, x.float()).to(x.dtype)
        return out if table.kept is None else torch.where(table.kept, x, out)


class _Choose:
    """A proxy's forward hook: our choice in place of its output. A copy of the model gets one of its own."""

    def __init__(self, quantizer: BrevitasActQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, proxy: Any, args: tuple[Any, ...], out: Any) -> Tensor:
        return self.quantizer.run(args[0], proxy.fused_activation_quant_proxy)


def _take(proxy: Any, quantizer: BrevitasActQuantizer) -> tuple[_Choose, Callable[[], None]]:
    """Let a quantizer of ours choose for one of brevitas's; gives what undoes it, too."""
    hook = _Choose(quantizer)
    handle = proxy.register_forward_hook(hook)
    before = proxy.disable_quant
    proxy.disable_quant = True

    def give_back() -> None:
        handle.remove()
        proxy.disable_quant = before

    return hook, give_back


def _check_taken(name: str, proxy: Any, hook: _Choose) -> None:
    if hook not in proxy._forward_hooks.values() or not proxy.disable_quant:
        raise IncompatibleModelError(f"{name}: its activation quantizer has been taken out")
    if proxy.export_mode:
        raise IncompatibleModelError(
            f"{name}: its scales and widths are frozen (quant_inference_mode, or an export), so that no choice has an "
            "effect: leave that mode first"
        )


class InstalledBrevitas(InstalledTorch):
    """A calibrated state on a float denoiser, with layers of brevitas in place of its own."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self._taken: list[tuple[str, nn.Module, _Choose]] = []

    def verify(self) -> None:
        """See `Installed.verify`."""
        super().verify()
        for name, module, hook in self._taken:
            if self._denoiser.get_submodule(name) is not module:
                raise IncompatibleModelError(f"{name}: its layer has been replaced")
            _check_taken(name, proxy_of(module), hook)

    def _quantize_input(
        self, name: str, module: nn.Module, layer: CalibratedLayer, ranges: Ranges
    ) -> nn.Module:
        reason = _cannot_express(name, layer, ranges)
        if reason or not layer.inputs:
            before = set(self._quantizers)
            module = super()._quantize_input(name, module, layer, ranges)
            self.not_expressed |= dict.fromkeys(set(self._quantizers) - before, reason)
            return module
        made = _layer_of_brevitas(module, layer.inputs[0])
        self._smooth(made, layer)
        parent, _, last = name.rpartition(".")
        holder = self._denoiser.get_submodule(parent)
        setattr(holder, last, made)
        self._undo.append(lambda: setattr(holder, last, module))
        quantizer = BrevitasActQuantizer(name, layer.inputs[0], ranges, own=False)
        hook, give_back = _take(proxy_of(made), quantizer)
        self._undo.append(give_back)
        self._quantizers[name] = quantizer
        self._taken.append((name, made, hook))
        return made

    def add_attention(self, name: str, state: CalibratedState, ranges: Ranges) -> None:
        """See `InstalledTorch.add_attention`."""
        before = set(self._quantizers)
        super().add_attention(name, state, ranges)
        self.not_expressed |= dict.fromkeys(set(self._quantizers) - before, _OPERANDS)


def _cannot_express(name: str, layer: CalibratedLayer, ranges: Ranges) -> str:
    if layer.split is not None:
        return _SPLIT
    if any(grid.scale <= 0 for grid in (*layer.inputs, *ranges.fitted.get(name, {}).values())):
        return "a step that training drove below zero: brevitas's scales are above"
    return ""


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


class InstalledLive(Installed):
    """A controller on a model that brevitas itself has quantized: its weights and ranges stay its own."""

    def __init__(self, state: CalibratedState) -> None:
        super().__init__({})
        self._state = state
        self._hosts: list[tuple[str, Any, _Choose]] = []
        self._undo: list[Callable[[], None]] = []

    def take(self, denoiser: nn.Module, ranges: Ranges) -> None:
        """Put handles on the model's quantizers."""
        for name, grid in self._state.activations.items():
            quantizer = BrevitasActQuantizer(name, grid, ranges, own=True)
            proxy = proxy_of(denoiser.get_submodule(name))
            hook, give_back = _take(proxy, quantizer)
            self._undo.append(give_back)
            self._hosts.append((name, proxy, hook))
            self._quantizers[name] = quantizer

    def remove(self) -> None:
        """See `Installed.remove`."""
        while self._undo:
            self._undo.pop()()

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
    _refuse_second(denoiser)
    own = read(denoiser)
    if own.fingerprint != state.fingerprint:
        raise IncompatibleModelError(
            f"{state.source}: the {type(denoiser).__name__} has layers of brevitas, and their quantizers are not this "
            f"base's ({own.fingerprint[:12]}..., the base is {state.fingerprint[:12]}...). Give the float pipeline, or "
            "`base: {adapter: brevitas}` without a checkpoint for the quantizers that are there"
        )
    installed = InstalledLive(state)
    try:
        installed.take(denoiser, ranges or Ranges())
    except BaseException:
        installed.remove()
        raise
    return installed


def _refuse_second(denoiser: nn.Module) -> None:
    for name, module in denoiser.named_modules():
        if any(isinstance(hook, _Choose) for hook in module._forward_hooks.values()):
            raise IncompatibleModelError(
                f"{name}: a recipe's quantizers are installed on this {type(denoiser).__name__} already: remove them "
                "first"
            )
