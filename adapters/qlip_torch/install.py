from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlip_plugins.adapter import Installed
from qlip_plugins.attention import QuantizedAttnProcessor, check_plain
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.grids import Ranges
from qlip_plugins.state import (
    OPERANDS,
    SPLIT_SUFFIX,
    CalibratedLayer,
    CalibratedState,
    through_low_rank,
)

from .quantizer import TorchActQuantizer


class _OnInput(ABC):
    """A layer's forward pre-hook that changes its input. Copied with the layer."""

    @abstractmethod
    def changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the layer is given in place of `x`."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not args:
            return (self.changed(module, kwargs["input"]),), {}
        return (self.changed(module, args[0]), *args[1:]), kwargs


class _Smooth(_OnInput):
    """Scales a layer's input, channel by channel; and the low-rank branch beside the layer."""

    def __init__(self, layer: CalibratedLayer) -> None:
        self._smoothing, self._low_rank = layer.smoothing, layer.low_rank
        self._beside: Tensor | None = None

    def changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `_OnInput.changed`."""
        if self._smoothing is not None:
            self._smoothing = self._smoothing.to(x.device)  # once: it stays there
            factor = self._smoothing.to(x.dtype)
            x = x * (factor.reshape(-1, 1, 1) if isinstance(module, nn.Conv2d) else factor)
        if self._low_rank is not None:
            down, up = self._low_rank
            self._low_rank = (down.to(x.device), up.to(x.device))
            self._beside = through_low_rank(x, self._low_rank)
        return x

    def add(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """The forward hook: adds the branch."""
        beside, self._beside = self._beside, None
        return out if beside is None else out + beside


class _QuantizeInput(_OnInput):
    """Quantizes a layer's input; a deepcopy has quantizers of its own."""

    def __init__(self, parts: tuple[TorchActQuantizer, ...], split: int | None) -> None:
        self.parts = parts
        self.split = split

    def changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """See `_OnInput.changed`."""
        if self.split is None:
            return self.parts[0](x)
        channels = 1 if isinstance(module, nn.Conv2d) else -1
        pieces = x.split((self.split, x.shape[channels] - self.split), dim=channels)
        return torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], channels)


class _RefuseOtherWeights:
    """Runs after `load_state_dict`: a weight that is not the quantized one must not pass unnoticed."""

    def __init__(self, name: str, layer: CalibratedLayer) -> None:
        self.name = name
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> _RefuseOtherWeights:
        return self  # the codes are constant and large: copies of a layer share them

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.is_meta:
            return
        if not torch.equal(weight.detach(), self.layer.dequantized().to(weight.device, weight.dtype)):
            raise IncompatibleModelError(
                f"{self.name}: its quantized weight has been overwritten (by load_state_dict?). Remove the "
                "quantizers first, load, then install them again"
            )


class InstalledTorch(Installed):
    """What `install` put on a denoiser."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__({})
        self._denoiser = denoiser
        self._undo: list[Callable[[], None]] = []
        self._hooks: list[tuple[nn.Module, _QuantizeInput]] = []
        self._attentions: list[tuple[str, Any, QuantizedAttnProcessor]] = []

    def remove(self) -> None:
        """See `Installed.remove`."""
        while self._undo:
            self._undo.pop()()

    def verify(self) -> None:
        """See `Installed.verify`."""
        for module, hook in self._hooks:
            if hook not in module._forward_pre_hooks.values():
                raise IncompatibleModelError(
                    f"{hook.parts[0].name}: its activation quantizer has been taken out"
                )
        for name, attention, processor in self._attentions:
            if attention.processor is not processor:
                raise IncompatibleModelError(
                    f"{name}: its attention processor has been replaced by "
                    f"{type(attention.processor).__name__}"
                )

    def add_float(self, path: str, value: Tensor) -> None:
        """Put a parameter of the calibrated model in place of the denoiser's, where they differ."""
        module_path, _, name = path.rpartition(".")
        module = self._denoiser.get_submodule(module_path)
        current: nn.Parameter = getattr(module, name)
        ours = value.to(current.device, current.dtype)
        if current.is_meta or not torch.equal(current.detach(), ours):
            self._swap(module, name, ours.clone())

    def add_layer(self, name: str, layer: CalibratedLayer, ranges: Ranges) -> None:
        """Bake a layer's weight and quantize its input."""
        module = self._denoiser.get_submodule(name)
        self._swap(module, "weight", layer.dequantized())
        if layer.inputs or layer.smoothing is not None or layer.low_rank is not None:
            module = self._quantize_input(name, module, layer, ranges)
        check = _RefuseOtherWeights(name, layer)
        self._undo.append(module.register_load_state_dict_post_hook(check).remove)

    def _quantize_input(
        self, name: str, module: nn.Module, layer: CalibratedLayer, ranges: Ranges
    ) -> nn.Module:
        """Quantize a layer's input; a backend of another framework overrides this where it can express it.

        Returns:
            The layer, or what has taken its place.
        """
        self._smooth(module, layer)
        parts = tuple(
            TorchActQuantizer(quantizer, grid, ranges)
            for quantizer, grid in zip((name, name + SPLIT_SUFFIX), layer.inputs, strict=False)
        )
        if not parts:
            return module
        self._quantizers |= {part.name: part for part in parts}
        hook = _QuantizeInput(parts, layer.split)
        self._hooks.append((module, hook))
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return module

    def _smooth(self, module: nn.Module, layer: CalibratedLayer) -> None:
        """Scale a layer's input and add its low-rank branch, where it has them; before its input is quantized."""
        if layer.smoothing is None and layer.low_rank is None:
            return
        smooth = _Smooth(layer)
        self._undo.append(module.register_forward_pre_hook(smooth, with_kwargs=True).remove)
        self._undo.append(module.register_forward_hook(smooth.add).remove)

    def add_attention(self, name: str, state: CalibratedState, ranges: Ranges) -> None:
        """Quantize the operands of an attention's products."""
        attention: Any = self._denoiser.get_submodule(name)
        operands = {
            operand: TorchActQuantizer(f"{name}.{operand}", state.operands[f"{name}.{operand}"], ranges)
            for operand in OPERANDS
        }
        self._quantizers |= {quantizer.name: quantizer for quantizer in operands.values()}
        processor, original = QuantizedAttnProcessor(**operands), attention.processor
        attention.set_processor(processor)
        self._attentions.append((name, attention, processor))
        self._undo.append(lambda: attention.set_processor(original))

    def _swap(self, module: nn.Module, name: str, value: Tensor) -> None:
        original: nn.Parameter = getattr(module, name)

        def restore() -> None:
            # The model may have moved since: the original follows it.
            now = getattr(module, name)
            if (now.device, now.dtype) != (original.device, original.dtype):
                original.data = original.data.to(now.device, now.dtype)
            setattr(module, name, original)

        placed = value.to(original.device, original.dtype)
        setattr(module, name, nn.Parameter(placed, requires_grad=original.requires_grad))
        self._undo.append(restore)


def install(
    denoiser: nn.Module,
    state: CalibratedState,
    ranges: Ranges | None,
    kind: type[InstalledTorch] = InstalledTorch,
) -> InstalledTorch:
    """See `qlip_plugins.adapter.Backend.install`; `kind` is a backend's that builds on this one."""
    ranges = ranges or Ranges()
    _refuse_second(denoiser)
    _refuse_offloaded(denoiser)
    state.check_whole()
    state.check_plain(denoiser)
    state.check_fits(denoiser)
    state = state.completed(denoiser)
    attentions = list(dict.fromkeys(name.rpartition(".")[0] for name in state.operands))
    for name in attentions:
        check_plain(name, denoiser.get_submodule(name))
    installed = kind(denoiser)
    try:
        for name, value in state.float_parameters.items():
            if name.removesuffix(".weight") not in state.layers:
                installed.add_float(name, value)
        for name, layer in state.layers.items():
            installed.add_layer(name, layer, ranges)
        for name in attentions:
            installed.add_attention(name, state, ranges)
    except BaseException:
        installed.remove()
        raise
    return installed


def _refuse_offloaded(denoiser: nn.Module) -> None:
    for name, module in denoiser.named_modules():
        if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
            raise IncompatibleModelError(
                f"{name}: its weights are offloaded by accelerate, which would put the float ones back. Install "
                "first, then call enable_sequential_cpu_offload()"
            )


def _refuse_second(denoiser: nn.Module) -> None:
    for name, module in denoiser.named_modules():
        if any(isinstance(hook, _RefuseOtherWeights) for hook in module._load_state_dict_post_hooks.values()):
            raise IncompatibleModelError(
                f"{name}: quantizers are installed on this {type(denoiser).__name__} already: remove them first "
                "(a copy of such a model keeps its own for good: copy before installing)"
            )
