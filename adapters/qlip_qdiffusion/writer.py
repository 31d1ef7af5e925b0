"""`CalibratedState` -> Q-Diffusion file, as its own calibration would have saved it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.files import written_whole
from qlip_plugins.grids import ActGrid
from qlip_plugins.ldm_names import LayoutError, ldm_names
from qlip_plugins.recipe import dump
from qlip_plugins.state import OPERANDS, CalibratedLayer, CalibratedState, WeightPart

from .contents import PREFIX
from .options import RECORD, read_record

CHECKPOINT = "ckpt.pth"
_WRITTEN_BY = "qlip-plugins"
_PARTS = ("", "_0")
_LETTER = {"q": "q", "k": "k", "v": "v", "softmax": "w"}
_STRETCH = (-0.1, 1.1)
_LEAST = 1e-6

# Options of diffusers' UNet2DConditionModel -> the only value with which it computes what LDM's does.
_LDM_CONFIG: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# Those that LDM has once, while diffusers takes one for each level.
_ALIKE = ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim")


def check_writable(denoiser: nn.Module, folder: Path) -> None:
    """See `qlip_plugins.adapter.CheckpointWriter.check_writable`."""
    config = getattr(denoiser, "config", None)
    if config is None or "block_out_channels" not in config:
        raise IncompatibleModelError(f"{type(denoiser).__name__} is no UNet2DConditionModel: {_REFUSED}")
    problems = [*_other_options(config), *_other_channels(config), *_other_heads(config)]
    if problems:
        raise IncompatibleModelError(f"{type(denoiser).__name__}: {'; '.join(problems)}: {_REFUSED}")
    _names(name for name, _ in denoiser.named_parameters())
    _check_folder(folder)


_REFUSED = "LDM's UNetModel has no such model, so no Q-Diffusion file can be written for it"


def _other_options(config: Any) -> Iterator[str]:
    for name, value in _LDM_CONFIG.items():
        found = config.get(name, value)
        if found != value:
            yield f"{name} is {found!r}, expected {value!r}"
    for name in _ALIKE:
        found = config.get(name)
        if isinstance(found, list | tuple) and len(set(found)) > 1:
            yield f"{name} is {tuple(found)}, expected one for all levels"


def _other_channels(config: Any) -> Iterator[str]:
    first, *others = config["block_out_channels"]
    if any(channels % first for channels in others):
        yield f"block_out_channels are {(first, *others)}, expected whole multiples of the first"


def _other_heads(config: Any) -> Iterator[str]:
    """LDM takes one number of heads for all levels, or one number of channels for all heads."""
    # diffusers' attention_head_dim is the number of heads (its own documented misnomer).
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    each = [heads] * len(config["block_out_channels"]) if isinstance(heads, int) else list(heads)
    channels = [size // count for size, count in zip(config["block_out_channels"], each, strict=True)]
    if len(set(each)) > 1 and len(set(channels)) > 1:
        yield f"its levels have {tuple(each)} heads of {tuple(channels)} channels, expected one number for all"


def write(state: CalibratedState, folder: Path) -> Path:
    """See `qlip_plugins.adapter.CheckpointWriter.write`."""
    _check_state(state)
    names = _names(state.float_parameters)
    tensors = _tensors(state, names)
    record = _record(state)
    _check_folder(folder)
    # An interrupted run leaves a record without a checkpoint, never one beside another run's.
    (folder / CHECKPOINT).unlink(missing_ok=True)
    with written_whole(folder / RECORD) as temporary:
        temporary.write_text(dump(record), encoding="utf-8")
    # Through a handle: torch would put the temporary file's name into the file.
    with written_whole(folder / CHECKPOINT) as temporary, temporary.open("wb") as file:
        torch.save(tensors, file)
    return folder / CHECKPOINT


def _names(parameters: Iterable[str]) -> dict[str, str]:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    try:
        return ldm_names(modules)
    except LayoutError as error:
        raise IncompatibleModelError(f"{error}: {_REFUSED}") from None


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder}: is a file, expected a folder to write {CHECKPOINT} into")
    if (folder / CHECKPOINT).exists() and read_record(folder / RECORD).get("written_by") != _WRITTEN_BY:
        raise ArtefactError(
            f"{folder / CHECKPOINT}: exists and was not written by this command; name another folder"
        )


def _check_state(state: CalibratedState) -> None:
    """Q-Diffusion quantizes every layer, at one width, and all inputs and operands or none."""
    problems = []
    layers = [name for name, t in state.float_parameters.items() if name.endswith(".weight") and t.ndim > 1]
    floating = [name for name in layers if name.removesuffix(".weight") not in state.layers]
    if floating:
        problems.append(f"{floating[0].removesuffix('.weight')} is not quantized")
    missing = [name for name in state.layers if f"{name}.weight" not in state.float_parameters]
    if missing:
        problems.append(f"the unquantized weight of {missing[0]} is not known")
    for what, widths in (
        ("weights", {bits for bits in state.weight_bits().values()}),
        ("activations", {(g.bits, g.low_code < 0) for n, g in state.activations.items() if not _softmax(n)}),
        ("softmax", {(g.bits, g.low_code < 0) for n, g in state.operands.items() if _softmax(n)}),
    ):
        if len(widths) > 1:
            problems.append(f"{what} of different widths: {sorted(widths)}")
    if state.activations:
        problems += _lacking_activations(state)
    if problems:
        raise IncompatibleModelError(
            f"{state.source}: {'; '.join(problems[:3])}: a Q-Diffusion file cannot hold such a model"
        )


def _lacking_activations(state: CalibratedState) -> list[str]:
    attentions = [name.removesuffix(".to_q") for name in state.layers if name.endswith(".to_q")]
    wanted = [f"{attention}.{operand}" for attention in attentions for operand in OPERANDS]
    lacking = [name for name, layer in state.layers.items() if len(layer.inputs) != len(layer.weight)]
    lacking += [name for name in wanted if name not in state.operands]
    return [f"{lacking[0]} has no activation quantizer"] if lacking else []


def _softmax(name: str) -> bool:
    return name.endswith(".softmax")


def _record(state: CalibratedState) -> dict[str, Any]:
    """The options of a run of Q-Diffusion that would have written the file; those that say what it is."""
    inputs = [grid for layer in state.layers.values() for grid in layer.inputs]
    record: dict[str, Any] = {
        "cond": True,
        "ptq": True,
        "quant_act": bool(inputs),
        "quant_mode": "qdiff",
        "split": any(layer.split is not None for layer in state.layers.values()),
        "weight_bit": next(iter(state.weight_bits().values())),
        "written_by": _WRITTEN_BY,
    }
    if inputs:
        softmax = next((grid.bits for name, grid in state.operands.items() if _softmax(name)), inputs[0].bits)
        record |= {"a_sym": inputs[0].low_code < 0, "act_bit": inputs[0].bits, "sm_abit": softmax}
    return dict(sorted(record.items()))


def _tensors(state: CalibratedState, names: dict[str, str]) -> OrderedDict[str, Tensor]:
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    operands: dict[str, str] = {}
    for name in state.operands:
        attention, _, operand = name.rpartition(".")
        operands.setdefault(f"{attention}.to_out.0", attention)
    for name, ldm in names.items():
        for parameter in ("weight", "bias"):
            if f"{name}.{parameter}" in state.float_parameters:
                value = state.float_parameters[f"{name}.{parameter}"]
                tensors[f"{PREFIX}{ldm}.{parameter}"] = value.float().clone()
        if name in state.layers:
            weight = tensors[f"{PREFIX}{ldm}.weight"]
            tensors.update(_layer_tensors(f"{PREFIX}{ldm}", name, weight, state.layers[name]))
        if name in operands:
            # Q-Diffusion's attention holds its own quantizers behind its layers, of which this is the last.
            attention = f"{PREFIX}{ldm.removesuffix('.to_out.0')}"
            for operand, letter in _LETTER.items():
                grid = state.operands[f"{operands[name]}.{operand}"]
                tensors.update(_grid_tensors(f"{attention}.act_quantizer_{letter}", grid))
    return tensors


def _layer_tensors(
    key: str, name: str, weight: Tensor, layer: CalibratedLayer
) -> Iterator[tuple[str, Tensor]]:
    pieces = weight.split([part.codes.shape[1] for part in layer.weight], dim=1)
    for place, (suffix, piece, part) in enumerate(zip(_PARTS, pieces, layer.weight, strict=False)):
        quantizer = f"{key}.weight_quantizer{suffix}"
        per_channel = (piece.shape[0], *[1] * (piece.ndim - 1))
        yield f"{quantizer}.alpha", _alpha(name, piece, part)
        yield f"{quantizer}.zero_point", part.zero_point.float().expand(per_channel).clone()
        yield f"{quantizer}.delta", part.scale.float().expand(per_channel).clone()
        if layer.inputs:
            yield from _grid_tensors(f"{key}.act_quantizer{suffix}", layer.inputs[place])


def _grid_tensors(key: str, grid: ActGrid) -> Iterator[tuple[str, Tensor]]:
    yield f"{key}.delta", torch.tensor(grid.scale, dtype=torch.float32)
    yield f"{key}.zero_point", torch.tensor(float(grid.zero_point), dtype=torch.float32)


def _alpha(name: str, weight: Tensor, part: WeightPart) -> Tensor:
    """AdaRound's variable: as far from 0 as at its start, on the side that its code asks for.

    Where a code is clamped, either side gives it; it then stays where it started.

    Raises:
        IncompatibleModelError: a code is neither of the two that rounding can give.
    """
    gamma, zeta = _STRETCH
    ratio = weight / part.scale.float()
    floor = ratio.floor()
    start = -((zeta - gamma) / (ratio - floor - gamma) - 1).log()
    codes, top = part.codes.float(), 2**part.bits - 1
    down = (floor + part.zero_point.float()).clamp(0, top) == codes
    up = (floor + 1 + part.zero_point.float()).clamp(0, top) == codes
    if not bool((down | up).all()):
        raise IncompatibleModelError(
            f"{name}: {int((~(down | up)).sum())} of its weight codes are none of the two nearest to their weights, "
            "which is all that a Q-Diffusion file can express"
        )
    away = start.abs().clamp(min=_LEAST)
    return torch.where(up & down, start, torch.where(up, away, -away))
