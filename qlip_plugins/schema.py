"""The pydantic base of everything a user writes: strict, frozen, and helpful about misspelt keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PACKAGE_SCHEME = "package://"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class StrictModel(BaseModel):
    """A frozen section of a recipe: unknown keys are errors that name the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_nearest_key(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                cls.__name__, [cls._explained(dict(found)) for found in error.errors()]
            ) from None

    @classmethod
    def _explained(cls, found: dict[str, Any]) -> InitErrorDetails:
        message = found["msg"]
        if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
            message = f"unknown key{nearest(str(found['loc'][0]), cls.model_fields)}" + (
                f" (known: {', '.join(cls.model_fields)})"
            )
        kind = "unknown_key" if found["type"] == "extra_forbidden" else found["type"]
        # The text is passed as a value, since a brace in it would be read as a placeholder.
        return {
            "type": PydanticCustomError(kind, "{text}", {"text": message}),
            "loc": found["loc"],
            "input": found["input"],
        }


class FromHere(str):
    """A text that a user gave beside a recipe: a relative path in it starts where the user is."""

    __slots__ = ()


def _as_path(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, Path) or not isinstance(value, str):
        return value
    if not value:
        raise PydanticCustomError("empty_path", "a path is needed, found an empty string")
    if value.startswith(PACKAGE_SCHEME):
        return _package_path(value)
    base = (info.context or {}).get("base_dir")
    path = Path(value).expanduser()
    if isinstance(value, FromHere):
        return path.absolute()
    return (Path(base) / path) if base is not None else path


def _package_path(value: str) -> Path:
    package, _, inner = value.removeprefix(PACKAGE_SCHEME).partition("/")
    if ".." in Path(inner).parts:
        raise PydanticCustomError("package_path", "a package:// path must stay inside its package")
    try:
        return Path(str(files(package))) / inner
    except (ModuleNotFoundError, ValueError, TypeError):
        raise PydanticCustomError(
            "package_path", "no installed package {package}", {"package": repr(package)}
        ) from None


def _as_path_or_hub_id(value: Any, info: ValidationInfo) -> Any:
    """`name` and `owner/name` may be hub ids, so they stay as they are unless such a folder exists."""
    path = _as_path(value, info)
    if not isinstance(value, str) or not value:
        return path
    return str(value) if _HUB_ID.fullmatch(value) and not path.exists() else path


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `someone/something`."""
    return _HUB_ID.fullmatch(text) is not None


RecipePath = Annotated[Path, BeforeValidator(_as_path)]
"""A file: `package://NAME/inside`, absolute, or relative to the recipe that names it."""

PathOrHubId = Annotated[str | Path, BeforeValidator(_as_path_or_hub_id)]
"""A local folder like `RecipePath`, or the hub id of a pipeline."""
