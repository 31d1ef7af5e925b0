"""Writing files and folders whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtefactError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well.

    Raises:
        ArtefactError: the file cannot be written; what stood at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path, marker: str) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends well.

    An older folder at `path` is replaced only if it holds `marker`, a file that shows it is ours.

    Raises:
        ArtefactError: `path` holds something else, or cannot be written.
    """
    if path.exists() and not ((path / marker).is_file() or (path.is_dir() and not any(path.iterdir()))):
        raise ArtefactError(f"{path}: exists and was not written by this command (no {marker}); name another")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
