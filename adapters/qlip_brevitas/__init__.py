"""AMD's brevitas: its quantized models as base quantizers, its quantizers as a backend.

Importing this package imports neither torch nor brevitas: checking a recipe needs only the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qlip_plugins.adapter import Inspection
from qlip_plugins.host import Host, OnHost

from .config import BrevitasConfig

if TYPE_CHECKING:
    import torch

    from qlip_plugins.adapter import Installed
    from qlip_plugins.grids import Ranges
    from qlip_plugins.state import CalibratedState

__all__ = ["Brevitas", "BrevitasBackend", "BrevitasConfig", "adapter", "backend"]


# earlier ones do not work with a torch that this package supports
HOST = Host("brevitas", "0.13.1", "brevitas")


class Brevitas(OnHost):
    """Reads the state dict of a brevitas model, or a model that brevitas has quantized."""

    config_class: ClassVar[type[BrevitasConfig]] = BrevitasConfig
    host: ClassVar[Host] = HOST

    def load(self, config: BrevitasConfig) -> CalibratedState:
        """See `qlip_plugins.adapter.BaseQuantizer.load`."""
        from .checkpoints import load

        return load(config, self.check_host)

    def inspect(self, path: Path) -> Inspection:
        """See `qlip_plugins.adapter.BaseQuantizer.inspect`; needs no brevitas."""
        from .checkpoints import inspect

        return inspect(path)

    def read(self, config: BrevitasConfig, denoiser: torch.nn.Module) -> CalibratedState | None:
        """See `qlip_plugins.adapter.ModelReader.read`."""
        if config.checkpoint is not None:
            return None
        self.check_host()
        from .checkpoints import check_fingerprint
        from .models import read

        state = read(denoiser)
        check_fingerprint(state, config)
        return state


class BrevitasBackend(OnHost):
    """Runs activation quantizers by brevitas; the numbers are simulated, not fast."""

    exact: ClassVar[bool] = False
    host: ClassVar[Host] = HOST

    def install(
        self, denoiser: torch.nn.Module, state: CalibratedState, ranges: Ranges | None = None
    ) -> Installed:
        """See `qlip_plugins.adapter.Backend.install`.

        A float denoiser gets brevitas's quantized layers; one that brevitas has quantized keeps its own.
        """
        self.check_host()
        from .install import install

        return install(denoiser, state, ranges)


adapter = Brevitas()
backend = BrevitasBackend()
