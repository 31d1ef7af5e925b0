"""Ranges fitted for each width, by mean squared error on what the quantizers see while sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .adapter import ActQuantizer
from .errors import BitsError
from .grids import ActGrid, Ranges
from .progress import progress
from .quantizer import fake_quantize
from .recipe import FULL_PRECISION
from .state import CalibratedState

_VALUES_KEPT = 8192
_VALUES_A_CALL = 1024
_SHRINKS = 80


class _Sample:
    """Extremes of everything seen, and a bounded random sample of it."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pieces: list[Tensor] = []
        self._a_call = _VALUES_A_CALL
        self.low, self.high = float("inf"), float("-inf")

    def __call__(self, x: Tensor) -> None:
        flat = x.reshape(-1)
        picks = torch.randint(flat.numel(), (min(self._a_call, flat.numel()),), generator=self._generator)
        self._pieces.append(flat[picks.to(flat.device)].float().cpu())
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        if sum(map(len, self._pieces)) > _VALUES_KEPT:
            # Every call stays represented: all pieces are thinned alike, later ones start thinner.
            self._pieces = [piece[::2] for piece in self._pieces]
            self._a_call = max(1, self._a_call // 2)

    def values(self) -> Tensor:
        return torch.cat(self._pieces) if self._pieces else torch.empty(0)


@contextmanager
def _sampling(
    quantizers: Mapping[str, ActQuantizer], names: Iterable[str], seed: int
) -> Iterator[dict[str, _Sample]]:
    samples = {name: _Sample(seed + index) for index, name in enumerate(names)}
    try:
        for name, sample in samples.items():
            quantizers[name].observe(sample)
        yield samples
    finally:
        for name in samples:
            quantizers[name].observe(None)


def fit_ranges(
    quantizers: Mapping[str, ActQuantizer],
    state: CalibratedState,
    widths: Iterable[int],
    run: Callable[[], object],
    seed: int = 0,
) -> Ranges:
    """Fit a range for each width and quantizer.

    Args:
        quantizers: what `Backend.install` returned; they stay at the bits they have.
        state: the base that is installed.
        widths: the widths of the menu; the base's own and 32 need no range and are passed over.
        run: generates calibration pictures with the installed model, with guidance if it will be used.
        seed: for the choice of the values that are looked at.

    Raises:
        BitsError: a quantizer saw nothing, or only one value, while `run` ran.
    """
    with _sampling(quantizers, state.activations, seed) as samples:
        run()
    fitted: dict[str, dict[int, ActGrid]] = {}
    for name, base in progress(state.activations.items(), "fitting ranges"):
        sample = samples[name]
        wanted = [width for width in widths if width not in (base.bits, FULL_PRECISION)]
        if wanted and not sample.low < sample.high:
            raise BitsError(f"{name}: saw no two different values while the calibration ran")
        fitted[name] = {width: _best_grid(sample, base, width) for width in wanted}
    return Ranges(fitted=fitted, fingerprint=state.fingerprint)


def _best_grid(sample: _Sample, base: ActGrid, bits: int) -> ActGrid:
    """The range with the least squared error: both extremes shrunk alike, or the calibrated one."""
    values = sample.values()
    candidates = [base.at_width(bits)]
    for step in range(_SHRINKS):
        shrink = 1 - step / _SHRINKS
        candidates.append(ActGrid.over(bits, sample.low * shrink, sample.high * shrink))
    errors = torch.stack([_squared_error(values, grid) for grid in candidates])
    return candidates[int(errors.argmin())]


def _squared_error(values: Tensor, grid: ActGrid) -> Tensor:
    low, high = torch.tensor(float(grid.low_code)), torch.tensor(float(grid.high_code))
    quantized = fake_quantize(
        values, torch.tensor(grid.scale), torch.tensor(float(grid.zero_point)), low, high
    )
    return (quantized - values).double().square().mean()
