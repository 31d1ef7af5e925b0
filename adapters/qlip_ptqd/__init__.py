"""PTQD checkpoints (`quantw4a8_ldm_brecq.pth` of ziplab/PTQD) as base quantizers.

Importing this package imports no torch: checking a recipe needs only the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qlip_plugins.adapter import Inspection

from .config import PTQDConfig

if TYPE_CHECKING:
    from qlip_plugins.state import CalibratedState

__all__ = ["PTQD", "PTQDConfig", "adapter"]


class PTQD:
    """Reads what PTQD's quantization scripts write."""

    config_class: ClassVar[type[PTQDConfig]] = PTQDConfig

    def load(self, config: PTQDConfig) -> CalibratedState:
        """See `qlip_plugins.adapter.BaseQuantizer.load`."""
        from .reader import load

        return load(config)

    def inspect(self, path: Path) -> Inspection:
        """See `qlip_plugins.adapter.BaseQuantizer.inspect`."""
        from .inspection import inspect

        return inspect(path)


adapter = PTQD()
