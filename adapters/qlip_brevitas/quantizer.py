"""How brevitas rounds at a chosen width, and where it is told to.

Its `IntQuant` takes scale, zero point and width as tensors, with a value for each row if need be. What is chosen
goes into these; brevitas's own width and range are never written to, so that they are there when the model is saved,
and a state dict that rebuilds its quantizers takes nothing of ours away: they are looked up at each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlip_torch.framework import FrameworkActQuantizer


class BrevitasActQuantizer(FrameworkActQuantizer):
    """An activation quantizer whose rounding is brevitas's; its host is a `FusedActivationQuantProxy`."""

    def _quantized(self, x: Tensor, widths: tuple[int, ...]) -> Tensor:
        if self._own and widths == (self.base_bits,):
            own: Tensor = self._host(x)[0]
            return own
        table = self._table(widths, x)
        scale, zero_point, low_code, high_code = table.values
        int_quant = self._host.tensor_quant.int_quant
        codes = high_code - low_code + 1
        bits = codes.log2().ceil()
        # A signed quantizer has its codes around 0, and may leave out the lowest: ours are moved there.
        lowest = 2 ** (bits - 1) - codes if int_quant.signed else torch.zeros_like(bits)
        out: Tensor = int_quant(scale, zero_point - low_code + lowest, bits, x.float()).to(x.dtype)
        return out if table.kept is None else torch.where(table.kept, x, out)


class Choose:
    """A proxy's forward hook: our choice in place of its output. A copy of the model gets one of its own."""

    def __init__(self, quantizer: BrevitasActQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, proxy: Any, args: tuple[Any, ...], out: Any) -> Tensor:
        """Quantize what the proxy was given."""
        return self.quantizer.run(args[0], proxy.fused_activation_quant_proxy)
