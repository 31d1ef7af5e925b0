"""The arithmetic of uniform affine quantization, once.

Source: `UniformAffineQuantizer` of BRECQ, as Q-Diffusion and PTQD use it. The order of operations is
part of the format: a true division, half-to-even rounding, the zero point added before the clamp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _OneHotStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probabilities: Tensor) -> Tensor:
        chosen = probabilities.argmax(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter_(-1, chosen, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged. Any shape."""
    rounded: Tensor = _RoundStraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def one_hot_straight_through(probabilities: Tensor) -> Tensor:
    """Exactly 0 and 1 forward, the gradient of `probabilities` backward (method.md 3, after CADyQ).

    Args:
        probabilities: `(..., W)`.
    """
    chosen: Tensor = _OneHotStraightThrough.apply(probabilities)  # type: ignore[no-untyped-call]
    return chosen


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low_code: Tensor, high_code: Tensor
) -> Tensor:
    """`(clamp(round(x / scale) + zero_point, low_code, high_code) - zero_point) * scale`.

    Computed in float32 whatever the type of `x`, since a 16-bit code does not fit float16.

    Args:
        x: activations of any shape and floating type.
        scale: step between two codes; broadcastable to `x`; may be negative, as trained steps can be.
        zero_point: code of 0.0; broadcastable to `x`; whole numbers.
        low_code: smallest code; broadcastable to `x`.
        high_code: largest code; broadcastable to `x`.
    """
    codes = round_straight_through(x.float() / scale) + zero_point
    codes = torch.minimum(torch.maximum(codes, low_code), high_code)
    return ((codes - zero_point) * scale).to(x.dtype)
