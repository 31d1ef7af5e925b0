"""Writing files and folders whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtefactError


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well.

    Raises:
        ArtefactError: the file cannot be written; what stood at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files for their owner alone
        temporary.replace(path)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: Path, kind: str, marker: str, *owned: str) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends well.

    An older folder there is replaced if it is one of ours and holds nothing else.

    Args:
        path: the folder to write.
        kind: what the `format` entry of the marker says in a folder of ours.
        marker: JSON file that every folder of this kind holds.
        owned: patterns of the other files that it may hold.

    Raises:
        ArtefactError: `path` holds something else, or cannot be written.
    """
    path = path.resolve()
    check_replaceable(path, kind, marker, *owned)
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


def check_replaceable(path: Path, kind: str, marker: str, *owned: str) -> None:
    """Check that `folder_written_whole` may write there, without writing.

    Raises:
        ArtefactError: `path` holds something that was not written so.
    """
    if not path.exists():
        return
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    strange = [item.name for item in found if not any(item.match(pattern) for pattern in (marker, *owned))]
    if not strange and found and _format_of(path / marker) != kind:
        strange = [marker]
    if strange:
        raise ArtefactError(
            f"{path}: exists and holds {strange[0]!r}, which was not written by this command; name another folder"
        )


def _format_of(marker: Path) -> object:
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("format") if isinstance(content, dict) else None
