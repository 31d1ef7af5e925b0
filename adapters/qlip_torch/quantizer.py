from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from qlip_plugins.errors import BitsError
from qlip_plugins.grids import ActGrid, GridChoice, Ranges
from qlip_plugins.quantizer import GridTable, choose_widths, fake_quantize

_UNTOUCHED = ActGrid.asymmetric(2, 1.0, 0)
"""Stands in the table for a row at 32 bits, whose values are taken from the input instead."""

_CACHE_ENTRIES = 256


@dataclass(frozen=True)
class _Mixture:
    widths: tuple[int, ...]
    probabilities: Tensor
    chosen: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, object]) -> _Mixture:
        # A copy of the model is no part of the graph that trains the original.
        return _Mixture(self.widths, self.probabilities.detach().clone(), self.chosen)


@dataclass(frozen=True)
class _Table:
    """The grids of a selection as tensors that broadcast to the input; `kept` marks untouched rows."""

    values: GridTable
    kept: Tensor | None


class TorchActQuantizer:
    """One activation quantizer; see `qlip_plugins.adapter.ActQuantizer`."""

    def __init__(self, name: str, base: ActGrid, ranges: Ranges) -> None:
        self.name = name
        self.base_bits = base.bits
        self._grids = GridChoice(name, base, ranges)
        self._selected: tuple[int, ...] | _Mixture = (base.bits,)
        self._observer: Callable[[Tensor], None] | None = None
        self._tables: dict[tuple[tuple[int, ...], torch.device, int], _Table] = {}

    def set_bits(self, bits: int | Tensor) -> None:
        """See `ActQuantizer.set_bits`."""
        widths = self._widths_of(bits)
        for width in set(widths):
            self._grids.grid(width)
        self._selected = widths

    def _widths_of(self, bits: int | Tensor) -> tuple[int, ...]:
        if isinstance(bits, Tensor) and bits.ndim < 2 and bits.numel() and not bits.is_floating_point():
            return tuple(int(width) for width in bits.reshape(-1).tolist())
        if not isinstance(bits, Tensor) and hasattr(bits, "__index__"):
            return (index(bits),)
        found = f"{bits.dtype} of shape {tuple(bits.shape)}" if isinstance(bits, Tensor) else repr(bits)
        raise BitsError(
            f"{self.name}: bits must be an integer or an integer tensor of shape (N,), found {found}"
        )

    def set_mixture(self, widths: tuple[int, ...], probabilities: Tensor, chosen: int | Tensor) -> None:
        """See `ActQuantizer.set_mixture`."""
        for width in widths:
            self._grids.grid(width)
        if probabilities.ndim not in (1, 2) or probabilities.shape[-1] != len(widths):
            raise BitsError(
                f"{self.name}: probabilities of shape {tuple(probabilities.shape)} for {len(widths)} widths, "
                f"expected ({len(widths)},) or (N, {len(widths)})"
            )
        running = self._widths_of(chosen)
        strange = sorted(set(running) - set(widths))
        if strange:
            raise BitsError(f"{self.name}: {strange[0]} bits are chosen, the mixture is of {widths}")
        self._selected = _Mixture(tuple(widths), probabilities, running)

    def observe(self, callback: Callable[[Tensor], None] | None) -> None:
        """See `ActQuantizer.observe`."""
        self._observer = callback

    def losses(self) -> Mapping[int, tuple[int, int, int]]:
        """See `ActQuantizer.losses`."""
        return self._grids.losses()

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize `x`, `(N, ...)`, at the selected widths."""
        if self._observer is not None:
            self._observer(x.detach())
        if isinstance(self._selected, _Mixture):
            return self._mixed(x, self._selected)
        return self._hard(x, self._selected)

    def _hard(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        if len(widths) not in (1, x.shape[0]):
            raise BitsError(
                f"{self.name}: bits were set for {len(widths)} rows, the batch has {x.shape[0]}. Set one width, "
                "or one for each row"
            )
        if all(self._grids.grid(width) is None for width in widths):
            return x
        out = self._quantized(x, widths)
        self._judge(widths, x, out)
        return out

    def _quantized(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        table = self._table(widths, x)
        out = fake_quantize(x, *table.values)
        return out if table.kept is None else torch.where(table.kept, x, out)

    def _mixed(self, x: Tensor, mixture: _Mixture) -> Tensor:
        probabilities = mixture.probabilities.reshape(-1, len(mixture.widths))
        if probabilities.shape[0] not in (1, x.shape[0]):
            raise BitsError(
                f"{self.name}: a mixture was set for {probabilities.shape[0]} rows, the batch has {x.shape[0]}"
            )
        with torch.no_grad():
            chosen = self._hard(x, mixture.chosen)
        # One axis more, for the widths.
        table = self._table(mixture.widths, x.unsqueeze(0))
        return choose_widths(chosen, x, probabilities, table.values, table.kept)

    def _table(self, widths: tuple[int, ...], x: Tensor) -> _Table:
        key = (widths, x.device, x.ndim)
        if key not in self._tables:
            if len(self._tables) >= _CACHE_ENTRIES:
                self._tables.clear()
            self._tables[key] = self._make_table(widths, x)
        return self._tables[key]

    def _make_table(self, widths: tuple[int, ...], x: Tensor) -> _Table:
        found = [self._grids.grid(width) for width in widths]
        grids = [grid or _UNTOUCHED for grid in found]
        shape = (-1, *[1] * (x.ndim - 1)) if len(widths) > 1 else ()

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=x.device).reshape(shape)

        values = (
            column([grid.scale for grid in grids]),
            column([grid.zero_point for grid in grids]),
            column([grid.low_code for grid in grids]),
            column([grid.high_code for grid in grids]),
        )
        if all(grid is not None for grid in found):
            return _Table(values, None)
        kept = torch.tensor([grid is None for grid in found], device=x.device).reshape(shape)
        return _Table(values, kept)

    def _judge(self, widths: tuple[int, ...], x: Tensor, out: Tensor) -> None:
        for width in sorted(set(widths)):
            if not self._grids.is_sound(width):
                rows = [i for i, w in enumerate(widths) if w == width] if len(widths) > 1 else slice(None)
                at_base = self._quantized(x[rows], (self.base_bits,))
                self._grids.judge(width, x[rows], out[rows], at_base)
