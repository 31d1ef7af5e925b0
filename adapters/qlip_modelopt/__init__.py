"""NVIDIA ModelOpt: its quantized models as base quantizers, its quantizers as a backend.

Importing this package imports neither torch nor ModelOpt: checking a recipe needs only the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qlip_plugins.adapter import Inspection
from qlip_plugins.host import Host, OnHost

from .config import ModelOptConfig

if TYPE_CHECKING:
    import torch

    from qlip_plugins.adapter import Installed
    from qlip_plugins.grids import Ranges
    from qlip_plugins.state import CalibratedState

__all__ = ["ModelOpt", "ModelOptBackend", "ModelOptConfig", "adapter", "backend"]


# `register_quant_backend` is older; lists in `quant_cfg`, which our pages show, are not
HOST = Host("nvidia-modelopt", "0.44", "modelopt")


class ModelOpt:
    """Reads what `mto.save` or `save_pretrained` wrote, or a model that `mtq.quantize` has quantized."""

    config_class: ClassVar[type[ModelOptConfig]] = ModelOptConfig

    def load(self, config: ModelOptConfig) -> CalibratedState:
        """See `qlip_plugins.adapter.BaseQuantizer.load`; needs no ModelOpt."""
        from .checkpoints import load

        return load(config)

    def inspect(self, path: Path) -> Inspection:
        """See `qlip_plugins.adapter.BaseQuantizer.inspect`."""
        from .checkpoints import inspect

        return inspect(path)

    def read(self, config: ModelOptConfig, denoiser: torch.nn.Module) -> CalibratedState | None:
        """See `qlip_plugins.adapter.ModelReader.read`."""
        if config.checkpoint is not None:
            return None
        from .models import read

        return read(denoiser)


class ModelOptBackend(OnHost):
    """Runs activation quantizers by ModelOpt; the numbers are simulated, not fast."""

    exact: ClassVar[bool] = False
    host: ClassVar[Host] = HOST

    def install(
        self, denoiser: torch.nn.Module, state: CalibratedState, ranges: Ranges | None = None
    ) -> Installed:
        """See `qlip_plugins.adapter.Backend.install`.

        A float denoiser gets ModelOpt's quantized layers; one that ModelOpt has quantized keeps its own.
        """
        self.check_host()
        from .install import install

        return install(denoiser, state, ranges)


adapter = ModelOpt()
backend = ModelOptBackend()
