"""The state of a training that can be interrupted: one file, written whole every few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..artefacts import read_tensors, write_tensors
from ..errors import ArtefactError
from ..work import WorkFolder

VERSION = 1
_NAME = "state.safetensors"
_KIND = "qlip-plugins training state"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU's generator, started from `seed`; others' draws go on afterwards as if nothing was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def save_state(work: WorkFolder, tensors: Mapping[str, Tensor], **facts: Any) -> None:
    """Keep the state of a training; it replaces an earlier one, whole or not at all."""
    write_tensors(work.file(_NAME), _KIND, VERSION, tensors, **facts)


def load_state(work: WorkFolder | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts of `save_state`; None where there are none yet.

    Raises:
        ArtefactError: the file is damaged.
    """
    if work is None or not work.file(_NAME).exists():
        return None
    return read_tensors(work.file(_NAME), _KIND, VERSION)


@contextmanager
def restoring(work: WorkFolder) -> Iterator[None]:
    """Restore what `load_state` gave within the block.

    Raises:
        ArtefactError: it is not such a state.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{work.file(_NAME)}: no state of this training ({error}); remove {work.path} to begin again"
        ) from None


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with a prefix to their names, as they are now."""
    return {f"{prefix}.{name}": tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those with a prefix, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers: `NUMBER.NAME` of each parameter."""
    remembered = optimiser.state_dict()["state"]
    return {
        f"{number}.{name}": tensor for number, values in remembered.items() for name, tensor in values.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave; settings stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
