"""Activation quantizers of one unit: a first grid, then steps learned on the unit's output.

Sources: LSQ (Esser et al., ICLR 2020, arXiv 1902.08153) for the gradient of the step, Q-Diffusion
(Li et al., ICCV 2023, arXiv 2302.04304) for what is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import QuantizedAttnProcessor
from ..errors import IncompatibleModelError
from ..grids import ActGrid
from ..quantizer import fake_quantize_with_step
from ..state import OPERANDS, SPLIT_SUFFIX
from .gathering import UnitSamples, joined
from .grid_search import range_grid, search_grid
from .schemes import LayerSpec, Start
from .units import Unit

_RATE = 1e-2
_SEARCHED = 16
_MOMENTUM = 0.95


@dataclass
class ActStep:
    """One activation quantizer during calibration; called with what it quantizes.

    Args:
        name: as in `CalibratedState.activations`.
        bits: its width.
        from_zero: whether it sees nothing below 0 and has its zero point there, as a softmax has.
        scale: step, `()`; unset, the quantizer passes values through and watches them.
        zero_point: code of 0.0, `()`.
    """

    name: str
    bits: int
    from_zero: bool
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    _last: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize `x` of any shape, or watch it."""
        if self.scale is None or self.zero_point is None:
            self._last = x.detach().float()
            return x
        return fake_quantize_with_step(x, self.scale, self.zero_point, 2**self.bits - 1)

    def seen(self) -> Tensor:
        """What it watched in the last call; asked for once.

        Raises:
            IncompatibleModelError: it was not called.
        """
        seen, self._last = self._last, None
        if seen is None:
            raise IncompatibleModelError(f"{self.name}: its quantizer sees nothing in a call of its unit")
        return seen

    def place(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a grid."""
        self.scale, self.zero_point = scale, zero_point

    def grid(self) -> ActGrid:
        """The grid as it stands."""
        assert self.scale is not None
        assert self.zero_point is not None
        return ActGrid.asymmetric(self.bits, float(self.scale), int(self.zero_point))

    def take(self, grid: ActGrid, device: torch.device) -> None:
        """Take a grid found earlier."""
        self.place(
            torch.tensor(grid.scale, device=device), torch.tensor(float(grid.zero_point), device=device)
        )


class _QuantizeInput:
    def __init__(self, steps: tuple[ActStep, ...], spec: LayerSpec) -> None:
        self.steps, self.spec = steps, spec

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        if self.spec.split is None:
            return (self.steps[0](x), *args[1:])
        channels = 1 if isinstance(module, nn.Conv2d) else -1
        parts = x.split((self.spec.split, x.shape[channels] - self.spec.split), dim=channels)
        return (
            torch.cat([step(part) for step, part in zip(self.steps, parts, strict=True)], channels),
            *args[1:],
        )


class UnitActivations:
    """The activation quantizers of a unit, put on its module in the quantized model, in place."""

    def __init__(self, unit: Unit, model: nn.Module, bits: int, softmax_bits: int | None) -> None:
        """Put them on.

        Args:
            unit: whose they are.
            model: the quantized model.
            bits: of layers without a width of their own, and of attention's q, k and v.
            softmax_bits: of attention weights; None puts no quantizers on attentions.
        """
        self._undo: list[Any] = []
        self.steps: list[ActStep] = []
        for spec in unit.layers:
            names = (spec.name,) if spec.split is None else (spec.name, spec.name + SPLIT_SUFFIX)
            width = spec.activation_bits(bits)
            steps = tuple(ActStep(name, width, from_zero=False) for name in names)
            handle = model.get_submodule(spec.name).register_forward_pre_hook(_QuantizeInput(steps, spec))
            self._undo.append(handle.remove)
            self.steps += steps
        if softmax_bits is not None:
            for path in unit.attentions:
                self._add_attention(model, path, bits, softmax_bits)

    def _add_attention(self, model: nn.Module, path: str, bits: int, softmax_bits: int) -> None:
        operands = {
            name: ActStep(f"{path}.{name}", softmax_bits if name == "softmax" else bits, name == "softmax")
            for name in OPERANDS
        }
        attention: Any = model.get_submodule(path)
        original = attention.processor
        attention.set_processor(QuantizedAttnProcessor(**operands))
        self._undo.append(lambda: attention.set_processor(original))
        self.steps += operands.values()

    def remove(self) -> None:
        """Take them off again."""
        while self._undo:
            self._undo.pop()()

    def grids(self) -> dict[str, ActGrid]:
        """The grids as they stand, by quantizer."""
        return {step.name: step.grid() for step in self.steps}

    def take(self, grids: Mapping[str, ActGrid], device: torch.device) -> None:
        """Take grids found earlier, by quantizer."""
        for step in self.steps:
            step.take(grids[step.name], device)


@torch.no_grad()
def start_grids(activations: UnitActivations, module: nn.Module, samples: UnitSamples, start: Start) -> None:
    """Give every quantizer of a unit its first grid, from what it sees while the unit runs in floating point.

    Args:
        activations: of the unit, without grids.
        module: the unit's module in the quantized model.
        samples: its inputs.
        start: `running`: over the running mean of each batch's extremes, of all samples; `mse`: with the
            least error on all values of a few samples.

    Raises:
        IncompatibleModelError: a quantizer sees nothing.
    """
    batches = samples.batches() if start == "running" else [samples.pick(samples.some(_SEARCHED))]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {step.name: [] for step in activations.steps}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for args, kwargs, _ in batches:
        module(*args, **kwargs)
        for step in activations.steps:
            x = step.seen()
            low, high = x.min(), x.max()
            seen[step.name].append((torch.zeros_like(low) if step.from_zero else low, high))
            if start == "mse":
                found[step.name] = _searched(step, x, *seen[step.name][-1])
    for step in activations.steps:
        if start == "running":
            lows, highs = (_running_mean(list(ends)) for ends in zip(*seen[step.name], strict=True))
            found[step.name] = range_grid(lows, highs, step.bits)
        step.place(*found[step.name])


def _searched(step: ActStep, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    scale, zero_point = search_grid(x.flatten()[None], low[None], high[None], step.bits)
    return scale[0], zero_point[0]


def _running_mean(values: list[Tensor]) -> Tensor:
    mean = values[0]
    for value in values[1:]:
        mean = _MOMENTUM * mean + (1 - _MOMENTUM) * value
    return mean


def learn_steps(
    activations: UnitActivations,
    module: nn.Module,
    samples: UnitSamples,
    error: float,
    iterations: int,
    seed: int,
) -> None:
    """Train the steps of a unit so that its output is kept; zero points stay.

    What is trained is the logarithm of the step, so a step keeps its sign and moves in proportion to
    itself, whatever its width.

    Args:
        activations: of the unit, with their first grids.
        module: the unit's module in the quantized model.
        samples: its inputs and targets.
        error: of the unit with the first grids.
        iterations: of Adam, under a cosine.
        seed: of the batches.
    """
    steps = activations.steps
    first = torch.stack([step.scale for step in steps if step.scale is not None])
    change = torch.zeros_like(first).requires_grad_()
    adam = torch.optim.Adam([change], lr=_RATE)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, iterations))
    order = samples.order(iterations, seed)
    for iteration in range(iterations):
        args, kwargs, target = samples.pick(order[iteration])
        for step, scale in zip(steps, (first * change.exp()).unbind(), strict=True):
            step.scale = scale
        loss = samples.loss(joined(module(*args, **kwargs)), target, error)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        cosine.step()
    for step, scale in zip(steps, (first * change.detach().exp()).unbind(), strict=True):
        step.scale = scale


@contextmanager
def removed_after(quantizers: list[UnitActivations]) -> Iterator[None]:
    """Take every quantizer in the list off its model when the block ends, however it ends."""
    try:
        yield
    finally:
        for activations in reversed(quantizers):
            activations.remove()
