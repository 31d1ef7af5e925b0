"""A whole QLIP model as one folder: base codes, ranges, controller, correction, recipe and model card.

config.json               what it is, and the SHA-256 of every other file but the card
recipe.yaml               how its parts go together; every verb takes the folder for it
base/                     the packed base (`packed.py`)
ranges.safetensors        where the recipe has a table
controller/               where it has a trained one
plan.safetensors, policy.json   where its controller is one of these
correction.safetensors, or correction/   where it corrects by a file, or by a folder of them
prompt_embeddings.safetensors   where it has one
README.md                 model card

The pipeline that was quantized is named, not copied: its weights are its makers' to share.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from .adapter import load_base_quantizer
from .artefacts import versions
from .controller import BitController, apply
from .errors import ArtefactError, HostError, IncompatibleModelError, RecipeError
from .files import file_digest, folder_written_whole
from .generation import load_model
from .model_folder import CONFIG_NAME, FORMAT, RECIPE_NAME, ModelConfig, checked
from .packed import write_packed
from .recipe import QlipController, Recipe, TableController, dump
from .schema import is_hub_id
from .state import CalibratedState
from .text_to_bits import CONFIG_NAME as CONTROLLER_CONFIG
from .text_to_bits import CURVES_NAME, TRAINING_NAME, WEIGHTS_NAME

CARD_NAME = "README.md"
_OWNED = (
    RECIPE_NAME,
    CARD_NAME,
    "base",
    "ranges.safetensors",
    "controller",
    "plan.safetensors",
    "policy.json",
    "correction.safetensors",
    "correction",
    "prompt_embeddings.safetensors",
)
_CONTROLLER = (CONTROLLER_CONFIG, WEIGHTS_NAME, TRAINING_NAME, CURVES_NAME)
_HUB_FILES = ["*.json", "*.safetensors", "*.yaml", "*.md", "*/*.json", "*/*.safetensors", "*/*.png"]


@dataclass(frozen=True)
class QlipModel:
    """A recipe with all that it names, saved and loaded as one folder.

    Args:
        recipe: its paths lie in the folder, or wherever the recipe's own files were.
        base_fingerprint: of the base.
    """

    recipe: Recipe
    base_fingerprint: str

    @classmethod
    def from_recipe(cls, recipe: Recipe | str | Path) -> Self:
        """A model of a recipe's files.

        Raises:
            RecipeError: the recipe is wrong.
            ArtefactError: its base is missing or damaged.
        """
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        return cls(recipe, _state(recipe).fingerprint)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """Read a folder that `save_pretrained` wrote, or one on the hub; every file is compared with its digest.

        Args:
            name: a local folder, or a hub id, which is taken from the cache where it is there.
            revision: of a hub id.
            cache_dir: of the hub.
            local_files_only: ask no server; also where `HF_HUB_OFFLINE` says so.
            token: for the hub.

        Raises:
            ArtefactError: missing, damaged, changed, or no such model.
            RecipeError: its recipe is wrong.
            HostError: `huggingface_hub` is needed and not installed.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _from_hub(str(name), revision, cache_dir, local_files_only, token)
        config = checked(folder)
        recipe = Recipe.from_yaml(folder / RECIPE_NAME)
        for key, path in _parts(recipe).items():
            # By name, not by where links lead: the hub's cache is made of links.
            if not Path(os.path.normpath(path.absolute())).is_relative_to(
                os.path.normpath(folder.absolute())
            ):
                raise ArtefactError(
                    f"{folder / RECIPE_NAME}: {key} is {path}, which is not part of the folder"
                )
        return cls(recipe, config.base_fingerprint)

    def save_pretrained(self, folder: str | Path, base_model: str | None = None) -> None:
        """Write the folder, whole or not at all; an earlier one is replaced.

        Args:
            folder: to write.
            base_model: hub id of the pipeline, or `package://` name; None: as the recipe names it.

        Raises:
            ArtefactError: the folder holds something else, or cannot be written.
            IncompatibleModelError: the base has widths that no packed folder holds.
            RecipeError: the pipeline's name, given or the recipe's, is a path on this machine.
        """
        recipe = self.recipe
        missing = [file for file in recipe.missing_files() if not file.startswith("model.pipeline")]
        if missing:
            raise ArtefactError(f"cannot be saved without its files: {', '.join(missing)}")
        named = base_model or _portable(recipe.model.pipeline)
        if not named.startswith("package://") and not is_hub_id(named):
            raise RecipeError(
                f"--base-model {named}: expected the hub id of the pipeline, such as someone/pipeline"
            )
        data: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
        with folder_written_whole(Path(folder), FORMAT, CONFIG_NAME, *_OWNED) as made:
            data["model"]["pipeline"] = named
            if recipe.model.prompt_embeddings is not None:
                shutil.copyfile(recipe.model.prompt_embeddings, made / "prompt_embeddings.safetensors")
                data["model"]["prompt_embeddings"] = "prompt_embeddings.safetensors"
            data["base"] = _write_base(recipe, named, made / "base")
            _copy_parts(recipe, data, made)
            (made / RECIPE_NAME).write_text(dump(data), encoding="utf-8")
            Recipe.from_yaml(made / RECIPE_NAME)  # what is saved can be read
            (made / CARD_NAME).write_text(_card(self, named), encoding="utf-8")
            files = {
                str(path.relative_to(made)): file_digest(path)
                for path in sorted(made.rglob("*"))
                if path.is_file() and path.name != CARD_NAME
            }
            config = ModelConfig(
                base_model=named, base_fingerprint=self.base_fingerprint, files=files, versions=versions()
            )
            (made / CONFIG_NAME).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def load_pipeline(self) -> Any:
        """The pipeline that was quantized, in float32 on the CPU; see `generation.load_model`."""
        return load_model(self.recipe.model)

    def apply(self, pipe: Any) -> BitController:
        """Put the model on its pipeline; see `qlip_plugins.apply`.

        Raises:
            IncompatibleModelError: as of `apply`, or the base is not the one that was saved.
        """
        controller = apply(pipe, self.recipe)
        if controller.state.fingerprint != self.base_fingerprint:
            controller.remove()
            raise IncompatibleModelError(
                f"the base has the fingerprint {controller.state.fingerprint[:12]}..., the model was saved with "
                f"{self.base_fingerprint[:12]}..."
            )
        return controller


def convert(recipe_base: Any, pipeline: str, out: Path) -> dict[str, Any]:
    """Write a checkpoint of any known format as a packed folder, which says all of itself.

    Args:
        recipe_base: the `base` section of a recipe that reads it, checked.
        pipeline: that it belongs to, as others can name it.
        out: folder to write.

    Returns:
        Facts: its `base` section, its fingerprint, its widths.

    Raises:
        ArtefactError: the checkpoint is missing or damaged, or the folder holds something else.
        IncompatibleModelError: it has widths that no packed folder holds, or activation grids that only a run of
            the model can tell.
    """
    state = load_base_quantizer(recipe_base.adapter).load(recipe_base)
    base = _write_state(state, pipeline, out)
    return {
        "base": {**base, "folder": str(out.resolve())},
        "fingerprint": state.fingerprint,
        "weight_bits": sorted(set(state.weight_bits().values())),
        "layers": len(state.layers),
        "activations": len(state.activations),
    }


def _state(recipe: Recipe) -> CalibratedState:
    return load_base_quantizer(recipe.base.adapter).load(recipe.base)


def _write_base(recipe: Recipe, pipeline: str, folder: Path) -> dict[str, Any]:
    return {**_write_state(_state(recipe), pipeline, folder), "folder": folder.name}


def _write_state(state: CalibratedState, pipeline: str, folder: Path) -> dict[str, Any]:
    if state.to_complete is not None:
        raise IncompatibleModelError(
            f"{state.source}: its activation grids are known only after a run of the model: give the file of zero "
            "points (docs/ptqd.md; `convert ... --set zero_points=FILE`, elsewhere `--set base.zero_points=FILE`)"
        )
    state.check_whole()
    widths = {grid.bits for name, grid in state.activations.items() if name not in state.operands}
    if len(widths) > 1:
        raise IncompatibleModelError(
            f"{state.source}: activations of {', '.join(map(str, sorted(widths)))} bits, a packed folder has tables of "
            "one width each"
        )
    bits = widths.pop() if widths else None
    grids = {} if bits is None else {bits: state.activations}
    plain = replace(state.with_activations({}), source=pipeline)
    write_packed(folder, plain, grids, {}, f"converted from {state.format}")
    return {"adapter": "packed", "folder": str(folder), "activation_bits": bits}


def _copy_parts(recipe: Recipe, data: dict[str, Any], made: Path) -> None:
    """Copy the files that a recipe names beside the base, and name the copies in its data."""
    if recipe.ranges is not None and recipe.ranges.table is not None:
        shutil.copyfile(recipe.ranges.table, made / "ranges.safetensors")
        data["ranges"]["table"] = "ranges.safetensors"
    controller = recipe.controller
    if isinstance(controller, QlipController):
        (made / "controller").mkdir()
        for name in _CONTROLLER:
            if (controller.path / name).is_file():
                shutil.copyfile(controller.path / name, made / "controller" / name)
        data["controller"]["path"] = "controller"
    elif isinstance(controller, TableController):
        shutil.copyfile(controller.plan, made / "plan.safetensors")
        data["controller"]["plan"] = "plan.safetensors"
    elif controller.kind == "policy":
        shutil.copyfile(controller.path, made / "policy.json")
        data["controller"]["path"] = "policy.json"
    statistics = getattr(recipe.correction, "statistics", None)
    if isinstance(statistics, Path):
        name = "correction" if statistics.is_dir() else "correction.safetensors"
        (shutil.copytree if statistics.is_dir() else shutil.copyfile)(statistics, made / name)
        data["correction"]["statistics"] = name
    strange = [key for key, value in data.get("correction", {}).items() if Path(str(value)).is_absolute()]
    if strange:
        raise RecipeError(f"correction.{strange[0]}: a path on this machine, which cannot be saved")


def _parts(recipe: Recipe) -> dict[str, Path]:
    """The files of a recipe that belong to its folder, by key."""
    sections = {name: getattr(recipe, name) for name in ("base", "ranges", "controller", "correction")}
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section or ()
        if isinstance(value, Path)
    }


def _portable(path: str | Path) -> str:
    """A pipeline or file as others can name it: a hub id, or a file of an installed package.

    Raises:
        RecipeError: it is a path on this machine.
    """
    if not isinstance(path, Path):
        return path
    path = path.resolve()
    for parent in path.parents:
        if not (parent / "__init__.py").is_file():
            continue
        spec = importlib.util.find_spec(parent.name)
        places = (
            [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or ()]
        )
        if parent in places:
            return f"package://{parent.name}/{path.relative_to(parent).as_posix()}"
    raise RecipeError(
        f"{path}: a path on this machine, which nobody else can name. Say where others find the pipeline (--base-model "
        "HUB_ID, `save_pretrained(..., base_model=...)`)"
    )


def _from_hub(
    name: str,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise HostError(f"{name}: no such folder, and the hub needs huggingface_hub ({error})") from None
    try:
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=_HUB_FILES,
        )
    except Exception as error:  # the hub's own errors are of many kinds
        raise ArtefactError(
            f"{name}: no such folder, and not to be had from the hub or its cache: {str(error) or type(error).__name__}"
        ) from None
    return Path(found)


def _card(model: QlipModel, base_model: str) -> str:
    recipe = model.recipe
    widths = ",".join(map(str, recipe.activation_bits.widths))
    head: Mapping[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": base_model,
        "base_model_relation": "quantized",
        "tags": ["quantization", "qlip", "qlip-plugins"],
    }
    return f"""---
{dump(dict(head)).rstrip()}
---
# {recipe.description or base_model}

A quantized base of `{base_model}` with text-conditioned activation bits {{{widths}}} (QLIP), made with qlip-plugins.
The pipeline's own weights are not in this folder, and their licence holds.

```python
from qlip_plugins import QlipModel

model = QlipModel.from_pretrained("this folder, or its hub id")
pipe = model.load_pipeline()
with model.apply(pipe) as controller:
    image = pipe("a red fox").images[0]
    print(controller.report())
```

- Base: fingerprint `{model.base_fingerprint}`; every file's SHA-256 stands in `config.json` and is checked on loading.
- **Simulated**: weights and activations are rounded to their grids and computed in floating point. FAB and BitOPs are
  counted; nothing here is faster than the float model.
"""
