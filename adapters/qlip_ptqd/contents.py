"""What stands in a PTQD file, sorted by module, with LDM's names.

The keys (P is a module path of LDM's UNetModel, prefix `model.`): `P.weight`, `P.bias`;
`P.weight_quantizer.alpha`; in a final file also `P.act_quantizer.delta`. Steps and zero points of the
weights are not stored, nor are the zero points of the activations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qlip_plugins.checkpoint import check_finite, read_state_dict
from qlip_plugins.errors import ArtefactError, ForeignFormatError

PREFIX = "model."
_QUANTIZER = re.compile(r"(?P<module>.+)\.(?P<tensor>weight_quantizer\.alpha|act_quantizer\.delta)")
_FLOAT_CHILDREN = ("skip", "op")
"""PTQD leaves a layer alone when its own name, the last part of its path, contains one of these."""

_EMBEDDINGS = ("label_emb",)


@dataclass
class Contents:
    """The tensors of a file by LDM module path.

    `alphas` are the learned roundings, `deltas` the activation steps, `floats` every other tensor by
    parameter name; `quantized` lists the layers that PTQD quantizes, in the order of its modules.
    """

    path: Path
    alphas: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def has_activations(self) -> bool:
        """Whether the file holds activation steps: it is a final one, not that of the first stage."""
        return bool(self.deltas)

    @property
    def quantized(self) -> list[str]:
        """Every layer that PTQD quantizes."""
        return [
            name.removesuffix(".weight")
            for name, tensor in self.floats.items()
            if name.endswith(".weight") and tensor.ndim in (2, 4) and _is_quantized(name)
        ]

    @property
    def eight_bit(self) -> list[str]:
        """The layers at 8 bits, rounded to nearest: by place the first, the third and the last."""
        quantized = self.quantized
        return [quantized[0], quantized[2], quantized[-1]]


def _is_quantized(weight: str) -> bool:
    module = weight.removesuffix(".weight")
    child = module.rpartition(".")[2]
    return module not in _EMBEDDINGS and not any(part in child for part in _FLOAT_CHILDREN)


def read_contents(path: Path) -> Contents:
    """Read and check a file as far as that goes without knowing bits.

    Raises:
        ForeignFormatError: of another format; the message says which, where that shows.
        ArtefactError: damaged, unfinished, or with NaN; names file and tensor.
    """
    tensors = read_state_dict(path)
    _refuse_foreign(path, list(tensors))
    check_finite(path, tensors)
    contents = Contents(path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ArtefactError(f"{path}: tensor {name!r} is {tensor.dtype}, expected a floating type")
        found = _QUANTIZER.fullmatch(name.removeprefix(PREFIX))
        if found is None:
            contents.floats[name.removeprefix(PREFIX)] = tensor
        elif found["tensor"] == "weight_quantizer.alpha":
            contents.alphas[found["module"]] = tensor
        else:
            contents.deltas[found["module"]] = tensor
    _check_layers(contents)
    _check_steps(contents)
    return contents


def _refuse_foreign(path: Path, names: list[str]) -> None:
    stray = next((name for name in names if not name.startswith(PREFIX)), None)
    if stray is not None:
        raise ForeignFormatError(
            f"{path}: not a PTQD checkpoint: key {stray!r} does not start with {PREFIX!r}"
        )
    if any(name.startswith(f"{PREFIX}diffusion_model.") for name in names):
        raise ForeignFormatError(f"{path}: a CompVis float model, not a PTQD checkpoint")
    quantizers = [name for name in names if "_quantizer" in name]
    if not any(name.endswith(".weight_quantizer.alpha") for name in quantizers):
        raise ForeignFormatError(
            f"{path}: not a PTQD checkpoint: no 'weight_quantizer.alpha' among its {len(names)} tensors"
        )
    other = next((n for n in quantizers if _QUANTIZER.fullmatch(n.removeprefix(PREFIX)) is None), None)
    if other is not None:
        raise ForeignFormatError(f"{path}: a Q-Diffusion checkpoint, not one of PTQD: it holds {other!r}")


def _check_layers(contents: Contents) -> None:
    quantized = contents.quantized
    stray = next((n for n in (*contents.alphas, *contents.deltas) if n not in quantized), None)
    if stray is not None:
        raise ForeignFormatError(
            f"{contents.path}: '{PREFIX}{stray}' has a quantizer, but PTQD quantizes no such layer: its "
            "shortcuts and downsamplers stay in floating point. An unfinished file of Q-Diffusion, perhaps"
        )
    if len(quantized) < 4:
        raise ArtefactError(f"{contents.path}: only {len(quantized)} layers: no UNet, or a part of one")
    lacking = [name for name in quantized if name not in contents.alphas and name not in contents.eight_bit]
    if lacking:
        raise ArtefactError(
            f"{contents.path}: '{PREFIX}{lacking[0]}.weight_quantizer.alpha' is missing ({len(lacking)} such layers): "
            "the file of an unfinished calibration, or its tensors were re-ordered. Only the first, third and last "
            "layer have none"
        )
    learned = next((name for name in contents.eight_bit if name in contents.alphas), None)
    if learned is not None:
        raise ArtefactError(
            f"{contents.path}: '{PREFIX}{learned}' has a learned rounding, where PTQD rounds its first, third and "
            "last layer to nearest at 8 bits: calibrated without set_first_last_layer_to_8bit, or its tensors were "
            "re-ordered"
        )
    for name, alpha in contents.alphas.items():
        shape = tuple(contents.floats[f"{name}.weight"].shape)
        if tuple(alpha.shape) != shape:
            raise ArtefactError(
                f"{contents.path}: '{PREFIX}{name}.weight' is {shape}, its rounding is {tuple(alpha.shape)}"
            )


def _check_steps(contents: Contents) -> None:
    if not contents.has_activations:
        return
    lacking = [name for name in contents.quantized if name not in contents.deltas]
    if lacking:
        raise ArtefactError(
            f"{contents.path}: tensor '{PREFIX}{lacking[0]}.act_quantizer.delta' is missing while other layers have "
            f"one ({len(lacking)} missing): an unfinished calibration"
        )
    for name, delta in contents.deltas.items():
        key = f"{PREFIX}{name}.act_quantizer.delta"
        if delta.numel() != 1:
            raise ArtefactError(
                f"{contents.path}: tensor '{key}' has shape {tuple(delta.shape)}, expected a single value"
            )
        if float(delta) == 0:
            raise ArtefactError(f"{contents.path}: tensor '{key}' is a step of 0")
