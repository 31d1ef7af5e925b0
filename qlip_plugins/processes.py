"""The processes of one launch: `accelerate launch` starts several of a program, a plain start is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from .errors import INSTALL_HINT, HostError

# Processes wait for the slowest: work may go on for days.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """This process among those of its launch.

    Args:
        index: its number, from 0; process 0 is the main one.
        count: how many there are.
        device: its own device.
        wait: returns when every process has called it.
    """

    index: int
    count: int
    device: str
    wait: Callable[[], None]

    @property
    def main(self) -> bool:
        """Whether this is the process that talks, and writes results."""
        return self.index == 0


@contextmanager
def launched(device: str) -> Iterator[Processes]:
    """The processes of this launch.

    Args:
        device: where to compute; with several processes `cuda` becomes a GPU for each.

    Raises:
        HostError: several processes were launched, and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Processes(0, 1, device, lambda: None)
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise HostError(f"several processes need accelerate ({error}): {INSTALL_HINT}") from None
    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    own = f"{device}:{state.local_process_index}" if device == "cuda" else device
    try:
        yield Processes(state.process_index, state.num_processes, own, state.wait_for_everyone)
    finally:
        state.destroy_process_group()
