"""The arithmetic of uniform affine quantization, once.

Source: `UniformAffineQuantizer` of BRECQ, as Q-Diffusion and PTQD use it. The order of operations is
part of the format: a true division, half-to-even rounding, the zero point added before the clamp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GridTable = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scales, zero points, least and greatest codes, in shapes that broadcast to the activations."""


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class _ChosenWidths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chosen: Tensor, x: Tensor, probabilities: Tensor, grids: GridTable, kept: Tensor | None
    ) -> Tensor:
        # Nothing else: what the widths make of x is computed again, for their gradients.
        ctx.save_for_backward(x, probabilities)
        ctx.grids, ctx.kept = grids, kept
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, probabilities = ctx.saved_tensors
        scale, zero_point, low_code, high_code = ctx.grids
        grad, rows = grads[0].float(), len(probabilities)
        codes = (x.float().unsqueeze(0) / scale).round_().add_(zero_point)
        # 1 inside and 0 outside; a last code counts half, as in the gradients of minimum and maximum.
        from_middle = (codes - (low_code + high_code) / 2).abs_()
        within = torch.sub((high_code - low_code + 1) / 2, from_middle, out=from_middle).clamp_(0, 1)
        quantized = codes.clamp_(low_code, high_code).sub_(zero_point).mul_(scale).to(x.dtype)
        if ctx.kept is not None:
            quantized = torch.where(ctx.kept, x, quantized)
            within = torch.where(ctx.kept, torch.ones_like(within), within)
        products = quantized.float().reshape(-1, len(x), x[0].numel()) * grad.flatten(1)
        to_rows = products.sum(2).T
        to_probabilities = to_rows if rows == len(x) else to_rows.sum(0, keepdim=True)
        shares = probabilities.float().T.reshape(-1, rows, *[1] * (x.ndim - 1))
        to_x = (within.mul_(shares).sum(0) * grad).to(x.dtype) if ctx.needs_input_grad[1] else None
        return None, to_x, to_probabilities.to(probabilities.dtype), None, None


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


def choose_widths(
    chosen: Tensor, x: Tensor, probabilities: Tensor, grids: GridTable, kept: Tensor | None = None
) -> Tensor:
    """The value of `chosen`, the gradient of sum_b p_b Q_b(x) (docs/method.md, after CADyQ).

    With chosen = sum_b onehot_b Q_b(x) it is the choice of a width that training can move. Of all that is
    computed only `x` is kept for the backward pass.

    Args:
        chosen: what goes forward, `(N, ...)`.
        x: activations, the same shape and type.
        probabilities: `(N, W)`, or `(1, W)` for all rows.
        grids: scale, zero point, least and greatest code of each width, `(W, 1, ..., 1)`, an axis more than x.
        kept: `(W, 1, ..., 1)`, true where Q_b(x) = x; None: nowhere.
    """
    out: Tensor = _ChosenWidths.apply(chosen, x, probabilities, grids, kept)  # type: ignore[no-untyped-call]
    return out


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
