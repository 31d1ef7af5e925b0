"""A model in memory that ModelOpt has quantized."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.state import CalibratedState

from .reading import Quantized, state_of

BACKEND_NAME = "qlip"
"""Under which quantizers ask for this package while a recipe is applied."""


def is_quantized(denoiser: nn.Module) -> bool:
    """Whether ModelOpt has put quantizers into a model."""
    return bool(_quantizers(denoiser))


def read(denoiser: nn.Module) -> CalibratedState:
    """See `qlip_plugins.adapter.ModelReader.read`."""
    quantizers = _quantizers(denoiser)
    kind = type(denoiser).__name__
    if not quantizers:
        raise IncompatibleModelError(
            f"the pipeline's {kind} has no quantizers of ModelOpt, and base.checkpoint names no file: in Python, call "
            "mtq.quantize (or mto.restore) on it first; on the command line, which loads the float pipeline, name what "
            "mto.save wrote, `base: {adapter: modelopt, checkpoint: FILE}`"
        )
    taken = [name for name, module in quantizers.items() if getattr(module, "backend", None) == BACKEND_NAME]
    if taken:
        raise IncompatibleModelError(
            f"{taken[0]}: a recipe is applied to this {kind}: remove its controller first"
        )
    calibrating = [name for name, module in quantizers.items() if getattr(module, "_if_calib", False)]
    if calibrating:
        raise IncompatibleModelError(f"{calibrating[0]} is still calibrating: let mtq.quantize finish")
    history: Any = getattr(denoiser, "_modelopt_state", ())
    return state_of(
        Quantized(
            quantizers={name: _properties(module) for name, module in quantizers.items()},
            tensors=denoiser.state_dict(),
            modes=[entry[0] for entry in history],
            source=f"the pipeline's {kind}, quantized by ModelOpt",
        )
    )


def _properties(module: Any) -> dict[str, Any]:
    # A sequence of quantizers has no properties of its own.
    sequence = isinstance(module, nn.Sequential)
    options = {} if sequence else {"properties_only": True}
    return dict(module.get_modelopt_state(**options))


def _quantizers(denoiser: nn.Module) -> dict[str, Any]:
    # By name, so that asking does not import ModelOpt.
    return {
        name: module
        for name, module in denoiser.named_modules()
        if hasattr(module, "get_modelopt_state") and type(module).__module__.startswith("modelopt.")
    }
