"""Pictures from a recipe: what `qlip-plugins generate` and `fit-ranges` do."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .artefacts import versions
from .controller import BitController, apply
from .embeddings import EncodedPrompts, PromptEmbeddings, check_table_serves
from .errors import INSTALL_HINT, ArtefactError, HostError, IncompatibleModelError
from .families import COMPONENTS, denoiser_of, family_of
from .files import folder_written_whole
from .fitting import fit_ranges
from .grids import Ranges
from .plan import BitPlan
from .progress import wanted
from .recipe import ModelSection, Recipe, StaticController

REPORT_NAME = "report.json"
REPORT_FORMAT = "qlip-plugins generate"
_OWNED = ("[0-9][0-9][0-9].png", "[0-9][0-9][0-9]-bits.png", "plan.safetensors", "report.txt")
_LATENT_SCALE = 16


@dataclass(frozen=True)
class Settings:
    """How to sample.

    Args:
        steps: inference steps.
        guidance_scale: 1 or less turns guidance off.
        seed: with the prompt and its number it gives each picture a noise of its own.
        device: where the pipeline runs.
        dtype: what it computes in; the quantizers' own arithmetic is float32 in any case.
        eta: share of fresh noise in each step of a DDIM sampler, 0..1; 0 is deterministic.
    """

    steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    eta: float = 0.0

    def unnumbered(self) -> Settings:
        """The same on a device without its number, which must not tell results apart."""
        return replace(self, device=torch.device(self.device).type)


def load_pipeline(recipe: Recipe) -> Any:
    """The diffusers pipeline that a recipe names; see `load_model`."""
    return load_model(recipe.model)


def load_model(model: ModelSection) -> Any:
    """A diffusers pipeline, on the CPU, in float32.

    Raises:
        ArtefactError: the folder is missing or holds no pipeline.
        HostError: the named package is not installed.
    """
    return _loaded(model, {})


def _loaded(model: ModelSection, without: dict[str, None]) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise HostError(f"diffusers cannot be imported ({error}): {INSTALL_HINT}") from None
    _quieten()
    source = model.pipeline
    local = isinstance(source, Path)
    if local and not Path(source).is_dir():
        raise ArtefactError(f"{source}: no such pipeline folder")
    try:
        # A pipeline with precomputed embeddings may come without an encoder or decoder.
        absent = {**without, **(_absent_components(Path(source)) if local else {})}
        pipe = DiffusionPipeline.from_pretrained(str(source), local_files_only=local, **absent)
    except (OSError, ValueError) as error:
        what = (
            "not a diffusers pipeline"
            if local
            else "no such folder, and no pipeline on the hub or in its cache"
        )
        raise ArtefactError(f"{source}: {what}: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=not wanted())
    _in_float32(pipe)
    return pipe


def load_text_side(model: ModelSection) -> Any:
    """A pipeline whose denoiser holds no data, and which has no decoder: enough to encode and to count.

    Raises:
        ArtefactError: as of `load_model`.
        HostError: likewise.
    """
    try:
        import diffusers
    except ImportError as error:
        raise HostError(f"diffusers cannot be imported ({error}): {INSTALL_HINT}") from None
    source = model.pipeline
    local = isinstance(source, Path)
    try:
        index = diffusers.DiffusionPipeline.load_config(str(source), local_files_only=local)
        found = [name for name in COMPONENTS if name in index]
        if not found:
            raise ArtefactError(f"{source}: no denoiser among its parts ({', '.join(COMPONENTS)})")
        kind = getattr(diffusers, index[found[0]][1])
        config = kind.load_config(str(source), subfolder=found[0], local_files_only=local)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{source}: not a diffusers pipeline: {str(error).splitlines()[0]}") from None
    pipe = _loaded(model, {name: None for name in (found[0], "vae", "safety_checker") if name in index})
    # Making it must not move the random numbers that pictures are drawn with.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        setattr(pipe, found[0], kind.from_config(config).eval())
    return pipe


def _in_float32(pipe: Any) -> None:
    """Loaders differ in the type they give half-precision files, by component and by version."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module) and component.dtype != torch.float32:
            component.to(torch.float32)


def placed(pipe: Any, settings: Settings) -> Any:
    """The pipeline, moved in place to the device and type of `settings`.

    Raises:
        HostError: the device cannot be used.
    """
    try:
        pipe = pipe.to(settings.device)
        return pipe if settings.dtype == "float32" else pipe.to(getattr(torch, settings.dtype))
    except (RuntimeError, AssertionError) as error:
        raise HostError(f"device {settings.device!r} cannot be used: {str(error).splitlines()[0]}") from None


def _quieten() -> None:
    """Keep the hosts' advice on packages that are not needed, and unwatched bars, off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not wanted():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def _absent_components(folder: Path) -> dict[str, None]:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder}: no readable model_index.json: {error}") from None
    return {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}


def noise_seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """The noise seed of each picture: from its prompt, and how often that came before, and nothing else."""
    return [
        _noise_seed(seed, prompt, list(prompts[:index]).count(prompt)) for index, prompt in enumerate(prompts)
    ]


def _noise_seed(seed: int, prompt: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed}\n{number}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def sample(pipe: Any, recipe: Recipe, prompts: Sequence[str], settings: Settings) -> Any:
    """Run the pipeline; returns PIL images, or latents `(P, C, h, w)` where it has no decoder."""
    output_type = "latent" if getattr(pipe, "vae", None) is None else "pil"
    return sample_model(pipe, recipe.model, prompts, settings, output_type)


def sample_model(
    pipe: Any,
    model: ModelSection,
    prompts: Sequence[str],
    settings: Settings,
    output_type: str,
    before: Sequence[str] = (),
) -> Any:
    """Run a pipeline that no recipe is needed for.

    Args:
        pipe: what `load_model` gave.
        model: where its prompts' embeddings come from.
        prompts: P of them.
        settings: how to sample.
        output_type: `pil`, or `latent` for tensors `(P, C, h, w)`.
        before: prompts sampled earlier; a prompt among them is repeated, and gets another noise.

    Raises:
        IncompatibleModelError: prompts cannot be encoded, or the sampler has no eta where one is asked for.
    """
    seeds = noise_seeds([*before, *prompts], settings.seed)[len(before) :]
    call: dict[str, Any] = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": output_type,
    }
    if settings.eta:
        if "eta" not in inspect.signature(pipe.scheduler.step).parameters:
            raise IncompatibleModelError(
                f"eta is {settings.eta:g}, and {type(pipe.scheduler).__name__} knows none: it belongs to DDIM"
            )
        call["eta"] = settings.eta
    if model.prompt_embeddings is None:
        if getattr(pipe, "tokenizer", None) is None or getattr(pipe, "text_encoder", None) is None:
            raise IncompatibleModelError(
                f"{model.pipeline}: the pipeline has no tokenizer or no text encoder, so a prompt cannot be "
                "encoded. Name a file of precomputed embeddings (model.prompt_embeddings in a recipe)"
            )
        call["prompt"] = list(prompts)
    else:
        check_table_serves(pipe)
        table = PromptEmbeddings.load(model.prompt_embeddings)
        states, empty = table.of(prompts), table.of([""] * len(prompts))
        dtype = denoiser_of(pipe).dtype
        call["prompt_embeds"] = states.to(pipe.device, dtype)
        call["negative_prompt_embeds"] = empty.to(pipe.device, dtype)
    return pipe(**call).images


def sample_encoded(
    pipe: Any, prompts: EncodedPrompts, settings: Settings, noises: Sequence[int], output_type: str
) -> Any:
    """Run a pipeline on prompts that are encoded already.

    Args:
        pipe: on its device.
        prompts: P of them.
        settings: `steps` and `guidance_scale` are used.
        noises: the noise seed of each.
        output_type: `pil`, `pt` for tensors `(P, 3, H, W)` in 0..1, or `latent` for `(P, C, h, w)`.
    """
    return pipe(
        **text_arguments(pipe, prompts),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(noise) for noise in noises],
        output_type=output_type,
    ).images


def text_arguments(pipe: Any, prompts: EncodedPrompts) -> dict[str, Tensor]:
    """P encoded prompts as arguments of a pipeline's call, with the empty prompt for guidance by halves."""
    family = family_of(pipe)
    count, dtype = len(prompts.prompts), family.denoiser_of(pipe).dtype
    given = {"prompt_embeds": prompts.states, "pooled_prompt_embeds": prompts.pooled}
    if family.guidance == "halves":
        for name, empty in (("", prompts.empty), ("pooled_", prompts.empty_pooled)):
            given[f"negative_{name}prompt_embeds"] = (
                None if empty is None else empty.expand(count, *empty.shape)
            )
    return {name: value.to(pipe.device, dtype) for name, value in given.items() if value is not None}


def generate(recipe: Recipe, prompts: Sequence[str], settings: Settings, out: Path) -> dict[str, Any]:
    """Write one picture and one drawn plan a prompt, the plan itself and the report, all or nothing.

    Returns:
        The report as it stands in `report.json`.
    """
    pipe = placed(load_pipeline(recipe), settings)
    # The folder is checked before the work, so that a wrong one costs nothing.
    with (
        folder_written_whole(out, REPORT_FORMAT, REPORT_NAME, *_OWNED) as folder,
        apply(pipe, recipe) as controller,
    ):
        images = sample(pipe, recipe, prompts, settings)
        report = _report(recipe, prompts, settings, controller)
        plan = controller.plan
        assert plan is not None  # sampling has called the denoiser
        for index, prompt in enumerate(prompts):
            _picture(images[index], prompt).save(folder / f"{index:03d}.png")
            if plan.layers:
                _draw_plan(plan, index, prompt).save(folder / f"{index:03d}-bits.png")
        plan.save(folder / "plan.safetensors")
        (folder / "report.txt").write_text(f"{controller.report()}\n", encoding="utf-8")
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def fit_recipe_ranges(recipe: Recipe, prompts: Sequence[str], settings: Settings) -> Ranges:
    """Fit ranges for a recipe's menu while its base, at base width, generates `prompts`."""
    pipe = placed(load_pipeline(recipe), settings)
    at_base = recipe.model_copy(
        update={
            "ranges": None,
            "controller": StaticController(kind="static", bits="base"),
            "correction": None,
        }
    )
    with apply(pipe, at_base) as controller:
        if not controller.quantizers:
            raise IncompatibleModelError("the base quantizes no activations, so there is no range to fit")
        return fit_ranges(
            controller.quantizers,
            controller.state,
            recipe.activation_bits.widths,
            lambda: sample(pipe, recipe, prompts, settings),
            settings.seed,
        )


def _report(
    recipe: Recipe, prompts: Sequence[str], settings: Settings, controller: BitController
) -> dict[str, Any]:
    report = controller.report().to_dict()
    costs = report.pop("prompts")
    return {
        "format": REPORT_FORMAT,
        "description": recipe.description,
        "recipe": recipe.model_dump(mode="json"),
        "base_fingerprint": controller.state.fingerprint,
        "versions": versions(),
        "settings": asdict(settings),
        "prompts": [
            {"prompt": prompt, "noise_seed": seed, **cost}
            for prompt, seed, cost in zip(prompts, noise_seeds(prompts, settings.seed), costs, strict=True)
        ],
        **report,
    }


def _picture(image: Any, prompt: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return draw_latent(image, f"{prompt}: latent, {len(image)} channels, no decoder")


def draw_latent(latent: Tensor, title: str) -> Image.Image:
    """A latent `(C, h, w)` as grey tiles, each channel from its least to its greatest value."""
    title_height = 16
    tiles = []
    for channel in latent.float().cpu():
        low, high = channel.min(), channel.max()
        grey = ((channel - low) / (high - low).clamp(min=1e-12) * 255).round().byte().numpy()
        tiles.append(np.kron(grey, np.ones((_LATENT_SCALE, _LATENT_SCALE), dtype=np.uint8)))
    gap = np.full((tiles[0].shape[0], 4), 255, dtype=np.uint8)
    row = np.concatenate([piece for tile in tiles for piece in (tile, gap)][:-1], axis=1)
    picture = Image.new("L", (row.shape[1], row.shape[0] + title_height), 255)
    picture.paste(Image.fromarray(row), (0, title_height))
    ImageDraw.Draw(picture).text((2, 2), title, fill=0)
    return picture


def _draw_plan(plan: BitPlan, index: int, prompt: str) -> Image.Image:
    quality = "" if plan.quality is None else f", predicted quality {plan.quality[index]:.3f}"
    shown = (prompt if len(prompt) <= 60 else prompt[:57] + "...") or "(empty prompt)"
    return plan.draw(index, f"{shown}: FAB {plan.fab()[index]:.2f}{quality}")
