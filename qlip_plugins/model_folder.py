"""The folder of a whole model (`sharing.py`): its `config.json`, and the check of every file by its digest.

Imports no torch, as a folder may be named where a recipe is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from .errors import ArtefactError
from .files import file_digest
from .schema import StrictModel

FORMAT: Literal["qlip-plugins model"] = "qlip-plugins model"
CONFIG_NAME = "config.json"
RECIPE_NAME = "recipe.yaml"


class ModelConfig(StrictModel):
    """`config.json` of a whole model.

    Args:
        quant_method: what tools that list quantized models look for.
        base_model: the pipeline that was quantized.
        base_fingerprint: of the base with its activations.
        files: path in the folder -> SHA-256; the model card may be edited, and is not among them.
        versions: of the packages that wrote it.
    """

    format: Literal["qlip-plugins model"] = FORMAT
    version: Literal[1] = 1
    quant_method: Literal["qlip"] = "qlip"
    base_model: str
    base_fingerprint: str
    files: dict[str, str] = Field(min_length=1)
    versions: dict[str, str]


def is_model(folder: Path) -> bool:
    """Whether a folder says that it is a whole model."""
    try:
        found = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def checked(folder: Path) -> ModelConfig:
    """Read a folder's `config.json`, and compare every file that it names.

    Raises:
        ArtefactError: it is no model, or a file is missing, changed, or outside of the folder.
    """
    path = folder / CONFIG_NAME
    try:
        config = ModelConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror}, expected what `qlip-plugins save` wrote") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtefactError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise ArtefactError(f"{path}: not JSON: {error}") from None
    if RECIPE_NAME not in config.files:
        raise ArtefactError(f"{path}: does not name {RECIPE_NAME} among its files")
    for name, digest in config.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtefactError(f"{path}: names {name!r}, a file outside of the folder")
        file = folder / name
        if not file.is_file():
            raise ArtefactError(f"{file}: missing; get the folder again")
        if file_digest(file) != digest:
            raise ArtefactError(
                f"{file}: not the file that was saved (its SHA-256 differs); get the folder again"
            )
    return config
