"""What one unit reads in the quantized model and gives in the float one, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import DenoiserInputs

_DEVICE_SHARE = 0.25
"""Part of the free device memory that a unit's samples may take; beyond, they stay on the CPU."""


@dataclass(frozen=True)
class UnitSamples:
    """The calls of one unit.

    Args:
        tensors: argument, by place or by name -> `(S, ...)`.
        constants: the arguments that are no tensors.
        target: what the float unit gives, `(S, ...)`.
        device: where the unit computes.
        batch: samples of a training batch.
    """

    tensors: dict[int | str, Tensor]
    constants: dict[int | str, Any]
    target: Tensor
    device: torch.device
    batch: int

    def __len__(self) -> int:
        return len(self.target)

    def pick(self, rows: Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Positional and keyword arguments and the target of some samples."""
        values = self.constants | {key: self._on_device(t, rows) for key, t in self.tensors.items()}
        args = [values[place] for place in sorted(key for key in values if isinstance(key, int))]
        kwargs = {name: value for name, value in values.items() if isinstance(name, str)}
        return tuple(args), kwargs, self._on_device(self.target, rows)

    def _on_device(self, tensor: Tensor, rows: Tensor | slice) -> Tensor:
        if isinstance(rows, Tensor) and rows.device != tensor.device:
            rows = rows.to(tensor.device)
        return tensor[rows].to(self.device)

    def batches(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
        """Every sample once, in order, in batches for evaluation."""
        for start in range(0, len(self), self.batch):
            yield self.pick(slice(start, start + self.batch))

    def some(self, count: int) -> Tensor:
        """Rows of up to `count` samples, evenly apart."""
        return torch.linspace(0, len(self) - 1, min(count, len(self)), device=self.target.device).long()

    def order(self, iterations: int, seed: int) -> Tensor:
        """Random rows of each iteration, `(iterations, batch)`, where the samples are."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self), (iterations, min(self.batch, len(self))), generator=generator)
        return rows.to(self.target.device)

    @torch.no_grad()
    def error(self, unit: nn.Module) -> float:
        """Squared error of the unit's output over the energy of its target."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for args, kwargs, target in self.batches():
            total += (joined(unit(*args, **kwargs)) - target).double().square().sum()
        return float(total) / self.energy / self.target.numel()

    @cached_property
    def energy(self) -> float:
        """Mean square of the target."""
        norm = float(torch.linalg.vector_norm(self.target, dtype=torch.float64))
        return max(norm**2 / self.target.numel(), 1e-30)

    def loss(self, found: Tensor, target: Tensor, error: float) -> Tensor:
        """Squared error of some rows, `()`, in units of the unit's `error` at the start: about 1 there."""
        return (found - target).square().mean() / (max(error, 1e-12) * self.energy)


def joined(output: Any) -> Tensor:
    """A unit's output as one tensor; where text and image come apart, the tokens of one after the other's."""
    return output if isinstance(output, Tensor) else torch.cat(tuple(output), dim=1)


class _Reached(Exception):  # noqa: N818 (no error: the unit has been reached)
    pass


@torch.no_grad()
def gather(
    name: str, denoiser: nn.Module, quantized: nn.Module, inputs: DenoiserInputs, batch: int
) -> UnitSamples:
    """Run both models as far as a unit, batch by batch.

    Args:
        name: the unit's module path.
        denoiser: the float model; its unit's output is the target.
        quantized: the model whose units before this one are quantized; it gives the unit's input.
        inputs: of the denoiser.
        batch: samples of a training batch.
    """
    device = next(denoiser.parameters()).device
    place: torch.device | None = None
    tensors: dict[int | str, list[Tensor]] = {}
    constants: dict[int | str, Any] = {}
    targets: list[Tensor] = []
    for call in inputs.calls(batch, device):
        target = _output(name, denoiser, call)
        arguments = _arguments(name, quantized, call)
        found = [value for value in arguments.values() if isinstance(value, Tensor)]
        if place is None:
            share = sum(t.numel() * t.element_size() for t in (*found, target)) / len(target)
            place = _place(device, share * len(inputs))
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                tensors.setdefault(key, []).append(value.to(place))
            else:
                constants[key] = value
        targets.append(target.to(place))
    joined = {key: torch.cat(pieces) for key, pieces in tensors.items()}
    return UnitSamples(joined, constants, torch.cat(targets), device, batch)


def _place(device: torch.device, needed: float) -> torch.device:
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if needed <= _DEVICE_SHARE * free else torch.device("cpu")


def _output(name: str, model: nn.Module, call: dict[str, Any]) -> Tensor:
    caught: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(joined(output))
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(hook)
    with _until_reached(handle):
        model(**call)
    return caught[0]


def _arguments(name: str, model: nn.Module, call: dict[str, Any]) -> dict[int | str, Any]:
    caught: dict[int | str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(enumerate(args))
        caught.update(kwargs)
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    with _until_reached(handle):
        model(**call)
    return caught


@contextmanager
def _until_reached(handle: Any) -> Iterator[None]:
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()
