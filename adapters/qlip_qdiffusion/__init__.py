"""Q-Diffusion checkpoints (`ckpt.pth` of Xiuyu-Li/q-diffusion) as base quantizers.

Importing this package imports no torch: checking a recipe needs only the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qlip_plugins.adapter import Inspection

from .config import QDiffusionConfig

if TYPE_CHECKING:
    from qlip_plugins.state import CalibratedState

__all__ = ["QDiffusion", "QDiffusionConfig", "adapter"]


class QDiffusion:
    """Reads what Q-Diffusion's calibration scripts write."""

    config_class: ClassVar[type[QDiffusionConfig]] = QDiffusionConfig

    def load(self, config: QDiffusionConfig) -> CalibratedState:
        """See `qlip_plugins.adapter.BaseQuantizer.load`."""
        from .reader import load

        return load(config)

    def inspect(self, path: Path) -> Inspection:
        """See `qlip_plugins.adapter.BaseQuantizer.inspect`."""
        from .inspection import inspect

        return inspect(path)


adapter = QDiffusion()
