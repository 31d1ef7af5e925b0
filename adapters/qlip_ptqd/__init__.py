"""PTQD (ziplab/PTQD): its checkpoints as base quantizers, and its correction of the sampler on any base.

Importing this package imports no torch: checking a recipe needs only the options.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qlip_plugins.adapter import CorrectionFit, Inspection

from .config import PTQDConfig, PTQDCorrectionConfig

if TYPE_CHECKING:
    from qlip_plugins.controller import BitController
    from qlip_plugins.recipe import Recipe
    from qlip_plugins.state import CalibratedState

    from .moments import statistics_of_errors
    from .scheduler import CorrectedDDIMScheduler
    from .statistics import CorrectionStatistics
    from .zero_points import write_zero_points

__all__ = [
    "PTQD",
    "CorrectedDDIMScheduler",
    "CorrectionStatistics",
    "PTQDConfig",
    "PTQDCorrection",
    "PTQDCorrectionConfig",
    "adapter",
    "correction",
    "statistics_of_errors",
    "write_zero_points",
]

_LATE = {
    "CorrectedDDIMScheduler": "scheduler",
    "CorrectionStatistics": "statistics",
    "statistics_of_errors": "moments",
    "write_zero_points": "zero_points",
}


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


class PTQDCorrection:
    """Corrects a DDIM sampler by the statistics of a base's error."""

    config_class: ClassVar[type[PTQDCorrectionConfig]] = PTQDCorrectionConfig

    def scheduler(self, config: PTQDCorrectionConfig, recipe: Recipe, controller: BitController) -> Any:
        """See `qlip_plugins.adapter.Correction.scheduler`."""
        from .scheduler import corrected
        from .statistics import CorrectionStatistics

        scheduler = corrected(controller.pipe.scheduler, CorrectionStatistics.load(config.statistics))
        scheduler.follow(recipe, controller)
        return scheduler

    def fit(self, what: CorrectionFit, say: Callable[[str], None]) -> Mapping[str, Any]:
        """See `qlip_plugins.adapter.Correction.fit`."""
        from .collecting import fit

        return fit(what, say)


adapter = PTQD()
correction = PTQDCorrection()


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
