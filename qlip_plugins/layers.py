"""Kinds of a denoiser's layers, and which of them the controller steers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from .state import OPERANDS, SPLIT_SUFFIX

OPERAND_KIND = "attention_operand"

# The first match in a module path decides; names are those of diffusers' denoisers.
_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"^(conv_in|x_embedder|context_embedder)$", "conv_in"),
        (r"^(conv_out|proj_out)$", "conv_out"),
        (r"time_emb|time_text_embed|add_embedding|class_embedding", "time_embedding"),
        (r"norm[^.]*\.linear$", "modulation"),
        (r"conv_shortcut", "shortcut"),
        (r"downsamplers", "downsample"),
        (r"upsamplers", "upsample"),
        (r"attn", "attention_projection"),
        (r"\bff(_context)?\.|\bproj_mlp$|single_transformer_blocks\.\d+\.proj_out$", "feed_forward"),
        (r"proj_in|proj_out", "transformer_projection"),
        (r"conv1|conv2", "resnet"),
    )
)

TIME_KINDS = ("time_embedding", "modulation")

UNCONTROLLED = ("conv_in", "conv_out", "time_embedding", "modulation", "shortcut", "downsample")
"""Kinds that keep their base width (our choice; the paper does not name K).

The paper's BitOPs come out only with shortcuts and downsamplers left at 32 bits (docs/method.md); the
first, last and time layers, and those that turn the time into FLUX's modulations, are few or cost next to
nothing, and are sensitive by common experience.
"""


def kind_of(name: str) -> str:
    """The kind of a layer or operand by its name: `resnet`, `feed_forward`, `attention_operand`, ..."""
    if name.rpartition(".")[2] in OPERANDS:
        return OPERAND_KIND
    return next((kind for pattern, kind in _KINDS if pattern.search(name)), "other")


def controlled(names: Iterable[str], attention: bool, time: bool = False) -> tuple[str, ...]:
    """K, the quantizers whose width the plan sets.

    Args:
        names: every activation quantizer of the base.
        attention: whether the operands of the attention products belong to K.
        time: whether the layers that read the time do.
    """
    left = {*UNCONTROLLED, OPERAND_KIND}
    left -= {OPERAND_KIND} if attention else set()
    left -= set(TIME_KINDS) if time else set()
    return tuple(name for name in names if kind_of(name) not in left)


def count_by_kind(names: Iterable[str]) -> dict[str, int]:
    """How many of each kind, most frequent first."""
    return dict(Counter(kind_of(name) for name in names).most_common())


def layer_of(name: str) -> str:
    """The layer that a quantizer belongs to: the second part of a split input has its first part's."""
    return name.removesuffix(SPLIT_SUFFIX)
