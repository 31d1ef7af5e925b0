"""The arithmetic of uniform affine quantization, once.

Source: `UniformAffineQuantizer` of BRECQ, as Q-Diffusion and PTQD use it. The order of operations is
part of the format: a true division, half-to-even rounding, the zero point added before the clamp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0]


class _FakeQuantizeWithStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        ratio = x / scale
        steps = (ratio.round() + zero_point).clamp(0, top) - zero_point
        ctx.save_for_backward(ratio, steps)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ratio, steps = ctx.saved_tensors
        within = ratio.round() == steps
        to_scale = (grads[0] * (steps - ratio * within)).sum()
        return grads[0] * within, to_scale, None, None


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged. Any shape."""
    rounded: Tensor = _RoundStraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, the gradient of `soft` (docs/method.md, after CADyQ). Equal shapes.

    With hard = sum_b onehot_b Q_b(x) and soft = sum_b p_b Q_b(x) it is the choice of a width that
    training can move.
    """
    chosen: Tensor = _StraightThrough.apply(hard, soft)  # type: ignore[no-untyped-call]
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


def fake_quantize_with_step(x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """`fake_quantize` to codes 0 .. `top` with one scale for all of `x`, made for training that scale.

    The same values, and the same gradients in a third of the operations: that of the scale is LSQ's,
    `round(x / scale) - x / scale` inside the range, the end's distance from the zero point outside.

    Args:
        x: activations of any shape, float32.
        scale: step, `()`.
        zero_point: code of 0.0, `()`; a whole number.
        top: largest code.
    """
    quantized: Tensor = _FakeQuantizeWithStep.apply(x, scale, zero_point, top)  # type: ignore[no-untyped-call]
    return quantized
