"""Names of LDM's UNetModel as names of diffusers' UNet2DConditionModel.

The map is read off the names in the file, not off a configuration, so every block layout that both
classes can express has one: any number of levels and residual blocks, attention at any of them,
transformers of any depth, residual down- and upsampling blocks. Source: the table of
`convert_ldm_unet_checkpoint` in diffusers, checked against the outputs of both models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
