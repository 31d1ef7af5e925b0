from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def wanted() -> bool:
    """Whether progress bars are drawn: on a terminal, and not in CI."""
    return sys.stderr.isatty() and not os.environ.get("CI")


def progress(items: Iterable[T], what: str) -> Iterable[T]:
    """`items`, with a bar on the error stream where someone is watching."""
    if not wanted():
        return items
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, desc=what, leave=False)
    return bar
