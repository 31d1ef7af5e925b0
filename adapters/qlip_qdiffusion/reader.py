"""Q-Diffusion file -> `CalibratedState`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qlip_plugins.grids import ActGrid
from qlip_plugins.ldm_names import names_in_file
from qlip_plugins.state import CalibratedLayer, CalibratedState, WeightPart

from .config import QDiffusionConfig
from .contents import ActTensors, Contents, WeightTensors, read_contents
from .options import Options, resolve

FORMAT = "qdiffusion"
_OPERAND = {"q": "q", "k": "k", "v": "v", "w": "softmax"}


def load(config: QDiffusionConfig) -> CalibratedState:
    """Read a checkpoint; see `BaseQuantizer.load`."""
    contents = read_contents(config.checkpoint)
    names = names_in_file(contents.path, contents.floats)
    options = resolve(config, contents)
    return build_state(contents, names, options)


def build_state(contents: Contents, names: Mapping[str, str], options: Options) -> CalibratedState:
    """Join tensors, names and bits."""
    layers = {names[module]: _layer(contents, module, options) for module in contents.weights}
    operands: dict[str, ActGrid] = {}
    if options.activation_bits is not None:
        for operand, act in contents.operands.items():
            attention, _, letter = operand.rpartition(".")
            bits = options.softmax_bits if letter == "w" else options.activation_bits
            if bits is not None:
                name = f"{_attention_name(attention, names)}.{_OPERAND[letter]}"
                operands[name] = _grid(act, bits, options.symmetric)
    floats = {_parameter_name(name, names): tensor for name, tensor in contents.floats.items()}
    return CalibratedState(FORMAT, layers, operands, floats, source=str(contents.path))


def _layer(contents: Contents, module: str, options: Options) -> CalibratedLayer:
    weight = contents.floats[f"{module}.weight"]
    widths = [part.alpha.shape[1] for part in contents.weights[module]]
    pieces = weight.split(widths, dim=1)
    parts = tuple(
        _codes(piece, tensors, options.weight_bits)
        for piece, tensors in zip(pieces, contents.weights[module], strict=True)
    )
    if options.activation_bits is None:
        return CalibratedLayer(parts)
    bits = options.activation_bits
    return CalibratedLayer(
        parts, tuple(_grid(act, bits, options.symmetric) for act in contents.inputs[module])
    )


def _codes(weight: Tensor, tensors: WeightTensors, bits: int) -> WeightPart:
    """AdaRound's hard rounding: `clamp(floor(w / delta) + [alpha >= 0] + zero_point, 0, 2^bits - 1)`."""
    up = (tensors.alpha >= 0).float()
    codes = (weight.float() / tensors.delta.float()).floor() + up + tensors.zero_point.float()
    kind = torch.uint8 if bits <= 8 else torch.int32
    return WeightPart(
        codes=codes.clamp(0, 2**bits - 1).to(kind),
        scale=tensors.delta.float().clone(),
        zero_point=tensors.zero_point.float().clone(),
        bits=bits,
    )


def _grid(act: ActTensors, bits: int, symmetric: bool) -> ActGrid:
    make = ActGrid.symmetric if symmetric else ActGrid.asymmetric
    return make(bits, float(act.delta), int(act.zero_point.item()))


def _attention_name(attention: str, names: Mapping[str, str]) -> str:
    # The attention itself has no parameters, hence no entry of its own: its projections have.
    return names[f"{attention}.to_q"].removesuffix(".to_q")


def _parameter_name(name: str, names: Mapping[str, str]) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{names[module]}.{parameter}"
