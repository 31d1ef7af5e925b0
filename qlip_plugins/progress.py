from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar, cast

T = TypeVar("T")

_LOG_EVERY = 60
"""Seconds between two lines where no terminal shows a bar, such as in a log file."""

_CURSOR_UP = "\x1b[A"
"""What a bar below another one writes."""


def wanted() -> bool:
    """Whether progress bars are drawn: on a terminal, and not in CI."""
    return sys.stderr.isatty() and not os.environ.get("CI")


def progress(items: Iterable[T], what: str) -> Iterable[T]:
    """`items`, with a bar on the error stream; a line a minute where that is no terminal, nothing in CI."""
    if os.environ.get("CI") or _is_helper():
        return items
    return cast("Iterable[T]", _bar(what, iterable=items))


@contextmanager
def counted(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """The same over `total` pieces of work; call what it gives as each is done.

    The text of the last piece stands beside the bar.
    """
    if os.environ.get("CI") or not total:
        yield lambda text: None
        return
    with _bar(what, total=total) as bar:

        def done(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield done


def _is_helper() -> bool:
    """Whether a launcher started this process beside a main one, which does the talking."""
    return os.environ.get("RANK", "0") != "0"


class _Lines:
    """Takes what a bar writes over itself, and gives it to a stream as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.replace(_CURSOR_UP, "").strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def _bar(what: str, **over: Any) -> Any:
    from tqdm import tqdm

    if wanted():
        return tqdm(desc=what, leave=False, **over)
    return tqdm(
        desc=what,
        file=_Lines(sys.stderr),
        mininterval=_LOG_EVERY,
        maxinterval=_LOG_EVERY,
        delay=_LOG_EVERY,
        ncols=100,
        **over,
    )
