"""The reference backend: plain torch layers, weights baked once, activations quantized by hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from qlip_plugins.adapter import Installed
    from qlip_plugins.grids import Ranges
    from qlip_plugins.state import CalibratedState

__all__ = ["TorchBackend", "backend"]


class TorchBackend:
    """Runs a calibrated state on the denoiser's own layers; the numbers are simulated, not fast."""

    exact: ClassVar[bool] = True

    def install(
        self, denoiser: torch.nn.Module, state: CalibratedState, ranges: Ranges | None = None
    ) -> Installed:
        """See `qlip_plugins.adapter.Backend.install`."""
        from .install import install

        return install(denoiser, state, ranges)


backend = TorchBackend()
