"""Calibration inputs: what a denoiser is called with while its own pipeline samples prompts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artefacts import read_tensors, write_tensors
from ..errors import ArtefactError, IncompatibleModelError
from ..families import Family, family_of
from ..generation import Settings, sample_model
from ..progress import progress
from ..recipe import ModelSection

FORMAT = "qlip-plugins calibration inputs"
VERSION = 1

_IGNORED = {"return_dict"}


@dataclass(frozen=True)
class DenoiserInputs:
    """Rows of denoiser calls, on the CPU.

    Args:
        tensors: argument name -> `(S, ...)`; a tensor inside a mapping is called `argument.key`.
        shared: argument name -> what all rows share.
    """

    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def call(self, rows: slice, device: torch.device) -> dict[str, Any]:
        """The keyword arguments of one call with some of the rows."""
        arguments: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.shared.items()}
        arguments["return_dict"] = False
        for name, tensor in self.tensors.items():
            argument, _, key = name.partition(".")
            value = tensor[rows].to(device)
            if key:
                arguments.setdefault(argument, {})[key] = value
            else:
                arguments[argument] = value
        return arguments

    def calls(self, batch: int, device: torch.device) -> Iterator[dict[str, Any]]:
        """Every row once, `batch` to a call."""
        for start in range(0, len(self), batch):
            yield self.call(slice(start, start + batch), device)

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        write_tensors(path, FORMAT, VERSION, {**self.tensors, **self.shared}, shared=sorted(self.shared))

    @classmethod
    def load(cls, path: Path) -> DenoiserInputs:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, damaged, or of another kind.
        """
        tensors, facts = read_tensors(path, FORMAT, VERSION)
        shared = {name: tensors.pop(name) for name in facts.get("shared", ()) if name in tensors}
        if len({len(tensor) for tensor in tensors.values()}) != 1:
            raise ArtefactError(f"{path}: its tensors are no rows of denoiser calls; remove it and run again")
        return cls(tensors, shared)


def collect(
    pipe: Any, model: ModelSection, prompts: Sequence[str], settings: Settings, rows: int, batch: int
) -> DenoiserInputs:
    """Sample `prompts` with the pipeline and keep up to `rows` rows of its denoiser's calls.

    Every k-th call of a prompt is kept, starting at another call from prompt to prompt, so that all
    timesteps are met equally often. Of a guided call both halves are kept.

    Args:
        pipe: a text-to-image pipeline of a known family, on its device.
        model: where prompts are encoded, or their embeddings come from.
        prompts: as many as `rows` allows are used, from the first.
        settings: steps, guidance and noise seed.
        rows: how many to keep at most.
        batch: rows of one denoiser call at most, while sampling.

    Raises:
        IncompatibleModelError: the denoiser takes arguments that have no rows.
    """
    family = family_of(pipe)
    halves = 2 if settings.guidance_scale > 1 and family.guidance == "halves" else 1
    used = list(prompts[: max(1, rows // halves)])
    chunk = max(1, batch // halves)
    catcher = _Catcher(pipe, len(used), max(1, rows // halves))
    with catcher.listening():
        for start in progress(range(0, len(used), chunk), "calibration inputs"):
            some = used[start : start + chunk]
            catcher.expect(start, len(some))
            sample_model(pipe, model, some, settings, "latent", before=used[:start])
    return DenoiserInputs(
        {name: torch.cat([call[name] for call in catcher.kept]) for name in catcher.kept[0]},
        catcher.shared,
    )


class _Catcher:
    """Keeps some rows of the calls of a pipeline's denoiser, on the CPU.

    Args:
        pipe: the pipeline.
        prompts: how many it will sample in all.
        wanted: how many calls to keep at most, those of one prompt counted singly.
    """

    def __init__(self, pipe: Any, prompts: int, wanted: int) -> None:
        self.kept: list[dict[str, Tensor]] = []
        self.shared: dict[str, Tensor] = {}
        self._family = family_of(pipe)
        self._pipe, self._prompts, self._wanted = pipe, prompts, wanted
        self._first = self._here = self._call = 0

    def expect(self, first: int, count: int) -> None:
        """Say that the next calls are for `count` prompts, the first of which is number `first`."""
        self._first, self._here, self._call = first, count, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        handle = self._family.denoiser_of(self._pipe).register_forward_pre_hook(self._catch, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found, self.shared = _rows_of(self._family, module, args, kwargs)
        every = stride(len(self._pipe.scheduler.timesteps), self._prompts, self._wanted)
        # The rows of a guided call: all prompts without, then all prompts with their text.
        chosen = [
            row
            for row in range(len(found[self._family.sample]))
            if (self._call + place(self._first + row % self._here, self._prompts, every)) % every == 0
        ]
        self._call += 1
        if chosen:
            self.kept.append({name: tensor[chosen].cpu() for name, tensor in found.items()})


def stride(calls: int, prompts: int, wanted: int) -> int:
    """The least k for which every k-th of `calls` calls, `prompts` times, is at most `wanted` calls.

    Prompt p takes the calls c for which c + `place` is a multiple of k.
    """
    every = max(1, math.ceil(calls * prompts / wanted))
    while _taken(calls, prompts, every) > wanted:
        every += 1
    return every


def place(prompt: int, prompts: int, every: int) -> int:
    """Where among `every` calls a prompt starts: one after the other, or, with fewer prompts, evenly apart."""
    return prompt if prompts >= every else prompt * every // prompts


def _taken(calls: int, prompts: int, every: int) -> int:
    starts = (-place(prompt, prompts, every) % every for prompt in range(prompts))
    return sum(len(range(start, calls, every)) for start in starts)


def _rows_of(
    family: Family, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The arguments of a call that have a row for each sample, and those that all share."""
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    count = len(arguments[family.sample])
    shared = {name: arguments[name].detach().cpu() for name in family.shared if name in arguments}
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif value is not None and name not in (*_IGNORED, *shared):
            flat[name] = value
    found: dict[str, Tensor] = {}
    for name, value in flat.items():
        tensor = torch.as_tensor(value) if name == "timestep" else value
        if not isinstance(tensor, Tensor):
            raise IncompatibleModelError(
                f"{type(module).__name__} is called with {name}={value!r}, calibration needs a tensor with a row "
                "for each sample: use the pipeline without that option"
            )
        if tensor.ndim == 0 or (name == "timestep" and len(tensor) == 1):
            tensor = tensor.reshape(1).expand(count)
        if len(tensor) != count:
            raise IncompatibleModelError(
                f"{type(module).__name__} is called with {name} of shape {tuple(tensor.shape)} for {count} rows"
            )
        found[name] = tensor.detach()
    return found, shared
