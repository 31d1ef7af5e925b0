"""Activation quantizers of ModelOpt under a controller, through its own plug point, `register_quant_backend`.

A quantizer keeps its width and its range; what is chosen lies in our `ModelOptActQuantizer`, in the place that
ModelOpt has for what a backend keeps (`_quantizer_cache`, which it never saves).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import (
    QuantModuleRegistry,
    TensorQuantizer,
    is_registered_quant_backend,
    register_quant_backend,
)
from modelopt.torch.quantization.tensor_quant import fake_tensor_quant
from torch import Tensor, nn

from qlip_plugins.adapter import Installed
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.grids import ActGrid, Ranges
from qlip_plugins.state import CalibratedLayer, CalibratedState
from qlip_torch.framework import FrameworkActQuantizer, InstalledInPlace, InstalledOnFramework
from qlip_torch.install import install as install_torch

from .models import BACKEND_NAME, is_quantized, read
from .reading import INPUT, TINY

_SKIPPED = "_skip_properties_for_save_restore"


class ModelOptActQuantizer(FrameworkActQuantizer):
    """An activation quantizer whose rounding is ModelOpt's; its host is a `TensorQuantizer`, which smooths before."""

    def __init__(self, name: str, base: ActGrid, ranges: Ranges, own: bool) -> None:
        super().__init__(name, base, ranges, own)
        self._scalars: dict[tuple[int, torch.device], tuple[Tensor, Tensor | None, bool]] = {}

    def _quantized(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        if len(widths) == 1:
            return self._at(x, widths[0])
        # ModelOpt has one width for a whole tensor.
        out = x.clone()
        for width in set(widths):
            rows = torch.tensor([row for row, own in enumerate(widths) if own == width], device=x.device)
            out = out.index_copy(0, rows, self._at(x.index_select(0, rows), width))
        return out

    def _at(self, x: Tensor, width: int) -> Tensor:
        if self._own and width == self.base_bits:
            return _by_itself(self._host, x)
        grid = self._grids.grid(width)
        return x if grid is None else self._on_grid(x, grid, self._host)

    def _on_grid(self, x: Tensor, grid: ActGrid, host: TensorQuantizer) -> Tensor:
        key = (grid.bits, x.device)
        if key not in self._scalars:
            high, middle, narrow = _as_modelopt(grid)
            value = None if middle is None else torch.tensor(middle, device=x.device)
            self._scalars[key] = (torch.tensor(high, device=x.device), value, narrow)
        amax, bias, narrow = self._scalars[key]
        out: Tensor = fake_tensor_quant(
            x.float(),
            amax,
            bias,
            grid.bits,
            False,  # unsigned
            narrow,
            None,
            host._pass_through_bwd,
            None,
            None,
        )
        return out.to(x.dtype)


def _by_itself(host: TensorQuantizer, x: Tensor) -> Tensor:
    """What a quantizer does without us."""
    host.backend = None
    try:
        out: Tensor = host._fake_quantize(x)
    finally:
        host.backend = BACKEND_NAME
    return out


def _as_modelopt(grid: ActGrid) -> tuple[float, float | None, bool]:
    """A grid as amax, the value of its middle code (None where that is 0.0), and whether it lacks the lowest code."""
    middle = 2 ** (grid.bits - 1)
    narrow = grid.high_code - grid.low_code < 2 * middle - 1
    shift = middle - narrow - (grid.zero_point - grid.low_code)
    return grid.scale * (middle - 1), shift * grid.scale if shift else None, narrow


def _entrypoint(x: Tensor, host: TensorQuantizer) -> Tensor:
    quantizer = host._quantizer_cache
    if not isinstance(quantizer, ModelOptActQuantizer):
        raise IncompatibleModelError(
            "a quantizer of ModelOpt asks for the backend 'qlip', and no recipe is applied to its model: apply one"
        )
    return quantizer.run(x, host)


def _register() -> None:
    if not is_registered_quant_backend(BACKEND_NAME):
        register_quant_backend(BACKEND_NAME, _entrypoint)


def _take(host: TensorQuantizer, quantizer: ModelOptActQuantizer) -> Callable[[], None]:
    """Let a quantizer of ours choose for one of ModelOpt's; gives what undoes it."""
    before = host.backend, host._quantizer_cache
    host.backend, host._quantizer_cache = BACKEND_NAME, quantizer
    # A model saved meanwhile must not ask for our backend when it is loaded.
    object.__setattr__(host, _SKIPPED, {*getattr(type(host), _SKIPPED), _SKIPPED, "backend"})

    def give_back() -> None:
        host.backend, host._quantizer_cache = before
        host.__dict__.pop(_SKIPPED, None)

    return give_back


class InstalledModelOpt(InstalledOnFramework):
    """A calibrated state on a float denoiser whose layers have become ModelOpt's."""

    operands = "attention operands: ModelOpt's attention has no backward pass (its issue 226)"

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self._taken: list[tuple[str, nn.Module, ModelOptActQuantizer]] = []

    def verify(self) -> None:
        """See `Installed.verify`."""
        super().verify()
        for name, module, quantizer in self._taken:
            _check_taken(name, getattr(module, INPUT, None), quantizer)

    def cannot_express(self, name: str, layer: CalibratedLayer, ranges: Ranges) -> str:
        """See `InstalledOnFramework.cannot_express`."""
        if layer.split is not None:
            return "a split input: ModelOpt has one quantizer for it, the checkpoint two"
        grids = [*layer.inputs, *ranges.fitted.get(name, {}).values()]
        if any(grid.scale * (2 ** (grid.bits - 1) - 1) <= TINY for grid in grids):
            return "a step that training drove below zero or next to it: ModelOpt rounds all of that to 0"
        return ""

    def place(self, name: str, module: nn.Module, layer: CalibratedLayer, ranges: Ranges) -> nn.Module:
        """See `InstalledOnFramework.place`."""
        self._undo.append(lambda: _export(module))
        converted: Any = QuantModuleRegistry.convert(module)
        converted.weight_quantizer.disable()  # the weight is on its grid already
        host = converted.input_quantizer
        quantizer = ModelOptActQuantizer(name, layer.inputs[0], ranges, own=False)
        _configure(host, layer.inputs[0])
        self._undo.append(_take(host, quantizer))
        self._quantizers[name] = quantizer
        self._taken.append((name, converted, quantizer))
        if layer.low_rank is not None:
            self._smooth(converted, layer)  # the branch wants the smoothed input, too
        elif layer.smoothing is not None:
            factor = layer.smoothing.to(converted.weight.dtype)
            host.pre_quant_scale = factor.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d) else factor
        # Ranges come from the state: a state dict keeps the keys of the float model.
        host._non_persistent_buffers_set |= set(host._buffers)
        host.to(converted.weight.device)
        return module


def _configure(host: TensorQuantizer, grid: ActGrid) -> None:
    amax, bias, narrow = _as_modelopt(grid)
    affine = {} if bias is None else {"bias": {-1: None, "type": "static"}}
    host.set_from_attribute_config(
        QuantizerAttributeConfig(num_bits=grid.bits, axis=None, narrow_range=narrow, **affine)
    )
    host.amax = torch.tensor(amax)
    if bias is not None:
        host.bias_value = torch.tensor(bias)


def _export(module: Any) -> None:
    """Make a layer what it was; its weight is put back by who has put ours in."""
    if hasattr(module, INPUT):
        module.export()
    vars(module).pop("_parallel_state", None)


class InstalledModelOptModel(InstalledInPlace):
    """A controller on a model that ModelOpt itself has quantized."""

    def __init__(self, state: CalibratedState) -> None:
        super().__init__(state)
        self._hosts: list[tuple[str, TensorQuantizer, ModelOptActQuantizer]] = []

    def take(self, denoiser: nn.Module, ranges: Ranges) -> None:
        """See `InstalledInPlace.take`."""
        for name, grid in self._state.activations.items():
            host: Any = denoiser.get_submodule(f"{name}.{INPUT}")
            quantizer = ModelOptActQuantizer(name, grid, ranges, own=True)
            self._undo.append(_take(host, quantizer))
            self._hosts.append((name, host, quantizer))
            self._quantizers[name] = quantizer
        for module in _attentions(denoiser):
            self._undo.append(_differentiable(module))

    def verify(self) -> None:
        """See `Installed.verify`."""
        for name, host, quantizer in self._hosts:
            _check_taken(name, host, quantizer)
            base = self._state.activations[name]
            amax: Any = host.amax
            found, off = (float(amax), host.num_bits), 1e-5 + torch.finfo(amax.dtype).eps
            if found[1] != base.bits or abs(found[0] - base.high) > off * base.high:
                raise IncompatibleModelError(
                    f"{name}: ModelOpt's range is {found[0]:.5g} at {found[1]} bits now; it was {base.high:.5g} at "
                    f"{base.bits} when the recipe was applied. Remove the recipe before calibrating or loading"
                )
            _check_smoothing(name, host, self._state.layers[name].smoothing)


def _check_smoothing(name: str, host: Any, expected: Tensor | None) -> None:
    found = host.pre_quant_scale
    if found is None and expected is None:
        return
    if found is not None and expected is not None:
        off = 1e-5 + torch.finfo(found.dtype).eps
        if torch.allclose(found.float().flatten().cpu(), expected, rtol=off, atol=0):
            return
    raise IncompatibleModelError(
        f"{name}: ModelOpt's pre_quant_scale is not the one that was there when the recipe was applied. Remove the "
        "recipe before calibrating or loading"
    )


def _check_taken(name: str, host: Any, quantizer: ModelOptActQuantizer) -> None:
    if (host is not None and not (host.is_enabled and host._if_quant)) or getattr(host, "_if_calib", False):
        raise IncompatibleModelError(
            f"{name}: ModelOpt's quantizer has been switched off, or to calibrating, so that no choice has an effect: "
            "remove the recipe before that"
        )
    if getattr(host, "_quantizer_cache", None) is not quantizer or host.backend != BACKEND_NAME:
        raise IncompatibleModelError(f"{name}: its activation quantizer has been taken out")


def _attentions(denoiser: nn.Module) -> list[Any]:
    """Attentions that ModelOpt has wrapped and whose products it leaves alone."""
    return [
        module
        for module in denoiser.modules()
        if hasattr(module, "q_bmm_quantizer")
        and "forward" not in vars(module)  # accelerate's hooks stay in charge
        and not any(q.is_enabled for n, q in module.named_children() if n.endswith("_quantizer"))
    ]


def _differentiable(attention: Any) -> Callable[[], None]:
    """Bypass ModelOpt's wrapper, whose products have no backward pass even where they are left alone."""
    plain: Any = next(
        kind
        for kind in type(attention).__mro__
        if not kind.__module__.startswith("modelopt.") and "forward" in vars(kind)
    )
    attention.forward = plain.forward.__get__(attention)

    def give_back() -> None:
        vars(attention).pop("forward", None)

    return give_back


def install(denoiser: nn.Module, state: CalibratedState, ranges: Ranges | None) -> Installed:
    """See `qlip_plugins.adapter.Backend.install`."""
    _register()
    if not is_quantized(denoiser):
        return install_torch(denoiser, state, ranges, InstalledModelOpt)
    return InstalledModelOptModel.install(denoiser, state, read(denoiser), ranges)
