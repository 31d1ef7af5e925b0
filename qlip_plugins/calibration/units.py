"""The units that are reconstructed one after the other, in the order in which a denoiser runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from ..attention import check_plain
from ..errors import IncompatibleModelError
from .gathering import joined
from .schemes import LayerSpec, Scheme

_BLOCKS = (ResnetBlock2D, BasicTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)
_LAYERS = (nn.Conv2d, nn.Linear)
_ATTENTIONS = (".attn1", ".attn2")


@dataclass(frozen=True)
class Unit:
    """A residual block, a transformer block, or a single layer outside of both.

    Args:
        name: its module path.
        layers: the layers in it that are quantized.
        attentions: module paths of the attentions in it whose operands are quantized.
        values: numbers that its inputs and its output hold for one sample.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    attentions: tuple[str, ...]
    values: int


def layer_specs(denoiser: nn.Module, scheme: Scheme, weight_bits: int) -> dict[str, LayerSpec]:
    """How each layer that a scheme quantizes is quantized, by module path, in the model's order.

    Args:
        denoiser: of diffusers.
        scheme: what is quantized.
        weight_bits: of every layer for which the scheme has no width of its own.

    Raises:
        IncompatibleModelError: its shape is unknown, or one that the scheme is not defined on.
    """
    splits = shortcut_splits(denoiser)
    names = [path for path, module in denoiser.named_modules() if isinstance(module, _LAYERS)]
    scheme.check_layers(names)
    found = {name: scheme.layer(name, weight_bits, splits.get(name)) for name in names}
    return {name: spec for name, spec in found.items() if spec is not None}


def find_units(
    denoiser: nn.Module, specs: Mapping[str, LayerSpec], operands: bool, call: Mapping[str, Any]
) -> list[Unit]:
    """Take a denoiser apart. Where nothing is quantized, in a downsampler say, there is no unit.

    Args:
        denoiser: of diffusers.
        specs: the layers that are quantized, by module path.
        operands: whether the operands of attention's products are, too.
        call: keyword arguments of one call with one row; the order of the units is seen in it.

    Raises:
        IncompatibleModelError: a unit does not run, or runs twice, or an attention has other operands.
    """
    members = {
        name: paths for name, paths in _members(denoiser).items() if any(path in specs for path in paths)
    }
    sizes = _run_order(denoiser, list(members), call)
    units = []
    for name, values in sizes.items():
        attentions = tuple(path for path in members[name] if operands and path.endswith(_ATTENTIONS))
        for path in attentions:
            check_plain(path, denoiser.get_submodule(path))
        layers = tuple(specs[path] for path in members[name] if path in specs)
        units.append(Unit(name, layers, attentions, values))
    return units


def shortcut_splits(denoiser: nn.Module) -> dict[str, int]:
    """Where the shortcuts of a UNet's decoder are split: layer -> channels that come from the decoder.

    A transformer has none. A residual block there reads the decoder's feature, then the encoder's skip, as one tensor;
    the two have ranges of their own.

    Raises:
        IncompatibleModelError: it is neither a UNet of diffusers nor a transformer with known blocks.
    """
    if any(isinstance(module, FluxTransformerBlock) for module in denoiser.modules()):
        return {}
    decoder, encoder = getattr(denoiser, "up_blocks", None), getattr(denoiser, "down_blocks", None)
    if not decoder or not encoder or not all(hasattr(block, "resnets") for block in (*decoder, *encoder)):
        raise IncompatibleModelError(
            f"{type(denoiser).__name__} is neither a UNet of diffusers with residual blocks nor FLUX's transformer: "
            "only those are calibrated"
        )
    deepest = getattr(denoiser, "mid_block", None) or encoder[-1]
    channels = deepest.resnets[-1].out_channels
    splits = {}
    for level, block in enumerate(decoder):
        for index, resnet in enumerate(block.resnets):
            if resnet.conv_shortcut is not None and channels < resnet.in_channels:
                splits[f"up_blocks.{level}.resnets.{index}.conv_shortcut"] = channels
            channels = resnet.out_channels
    return splits


def _members(denoiser: nn.Module) -> dict[str, list[str]]:
    """Unit -> the module paths in it, itself included."""
    members: dict[str, list[str]] = {}
    block = None
    for path, module in denoiser.named_modules():
        if block is not None and path.startswith(f"{block}."):
            members[block].append(path)
        elif isinstance(module, _BLOCKS):
            block = path
            members[path] = [path]
        elif isinstance(module, _LAYERS):
            members[path] = [path]
    return members


@torch.no_grad()
def _run_order(denoiser: nn.Module, names: list[str], call: Mapping[str, Any]) -> dict[str, int]:
    """The named modules in the order in which they run, with what they read and give for one row."""
    sizes: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if name in sizes:
                raise IncompatibleModelError(
                    f"{name} runs twice in one call: such a denoiser is not calibrated"
                )
            read = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sizes[name] = sum(tensor.numel() for tensor in read) + joined(output).numel()

        return hook

    handles = [
        denoiser.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names
    ]
    try:
        denoiser(**call)
    finally:
        for handle in handles:
            handle.remove()
    idle = [name for name in names if name not in sizes]
    if idle:
        raise IncompatibleModelError(
            f"{idle[0]} does not run in a call of the denoiser ({len(idle)} such layers): it cannot be calibrated"
        )
    return sizes
