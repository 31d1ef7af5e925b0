"""Files of ModelOpt: what `mto.save` writes, and `modelopt_state.pth` beside safetensors.

Both hold the float weights (unless folded), the ranges as buffers and, for each quantizer, its properties. They
are read with `weights_only=True`, without ModelOpt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlip_plugins.adapter import Inspection
from qlip_plugins.checkpoint import check_finite, read_plain
from qlip_plugins.errors import ArtefactError, ForeignFormatError
from qlip_plugins.state import CalibratedState

from .config import ModelOptConfig
from .reading import NAME, Quantized, state_of

STATE_FILE = "modelopt_state.pth"
_EXPECTED = "expected what mto.save wrote, or a folder of safetensors with modelopt_state.pth"


def load(config: ModelOptConfig) -> CalibratedState:
    """See `qlip_plugins.adapter.BaseQuantizer.load`."""
    if config.checkpoint is None:
        raise ArtefactError(
            "base.checkpoint: none is named, so the base is the model in a pipeline that ModelOpt has quantized: apply "
            "the recipe to that pipeline in Python. What loads a pipeline by itself needs a file: mto.save writes one"
        )
    return state_of(_read(config.checkpoint))


def inspect(path: Path) -> Inspection:
    """See `qlip_plugins.adapter.BaseQuantizer.inspect`."""
    model = _read(path)
    state = state_of(model)
    weights = Counter(state.weight_bits().values())
    inputs = Counter(grid.bits for grid in state.activations.values())
    return Inspection(
        format=NAME,
        weight_bits=max(weights, key=lambda bits: weights[bits]),
        activation_bits=max(inputs, key=lambda bits: inputs[bits]),
        has_activations=True,
        quantized_layers=len(state.layers),
        split_layers=0,
        base={"adapter": NAME, "checkpoint": str(path.resolve())},
        notes=tuple(
            f"{count} quantizers that only ModelOpt can run ({what}): apply the recipe to the model in memory"
            for what, count in Counter(state.left.values()).items()
        ),
        details={
            "modes": ", ".join(model.modes),
            "smoothed_layers": sum(layer.smoothing is not None for layer in state.layers.values()),
            "low_rank_layers": sum(layer.low_rank is not None for layer in state.layers.values()),
            "layers": list(state.layers),
        },
    )


def _read(path: Path) -> Quantized:
    if path.is_dir():
        record, tensors = _from_folder(path)
    else:
        record, tensors = _from_file(path)
    check_finite(path, tensors)
    try:
        modes = record["modelopt_state_dict"]
        quantizers: Any = next(
            made["metadata"]["quantizer_state"]
            for _, made in reversed(modes)
            if "quantizer_state" in made["metadata"]
        )
        return Quantized(quantizers, tensors, tuple(name for name, _ in modes), str(path))
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise ArtefactError(
            f"{path}: its modelopt_state holds no quantizers ({error!r}), {_EXPECTED}"
        ) from None


def _from_folder(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    files = sorted(path.glob("*.safetensors"))
    if not (path / STATE_FILE).is_file():
        raise ForeignFormatError(f"{path}: no {STATE_FILE} in this folder, {_EXPECTED}")
    if not files:
        raise ArtefactError(f"{path}: {STATE_FILE} without any safetensors beside it, {_EXPECTED}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{file}: damaged or not safetensors: {error}") from None
    return _mapping(path / STATE_FILE), tensors


def _from_file(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    if path.suffix not in (".pth", ".pt"):
        what = "" if path.exists() else "no such file; "
        raise ForeignFormatError(f"{path}: {what}{_EXPECTED}")
    content = _mapping(path)
    if "modelopt_state" not in content or not isinstance(content.get("model_state_dict"), dict):
        raise ForeignFormatError(f"{path}: without modelopt_state and model_state_dict, {_EXPECTED}")
    return content["modelopt_state"], content["model_state_dict"]


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        content = read_plain(path)
    except ArtefactError as error:
        # Whether it is damaged, or another framework's, cannot be told.
        raise ForeignFormatError(str(error)) from None
    if not isinstance(content, dict):
        raise ForeignFormatError(f"{path}: a {type(content).__name__}, {_EXPECTED}")
    return content
