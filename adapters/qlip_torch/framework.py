"""What the backends of other frameworks share.

A float denoiser takes their layers, one that they have quantized keeps its own. What a framework cannot express
runs in plain torch, and is named.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from qlip_plugins.adapter import Installed
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.grids import ActGrid, Ranges
from qlip_plugins.state import CalibratedLayer, CalibratedState

from .install import InstalledTorch
from .quantizer import TorchActQuantizer


class FrameworkActQuantizer(TorchActQuantizer):
    """An activation quantizer whose rounding is a framework's; see `qlip_plugins.adapter.ActQuantizer`.

    `own` says that the framework calibrated it, so that the base width is whatever the framework makes of it.
    Otherwise its range is ours, a buffer that half precision would round, and the grid's float32 counts.
    """

    def __init__(self, name: str, base: ActGrid, ranges: Ranges, own: bool) -> None:
        super().__init__(name, base, ranges)
        self._own = own
        self._host: Any = None

    def run(self, x: Tensor, host: Any) -> Tensor:
        """Quantize `x` at the selected widths by `host`, the framework's quantizer."""
        self._host = host
        try:
            return self(x)
        finally:
            self._host = None


class InstalledOnFramework(InstalledTorch):
    """A calibrated state on a float denoiser whose layers have become a framework's.

    `operands` says why the framework cannot run the operands of attention.
    """

    operands: ClassVar[str]

    @abstractmethod
    def cannot_express(self, name: str, layer: CalibratedLayer, ranges: Ranges) -> str:
        """Why the framework cannot run a layer's input; empty where it can."""

    @abstractmethod
    def place(self, name: str, module: nn.Module, layer: CalibratedLayer, ranges: Ranges) -> nn.Module:
        """Let the framework quantize a layer's input, of one part; gives the layer, or what has taken its place."""

    def _quantize_input(
        self, name: str, module: nn.Module, layer: CalibratedLayer, ranges: Ranges
    ) -> nn.Module:
        reason = self.cannot_express(name, layer, ranges)
        if layer.inputs and not reason:
            return self.place(name, module, layer, ranges)
        before = set(self)
        module = super()._quantize_input(name, module, layer, ranges)
        self.not_expressed |= dict.fromkeys(set(self) - before, reason)
        return module

    def add_attention(self, name: str, state: CalibratedState, ranges: Ranges) -> None:
        """See `InstalledTorch.add_attention`."""
        before = set(self)
        super().add_attention(name, state, ranges)
        self.not_expressed |= dict.fromkeys(set(self) - before, self.operands)


class InstalledInPlace(Installed):
    """A controller on a model that a framework itself has quantized: its weights and ranges stay its own."""

    def __init__(self, state: CalibratedState) -> None:
        super().__init__({})
        self._state = state
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def take(self, denoiser: nn.Module, ranges: Ranges) -> None:
        """Put handles on the model's quantizers."""

    def remove(self) -> None:
        """See `Installed.remove`."""
        while self._undo:
            self._undo.pop()()

    @classmethod
    def install(
        cls, denoiser: nn.Module, state: CalibratedState, own: CalibratedState, ranges: Ranges | None
    ) -> Self:
        """Put handles on a quantized denoiser; `own` is what was read from it.

        Raises:
            IncompatibleModelError: `state` is another base.
        """
        if own.fingerprint != state.fingerprint:
            raise IncompatibleModelError(
                f"{state.source}: the {type(denoiser).__name__} has quantizers of {own.format}, and they are not this "
                f"base's ({own.fingerprint[:12]}..., the base is {state.fingerprint[:12]}...). Give the float "
                f"pipeline, or `base: {{adapter: {own.format}}}` without a checkpoint for the quantizers that are there"
            )
        installed = cls(state)
        try:
            installed.take(denoiser, ranges or Ranges())
        except BaseException:
            installed.remove()
            raise
        return installed
