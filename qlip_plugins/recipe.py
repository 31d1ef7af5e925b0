"""The recipe: one frozen object, spelt as one YAML file, checked whole before torch is imported."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML

from .adapter import (
    BACKENDS,
    BASE_QUANTIZERS,
    CORRECTIONS,
    AdapterConfig,
    CorrectionConfig,
    check_installed,
    installed,
    load_base_quantizer,
    load_correction,
)
from .errors import AdapterNotFoundError, RecipeError
from .model_folder import RECIPE_NAME, checked, is_model
from .schema import FromHere, PathOrHubId, RecipePath, StrictModel, nearest
from .yaml_lines import Document, read_document

SHIPPED_PACKAGE = "qlip_recipes"
NEEDED = "???"
"""Stands in a recipe for what only its user has."""

FULL_PRECISION = 32

Width = Annotated[int, Field(ge=2, le=FULL_PRECISION)]


class ModelSection(StrictModel):
    """The diffusers pipeline that the recipe is for."""

    pipeline: PathOrHubId
    prompt_embeddings: RecipePath | None = None
    """Precomputed text embeddings, for a pipeline without a text encoder (`embeddings.py`)."""


class ActivationBits(StrictModel):
    """The bit menu B = (low, medium, high); 32 leaves an activation untouched."""

    low: Width
    medium: Width
    high: Width

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.medium < self.high:
            raise PydanticCustomError(
                "menu_order",
                "need low < medium < high, found {found}",
                {"found": f"{self.low}, {self.medium}, {self.high}"},
            )
        return self

    @property
    def widths(self) -> tuple[int, int, int]:
        """The three widths, ascending."""
        return (self.low, self.medium, self.high)


class RangesSection(StrictModel):
    """Where the ranges of widths other than the base width come from: exactly one of the two."""

    table: RecipePath | None = None
    """Ranges fitted for each width by mean squared error; `qlip-plugins fit-ranges` writes the file."""
    keep_calibrated: bool = False
    """Keep the checkpoint's range at every width; the report then states what was clipped and zeroed."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.table is None) == (not self.keep_calibrated):
            raise PydanticCustomError(
                "ranges", "give exactly one of `table: FILE` and `keep_calibrated: true`"
            )
        return self


class StaticController(StrictModel):
    """Every controlled activation at one width, whatever the prompt; `base` is the checkpoint's own."""

    kind: Literal["static"]
    bits: Width | Literal["base"]


class TableController(StrictModel):
    """A given bit plan, whatever the prompt."""

    kind: Literal["table"]
    plan: RecipePath


class Budget(StrictModel):
    """What a plan may cost: exactly one of `fab`, `bitops` and `relative`."""

    fab: float | None = Field(default=None, ge=2, le=FULL_PRECISION)
    """Mean width over the steps and the controlled layers."""
    bitops: float | None = Field(default=None, gt=0)
    """T, profile `paper`, of one generation."""
    relative: float | None = Field(default=None, gt=0)
    """BitOPs over those of the base at its own widths."""
    per: Literal["prompt", "batch", "population"] = "population"
    """Met by each prompt; by the mean of a batch; or by the mean of the prompts that the controller was made
    with, so that a prompt's bits depend neither on its batch nor are equal for all."""

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if sum(value is not None for value in (self.fab, self.bitops, self.relative)) != 1:
            raise PydanticCustomError("budget", "give exactly one of `fab`, `bitops` and `relative`")
        return self


class QlipController(StrictModel):
    """A trained (or hand-set) T2Q and Q2B: the prompt chooses."""

    kind: Literal["qlip"]
    path: RecipePath
    budget: Budget | None = None
    """Turns the controller to this cost; left out: as it was trained."""


class PolicyController(StrictModel):
    """The `diffusion_step_policy` of a `config.json`, as diffusers, vllm-omni and sglang read it."""

    kind: Literal["policy"]
    path: RecipePath
    native: Width
    """The width of the steps that the policy leaves to the checkpoint's own quantizers."""
    a16: Width = 16
    """The width that stands for its 16-bit activations."""


Controller = Annotated[
    StaticController | TableController | PolicyController | QlipController, Field(discriminator="kind")
]


def _options_of(section: str, load: Callable[[str], Any]) -> WrapValidator:
    """Let the adapter named in a section check its options, inside the same report."""

    def checked(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if value is None or isinstance(value, StrictModel):
            return handler(value)
        if not isinstance(value, dict):
            raise PydanticCustomError(f"{section}_section", "a section with the key `adapter` is needed")
        if not isinstance(value.get("adapter"), str):
            raise PydanticCustomError("missing", "the key `adapter` is missing")
        try:
            config_class = load(value["adapter"]).config_class
        except AdapterNotFoundError as error:
            raise PydanticCustomError("adapter_not_found", "{text}", {"text": str(error)}) from None
        return config_class.model_validate(value, context=info.context)

    return WrapValidator(checked)


class Recipe(StrictModel):
    """How to put QLIP on one quantized model. Every section without a default must be there."""

    schema_version: Literal[1]
    description: str = ""
    model: ModelSection
    base: Annotated[SerializeAsAny[AdapterConfig], _options_of("base", load_base_quantizer)]
    backend: str
    activation_bits: ActivationBits
    ranges: RangesSection | None = None
    attention: Literal["base", "controlled"] = "base"
    """Whether the operands of the attention products (q, k, v, softmax) leave their base width."""
    time_layers: Literal["base", "controlled"] = "base"
    """Whether the layers that read the time do, with those that turn it into FLUX's modulations."""
    controller: Controller
    correction: Annotated[
        SerializeAsAny[CorrectionConfig] | None, _options_of("correction", load_correction)
    ] = None
    """A change of the sampler that allows for the base's error; without it the pipeline's own is used."""

    @property
    def controls(self) -> dict[str, bool]:
        """Which quantizers belong to K beyond those that always do, as `layers.controlled` takes it."""
        return {"attention": self.attention == "controlled", "time": self.time_layers == "controlled"}

    @field_validator("backend")
    @classmethod
    def _backend_is_installed(cls, name: str) -> str:
        try:
            check_installed(BACKENDS, "backend", name)
        except AdapterNotFoundError as error:
            raise PydanticCustomError("adapter_not_found", "{text}", {"text": str(error)}) from None
        return name

    @classmethod
    def from_yaml(
        cls, path: str | Path, given: Mapping[str, Any] | None = None, unused: Collection[str] = ()
    ) -> Recipe:
        """Read and check a recipe file.

        Args:
            path: the file.
            given: values in place of the file's, by dotted key, such as `base.checkpoint`; `controller` stands
                for the folder of a controller.
            unused: sections that need not be complete, `controller` or `ranges`, for work that makes them.

        Raises:
            RecipeError: every problem of the file at once, each as `FILE:LINE: KEY: WHAT`; or it needs values
                that it does not hold.
        """
        recipe, needs = cls.with_needs(path, given, unused)
        if needs:
            raise RecipeError(
                f"{path}: needs {', '.join(needs)}: give each with --set KEY=VALUE, or in a copy of the recipe"
            )
        return recipe

    @classmethod
    def with_needs(
        cls, path: str | Path, given: Mapping[str, Any] | None = None, unused: Collection[str] = ()
    ) -> tuple[Recipe, list[str]]:
        """A recipe file as `from_yaml` reads it, and the keys at which it says `???`: what a user has to give.

        Raises:
            RecipeError: every problem of the file at once.
        """
        document = read_document(Path(path))
        problems = list(document.problems)
        data = _completed(document.data, given or {}, unused)
        bare = [name for name in data if data[name] == NEEDED] if isinstance(data, dict) else []
        if bare:
            raise RecipeError(
                f"{path}: {bare[0]} is {NEEDED!r}: say so of each value that a user has to give, not of a section"
            )
        recipe = None
        try:
            recipe = cls.model_validate(data, context={"base_dir": Path(path).absolute().parent})
        except ValidationError as error:
            problems += [_line_of(document, dict(found)) for found in error.errors()]
        if problems or recipe is None:
            raise RecipeError("\n".join(document.report(problems)))
        return recipe, sorted(_needs(data))

    @classmethod
    def load(
        cls, name_or_path: str | Path, given: Mapping[str, Any] | None = None, unused: Collection[str] = ()
    ) -> Recipe:
        """A shipped recipe by name, or a recipe file by path; otherwise as `from_yaml`.

        Raises:
            RecipeError: neither exists, or the file has problems.
        """
        return cls.from_yaml(find_recipe(name_or_path), given, unused)

    def within(self, budget: Budget) -> Self:
        """The same recipe, its controller turned to a budget.

        Raises:
            RecipeError: its controller has no dial.
        """
        if not isinstance(self.controller, QlipController):
            raise RecipeError(
                f"a budget needs a controller of kind qlip, the recipe's is {self.controller.kind}, with fixed bits"
            )
        return self.model_copy(update={"controller": self.controller.model_copy(update={"budget": budget})})

    def missing_files(self) -> list[str]:
        """The files that the recipe names and that are not there, as `key: path`."""
        named: list[tuple[str, Any]] = [
            ("model.prompt_embeddings", self.model.prompt_embeddings),
            *((f"base.{key}", value) for key, value in self.base),
            *((f"controller.{key}", value) for key, value in self.controller),
            *((f"correction.{key}", value) for key, value in self.correction or ()),
        ]
        named.append(("model.pipeline", self.model.pipeline))
        if self.ranges is not None:
            named.append(("ranges.table", self.ranges.table))
        return [
            f"{key}: {path}" for key, path in named if isinstance(path, Path) and not os.path.exists(path)
        ]


def _completed(data: Any, given: Mapping[str, Any], unused: Collection[str]) -> Any:
    """A recipe's data with the values that a user gives, and without unfinished sections that are not used."""
    if not isinstance(data, dict):
        return data
    data = copy.deepcopy(data)
    for key, value in given.items():
        if key == "controller" and not isinstance(value, dict):
            known = data.get(key)
            kept = known if isinstance(known, dict) and known.get("kind") == "qlip" else {}
            data[key] = {**kept, "kind": "qlip", "path": _from_here(value)}
            continue
        *sections, last = key.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise RecipeError(f"--set {key}: {section!r} is no section of the recipe")
        place[last] = _from_here(value)
    for section in unused:
        if any(True for _ in _needs(data.get(section))):
            data[section] = {"controller": {"kind": "static", "bits": "base"}}.get(section)
    return {key: value for key, value in data.items() if value is not None}


def _from_here(value: Any) -> Any:
    return FromHere(value) if isinstance(value, str) else value


def _needs(data: Any, key: str = "") -> Iterator[str]:
    if data == NEEDED:
        yield key
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _needs(value, f"{key}.{name}" if key else str(name))


def _line_of(document: Document, found: dict[str, Any]) -> tuple[int, str]:
    """One pydantic error as the line where it stands and its text."""
    where = document.locate(found["loc"])
    message = found["msg"]
    if found["type"] == "missing" and message == "Field required":
        message = f"the key {found['loc'][-1]!r} is missing"
    elif found["type"] in ("model_type", "dict_type"):
        message = "a section is needed here, `key: value` lines or {key: value, ...}"
    elif found["type"] not in _OWN_WORDS and isinstance(found["input"], str | int | float | bool):
        message = f"{message}, found {found['input']!r}"
    return where.line, f"{where.dotted}: {message}" if where.dotted else message


_OWN_WORDS = {
    "unknown_key",
    "menu_order",
    "ranges",
    "adapter_not_found",
    "package_path",
    "empty_path",
    "missing",
}


def shipped_recipes() -> dict[str, Path]:
    """The recipes in this package's library, by name."""
    folder = Path(str(files(SHIPPED_PACKAGE)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe's name, or the path itself.

    Raises:
        RecipeError: there is no such recipe.
    """
    shipped = shipped_recipes()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path)
    folder = path.parent if path.name == RECIPE_NAME else path
    if is_model(folder):
        checked(folder)
        return folder / RECIPE_NAME
    if not path.is_file():
        raise RecipeError(
            f"{path}: no such recipe file, and no shipped recipe of that name"
            f"{nearest(str(name_or_path), shipped)} (shipped: {', '.join(shipped) or 'none'})"
        )
    return path


def _spelt_out_null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def dump(section: dict[str, Any]) -> str:
    """A plain mapping as YAML text."""
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.representer.add_representer(type(None), _spelt_out_null)
    yaml.dump(section, out)
    return out.getvalue()


def json_schema() -> tuple[dict[str, Any], dict[str, ImportError]]:
    """The JSON Schema of a recipe with the options of every base quantizer that can be imported.

    Returns:
        The schema, and the adapters that are missing in it with the reason.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    broken: dict[str, ImportError] = {}
    loads: dict[str, tuple[str, Callable[[str], Any]]] = {
        "base": (BASE_QUANTIZERS, load_base_quantizer),
        "correction": (CORRECTIONS, load_correction),
    }
    for section, (group, load) in loads.items():
        options: dict[str, Any] = {}
        for name in installed(group):
            try:
                config_class = load(name).config_class
            except ImportError as error:
                broken[name] = error
            else:
                ref = f"#/$defs/{section}-{name}/$defs/{{model}}"
                options[f"{section}-{name}"] = config_class.model_json_schema(ref_template=ref)
        for found in options.values():
            found["required"] = ["adapter", *found.get("required", [])]
        schema["$defs"] |= options
        choices = [{"$ref": f"#/$defs/{name}"} for name in options]
        if section not in schema["required"]:
            choices.append({"type": "null"})
        schema["properties"][section] = {"anyOf": choices}
    return schema, broken
