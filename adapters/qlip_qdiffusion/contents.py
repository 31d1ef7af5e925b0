"""What stands in a Q-Diffusion file, sorted by module, with LDM's names.

The keys (P is a module path of LDM's UNetModel, prefix `model.`):
`P.weight`, `P.bias`; `P.weight_quantizer{,_0}.{alpha,delta,zero_point}`;
`P.act_quantizer{,_0}.{delta,zero_point}`; `<attention>.act_quantizer_{q,k,v,w}.{delta,zero_point}`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qlip_plugins.checkpoint import check_finite, read_state_dict
from qlip_plugins.errors import ArtefactError, ForeignFormatError

PREFIX = "model."
_QUANTIZER = re.compile(
    r"(?P<module>.+)\.(?P<quantizer>weight_quantizer(?:_0)?|act_quantizer(?:_0|_q|_k|_v|_w)?)"
    r"\.(?P<tensor>alpha|delta|zero_point)"
)
_PARTS = ("", "_0")
_EMBEDDINGS = ("label_emb",)


@dataclass(frozen=True)
class WeightTensors:
    """AdaRound's tensors of one part of a layer: `alpha` has the shape of that part of the weight."""

    alpha: Tensor
    delta: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class ActTensors:
    """One activation quantizer: two scalars, both `()`."""

    delta: Tensor
    zero_point: Tensor


@dataclass
class Contents:
    """The tensors of a file by LDM module path.

    `weights` holds one part, or two where the shortcut is split; `inputs` likewise; `operands` maps
    `<attention path>.{q,k,v,w}`; `floats` every other tensor by parameter name.
    """

    path: Path
    weights: dict[str, list[WeightTensors]] = field(default_factory=dict)
    inputs: dict[str, list[ActTensors]] = field(default_factory=dict)
    operands: dict[str, ActTensors] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def has_activations(self) -> bool:
        """Whether the file holds activation quantizers."""
        return bool(self.inputs)

    @property
    def split_layers(self) -> list[str]:
        """The layers whose input channels are quantized in two parts."""
        return [name for name, parts in self.weights.items() if len(parts) > 1]


def read_contents(path: Path) -> Contents:
    """Read and check a file as far as that goes without knowing bits.

    Raises:
        ForeignFormatError: of another format; the message says which, where that shows.
        ArtefactError: damaged, unfinished, or with NaN; names file and tensor.
    """
    tensors = read_state_dict(path)
    _refuse_foreign(path, tensors)
    check_finite(path, tensors)
    contents, quantizers = _sorted(path, tensors)
    _refuse_ptqd(path, quantizers)
    for module, found in quantizers.items():
        _take_module(contents, module, found)
    _check_complete(contents)
    return contents


def _refuse_foreign(path: Path, tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    if any(name.startswith(("down_blocks.", "unet.down_blocks.")) for name in names):
        raise ForeignFormatError(f"{path}: a diffusers UNet without quantizers, not a Q-Diffusion checkpoint")
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in names):
        raise ForeignFormatError(f"{path}: a CompVis float model, not a Q-Diffusion checkpoint")
    stray = next((name for name in names if not name.startswith(PREFIX)), None)
    if stray is not None:
        raise ForeignFormatError(
            f"{path}: not a Q-Diffusion checkpoint: key {stray!r} does not start with {PREFIX!r}"
        )
    if not any(_QUANTIZER.fullmatch(name) for name in names):
        raise ForeignFormatError(
            f"{path}: not a Q-Diffusion checkpoint: no quantizer among its {len(names)} tensors"
        )


def _sorted(path: Path, tensors: dict[str, Tensor]) -> tuple[Contents, dict[str, dict[str, Tensor]]]:
    contents = Contents(path)
    quantizers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ArtefactError(f"{path}: tensor {name!r} is {tensor.dtype}, expected a floating type")
        found = _QUANTIZER.fullmatch(name)
        if found is None:
            contents.floats[name.removeprefix(PREFIX)] = tensor
        else:
            module = found["module"].removeprefix(PREFIX)
            quantizers.setdefault(module, {})[f"{found['quantizer']}.{found['tensor']}"] = tensor
    return contents, quantizers


def _refuse_ptqd(path: Path, quantizers: dict[str, dict[str, Tensor]]) -> None:
    """PTQD leaves shortcuts and downsamplers in floating point, and knows no split and no operands.

    So has an unfinished Q-Diffusion file no weight steps; but what it has come to is quantized whole.
    """
    keys = {f"{module}.{key}" for module, found in quantizers.items() for key in found}
    only_qdiffusion = (
        ".skip_connection.",
        ".op.",
        "quantizer_0.",
        *(f"act_quantizer_{letter}." for letter in "qkvw"),
    )
    own = any(part in key for key in keys for part in only_qdiffusion)
    has_steps = any(key.endswith("weight_quantizer.delta") for key in keys)
    reached_the_end = any(module.startswith("output_blocks.") for module in quantizers)
    if not (own or has_steps) and reached_the_end:
        raise ForeignFormatError(
            f"{path}: a PTQD checkpoint, not one of Q-Diffusion: it holds no weight steps, and leaves shortcuts "
            "and downsamplers in floating point"
        )


def _take_module(contents: Contents, module: str, found: dict[str, Tensor]) -> None:
    for suffix in "qkvw":
        act = _act(contents.path, module, f"act_quantizer_{suffix}", found)
        if act is not None:
            contents.operands[f"{module}.{suffix}"] = act
    parts = [_weight(contents.path, module, f"weight_quantizer{part}", found) for part in _PARTS]
    acts = [_act(contents.path, module, f"act_quantizer{part}", found) for part in _PARTS]
    weights = [part for part in parts if part is not None]
    inputs = [act for act in acts if act is not None]
    if weights:
        contents.weights[module] = weights
        _check_shapes(contents, module, weights)
    if inputs:
        contents.inputs[module] = inputs
    if inputs and weights and len(inputs) != len(weights):
        raise ArtefactError(
            f"{contents.path}: {PREFIX}{module} has {len(weights)} weight but {len(inputs)} activation quantizers"
        )


def _weight(path: Path, module: str, quantizer: str, found: dict[str, Tensor]) -> WeightTensors | None:
    keys = {name: f"{quantizer}.{name}" for name in ("alpha", "delta", "zero_point")}
    if not any(key in found for key in keys.values()):
        return None
    for key in keys.values():
        if key not in found:
            raise ArtefactError(
                f"{path}: tensor '{PREFIX}{module}.{key}' is missing: an intermediate file, written before the "
                "calibration had finished. It cannot be resumed; take the ckpt.pth of a finished run"
            )
    tensors = WeightTensors(**{name: found[key] for name, key in keys.items()})
    _check_step(path, f"{PREFIX}{module}.{quantizer}", tensors.delta, tensors.zero_point)
    return tensors


def _act(path: Path, module: str, quantizer: str, found: dict[str, Tensor]) -> ActTensors | None:
    delta, zero_point = found.get(f"{quantizer}.delta"), found.get(f"{quantizer}.zero_point")
    if delta is None and zero_point is None:
        return None
    if delta is None or zero_point is None:
        missing = "delta" if delta is None else "zero_point"
        raise ArtefactError(
            f"{path}: tensor '{PREFIX}{module}.{quantizer}.{missing}' is missing: an unfinished calibration"
        )
    for name, tensor in (("delta", delta), ("zero_point", zero_point)):
        if tensor.numel() != 1:
            raise ArtefactError(
                f"{path}: tensor '{PREFIX}{module}.{quantizer}.{name}' has shape {tuple(tensor.shape)}, "
                "expected a single value (Q-Diffusion quantizes activations per tensor)"
            )
    _check_step(path, f"{PREFIX}{module}.{quantizer}", delta, zero_point)
    return ActTensors(delta, zero_point)


def _check_step(path: Path, quantizer: str, delta: Tensor, zero_point: Tensor) -> None:
    if bool((delta == 0).any()):
        raise ArtefactError(f"{path}: tensor '{quantizer}.delta' holds a step of 0")
    if bool((zero_point != zero_point.round()).any()):
        raise ArtefactError(f"{path}: tensor '{quantizer}.zero_point' holds a value that is no whole number")


def _check_shapes(contents: Contents, module: str, parts: list[WeightTensors]) -> None:
    key = f"{module}.weight"
    if key not in contents.floats:
        raise ArtefactError(f"{contents.path}: tensor '{PREFIX}{key}' is missing, its quantizers are there")
    weight = contents.floats[key]
    alphas = [tuple(part.alpha.shape) for part in parts]
    together = (
        (alphas[0][0], sum(shape[1] for shape in alphas), *alphas[0][2:]) if len(alphas[0]) > 1 else alphas[0]
    )
    if tuple(weight.shape) != together or any(shape[0] != together[0] for shape in alphas):
        raise ArtefactError(
            f"{contents.path}: '{PREFIX}{key}' is {tuple(weight.shape)}, its rounding codes are {alphas}: "
            "the shapes contradict each other"
        )
    per_channel = (weight.shape[0], *[1] * (weight.ndim - 1))
    for part in parts:
        for name in ("delta", "zero_point"):
            shape = tuple(getattr(part, name).shape)
            if shape not in (per_channel, ()):
                raise ArtefactError(
                    f"{contents.path}: '{PREFIX}{module}.weight_quantizer.{name}' is {shape}, expected {per_channel}"
                )


def _check_complete(contents: Contents) -> None:
    for name, tensor in contents.floats.items():
        module, _, parameter = name.rpartition(".")
        exempt = parameter != "weight" or tensor.ndim < 2 or module in _EMBEDDINGS
        if not exempt and module not in contents.weights:
            raise ArtefactError(
                f"{contents.path}: layer '{PREFIX}{module}' has no 'weight_quantizer.alpha': Q-Diffusion "
                "quantizes every layer, so this is an intermediate file of an unfinished calibration"
            )
    attentions = {name.rpartition(".")[0] for name in contents.weights if name.endswith(".to_q")}
    if contents.has_activations:
        wanted = {f"{attention}.{operand}" for attention in attentions for operand in "qkvw"}
        lacking = [f"{name}.act_quantizer" for name in contents.weights if name not in contents.inputs]
        lacking += [
            f"{name.rpartition('.')[0]}.act_quantizer_{name[-1]}"
            for name in sorted(wanted - set(contents.operands))
        ]
        if lacking:
            raise ArtefactError(
                f"{contents.path}: tensor '{PREFIX}{lacking[0]}.delta' is missing while other layers have "
                f"activation quantizers ({len(lacking)} missing): an unfinished calibration"
            )
    elif contents.operands:
        raise ArtefactError(
            f"{contents.path}: attention operands have quantizers, layer inputs have none: an unfinished calibration"
        )
