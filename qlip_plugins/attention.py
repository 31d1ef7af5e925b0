"""Attention whose matrix products take quantized operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import IncompatibleModelError

Quantize = Callable[[Tensor], Tensor]

# Attribute of diffusers' Attention -> its only value under which q, k, v and softmax are all there is.
_PLAIN = {
    "spatial_norm": None,
    "group_norm": None,
    "norm_cross": None,
    "norm_q": None,
    "norm_k": None,
    "added_kv_proj_dim": None,
    "residual_connection": False,
    "rescale_output_factor": 1.0,
}


class QuantizedAttnProcessor:
    """Attention as Q-Diffusion computes it: quantize, then scale; softmax; quantize; product with v.

    Source: `QuantBasicTransformerBlock` (formats of Q-Diffusion). Operands are quantized after the
    head split, per tensor.

    Args:
        q: quantizes `(N, heads, L, d)` queries.
        k: quantizes `(N, heads, S, d)` keys.
        v: quantizes `(N, heads, S, d)` values.
        softmax: quantizes `(N, heads, L, S)` attention weights.
    """

    def __init__(self, q: Quantize, k: Quantize, v: Quantize, softmax: Quantize) -> None:
        self.q, self.k, self.v, self.softmax = q, k, v, softmax

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the diffusers `Attention` this processor sits in.
            hidden_states: `(N, L, C)`.
            encoder_hidden_states: `(N, S, D)`; None attends to `hidden_states`.
            attention_mask: added to the scores, in any form that `attn.prepare_attention_mask` takes.
            temb: unused; part of diffusers' signature.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            _split_heads(project(source), attn.heads)
            for project, source in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        query, key = self.q(query), self.k(key)
        if attn.upcast_attention:
            query, key = query.float(), key.float()
        scores = torch.matmul(query, key.transpose(-1, -2)) * attn.scale
        if attention_mask is not None:
            batch, length = context.shape[:2]
            mask = attn.prepare_attention_mask(attention_mask, length, batch)
            scores = scores + mask.reshape(batch, attn.heads, -1, length)
        if attn.upcast_softmax:
            scores = scores.float()
        weights = self.softmax(scores.softmax(dim=-1).to(value.dtype))
        joined = torch.matmul(weights, self.v(value)).transpose(1, 2).flatten(2)
        projected: Tensor = attn.to_out[1](attn.to_out[0](joined))
        return projected


def check_plain(name: str, attn: Any) -> None:
    """Check that an attention is nothing but projections, softmax and products.

    Raises:
        IncompatibleModelError: it does more than the processor would; names what.
    """
    for attribute, plain in _PLAIN.items():
        value = getattr(attn, attribute, plain)
        if value != plain and value is not plain:
            raise IncompatibleModelError(
                f"{name}: its attention has {attribute}={value!r}, quantized operands need {plain!r}"
            )


def _split_heads(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split
