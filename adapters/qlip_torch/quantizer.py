from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlip_plugins.errors import BitsError
from qlip_plugins.grids import ActGrid, GridChoice, Ranges
from qlip_plugins.quantizer import fake_quantize, one_hot_straight_through

_UNTOUCHED = ActGrid.asymmetric(2, 1.0, 0)
"""Stands in the table for a row at 32 bits, whose values are taken from the input instead."""

_CACHE_ENTRIES = 256


@dataclass(frozen=True)
class _Mixture:
    widths: tuple[int, ...]
    probabilities: Tensor


@dataclass(frozen=True)
class _Table:
    """The grids of a selection as tensors that broadcast to the input; `kept` marks untouched rows."""

    values: tuple[Tensor, Tensor, Tensor, Tensor]
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
        if isinstance(bits, Tensor):
            if bits.ndim > 1 or bits.numel() == 0 or bits.is_floating_point():
                raise BitsError(
                    f"{self.name}: bits must be an integer or an integer tensor of shape (N,), found "
                    f"{bits.dtype} of shape {tuple(bits.shape)}"
                )
            widths = tuple(int(width) for width in bits.reshape(-1).tolist())
        else:
            widths = (int(bits),)
        for width in set(widths):
            self._grids.grid(width)
        self._selected = widths[:1] if len(set(widths)) == 1 and _is_scalar(bits) else widths

    def set_mixture(self, widths: tuple[int, ...], probabilities: Tensor) -> None:
        """See `ActQuantizer.set_mixture`."""
        for width in widths:
            self._grids.grid(width)
        if probabilities.ndim not in (1, 2) or probabilities.shape[-1] != len(widths):
            raise BitsError(
                f"{self.name}: probabilities of shape {tuple(probabilities.shape)} for {len(widths)} widths, "
                f"expected ({len(widths)},) or (N, {len(widths)})"
            )
        self._selected = _Mixture(tuple(widths), probabilities)

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
        table = self._table(widths, x)
        out = fake_quantize(x, *table.values)
        if table.kept is not None:
            out = torch.where(table.kept, x, out)
        self._judge(widths, x, out)
        return out

    def _mixed(self, x: Tensor, mixture: _Mixture) -> Tensor:
        choice = one_hot_straight_through(mixture.probabilities)
        rows = choice.reshape(-1, len(mixture.widths), *[1] * (x.ndim - 1))
        if rows.shape[0] not in (1, x.shape[0]):
            raise BitsError(
                f"{self.name}: a mixture was set for {rows.shape[0]} rows, the batch has {x.shape[0]}"
            )
        total = torch.zeros_like(x)
        for index, width in enumerate(mixture.widths):
            total = total + rows[:, index] * self._hard(x, (width,))
        return total.to(x.dtype)

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
                self._grids.judge(width, x[rows], out[rows])


def _is_scalar(bits: int | Tensor) -> bool:
    return not isinstance(bits, Tensor) or bits.numel() == 1
