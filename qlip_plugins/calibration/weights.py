"""Weights: a grid for each output channel or for a layer, then AdaRound of a unit's layers together.

Sources: AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568), BRECQ (Li et al., ICLR 2021,
arXiv 2102.05426), Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..state import CalibratedLayer, WeightPart
from .gathering import UnitSamples, joined
from .grid_search import search_grid
from .schemes import LayerSpec
from .units import Unit

GAMMA, ZETA = -0.1, 1.1
_TRAVEL = 20.0
"""Rate times iterations, as in BRECQ (1e-3 x 20,000): how far alpha can come, whatever the iterations."""

_MAX_RATE = 0.1
_PULL = 300.0
"""Weight of the mean rounding regulariser against the relative error: decides every rounding in time."""

_WARM_UP = 0.2
_BETA = (20.0, 2.0)


@dataclass(frozen=True)
class WeightGrid:
    """Where a layer's weight can be rounded to; every tensor is as large as the weight.

    Args:
        spec: the layer.
        floor: `floor(weight / scale)`.
        fraction: `weight / scale - floor`, 0..1.
        scale: step.
        zero_point: code of 0.0.
    """

    spec: LayerSpec
    floor: Tensor
    fraction: Tensor
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def found(cls, spec: LayerSpec, weight: Tensor) -> WeightGrid:
        """Search the grid of each output channel, or of the layer, and of each part of a split input."""
        per_channel = (-1, *[1] * (weight.ndim - 1))
        scales, zeros = [], []
        for part in _parts(weight, spec.split):
            rows = part.reshape(1, -1) if spec.per_tensor else part.flatten(1)
            scale, zero = search_grid(rows, rows.amin(1), rows.amax(1), spec.bits)
            scales.append(scale.reshape(per_channel).expand(part.shape))
            zeros.append(zero.reshape(per_channel).expand(part.shape))
        scale, zero = torch.cat(scales, 1), torch.cat(zeros, 1)
        floor = (weight / scale).floor()
        return cls(spec, floor, weight / scale - floor, scale, zero)

    def nearest(self) -> Tensor:
        """Whether each value is rounded up by rounding to nearest, half to even."""
        return (self.floor + self.fraction).round() > self.floor

    def layer(self, up: Tensor) -> CalibratedLayer:
        """The layer's codes when the values marked `up` are rounded up and the others down, on the CPU."""
        codes = (self.floor + up.float() + self.zero_point).clamp(0, 2**self.spec.bits - 1)
        split = self.spec.split
        columns = zip(*(_parts(t, split) for t in (codes, self.scale, self.zero_point)), strict=True)
        return CalibratedLayer(
            tuple(
                WeightPart(
                    codes=part.to(torch.uint8).cpu().contiguous(),
                    scale=_channel(scale),
                    zero_point=_channel(zero),
                    bits=self.spec.bits,
                )
                for part, scale, zero in columns
            )
        )


def _parts(tensor: Tensor, split: int | None) -> tuple[Tensor, ...]:
    return (tensor,) if split is None else tensor.split((split, tensor.shape[1] - split), dim=1)


def _channel(tensor: Tensor) -> Tensor:
    """One value an output channel, `(O, 1)` or `(O, 1, 1, 1)`."""
    return tensor.flatten(1)[:, 0].reshape(-1, *[1] * (tensor.ndim - 1)).cpu().clone()


def soft_rounding(alpha: Tensor) -> Tensor:
    """AdaRound's h, 0..1: how far each value is rounded up; 0.5 at `alpha` 0. Any shape."""
    return (alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def start_alpha(fraction: Tensor) -> Tensor:
    """The alpha whose soft rounding leaves a value where it is. `fraction` is 0..1, any shape."""
    return -((ZETA - GAMMA) / (fraction - GAMMA) - 1).log()


def bake(model: nn.Module, layers: Mapping[str, CalibratedLayer]) -> None:
    """Put quantized weights into a model, in place."""
    with torch.no_grad():
        for name, layer in layers.items():
            weight: Any = model.get_submodule(name).weight
            weight.copy_(layer.dequantized())


def find_grids(unit: Unit, denoiser: nn.Module) -> list[WeightGrid]:
    """The grids of a unit's layers, searched on the float model's weights."""
    weights: list[Any] = [denoiser.get_submodule(spec.name).weight for spec in unit.layers]
    return [
        WeightGrid.found(spec, weight.detach().float())
        for spec, weight in zip(unit.layers, weights, strict=True)
    ]


def learn_rounding(
    unit: Unit,
    module: nn.Module,
    grids: Sequence[WeightGrid],
    samples: UnitSamples,
    error: float,
    iterations: int,
    seed: int,
) -> list[Tensor]:
    """Choose for every weight of a unit whether it is rounded up, so that the unit's output is kept.

    Args:
        unit: what is reconstructed.
        module: its module in the quantized model.
        grids: of those of its layers whose rounding is learned; the others keep the weights they have.
        samples: its inputs and targets.
        error: of the unit when every weight is rounded to nearest.
        iterations: of Adam.
        seed: of the batches.

    Returns:
        For each grid a boolean tensor of its weight's shape.
    """
    rounding = _UnitRounding(unit, grids)
    adam = torch.optim.Adam([rounding.alpha], lr=min(_MAX_RATE, _TRAVEL / max(1, iterations)))
    order = samples.order(iterations, seed)
    for iteration in range(iterations):
        args, kwargs, target = samples.pick(order[iteration])
        soft = soft_rounding(rounding.alpha)
        found = joined(functional_call(module, rounding.weights(soft), args, kwargs, tie_weights=False))
        loss = samples.loss(found, target, error)
        done = (iteration / iterations - _WARM_UP) / (1 - _WARM_UP)
        if done >= 0:
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - done)
            loss = loss + _PULL * (1 - (2 * soft - 1).abs().pow(beta)).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
    return rounding.up()


class _UnitRounding:
    """The rounding of all layers of a unit, as one vector: few operations an iteration."""

    def __init__(self, unit: Unit, grids: Sequence[WeightGrid]) -> None:
        self._shapes = [grid.floor.shape for grid in grids]
        prefix = len(unit.name) + 1
        self._names = [f"{grid.spec.name}.weight"[prefix:] for grid in grids]
        self._floor = _flat(grid.floor for grid in grids)
        self._scale = _flat(grid.scale for grid in grids)
        self._zero_point = _flat(grid.zero_point for grid in grids)
        self._top = _flat(torch.full_like(grid.floor, 2**grid.spec.bits - 1) for grid in grids)
        self.alpha = start_alpha(_flat(grid.fraction for grid in grids)).requires_grad_()

    def weights(self, soft: Tensor) -> dict[str, Tensor]:
        codes = torch.minimum((self._floor + soft + self._zero_point).clamp(min=0), self._top)
        flat = (codes - self._zero_point) * self._scale
        return dict(zip(self._names, self._split(flat), strict=True))

    def up(self) -> list[Tensor]:
        return [piece.detach() >= 0 for piece in self._split(self.alpha)]

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([shape.numel() for shape in self._shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
