"""Reading the `.pth` files of other frameworks without running anything they contain."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ArtefactError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d state dict, on the CPU, mapped from the file where it allows.

    Read with `weights_only=True` and never otherwise.

    Raises:
        ArtefactError: missing, truncated, not of torch, holding code, or not a flat dict of tensors.
    """
    content = read_plain(path)
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: expected a state dict, found {_named(content)}")
    if not content:
        raise ArtefactError(f"{path}: the state dict is empty")
    if isinstance(content.get("state_dict"), dict):
        raise ArtefactError(
            f"{path}: the tensors stand under the key 'state_dict': a CompVis or Lightning checkpoint of the "
            "float model. Give the ckpt.pth that the calibration wrote"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ArtefactError(f"{path}: entry {name!r} is {_named(value)}, expected a tensor")
    return content


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Look for NaN and infinity in every floating tensor.

    Raises:
        ArtefactError: one has some; names the first tensor.
    """
    for name, tensor in tensors.items():
        # A sum is finite only if every term is, and far quicker than looking at each of a billion.
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.sum().isfinite()):
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise ArtefactError(
                    f"{path}: tensor {name!r} holds {bad} NaN or infinite of {tensor.numel()} values: "
                    "the calibration diverged, or the file is damaged"
                )


def read_plain(path: Path) -> Any:
    """What a `torch.save`d file holds, tensors and plain data alone, on the CPU.

    Read with `weights_only=True` and never otherwise.

    Raises:
        ArtefactError: missing, truncated, not of torch, or holding code.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ArtefactError(f"{path}: {what}, expected a checkpoint file")
    if path.stat().st_size == 0:
        raise ArtefactError(f"{path}: the file is empty")
    try:
        # Mapping keeps a 7 GB file out of memory; files older than torch 1.6 are no archive. What torch
        # warns of in a file (its pickle protocol, say) either loads as tensors or is an error below.
        # A slice is plain data; ModelOpt's quantizers in blocks keep some.
        with warnings.catch_warnings(), torch.serialization.safe_globals([slice]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "").strip()
        if reason:
            raise ArtefactError(
                f"{path}: refused, the file holds more than tensors ({reason[:200]}). It is read with "
                "weights_only=True and nothing else"
            ) from None
        raise ArtefactError(f"{path}: not a torch checkpoint, or truncated") from None
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        size = f"{path.stat().st_size:,} bytes"
        raise ArtefactError(
            f"{path}: truncated or not a torch checkpoint ({size}; {_first_sentence(error)}). Copy it again, or name "
            "the ckpt.pth that the calibration wrote"
        ) from None


def _first_sentence(error: Exception) -> str:
    return re.split(r"[.\n]", f"{error}", maxsplit=1)[0][:100] or type(error).__name__


def _named(value: Any) -> str:
    return f"a {type(value).__name__}"
