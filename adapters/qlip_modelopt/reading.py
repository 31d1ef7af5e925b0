"""What ModelOpt's quantizers say of themselves, as a `CalibratedState`.

A quantizer's properties have the same names in a saved `quantizer_state` and in `get_modelopt_state()` of a
live one, so one reader serves both. No ModelOpt is needed.

Arithmetic of an integer quantizer (`tensor_quant.py`): clamp(round(x * m / amax), -m - 1, m) * amax / m with
m = 2^(bits - 1) - 1; another width keeps amax.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.grids import ActGrid
from qlip_plugins.state import CalibratedLayer, CalibratedState, WeightPart

NAME = "modelopt"
INPUT, WEIGHT = "input_quantizer", "weight_quantizer"
TINY = 2.0**-24
"""ModelOpt makes 0 of everything under an amax up to this."""

_FOLDED_OFF = 0.15

_WEIGHTS_KEPT = frozenset({"quantize", "max_calibrate", "mse_calibrate"})
"""Modes that leave the float weights as they were; the others smooth, split or move them."""


@dataclass(frozen=True)
class Quantized:
    """A model that ModelOpt quantized, alive or from a file.

    Args:
        quantizers: by module path, the properties of each.
        tensors: the state dict.
        modes: what ModelOpt has done to it, in order.
        source: for messages.
    """

    quantizers: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Tensor]
    modes: Collection[str]
    source: str


def state_of(model: Quantized) -> CalibratedState:
    """The neutral record of a model.

    Raises:
        IncompatibleModelError: a quantizer has no integer widths to choose from; names it and says what it is.
        ArtefactError: a tensor is missing, or an amax is no range.
    """
    _check_controllable(model)
    layers: dict[str, CalibratedLayer] = {}
    folded = False
    left: dict[str, str] = {}
    for name, quantizer in model.quantizers.items():
        path, _, role = name.rpartition(".")
        # A sequence of quantizers is listed with its parts, `...weight_quantizer.0` and on.
        if role.isdigit():
            continue
        if not _is_on(quantizer):
            if _is_layer(model, path) and not _quantizes(model, path) and _transforms(model, name):
                left[name] = "changes a layer whose quantizers are off"
            continue
        if role in (INPUT, WEIGHT) and _is_layer(model, path):
            _check_integer(model, name, quantizer)
        else:
            left[name] = _described(path, role, quantizer)
    for path in _paths(model):
        if _is_layer(model, path) and _quantizes(model, path):
            layers[path] = _layer(model, path)
            folded |= not _is_on(model.quantizers[f"{path}.{WEIGHT}"])
    weights = {f"{path}.weight" for path in layers}
    moved = frozenset(weights) if folded or not set(model.modes) <= _WEIGHTS_KEPT else frozenset()
    inside = tuple(f"{name}." for name in model.quantizers)
    floats = {
        name: tensor.detach().cpu()
        for name, tensor in model.tensors.items()
        if tensor.is_floating_point() and not name.startswith(inside)
    }
    return CalibratedState(NAME, layers, float_parameters=floats, source=model.source, moved=moved, left=left)


def _paths(model: Quantized) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in model.quantizers))


def _is_on(quantizer: Mapping[str, Any]) -> bool:
    return "_disabled" not in quantizer or not quantizer["_disabled"]


def _is_layer(model: Quantized, path: str) -> bool:
    weight = model.tensors.get(f"{path}.weight")
    both = f"{path}.{INPUT}" in model.quantizers and f"{path}.{WEIGHT}" in model.quantizers
    return both and weight is not None and weight.ndim in (2, 4)


def _quantizes(model: Quantized, path: str) -> bool:
    return _is_on(model.quantizers[f"{path}.{INPUT}"]) or _is_on(model.quantizers[f"{path}.{WEIGHT}"])


def _transforms(model: Quantized, name: str) -> bool:
    """Whether a quantizer does something even where it is off: it smooths, or has a low-rank branch."""
    return any(f"{name}.{part}" in model.tensors for part in ("_pre_quant_scale", "_svdquant_lora_a"))


def _described(path: str, role: str, quantizer: Mapping[str, Any]) -> str:
    if role == "output_quantizer":
        where = "an output"
    elif path.rpartition(".")[2].startswith("norm"):
        where = "an input of a normalization"
    else:
        where = "outside convolutions and linears"
    return f"{where}, {quantizer.get('_num_bits', 'several')} bits"


def _check_integer(model: Quantized, name: str, quantizer: Mapping[str, Any]) -> None:
    """Refuse what is no integer quantizer with a static range per tensor (inputs) or output channel (weights)."""
    reason = next(
        (
            reason
            for wrong, reason in _objections(name, quantizer, model.tensors.get(f"{name}._amax"))
            if wrong
        ),
        "",
    )
    if reason:
        raise IncompatibleModelError(
            f"{model.source}: {name} is {reason}. Taken are integers with one range a tensor for inputs, one an output "
            'channel for weights: "*input_quantizer": {"num_bits": 8, "axis": None}, '
            '"*weight_quantizer": {"num_bits": 4, "axis": 0}'
        )
    bits = quantizer["_num_bits"]
    if not 2 <= bits <= 24:
        raise IncompatibleModelError(f"{model.source}: {name} has {bits} bits, expected 2 to 24")


def _objections(name: str, quantizer: Mapping[str, Any], amax: Tensor | None) -> list[tuple[bool, str]]:
    bits, axis, is_input = quantizer.get("_num_bits"), quantizer.get("_axis"), name.endswith(INPUT)
    is_float = isinstance(bits, tuple | list)
    floats = {(4, 3): "FP8", (2, 1): "FP4 (NVFP4, MXFP4)"}
    channels = 1 if amax is None else amax.numel()
    return [
        ("_disabled" not in quantizer, "a sequence of quantizers (W4A8_AWQ_BETA_CFG?)"),
        (is_float, f"a floating-point format, {floats.get(tuple(bits or ()), bits) if is_float else ''}"),
        (bool(quantizer.get("_block_sizes")), f"quantized in blocks {quantizer.get('_block_sizes')}"),
        (not quantizer.get("_fake_quant", True), "compressed (mtq.compress), so its float weight is gone"),
        (bool(quantizer.get("_rotate")), "behind a rotation"),
        (bool(quantizer.get("backend")), f"run by another backend, {quantizer.get('backend')!r}"),
        (bool(quantizer.get("_bias")), "affine, with a bias that need not be a code"),
        (
            bool(quantizer.get("_dynamic")) or amax is None,
            "dynamic: it has no calibrated range (was a forward_loop given?)",
        ),
        (
            is_input and channels > 1,
            f"a range for each of {channels} channels (axis={axis}). smoothquant leaves that behind where it smooths "
            "nothing: it wants 8-bit weights, too",
        ),
        (not is_input and bool(quantizer.get("_unsigned")), "unsigned, expected signed weights"),
        (not is_input and axis not in (0, (0,), None), f"quantized along axis {axis}, expected 0"),
    ]


def _check_controllable(model: Quantized) -> None:
    quantized = [path for path in _paths(model) if _is_layer(model, path) and _quantizes(model, path)]
    if not quantized:
        raise IncompatibleModelError(f"{model.source}: no convolution or linear is quantized")
    if not any(_is_on(model.quantizers[f"{path}.{INPUT}"]) for path in quantized):
        raise IncompatibleModelError(
            f"{model.source}: it quantizes weights alone (INT4_AWQ_CFG?), so there are no activation bits to choose. "
            'Quantize "*input_quantizer", too'
        )


def _layer(model: Quantized, path: str) -> CalibratedLayer:
    entry, weight = model.quantizers[f"{path}.{INPUT}"], model.quantizers[f"{path}.{WEIGHT}"]
    smoothing = _scale_before(model, f"{path}.{INPUT}", entry)
    down, up = (model.tensors.get(f"{path}.{WEIGHT}._svdquant_lora_{part}") for part in "ab")
    return CalibratedLayer(
        weight=(_weight_part(model, path, weight),),
        inputs=(_input_grid(model, f"{path}.{INPUT}", entry),) if _is_on(entry) else (),
        smoothing=smoothing,
        low_rank=None if down is None or up is None else (_own(down), _own(up)),
    )


def _scale_before(model: Quantized, name: str, quantizer: Mapping[str, Any]) -> Tensor | None:
    found = model.tensors.get(f"{name}._pre_quant_scale")
    if found is None or not quantizer.get("_enable_pre_quant_scale", True):
        return None
    return _own(found).flatten()


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float().clone()


def _input_grid(model: Quantized, name: str, quantizer: Mapping[str, Any]) -> ActGrid:
    bits, amax = int(quantizer["_num_bits"]), _positive(model, name)
    if quantizer.get("_unsigned"):
        return ActGrid.asymmetric(bits, amax / (2**bits - 1), 0)
    top = 2 ** (bits - 1) - 1
    low = -top if quantizer.get("_narrow_range") else -top - 1
    return ActGrid(bits, amax / top, 0, low, top, "high")


def _positive(model: Quantized, name: str) -> float:
    amax = float(model.tensors[f"{name}._amax"])
    if not TINY < amax < float("inf"):
        raise ArtefactError(
            f"{model.source}: {name} has the range {amax}: calibration never reached it, or diverged there"
        )
    return amax


def _weight_part(model: Quantized, path: str, quantizer: Mapping[str, Any]) -> WeightPart:
    bits = int(quantizer["_num_bits"]) if isinstance(quantizer["_num_bits"], int) else 0
    weight = _own(model.tensors[f"{path}.weight"])
    amax = model.tensors.get(f"{path}.{WEIGHT}._amax")
    top = 2 ** (bits - 1) - 1
    if not _is_on(quantizer) or amax is None:
        return _folded(model, path, weight, bits, model.tensors[f"{path}.weight"].dtype)
    if not bool(amax.isfinite().all()) or not bool(weight.isfinite().all()):
        raise ArtefactError(f"{model.source}: {path}: its weight, or its range, is NaN or infinite")
    spread = _own(amax).reshape(-1, *[1] * (weight.ndim - 1)).expand(len(weight), *[-1] * (weight.ndim - 1))
    # ModelOpt's own order of operations: it multiplies by the inverse of the step.
    inverse = torch.where(spread > TINY, torch.full_like(spread, top) / spread, torch.zeros_like(spread))
    low = -top if quantizer.get("_narrow_range") else -top - 1
    codes = (weight * inverse).round().clamp(low, top)
    step = torch.where(spread > TINY, spread / top, torch.ones_like(spread))
    return _part(codes, step, bits)


def _part(codes: Tensor, step: Tensor, bits: int) -> WeightPart:
    middle = 2 ** (bits - 1)
    kind = torch.uint8 if bits <= 8 else torch.int32
    return WeightPart((codes + middle).to(kind), step, torch.full_like(step, float(middle)), bits)


def _folded(model: Quantized, path: str, weight: Tensor, bits: int, kind: torch.dtype) -> WeightPart:
    """The codes of a weight that `mtq.fold_weight` has rounded already: each channel's largest one is sought."""
    top = 2 ** (bits - 1) - 1 if bits else 0
    off = max(1e-3, top * torch.finfo(kind).eps)  # of a step: what the weight's type may round a code by
    if not 2 <= bits <= 8 or off > _FOLDED_OFF:
        raise IncompatibleModelError(
            f"{model.source}: {path}: its weight quantizer is off; whether its weight is folded to {bits} bits "
            f"cannot be told in {kind}. Save the model before mtq.fold_weight, or in float32"
        )
    rows = weight.flatten(1)
    peak = rows.abs().amax(1, keepdim=True)
    step, found = torch.ones_like(peak), peak <= TINY
    for largest in range(top + 1, 0, -1):
        candidate = peak / largest
        ratio = rows / candidate.clamp(min=TINY)
        fits = ((ratio - ratio.round()).abs().amax(1, keepdim=True) < off) & (peak > TINY)
        fits &= ratio.round().amax(1, keepdim=True) <= top
        step, found = torch.where(fits & ~found, candidate, step), found | fits
    if not bool(found.all()):
        raise IncompatibleModelError(
            f"{model.source}: {path}: its weight quantizer is off and its weight is on no {bits}-bit grid (it is not "
            "folded): the layer's activations are quantized and its weight is not. Quantize both, or neither"
        )
    codes = (rows / step).round().reshape(weight.shape)
    return _part(codes, step.reshape(-1, *[1] * (weight.ndim - 1)), bits)
