"""The integer grid of an activation quantizer, at its base width and at every other.

At the base width the checkpoint's own grid is used to the letter. Another width needs a range: one
fitted for that width on calibration inputs, or, when the user says so, the calibrated range kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .artefacts import read_tensors, write_tensors
from .errors import ArtefactError, BitsError
from .recipe import FULL_PRECISION

RANGES_FORMAT = "qlip-plugins ranges"
RANGES_VERSION = 1

LOST_SIGNAL = 0.5
"""Relative squared error beyond which a kept range counts as useless: half the signal's energy."""

WASTED_WIDTH = (0.1, 300)
"""Or: this relative squared error, when the row's own range would make it so many times smaller.

Set between what the golden files show (tests/library/test_controller.py): their own ranges must pass down
to 4 bits, and must not at 8 bits once their steps are 13 times too wide.
"""


Kept = Literal["ends", "high", "low"]
"""What another width keeps of a calibrated range: both ends (Q-Diffusion, PTQD), or, around a middle code of
0.0, the greatest value (ModelOpt's amax) or the least one (brevitas's threshold)."""


@dataclass(frozen=True)
class ActGrid:
    """The codes of one activation quantizer at one width.

    `scale` is the step (negative where training drove it there), `zero_point` the code of 0.0,
    `low_code`..`high_code` the codes that exist, `kept` what `at_width` keeps.
    """

    bits: int
    scale: float
    zero_point: int
    low_code: int
    high_code: int
    # Not shown: fingerprints are taken over what is, and those of older bases stay as they are.
    kept: Kept = field(default="ends", repr=False)

    @classmethod
    def asymmetric(cls, bits: int, scale: float, zero_point: int) -> ActGrid:
        """Codes 0 .. 2^bits - 1."""
        return cls(bits, scale, zero_point, 0, 2**bits - 1)

    @classmethod
    def symmetric(cls, bits: int, scale: float, zero_point: int = 0) -> ActGrid:
        """Codes -2^(bits-1) .. 2^(bits-1) - 1."""
        return cls(bits, scale, zero_point, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @classmethod
    def over(cls, bits: int, low: float, high: float) -> ActGrid:
        """2^bits even steps from `low` to `high`, 0.0 on a step where the range holds it.

        Raises:
            BitsError: the range is empty or not finite.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BitsError(f"a range from {low} to {high} has no {bits}-bit grid")
        scale = (high - low) / (2**bits - 1)
        return cls.asymmetric(bits, float(torch.tensor(scale).item()), round(-low / scale))

    @property
    def low(self) -> float:
        """The smallest value the grid can express."""
        return min(self._ends())

    @property
    def high(self) -> float:
        """The largest value the grid can express."""
        return max(self._ends())

    def _ends(self) -> tuple[float, float]:
        return (
            (self.low_code - self.zero_point) * self.scale,
            (self.high_code - self.zero_point) * self.scale,
        )

    def at_width(self, bits: int) -> ActGrid:
        """The same range in 2^bits steps."""
        if bits == self.bits:
            return self
        if self.kept == "ends":
            return ActGrid.over(bits, self.low, self.high)
        middle = 2 ** (bits - 1)
        if self.kept == "low":
            return ActGrid.asymmetric(bits, -self.low / middle, middle)
        narrow = self.low_code == -self.high_code  # the lowest code is left out, there as well
        return ActGrid(bits, self.high / (middle - 1), middle - narrow, 0, 2**bits - 1 - narrow)


@dataclass(frozen=True)
class Ranges:
    """Grids of the widths other than the base width.

    Args:
        fitted: quantizer name -> width -> grid.
        keep_calibrated: use the calibrated range where nothing is fitted, and count what that loses.
        fingerprint: of the base that the grids were fitted on; empty where there are none.
    """

    fitted: Mapping[str, Mapping[int, ActGrid]] = field(default_factory=dict)
    keep_calibrated: bool = False
    fingerprint: str = ""

    def digest(self) -> str:
        """SHA-256 of what a quantizer computes with."""
        fitted = {
            name: {w: astuple(grid)[:5] for w, grid in grids.items()} for name, grids in self.fitted.items()
        }
        return hashlib.sha256(json.dumps([fitted, self.keep_calibrated], sort_keys=True).encode()).hexdigest()

    def only(self, widths: Collection[int]) -> Ranges:
        """Those of some widths."""
        fitted = {
            name: {width: grid for width, grid in grids.items() if width in widths}
            for name, grids in self.fitted.items()
        }
        return Ranges(fitted, self.keep_calibrated, self.fingerprint)

    def save(self, path: Path) -> None:
        """Write the fitted grids as safetensors, whole or not at all.

        Each quantizer has `(W, 3)` float64: width, step and zero point.
        """
        tensors = {
            name: torch.tensor(
                [[width, grid.scale, grid.zero_point] for width, grid in sorted(grids.items())],
                dtype=torch.float64,
            ).reshape(-1, 3)
            for name, grids in self.fitted.items()
        }
        write_tensors(path, RANGES_FORMAT, RANGES_VERSION, tensors, base_fingerprint=self.fingerprint)

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, damaged, of another format, or with values that are no grid.
        """
        tensors, facts = read_tensors(path, RANGES_FORMAT, RANGES_VERSION)
        fitted: dict[str, dict[int, ActGrid]] = {}
        for name, rows in tensors.items():
            if rows.ndim != 2 or rows.shape[1] != 3 or not rows.isfinite().all() or (rows[:, :2] <= 0).any():
                raise ArtefactError(f"{path}: tensor {name!r} is no list of (width, step, zero point)")
            fitted[name] = {
                int(width): ActGrid.asymmetric(int(width), step, int(zero))
                for width, step, zero in rows.tolist()
            }
        return cls(fitted=fitted, fingerprint=facts.get("base_fingerprint", ""))


class GridChoice:
    """The grids of one quantizer by width, and what keeping a range has cost.

    Every backend shares this, so that a width means the same on each.
    """

    def __init__(self, name: str, base: ActGrid, ranges: Ranges) -> None:
        self.name = name
        self.base = base
        self._fitted = ranges.fitted.get(name, {})
        self._keep = ranges.keep_calibrated
        self._losses: dict[int, Tensor] = {}

    def grid(self, bits: int) -> ActGrid | None:
        """The grid of a width; None for 32, which leaves values as they are.

        Raises:
            BitsError: the width is outside 2..32.
        """
        if not 2 <= bits <= FULL_PRECISION:
            raise BitsError(f"{self.name}: a width of {bits} bits, expected 2 to {FULL_PRECISION}")
        if bits == self.base.bits:
            return self.base
        if bits == FULL_PRECISION:
            return None
        return self._fitted.get(bits) or self.base.at_width(bits)

    def is_sound(self, bits: int) -> bool:
        """Whether a width needs no look at what it does: it is the base's, 32, or has a fitted range."""
        return bits in (self.base.bits, FULL_PRECISION) or bits in self._fitted

    def judge(self, bits: int, x: Tensor, quantized: Tensor, at_base: Tensor) -> None:
        """Look at what a kept range did to `x`: count it, and refuse a lost signal unless asked to keep.

        Args:
            bits: the width.
            x: what went in, `(N, ...)`.
            quantized: what came out, the same shape.
            at_base: what the base width makes of `x`; its own loss is not held against the width.

        Raises:
            BitsError: some row loses too much of its signal to the range (`LOST_SIGNAL`, `WASTED_WIDTH`),
                and nobody asked to keep it.
        """
        x, quantized, at_base = (tensor.detach().float() for tensor in (x, quantized, at_base))
        clipped = ((x < self.base.low) | (x > self.base.high)).sum()
        zeroed = ((x != 0) & (quantized == 0)).sum()
        counts = torch.stack([torch.full_like(clipped, x.numel()), clipped, zeroed])
        self._losses[bits] = self._losses.get(bits, torch.zeros_like(counts)) + counts
        if self._keep:
            return
        lost, base_lost = _lost_share(x, quantized), _lost_share(x, at_base)
        least, ratio = WASTED_WIDTH
        wasted = (lost > least) & (lost > ratio * _lost_share(x, _on_own_range(x, bits)))
        bad = ((lost > LOST_SIGNAL) | wasted) & (lost > 2 * base_lost)
        if bool(bad.any()):
            worst = float(lost[bad].max().clamp(max=1))
            raise BitsError(
                f"{self.name}: {bits} bits inside the calibrated range [{self.base.low:.4g}, "
                f"{self.base.high:.4g}] lose {worst:.0%} of the signal. "
                "Fit a range for this width (`qlip-plugins fit-ranges`, `ranges: {table: FILE}`), or accept "
                "the loss with `ranges: {keep_calibrated: true}`"
            )

    def losses(self) -> dict[int, tuple[int, int, int]]:
        """`{width: (values seen, clipped, zeroed)}` so far, where the calibrated range was kept."""
        counted = {bits: counts.tolist() for bits, counts in self._losses.items()}
        return {bits: (seen, clipped, zeroed) for bits, (seen, clipped, zeroed) in counted.items()}


def _on_own_range(x: Tensor, bits: int) -> Tensor:
    """Each row rounded to 2^bits even steps between its own extremes."""
    rows = x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(rows.dtype).tiny)
    rounded: Tensor = ((rows - low) / step).round() * step + low
    return rounded.reshape(x.shape)


def _lost_share(x: Tensor, quantized: Tensor) -> Tensor:
    """Energy of the error over that of the signal, `(N,)`; 0 where there is no signal."""
    rows = x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    error = (quantized.reshape(rows.shape) - rows).square().sum(1)
    energy = rows.square().sum(1)
    return torch.where(energy > 0, error / energy, torch.zeros_like(error))
