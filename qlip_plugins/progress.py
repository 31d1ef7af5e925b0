from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A bar over `total` pieces of work where someone is watching; call what it gives as each is done.

    The text of the last piece stands beside the bar.
    """
    if not wanted():
        yield lambda text: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, leave=False) as bar:

        def done(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield done
