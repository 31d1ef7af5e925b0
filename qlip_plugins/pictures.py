"""Folders of pictures: references of quality metrics and of distances between sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import ArtefactError
from .files import file_digest

METADATA_NAME = "metadata.jsonl"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_OPAQUE_MODES = {"1", "L", "P", "RGB"}


class PictureFolder:
    """The pictures in a folder, by name, and what `metadata.jsonl` says of each.

    The layout is that of Hugging Face's *imagefolder*: `metadata.jsonl`, where there is one, holds a line
    `{"file_name": "0001.png", "concept": "fox", ...}` for every picture; all values are strings.

    Args:
        path: the folder; folders in it, and files of other kinds, are passed over.

    Attributes:
        names: of the N picture files, sorted.
        tags: name -> N strings.
        size: height and width of every picture.

    Raises:
        ArtefactError: no folder, no picture, a picture that is broken, see-through or of another size than
            the first, or metadata that do not fit the files.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ArtefactError(f"{path}: no such folder of pictures")
        self.path = path
        self.names = tuple(sorted(file.name for file in path.iterdir() if file.suffix.lower() in _SUFFIXES))
        if not self.names:
            raise ArtefactError(f"{path}: holds no picture, expected PNG, JPEG or WebP files directly in it")
        self.size = self._common_size()
        self.tags: Mapping[str, tuple[str, ...]] = _tags(path / METADATA_NAME, self.names)

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All pictures in order, `size` at a time (the last batch may be smaller): `(N, 3, H, W)`, 0..1.

        Raises:
            ArtefactError: one is broken.
        """
        for start in range(0, len(self), size):
            yield torch.stack([_decoded(self.path / name) for name in self.names[start : start + size]])

    def digest(self) -> str:
        """SHA-256 over the names and contents of the pictures; the metadata are not in it."""
        found = hashlib.sha256()
        for name in self.names:
            content = file_digest(self.path / name)
            found.update(f"{content}  {name}\n".encode())
        return found.hexdigest()

    def _common_size(self) -> tuple[int, int]:
        first = _size(self.path / self.names[0])
        for name in self.names[1:]:
            found = _size(self.path / name)
            if found != first:
                raise ArtefactError(
                    f"{self.path / name}: {_shown(found)} pixels, {self.names[0]} has {_shown(first)}: bring all "
                    "pictures of the folder to one size"
                )
        return first


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _size(path: Path) -> tuple[int, int]:
    """Height and width, from the file's head."""
    # PIL calls a broken PNG chunk a syntax error.
    try:
        with Image.open(path) as image:
            if image.mode not in _OPAQUE_MODES or image.has_transparency_data:
                clear = " with transparency" if image.has_transparency_data else ""
                raise ArtefactError(
                    f"{path}: a picture of mode {image.mode}{clear}, expected opaque grey or RGB of 8 bits: convert it"
                )
            return image.height, image.width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ArtefactError(f"{path}: no readable picture: {error}") from None


def _decoded(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ArtefactError(f"{path}: broken picture: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _tags(path: Path, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The tags of the pictures, in their order."""
    if not path.is_file():
        return {}
    known, rows = set(names), dict[str, dict[str, str]]()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _row(f"{path}, line {number}", line)
            name = row.pop("file_name")
            if name not in known:
                raise ArtefactError(f"{path}, line {number}: no picture {name!r} in the folder")
            if name in rows:
                raise ArtefactError(f"{path}, line {number}: {name!r} is described twice")
            rows[name] = row
    missing = [name for name in names if name not in rows]
    if missing:
        raise ArtefactError(f"{path}: says nothing of {missing[0]!r} ({len(missing)} such pictures)")
    keys = rows[names[0]]
    for name, row in rows.items():
        if set(row) != set(keys):
            odd = ", ".join(sorted(set(row) ^ set(keys)))
            raise ArtefactError(f"{path}: {name!r} has other keys than {names[0]!r}: {odd}")
    return {key: tuple(rows[name][key] for name in names) for key in keys}


def _row(where: str, line: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ArtefactError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ArtefactError(f'{where}: expected an object with "file_name", such as {{"file_name": "1.png"}}')
    odd = [name for name, value in row.items() if not isinstance(value, str)]
    if odd:
        raise ArtefactError(f"{where}: {odd[0]!r} is {row[odd[0]]!r}, expected a string")
    return row
