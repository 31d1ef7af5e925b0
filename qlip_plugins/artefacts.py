"""This package's own files: safetensors that say what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ArtefactError
from .files import written_whole

_KEY = "qlip_plugins"


def write_tensors(path: Path, kind: str, version: int, tensors: Mapping[str, Tensor], **facts: Any) -> None:
    """Write tensors with a description of themselves, whole or not at all; equal content, equal bytes.

    Args:
        path: the file.
        kind: what it is.
        version: of its format.
        tensors: by name.
        facts: anything else that JSON can hold.
    """
    header = json.dumps({"format": kind, "version": version, **facts}, sort_keys=True)
    with written_whole(path) as temporary:
        # One entry: safetensors writes several in an order that changes from run to run.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {_KEY: header})


def read_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts that `write_tensors` wrote.

    Raises:
        ArtefactError: missing, damaged, of another kind, or newer than this package.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as opened:
            facts = json.loads((opened.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"{path}: damaged or not safetensors: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != kind:
        found = facts.get("format") if isinstance(facts, dict) else facts
        raise ArtefactError(f"{path}: expected a file of {kind!r}, found {found!r}")
    check_version(path, facts, version)
    return tensors, facts


def check_version(path: Path, facts: Mapping[str, Any], newest: int) -> None:
    """Check that a description's `version` is one that this package reads, up to `newest`.

    Raises:
        ArtefactError: it is newer, or no number.
    """
    found = facts.get("version")
    if not isinstance(found, int) or found > newest:
        raise ArtefactError(
            f"{path}: written as version {found}, this package reads up to {newest}: upgrade it"
        )


def versions() -> dict[str, str]:
    """The versions of this package and of the hosts, for what is written down about a result."""
    return {name: metadata.version(name) for name in ("qlip-plugins", "torch", "diffusers", "transformers")}
