"""LDM's UNetModel with SpatialTransformer, written from its structure for the tests of the map of names.

Names of modules, their order and the arithmetic are LDM's; only what text-conditioned models use is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEMO: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 96,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1, 2),
    "num_heads": 4,
    "context_dim": 256,
}
"""What the public code would be told about the embedded demo, besides `use_spatial_transformer` and the like."""


def sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of `(N,)` timesteps: `(N, width)`."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10_000) / half))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out: int, emb: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        out: Tensor = self.skip_connection(x) + self.out_layers(h)
        return out


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out: Tensor = self.to_out((weights @ v).transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, context, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        out: Tensor = x + self.proj_out(tokens.mT.unflatten(2, x.shape[2:]))
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return out


class Block(nn.Sequential):
    """Children in a row, each given what it takes besides the picture: time, text or nothing."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        for child in self:
            if isinstance(child, ResBlock):
                x = child(x, emb)
            elif isinstance(child, SpatialTransformer):
                x = child(x, context)
            else:
                x = child(x)
        return x


class UNetModel(nn.Module):
    """Args are LDM's, with `norm_groups` (32 in LDM) for the tiny models of the tests."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        num_heads: int,
        context_dim: int,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        emb = 4 * model_channels

        def resnet(channels: int, out: int) -> nn.Module:
            return ResBlock(channels, out, emb, norm_groups)

        def attention(channels: int) -> nn.Module:
            return SpatialTransformer(channels, context_dim, num_heads, norm_groups)

        def attended(channels: int, level: int) -> list[nn.Module]:
            return [attention(channels)] if 2**level in attention_resolutions else []

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, model_channels, 3, padding=1))])
        skips = [model_channels]
        widths = [factor * model_channels for factor in channel_mult]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Block(resnet(skips[-1], width), *attended(width, level)))
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(Downsample(width)))
                skips.append(width)
        last = widths[-1]
        self.middle_block = Block(resnet(last, last), attention(last), resnet(last, last))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(num_res_blocks + 1):
                way_up = [Upsample(width)] if level > 0 and index == num_res_blocks else []
                children = [resnet(last + skips.pop(), width), *attended(width, level), *way_up]
                self.output_blocks.append(Block(*children))
                last = width
        self.out = nn.Sequential(
            nn.GroupNorm(norm_groups, last), nn.SiLU(), nn.Conv2d(last, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """The predicted noise, of the shape of `x`."""
        emb = self.time_embed(sinusoids(timesteps, self.model_channels))
        kept: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            kept.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], dim=1), emb, context)
        out: Tensor = self.out(x)
        return out
