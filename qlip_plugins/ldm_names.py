"""Names of LDM's UNetModel as names of diffusers' UNet2DConditionModel, and back.

The map is read off the names in the file, not off a configuration, so every block layout that both
classes can express has one: any number of levels and residual blocks, attention at any of them,
transformers of any depth, residual down- and upsampling blocks. Source: the table of
`convert_ldm_unet_checkpoint` in diffusers, checked against the outputs of both models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ArtefactError

_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# The order in which LDM's modules are made, hence that of the keys of its state dicts.
_ORDER = (
    *("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"),
    *("in_layers", "emb_layers", "out_layers", "skip_connection", "op", "conv"),
    *("norm", "proj_in", "transformer_blocks", "proj_out"),
    *("attn1", "ff", "attn2", "norm1", "norm2", "norm3"),
    *("to_q", "to_k", "to_v", "to_out", "net", "proj"),
)
_BLOCK = re.compile(
    r"(input_blocks|output_blocks)\.(\d+)\.(\d+)(?:\.(.+))?|middle_block()\.(\d+)()(?:\.(.+))?"
)
_TRANSFORMER_PARTS = ("norm", "proj_in", "proj_out", "transformer_blocks")


class LayoutError(ValueError):
    """The names are not those of a UNetModel that diffusers can express."""


@dataclass(frozen=True)
class _Child:
    """One child of a block: `kind` is resnet, transformer, down or up."""

    position: int
    kind: str


def diffusers_names(ldm_modules: Iterable[str]) -> dict[str, str]:
    """The diffusers module path of every given LDM module path.

    Args:
        ldm_modules: paths of all modules with parameters, without a prefix.

    Raises:
        LayoutError: a path fits no block, blocks are missing, or diffusers has no such block.
    """
    paths = list(ldm_modules)
    blocks = _homes(_children(paths))
    return {path: _translate(path, blocks) for path in paths}


def names_in_file(path: Path, parameters: Iterable[str]) -> dict[str, str]:
    """`diffusers_names` of every module that a checkpoint has parameters of.

    Args:
        path: of the checkpoint, for messages.
        parameters: LDM names of its parameters, without a prefix.

    Raises:
        ArtefactError: the modules are not those of a UNetModel that diffusers can express.
    """
    try:
        return diffusers_names(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    except LayoutError as error:
        raise ArtefactError(f"{path}: {error}") from None


def ldm_names(diffusers_modules: Iterable[str]) -> dict[str, str]:
    """The LDM module path of every given diffusers module path, in the order of LDM's state dict.

    The inverse of `diffusers_names`, and checked to be that: what it gives is read back.

    Args:
        diffusers_modules: paths of all modules with parameters.

    Raises:
        LayoutError: LDM's UNetModel has no such module, or no such order of blocks.
    """
    paths = list(diffusers_modules)
    homes = _ldm_homes(paths)
    names = {path: _translate_back(path, homes) for path in paths}
    back = diffusers_names(names.values())
    for path, name in names.items():
        if back[name] != path:
            raise LayoutError(f"module {path!r} has no place of its own in LDM's UNetModel")
    return dict(sorted(names.items(), key=lambda item: _place(item[1])))


def _place(ldm_path: str) -> list[tuple[int, int]]:
    """Sorts paths as LDM's state dict does."""
    return [(0, int(part)) if part.isdigit() else (1, _ORDER.index(part)) for part in ldm_path.split(".")]


def _ldm_homes(paths: Iterable[str]) -> dict[str, str]:
    """`down_blocks.1.attentions.0` -> `input_blocks.4.1`, and so on, for every child of a block."""
    paths = list(paths)
    return {
        **_encoder_homes(_levels(paths, "down_blocks")),
        **{f"mid_block.resnets.{index}": f"middle_block.{2 * index}" for index in (0, 1)},
        "mid_block.attentions.0": "middle_block.1",
        **_decoder_homes(_levels(paths, "up_blocks")),
    }


def _levels(paths: Iterable[str], side: str) -> list[dict[str, set[int]]]:
    """For each block of a side: kind of child (`resnets`, ...) -> the numbers that there are."""
    found: dict[int, dict[str, set[int]]] = {}
    for path in paths:
        parts = path.split(".")
        if parts[0] == side and len(parts) > 4 and parts[1].isdigit() and parts[3].isdigit():
            found.setdefault(int(parts[1]), {}).setdefault(parts[2], set()).add(int(parts[3]))
    return [found[level] for level in sorted(found)]


def _encoder_homes(levels: list[dict[str, set[int]]]) -> dict[str, str]:
    homes: dict[str, str] = {}
    number = 1
    for level, kinds in enumerate(levels):
        for index in sorted(kinds.get("resnets", ())):
            homes[f"down_blocks.{level}.resnets.{index}"] = f"input_blocks.{number}.0"
            homes[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{number}.1"
            number += 1
        if "downsamplers" in kinds:
            homes[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    return homes


def _decoder_homes(levels: list[dict[str, set[int]]]) -> dict[str, str]:
    homes: dict[str, str] = {}
    number = 0
    for level, kinds in enumerate(levels):
        for index in sorted(kinds.get("resnets", ())):
            homes[f"up_blocks.{level}.resnets.{index}"] = f"output_blocks.{number}.0"
            homes[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{number}.1"
            number += 1
        # The way up stands last in the block: behind the transformer, where there is one.
        position = 2 if kinds.get("attentions") else 1
        homes[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{position}"
    return homes


def _translate_back(path: str, homes: Mapping[str, str]) -> str:
    top = {name: ldm for ldm, name in _TOP.items()}
    if path in top:
        return top[path]
    child = ".".join(path.split(".")[: 3 if path.startswith("mid_block") else 4])
    if child not in homes:
        raise LayoutError(f"module {path!r} has no place in LDM's UNetModel")
    inner = path[len(child) + 1 :]
    resnet = {name: ldm for ldm, name in _RESNET.items()}
    if inner == "conv":
        inner = "op" if "downsamplers" in child else "conv"
    elif inner in resnet:
        inner = resnet[inner]
    elif inner.split(".")[0] not in _TRANSFORMER_PARTS:
        raise LayoutError(f"module {path!r} has no place in LDM's UNetModel")
    return f"{homes[child]}.{inner}"


def _translate(path: str, homes: Mapping[str, str]) -> str:
    if path in _TOP:
        return _TOP[path]
    found = _BLOCK.fullmatch(path)
    child = ".".join(path.split(".")[: 3 if not path.startswith("middle") else 2])
    if found is None or child not in homes:
        raise LayoutError(f"module {path!r} is not part of LDM's UNetModel")
    inner = path[len(child) + 1 :]
    home = homes[child]
    if inner in _RESNET:
        return f"{home}.{_RESNET[inner]}"
    if inner in ("op", "conv"):
        return f"{home}.conv"
    if inner.split(".")[0] in _TRANSFORMER_PARTS:
        return f"{home}.{inner}"
    raise LayoutError(f"module {path!r} is not part of LDM's UNetModel")


def _children(paths: Iterable[str]) -> dict[str, dict[int, dict[int, str]]]:
    """Side -> block number -> position in the block -> kind."""
    found: dict[str, dict[int, dict[int, str]]] = {
        "input_blocks": {},
        "middle_block": {},
        "output_blocks": {},
    }
    for path in paths:
        parts = path.split(".")
        if parts[0] not in found or path == "input_blocks.0.0":
            continue
        numbers = parts[1:2] if parts[0] == "middle_block" else parts[1:3]
        if not all(number.isdigit() for number in numbers) or len(parts) <= len(numbers) + 1:
            raise LayoutError(f"module {path!r} is not part of LDM's UNetModel")
        block, position = (0, int(numbers[0])) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))
        kind = _kind(path, parts[len(numbers) + 1])
        known = found[parts[0]].setdefault(block, {}).setdefault(position, kind)
        if known != kind:
            raise LayoutError(f"{path!r} makes its block both a {known} and a {kind}")
    return found


def _kind(path: str, part: str) -> str:
    if part in ("in_layers", "emb_layers", "out_layers", "skip_connection"):
        return "resnet"
    if part in ("op", "conv"):
        return "down" if part == "op" else "up"
    if part == "qkv":
        raise LayoutError(
            f"module {path!r} is LDM's unconditional AttentionBlock; a text-conditioned UNet has SpatialTransformer"
        )
    if part in _TRANSFORMER_PARTS:
        return "transformer"
    raise LayoutError(f"module {path!r} is not part of LDM's UNetModel")


def _homes(children: Mapping[str, Mapping[int, Mapping[int, str]]]) -> dict[str, str]:
    """`input_blocks.4.1` -> `down_blocks.1.attentions.0`, and so on, for every child."""
    homes: dict[str, str] = {}
    levels = _walk_up(children["output_blocks"], homes)
    _walk_down(children["input_blocks"], levels, homes)
    _walk_middle(children["middle_block"].get(0, {}), homes)
    return homes


def _walk_up(blocks: Mapping[int, Mapping[int, str]], homes: dict[str, str]) -> list[int]:
    """Name the decoder's children; returns the residual blocks of each level, deepest level first."""
    _check_gapless("output_blocks", blocks, 0)
    level, resnets, levels = 0, 0, []
    for number in sorted(blocks):
        kinds = blocks[number]
        _check_block(f"output_blocks.{number}", kinds)
        ends_level = False
        for position, kind in sorted(kinds.items()):
            # After the residual block, a second one or a convolution is the way up to the next level.
            if position > 0 and kind in ("resnet", "up"):
                place = "upsamplers.0"
                ends_level = True
            else:
                place = f"resnets.{resnets}" if kind == "resnet" else f"attentions.{resnets}"
            homes[f"output_blocks.{number}.{position}"] = f"up_blocks.{level}.{place}"
        resnets += 1
        if ends_level:
            levels.append(resnets)
            level, resnets = level + 1, 0
    return [*levels, resnets]


def _walk_down(blocks: Mapping[int, Mapping[int, str]], levels: list[int], homes: dict[str, str]) -> None:
    _check_gapless("input_blocks", blocks, 1)
    number = 1
    for level, decoder_resnets in enumerate(reversed(levels)):
        for resnet in range(decoder_resnets - 1):
            _check_block(f"input_blocks.{number}", blocks.get(number, {}))
            for position, kind in blocks[number].items():
                part = "resnets" if kind == "resnet" else "attentions"
                homes[f"input_blocks.{number}.{position}"] = f"down_blocks.{level}.{part}.{resnet}"
            number += 1
        if level < len(levels) - 1:
            if set(blocks.get(number, {}).values()) not in ({"down"}, {"resnet"}):
                raise LayoutError(f"input_blocks.{number} should lead one level down, as the decoder has it")
            homes[f"input_blocks.{number}.0"] = f"down_blocks.{level}.downsamplers.0"
            number += 1
    if number - 1 != len(blocks):
        raise LayoutError(
            f"the encoder has {len(blocks)} blocks after conv_in where the decoder asks for {number - 1}"
        )


def _walk_middle(kinds: Mapping[int, str], homes: dict[str, str]) -> None:
    resnets = [position for position, kind in sorted(kinds.items()) if kind == "resnet"]
    attentions = [position for position, kind in sorted(kinds.items()) if kind == "transformer"]
    if len(resnets) != 2 or len(attentions) > 1:
        raise LayoutError("middle_block should be two residual blocks around one transformer")
    for index, position in enumerate(resnets):
        homes[f"middle_block.{position}"] = f"mid_block.resnets.{index}"
    for position in attentions:
        homes[f"middle_block.{position}"] = "mid_block.attentions.0"


def _check_gapless(side: str, blocks: Mapping[int, object], first: int) -> None:
    expected = list(range(first, first + len(blocks)))
    if not blocks or sorted(blocks) != expected:
        missing = sorted(set(range(first, max(blocks, default=first) + 1)) - set(blocks))
        raise LayoutError(
            f"{side} has no parameters in block {missing[0] if missing else first}: not LDM's UNetModel, or one "
            "that resamples without convolutions (conv_resample=False), which diffusers cannot express"
        )


def _check_block(name: str, kinds: Mapping[int, str]) -> None:
    if kinds.get(0) != "resnet" or kinds.get(1, "transformer") == "down":
        raise LayoutError(f"{name} should start with a residual block, found {dict(kinds) or 'nothing'}")
