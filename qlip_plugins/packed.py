"""The self-describing folder of a calibrated model: packed weight codes, and a table of activation grids a width.

config.json                what it is, how it was made
weights.safetensors        codes without gaps, steps, zero points, biases, norms
activations-8.safetensors  the grids of one width
report.json                errors before and after learning

Where all weights have one width and every table a softmax width, a folder is of version 1; version 2 says
which layers have widths of their own, and may leave the softmax in floating point; version 3 may smooth inputs,
have low-rank branches, parameters that the calibration moved, and grids whose other widths keep one end of the range.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from .artefacts import check_version, read_tensors, versions, write_tensors
from .checkpoint import check_finite
from .errors import ArtefactError, ForeignFormatError, IncompatibleModelError
from .files import check_replaceable, folder_written_whole
from .grids import ActGrid, Kept
from .schema import StrictModel
from .state import CalibratedLayer, CalibratedState, WeightPart, weight_sample

NAME = "packed"
FORMAT: Final = "qlip-plugins packed"
VERSION: Final = 3
_BY_LAYER: Final = 2
_UNIFORM: Final = 1
CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
REPORT = "report.json"
_OWNED = (WEIGHTS, "activations-*.safetensors", REPORT)
_ZERO_POINTS = (torch.int8, torch.int16, torch.int32)
_GRID = 5
_KEPT: tuple[Kept, ...] = ("ends", "high", "low")
_LOW_RANK = ("down", "up")

Width = Annotated[int, Field(ge=2, le=16)]


class ActivationTable(StrictModel):
    """One width that the folder has activation grids for."""

    bits: Width
    softmax_bits: Width | None
    """None where attention's products are computed in floating point."""
    fingerprint: str
    """Of the model with these activations (`CalibratedState.fingerprint`)."""


class PackedConfig(StrictModel):
    """`config.json`."""

    format: Literal["qlip-plugins packed"]
    version: Literal[1, 2, 3]
    weight_bits: Annotated[int, Field(ge=2, le=8)]
    """Of all quantized layers but those for which `weights.safetensors` names another width."""
    activations: tuple[ActivationTable, ...] = Field(strict=False)
    fingerprint: str
    """Of the model with activations in floating point."""
    pipeline: str
    """The pipeline that was calibrated, as it was named."""
    origin: str
    """What made the folder."""
    settings: dict[str, Any]
    """Of the calibration, the seed included."""
    versions: dict[str, str]

    def table(self, bits: int) -> ActivationTable | None:
        """The entry of a width; None where there is none."""
        return next((table for table in self.activations if table.bits == bits), None)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that there are grids for."""
        return tuple(table.bits for table in self.activations)


def check_writable(folder: Path) -> None:
    """Check, before long work, that `write_packed` may write there.

    Raises:
        ArtefactError: the folder holds something else.
    """
    check_replaceable(folder, FORMAT, CONFIG, *_OWNED)


def write_packed(
    folder: Path,
    weights: CalibratedState,
    grids: Mapping[int, Mapping[str, ActGrid]],
    report: Mapping[str, Any],
    origin: str,
) -> PackedConfig:
    """Write a calibrated model, whole or not at all; equal content, equal bytes.

    Args:
        folder: to write; an earlier one is replaced.
        weights: the state without activation quantizers.
        grids: activation width -> quantizer -> grid.
        report: errors, and under `settings` how it was made.
        origin: what made it.

    Raises:
        ArtefactError: the folder holds something else, or cannot be written.
        IncompatibleModelError: there is no quantized layer, or one with a width beyond 8 or with two.
    """
    widths = _widths(weights)
    common = _most_common(widths)
    others = {name: bits for name, bits in widths.items() if bits != common}
    tables = [_table(bits, weights.with_activations(found)) for bits, found in sorted(grids.items())]
    uniform = not others and all(table.softmax_bits is not None for table in tables)
    config = PackedConfig(
        format=FORMAT,
        version=_version(uniform, weights, grids),
        weight_bits=common,
        activations=tuple(tables),
        fingerprint=weights.fingerprint,
        pipeline=weights.source,
        origin=origin,
        settings=dict(report.get("settings", {})),
        versions=versions(),
    )
    with folder_written_whole(folder, FORMAT, CONFIG, *_OWNED) as temporary:
        _write_weights(temporary / WEIGHTS, weights, others)
        for bits, found in grids.items():
            _write_grids(temporary / _activations(bits), found)
        (temporary / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (temporary / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return config


def read_packed(folder: Path, activation_bits: int | None) -> CalibratedState:
    """Read a calibrated model.

    Args:
        folder: what `write_packed` wrote.
        activation_bits: a width that it has; None leaves activations in floating point.

    Raises:
        ForeignFormatError: the folder is of another kind.
        ArtefactError: missing, damaged, newer than this package, or without that width.
    """
    config = read_config(folder)
    table = None if activation_bits is None else config.table(activation_bits)
    if activation_bits is not None and table is None:
        known = ", ".join(map(str, config.widths)) or "none"
        raise ArtefactError(
            f"{folder}: activation_bits is {activation_bits}, the folder has activation grids for {known}. Name one "
            "of these, or null for floating-point activations"
        )
    state = _read_weights(folder / WEIGHTS, config)
    if table is not None:
        state = state.with_activations(_read_grids(folder / _activations(table.bits)))
    expected = config.fingerprint if table is None else table.fingerprint
    if state.fingerprint != expected:
        raise ArtefactError(
            f"{folder}: its tensors have the fingerprint {state.fingerprint[:12]}..., {CONFIG} says "
            f"{expected[:12]}...: a file has been changed or exchanged. Copy the folder again"
        )
    return state


def read_config(folder: Path) -> PackedConfig:
    """Read and check a folder's `config.json`.

    Raises:
        ForeignFormatError: the folder is of another kind.
        ArtefactError: damaged, or newer than this package.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise ForeignFormatError(f"{folder}: {what}, expected a folder that `qlip-plugins calibrate` wrote")
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ForeignFormatError(
            f"{path}: {error.strerror}, expected what `qlip-plugins calibrate` wrote"
        ) from None
    except ValueError as error:
        raise ArtefactError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else data
        raise ForeignFormatError(f"{path}: expected a folder of {FORMAT!r}, found {found!r}")
    check_version(path, data, VERSION)
    try:
        return PackedConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtefactError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes without a gap between them, least significant bit first.

    Args:
        codes: n whole numbers 0 .. 2^bits - 1, any shape.
        bits: of a code, 1..8.

    Returns:
        uint8 `(ceil(n * bits / 8),)`; the last byte is filled up with zeros.
    """
    each = (codes.flatten().to(torch.uint8)[:, None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    stream = torch.nn.functional.pad(each.flatten(), (0, -each.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """What `pack_codes` packed, uint8 of `shape`.

    Raises:
        ValueError: the bytes are not as many as the shape needs.
    """
    count = 1
    for size in shape:
        count *= size
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(
            f"{packed.dtype} of shape {tuple(packed.shape)} holds no {count} codes of {bits} bits"
        )
    stream = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: count * bits]
    each = stream.reshape(count, bits) << torch.arange(bits, dtype=torch.uint8)
    return each.sum(1, dtype=torch.uint8).reshape(shape)


def _version(
    uniform: bool, weights: CalibratedState, grids: Mapping[int, Mapping[str, ActGrid]]
) -> Literal[1, 2, 3]:
    """The oldest version that can say it."""
    beside = any(
        layer.smoothing is not None or layer.low_rank is not None for layer in weights.layers.values()
    )
    beside |= bool(weights.moved)
    one_end = any(grid.kept != "ends" for found in grids.values() for grid in found.values())
    if beside or one_end:
        return VERSION
    return _UNIFORM if uniform else _BY_LAYER


def _activations(bits: int) -> str:
    return f"activations-{bits}.safetensors"


def _widths(weights: CalibratedState) -> dict[str, int]:
    """Width of each layer's weight, checked to be one that a folder holds."""
    if not weights.layers:
        raise IncompatibleModelError(f"{weights.source}: no layer is quantized, so there is nothing to pack")
    for name, layer in weights.layers.items():
        found = sorted({part.bits for part in layer.weight})
        if len(found) != 1 or not 2 <= found[0] <= 8:
            raise IncompatibleModelError(
                f"{weights.source}: {name} has weights of {', '.join(map(str, found))} bits, a packed folder holds one "
                "width a layer, from 2 to 8"
            )
    return weights.weight_bits()


def _most_common(widths: Mapping[str, int]) -> int:
    """The width of most layers; of those that tie the smallest."""
    counts = Counter(widths.values())
    return min(counts, key=lambda bits: (-counts[bits], bits))


def _table(bits: int, state: CalibratedState) -> ActivationTable:
    softmax = {grid.bits for name, grid in state.operands.items() if name.endswith(".softmax")}
    # A model without attention has no softmax that could be in floating point.
    without = None if any(name.endswith(".to_q") for name in state.layers) else bits
    return ActivationTable(
        bits=bits, softmax_bits=max(softmax, default=without), fingerprint=state.fingerprint
    )


def _write_weights(path: Path, state: CalibratedState, others: Mapping[str, int]) -> None:
    """Write codes and floats; `others` are the layers whose width is not the common one."""
    tensors: dict[str, Tensor] = {
        name: tensor
        for name, tensor in state.float_parameters.items()
        if name.removesuffix(".weight") not in state.layers
    }
    shapes: dict[str, list[list[int]]] = {}
    for name, layer in state.layers.items():
        shapes[name] = [list(part.codes.shape) for part in layer.weight]
        for place, part in enumerate(layer.weight):
            tensors[f"{name}.{place}.codes"] = pack_codes(part.codes, part.bits)
            tensors[f"{name}.{place}.scale"] = part.scale.flatten()
            tensors[f"{name}.{place}.zero_point"] = _small(part.zero_point.flatten())
        if layer.smoothing is not None:
            tensors[f"{name}.smoothing"] = layer.smoothing
        if layer.low_rank is not None:
            tensors |= {
                f"{name}.{part}": matrix for part, matrix in zip(_LOW_RANK, layer.low_rank, strict=True)
            }
        if f"{name}.weight" not in state.moved:
            tensors[f"{name}.sample"] = _sample(state, name)
    facts: dict[str, Any] = {"shapes": shapes}
    facts |= {"bits": dict(others)} if others else {}
    facts |= {"moved": sorted(state.moved)} if state.moved else {}
    write_tensors(path, FORMAT, _version(not others, state, {}), tensors, **facts)


def _sample(state: CalibratedState, name: str) -> Tensor:
    weight = state.float_parameters.get(f"{name}.weight")
    return state.weight_samples[name] if weight is None else weight_sample(weight)


def _small(zero_point: Tensor) -> Tensor:
    """Whole numbers in the smallest type that holds them."""
    kind = next(k for k in _ZERO_POINTS if bool((zero_point.to(k) == zero_point).all()))
    return zero_point.to(kind)


def _read_weights(path: Path, config: PackedConfig) -> CalibratedState:
    tensors, facts = read_tensors(path, FORMAT, VERSION)
    check_finite(path, tensors)
    layers: dict[str, CalibratedLayer] = {}
    samples: dict[str, Tensor] = {}
    try:
        others, moved = facts.get("bits", {}), frozenset(facts.get("moved", ()))
        for name, shapes in facts["shapes"].items():
            bits = others.get(name, config.weight_bits)
            parts = (
                _read_part(tensors, f"{name}.{place}", tuple(shape), bits)
                for place, shape in enumerate(shapes)
            )
            layers[name] = CalibratedLayer(
                tuple(parts),
                smoothing=tensors.pop(f"{name}.smoothing", None),
                low_rank=_read_low_rank(tensors, name),
            )
            if f"{name}.weight" not in moved:
                samples[name] = tensors.pop(f"{name}.sample")
    except KeyError as error:
        raise ArtefactError(f"{path}: {error} is missing: the file is damaged") from None
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtefactError(f"{path}: the file is damaged: {error}") from None
    # What is left are the parameters that are not quantized.
    return CalibratedState(NAME, layers, {}, tensors, samples, str(path.parent), moved=moved)


def _read_part(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], bits: int) -> WeightPart:
    scale, zero_point = tensors.pop(f"{name}.scale"), tensors.pop(f"{name}.zero_point")
    per_channel = (shape[0], *[1] * (len(shape) - 1))
    codes = unpack_codes(tensors.pop(f"{name}.codes"), bits, shape)
    return WeightPart(codes, scale.reshape(per_channel), zero_point.float().reshape(per_channel), bits)


def _read_low_rank(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor] | None:
    if f"{name}.{_LOW_RANK[0]}" not in tensors:
        return None
    down, up = (tensors.pop(f"{name}.{part}") for part in _LOW_RANK)
    return down, up


def _write_grids(path: Path, grids: Mapping[str, ActGrid]) -> None:
    rows = [[g.bits, g.scale, g.zero_point, g.low_code, g.high_code] for g in grids.values()]
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, _GRID)
    kept = {name: grid.kept for name, grid in grids.items() if grid.kept != "ends"}
    if kept:
        write_tensors(path, FORMAT, VERSION, {"grids": table}, quantizers=list(grids), kept=kept)
    else:
        write_tensors(path, FORMAT, _UNIFORM, {"grids": table}, quantizers=list(grids))


def _read_grids(path: Path) -> dict[str, ActGrid]:
    tensors, facts = read_tensors(path, FORMAT, VERSION)
    check_finite(path, tensors)
    kept = facts.get("kept", {})
    names, table = facts.get("quantizers"), tensors.get("grids")
    known = isinstance(kept, dict) and all(end in _KEPT for end in kept.values())
    if not known or not isinstance(names, list) or table is None or table.shape != (len(names), _GRID):
        raise ArtefactError(f"{path}: no table of activation grids: the file is damaged")
    if bool((table[:, 1] == 0).any()):
        raise ArtefactError(f"{path}: {names[int((table[:, 1] == 0).nonzero()[0])]} has a step of 0")
    return {
        name: ActGrid(int(bits), scale, int(zero), int(low), int(high), kept.get(name, "ends"))
        for name, (bits, scale, zero, low, high) in zip(names, table.tolist(), strict=True)
    }
