"""The folders that `qlip-plugins calibrate` writes, as base quantizers.

Importing this package imports no torch: checking a recipe needs only the options.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from qlip_plugins.adapter import AdapterConfig, Inspection
from qlip_plugins.schema import RecipePath

if TYPE_CHECKING:
    from qlip_plugins.state import CalibratedState

__all__ = ["Packed", "PackedOptions", "adapter"]


class PackedOptions(AdapterConfig):
    """Which folder, and which of its activation widths.

    Args:
        folder: what `qlip-plugins calibrate` wrote.
        activation_bits: a width that the folder has; null leaves activations in floating point.
    """

    adapter: Literal["packed"] = "packed"
    folder: RecipePath
    activation_bits: Annotated[int, Field(ge=2, le=16)] | None


class Packed:
    """Reads what this project's own calibration writes."""

    config_class: ClassVar[type[PackedOptions]] = PackedOptions

    def load(self, config: PackedOptions) -> CalibratedState:
        """See `qlip_plugins.adapter.BaseQuantizer.load`."""
        from qlip_plugins.packed import read_packed

        return read_packed(config.folder, config.activation_bits)

    def inspect(self, path: Path) -> Inspection:
        """See `qlip_plugins.adapter.BaseQuantizer.inspect`."""
        from .inspection import inspect

        return inspect(path)


adapter = Packed()
