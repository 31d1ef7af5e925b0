"""QLIP for quantized diffusion models: the prompt chooses the activation bits.

`Recipe` and the adapter lookups import no torch; the rest is imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .adapter import load_backend, load_base_quantizer
from .recipe import Recipe

if TYPE_CHECKING:
    from .controller import BitController, apply
    from .fitting import fit_ranges
    from .metrics import bitops
    from .plan import BitPlan
    from .sharing import QlipModel
    from .text_to_bits import TextToBits, TextToBitsConfig

__version__ = "0.1.0"

__all__ = [
    "BitController",
    "BitPlan",
    "QlipModel",
    "Recipe",
    "TextToBits",
    "TextToBitsConfig",
    "__version__",
    "apply",
    "bitops",
    "fit_ranges",
    "load_backend",
    "load_base_quantizer",
]

_LATE = {
    "BitController": "controller",
    "BitPlan": "plan",
    "QlipModel": "sharing",
    "TextToBits": "text_to_bits",
    "TextToBitsConfig": "text_to_bits",
    "apply": "controller",
    "bitops": "metrics",
    "fit_ranges": "fitting",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
