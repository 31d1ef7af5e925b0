"""The work folder: what an interrupted piece of long work has finished."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .artefacts import versions
from .errors import ArtefactError, RecipeError
from .families import denoiser_of
from .files import file_digest, written_whole
from .recipe import ModelSection

_IDENTITY = "work.json"
_SHOWN = 3
"""Differences that a message names."""


class WorkFolder:
    """Finished parts of one piece of work, each a file written whole; removed when all is done.

    Args:
        path: the folder.
        what: the work, in a word.
        version: of what is kept.
        identity: all that the result depends on, as JSON can hold it.

    Raises:
        RecipeError: what stands there was begun with another identity; the message says what differs.
        ArtefactError: the folder holds something else.
    """

    def __init__(self, path: Path, what: str, version: int, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._what = what
        ours: dict[str, Any] = json.loads(
            json.dumps({"format": f"qlip-plugins {what} work", "version": version, **identity})
        )
        marker = path / _IDENTITY
        # One look: another process may be making the same folder, and begins with the marker.
        found = _visible(path)
        if _IDENTITY in found:
            self._check_same(marker, ours)
        elif found:
            raise ArtefactError(f"{path}: exists and is no work folder ({what}); name another with --work")
        else:
            with written_whole(marker) as temporary:
                temporary.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")

    def file(self, name: str) -> Path:
        """The path of a file in it."""
        return self.path / name

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        # Out of the way at once: an interruption must not leave a folder that has lost its marker.
        gone = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        with suppress(OSError):
            self.path.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _check_same(self, marker: Path, ours: dict[str, Any]) -> None:
        try:
            theirs = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{marker}: unreadable: {error}; remove {self.path} to begin again") from None
        if not isinstance(theirs, dict) or theirs.get("format") != ours["format"]:
            raise ArtefactError(f"{marker}: no work folder ({self._what}); name another with --work")
        begun, now = flat(theirs), flat(ours)
        differing = [key for key in sorted({*begun, *now}) if begun.get(key) != now.get(key)]
        if differing:
            shown = [f"{key}: {_shown(begun, key)}, now {_shown(now, key)}" for key in differing[:_SHOWN]]
            more = [f"and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
            raise RecipeError(
                f"{self.path}: holds work ({self._what}) that was begun otherwise ({', '.join(shown + more)}). Run it "
                "with those settings to finish it, name another folder with --work, or remove this one"
            )


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        whole = prefix + name
        found |= flat(item, whole + ".") if isinstance(item, Mapping) and item else {whole: item}
    return found


def _shown(found: Mapping[str, Any], key: str) -> str:
    """A value for people: of a long digest its beginning."""
    if key not in found:
        return "absent"
    value = found[key]
    is_digest = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value) is not None
    return f"{value[:12]}..." if is_digest else repr(value)


def _visible(path: Path) -> list[str]:
    """The names in a folder, none where there is no folder yet; a file in its place counts as strange."""
    if not path.is_dir():
        return [path.name] if path.exists() else []
    return [item.name for item in path.iterdir() if not item.name.startswith(".")]


def identity_of(pipe: Any, model: ModelSection, prompts: Sequence[str]) -> dict[str, Any]:
    """What sampling `prompts` with a pipeline depends on, as JSON can hold it; settings not included."""
    table = model.prompt_embeddings
    return {
        "pipeline": pipeline_digest(pipe),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "prompt_embeddings": table and file_digest(table),
        "versions": versions(),
    }


def pipeline_digest(pipe: Any) -> str:
    """SHA-256 of a pipeline's scheduler, denoiser and text encoders, wherever they were loaded from."""
    digest = hashlib.sha256()
    denoiser: Any = denoiser_of(pipe)
    for part in (pipe.scheduler, denoiser):
        # What begins with _ is said by whoever wrote or loaded the files: their version, their path.
        config = {name: value for name, value in dict(part.config).items() if not name.startswith("_")}
        digest.update(type(part).__name__.encode() + json.dumps(config, sort_keys=True, default=str).encode())
    encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    for module in filter(None, (denoiser, *encoders)):
        for name, tensor in module.state_dict().items():
            raw = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
            digest.update(name.encode() + raw.tobytes())
    for tokenizer in filter(None, (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2"))):
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()
