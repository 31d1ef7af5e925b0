"""A model in memory that brevitas has quantized."""

from __future__ import annotations

from torch import nn

from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.state import CalibratedState

from .quantizer import Choose
from .reading import LAYERS, floats_of, is_quantized, left_of, state_of


def read(denoiser: nn.Module) -> CalibratedState:
    """See `qlip_plugins.adapter.ModelReader.read`."""
    kind = type(denoiser).__name__
    if not is_quantized(denoiser):
        raise IncompatibleModelError(
            f"the pipeline's {kind} has no layers of brevitas, and base.checkpoint names no file: in Python, call "
            "layerwise_quantize on it and calibrate it first (what from_pretrained gives has lost them); on the "
            "command line, which loads the float pipeline, name a saved state dict, `base: {adapter: brevitas, "
            "checkpoint: FILE, weight_bits: 4, activation_bits: 8}`"
        )
    for name, module in denoiser.named_modules():
        if any(isinstance(hook, Choose) for hook in module._forward_hooks.values()):
            raise IncompatibleModelError(
                f"{name}: a recipe is applied to this {kind}: remove its controller first"
            )
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, LAYERS)}
    return state_of(
        layers,
        floats_of(denoiser, layers),
        left_of(denoiser, layers),
        f"the pipeline's {kind}, quantized by brevitas",
    )
