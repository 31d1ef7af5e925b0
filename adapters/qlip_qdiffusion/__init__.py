"""Q-Diffusion checkpoints (`ckpt.pth` of Xiuyu-Li/q-diffusion) as base quantizers.

Importing this package imports no torch: checking a recipe needs only the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qlip_plugins.adapter import Inspection

from .config import QDiffusionConfig

if TYPE_CHECKING:
    import torch

    from qlip_plugins.state import CalibratedState

__all__ = ["QDiffusion", "QDiffusionConfig", "adapter"]


class QDiffusion:
    """Reads what Q-Diffusion's calibration scripts write, and writes the same."""

    config_class: ClassVar[type[QDiffusionConfig]] = QDiffusionConfig

    def load(self, config: QDiffusionConfig) -> CalibratedState:
        """See `qlip_plugins.adapter.BaseQuantizer.load`."""
        from .reader import load

        return load(config)

    def inspect(self, path: Path) -> Inspection:
        """See `qlip_plugins.adapter.BaseQuantizer.inspect`."""
        from .inspection import inspect

        return inspect(path)

    def check_writable(self, denoiser: torch.nn.Module, folder: Path) -> None:
        """See `qlip_plugins.adapter.CheckpointWriter.check_writable`."""
        from .writer import check_writable

        check_writable(denoiser, folder)

    def write(self, state: CalibratedState, folder: Path) -> Path:
        """See `qlip_plugins.adapter.CheckpointWriter.write`."""
        from .writer import write

        return write(state, folder)


adapter = QDiffusion()
