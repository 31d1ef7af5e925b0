"""Grids with the least error, as BRECQ's quantizers search them."""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 80
NORM = 2.4


@torch.no_grad()
def search_grid(values: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Shrink each row's range in 80 steps of a hundredth and keep the one with the least |error|^2.4.

    Source: `scale_method='mse'` of BRECQ's UniformAffineQuantizer; the first of equal errors wins.

    Args:
        values: `(R, n)` floats, each row quantized on its own.
        low: `(R,)` lower ends of the unshrunk ranges.
        high: `(R,)` upper ends, at least `low`.
        bits: of the grid.

    Returns:
        Scale and zero point, `(R,)` each, float32; the zero point is a whole number, beyond the codes
        where a range lies off 0. A row of one value, which has no range, gets a grid that holds it.
    """
    best = torch.full_like(low, torch.inf)
    scale, zero_point = torch.zeros_like(low), torch.zeros_like(low)
    for step in range(CANDIDATES):
        shrink = 1.0 - 0.01 * step
        trial_scale = (high * shrink - low * shrink) / (2**bits - 1)
        trial_zero = (-(low * shrink) / trial_scale).round()
        codes = ((values / trial_scale[:, None]).round() + trial_zero[:, None]).clamp(0, 2**bits - 1)
        error = (values - (codes - trial_zero[:, None]) * trial_scale[:, None]).abs().pow(NORM).mean(1)
        better = error < best  # never so for the NaN of an empty range
        best = torch.where(better, error, best)
        scale = torch.where(better, trial_scale, scale)
        zero_point = torch.where(better, trial_zero, zero_point)
    return _or_alone(low, high, scale, zero_point)


def range_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid over a whole range: scale and zero point, shaped as `low` and `high`."""
    scale = (high - low) / (2**bits - 1)
    return _or_alone(low, high, scale, (-low / scale).round())


def _or_alone(low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Where there is one value and no range: a step of that size, or of 1 for 0, holds it exactly."""
    alone = low == high
    scale = torch.where(alone, torch.where(low == 0, 1.0, low.abs()), scale)
    return scale, torch.where(alone, (low < 0).float(), zero_point)
