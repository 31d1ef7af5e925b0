"""Collecting the statistics of the quantization error, for any pipeline with a UNet and any bit plan.

The float model samples each prompt with DDIM (eta 0). Then the quantized model is led along the same
trajectory: it is run by the same pipeline, whose scheduler puts every next sample where the float model's
was. So what is compared are the predictions after guidance, whatever a pipeline does to come to them.
Source of the definition: PTQD (formats of its `data_error_t_*.pth`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from qlip_plugins.adapter import CorrectionFit
from qlip_plugins.artefacts import read_tensors, write_tensors
from qlip_plugins.controller import Planner, apply_base, load_base
from qlip_plugins.embeddings import PromptEmbeddings
from qlip_plugins.errors import ArtefactError, RecipeError
from qlip_plugins.families import denoiser_of
from qlip_plugins.generation import load_pipeline, placed, sample_model
from qlip_plugins.progress import counted
from qlip_plugins.recipe import FULL_PRECISION, Recipe, StaticController
from qlip_plugins.state import CalibratedState
from qlip_plugins.work import WorkFolder, identity_of

from .following import validity_of
from .moments import Moments
from .scheduler import check_ddim, ddim_config, schedule_facts
from .statistics import CorrectionStatistics, Validity

WORK = "correction"
VERSION = 1
_PLAN = "plan"


class _Leading(DDIMScheduler):  # type: ignore[misc]
    """DDIM that keeps the predictions it is given, and the way it goes or is led."""

    def start(self, way: Sequence[Tensor] | None) -> None:
        """Begin; `way` holds the samples after each step, None: go freely."""
        self.given = way
        self.predictions: list[Tensor] = []
        self.way: list[Tensor] = []

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """See diffusers; eta is 0."""
        place = len(self.predictions)
        self.predictions.append(model_output.detach())
        if self.given is None:
            after = super().step(model_output, timestep, sample, eta=0.0, return_dict=False)[0]
        else:
            after = self.given[place]
        self.way.append(after)
        return DDIMSchedulerOutput(prev_sample=after) if return_dict else (after,)


@dataclass(frozen=True)
class Collector:
    """Collects the moments of the errors of some prompts at a time.

    Args:
        pipe: on its device, in floating point; as it was after each call.
        recipe: the base, and how its widths come about.
        state: the base, read.
        variants: name -> recipe to run it with: a width throughout, or the recipe's own controller.
    """

    pipe: Any
    recipe: Recipe
    state: CalibratedState
    variants: Mapping[str, Recipe]

    def collect(self, what: CorrectionFit, first: int, done: Callable[[str], None]) -> dict[str, Moments]:
        """The moments of `what.batch` prompts from number `first` on, by variant."""
        prompts = what.prompts[first : first + what.batch]
        before = what.prompts[:first]

        def sampled(scheduler: _Leading, way: Sequence[Tensor] | None) -> Tensor:
            scheduler.start(way)
            sample_model(self.pipe, self.recipe.model, prompts, what.settings, "latent", before)
            return torch.stack(scheduler.predictions, dim=1)

        found = {}
        with _led(self.pipe) as scheduler:
            exact = sampled(scheduler, None)
            way = scheduler.way
            done("float")
            for name, recipe in self.variants.items():
                with apply_base(self.pipe, recipe, self.state):
                    found[name] = Moments.of(exact, sampled(scheduler, way) - exact)
                done(name)
        return found


@contextmanager
def _led(pipe: Any) -> Iterator[_Leading]:
    """The pipeline with a leading scheduler on its own schedule."""
    original = pipe.scheduler
    pipe.scheduler = leading(original)
    try:
        yield pipe.scheduler
    finally:
        pipe.scheduler = original


def leading(scheduler: Any) -> _Leading:
    """A leading DDIM scheduler on the schedule of another one.

    Raises:
        IncompatibleModelError: the correction is not defined for it.
    """
    made = _Leading(**ddim_config(scheduler.config))
    check_ddim(made.config)
    return made


def fit(what: CorrectionFit, say: Callable[[str], None]) -> dict[str, Any]:
    """See `qlip_plugins.adapter.Correction.fit`."""
    _check(what)
    table = what.recipe.model.prompt_embeddings
    if table is not None:
        PromptEmbeddings.load(table).of([*what.prompts, ""])
    recipe = what.recipe.model_copy(update={"correction": None})
    pipe = placed(load_pipeline(recipe), what.settings)
    state = load_base(recipe, denoiser_of(pipe))
    with apply_base(pipe, recipe, state) as controller:
        own = validity_of(recipe, controller)
        variants = variants_of(recipe, controller.planner, what.own_plan)
    collector = Collector(pipe, recipe, state, variants)
    validity = _validity(collector, what, own)
    identity = {
        **identity_of(pipe, recipe.model, what.prompts),
        "validity": asdict(validity),
        "recipe": recipe.model_dump(mode="json", exclude={"description"}),
        "settings": asdict(what.settings),
        "variants": list(collector.variants),
        "batch": what.batch,
    }
    folder = WorkFolder(what.work, WORK, VERSION, identity)
    say(f"{len(what.prompts)} prompts, each once in floating point and at {', '.join(collector.variants)}")
    finished = len(list(folder.path.glob("prompts-*.safetensors")))
    if finished:
        say(f"{finished} batches of {what.batch} prompts were finished before")
    moments = _all_moments(collector, what, folder)
    with _led(pipe) as scheduler:
        scheduler.set_timesteps(what.settings.steps)
        timesteps = scheduler.timesteps.tolist()
    widths = {
        None if name == _PLAN else int(name): found.statistics(timesteps) for name, found in moments.items()
    }
    CorrectionStatistics(widths, validity, prompts=len(what.prompts)).save(what.out)
    folder.remove()
    return _described(widths, what)


def _check(what: CorrectionFit) -> None:
    if what.out.suffix != ".safetensors" or what.out.is_dir():
        raise RecipeError(f"--out {what.out}: correction statistics are a .safetensors file")
    if not what.prompts or what.batch < 1:
        raise RecipeError("correction statistics need at least one prompt, and one at a time")
    if what.settings.eta:
        raise RecipeError(f"eta is {what.settings.eta:g}: statistics are collected at 0, and serve any")


def _validity(collector: Collector, what: CorrectionFit, own: Validity) -> Validity:
    """What the statistics will hold for; a variant that cannot be applied is found out here, before the work."""
    pipe, state = collector.pipe, collector.state
    facts = schedule_facts(leading(pipe.scheduler).config)
    for variant in collector.variants.values():
        apply_base(pipe, variant, state).remove()
    return replace(
        own,
        plan=own.plan if what.own_plan else None,
        guidance_scale=max(1.0, what.settings.guidance_scale),
        steps=what.settings.steps,
        schedule=facts,
    )


def variants_of(recipe: Recipe, planner: Planner, own_plan: bool) -> dict[str, Recipe]:
    """The recipes to run a base with: each width of the menu and of the planner, or the recipe as it is.

    Raises:
        RecipeError: a plan of its own was asked of a base without activation quantizers.
    """
    if not planner.layers:
        if own_plan:
            raise RecipeError("the base quantizes no activations, so there is no plan to follow")
        return {str(FULL_PRECISION): recipe}
    if own_plan:
        return {_PLAN: recipe}
    widths = set(recipe.activation_bits.widths).union(*map(planner.widths, planner.layers))
    return {
        str(bits): recipe.model_copy(update={"controller": StaticController(kind="static", bits=bits)})
        for bits in sorted(widths)
    }


def _all_moments(collector: Collector, what: CorrectionFit, folder: WorkFolder) -> dict[str, Moments]:
    """Of every prompt; batches that are finished are read from the folder."""
    starts = range(0, len(what.prompts), what.batch)
    parts: dict[str, list[Moments]] = {name: [] for name in collector.variants}
    with counted(len(starts) * (1 + len(parts)), "correction statistics") as done:
        for first in starts:
            path = folder.file(f"prompts-{first:06d}.safetensors")
            if path.exists():
                for text in ("float", *parts):
                    done(text)
            else:
                _keep(path, collector.collect(what, first, done))
            for name, found in _kept(path).items():
                parts[name].append(found)
    try:
        return {name: Moments.joined(found) for name, found in parts.items()}
    except ArtefactError as error:
        raise ArtefactError(f"{folder.path}: {error}") from None


def _keep(path: Path, found: Mapping[str, Moments]) -> None:
    tensors = {f"{n}|{part}": tensor for n, m in found.items() for part, tensor in m.to_tensors().items()}
    write_tensors(path, WORK, VERSION, tensors)


def _kept(path: Path) -> dict[str, Moments]:
    tensors, _ = read_tensors(path, WORK, VERSION)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition("|")
        found.setdefault(name, {})[part] = tensor
    return {name: Moments.from_tensors(path, parts) for name, parts in found.items()}


def _described(widths: Mapping[int | None, Any], what: CorrectionFit) -> dict[str, Any]:
    """Means over the timesteps, for people."""
    rows = {
        _PLAN if width is None else str(width): {
            "slope": float(found.slope.mean()),
            "deviation": float(found.deviation.mean()),
            "bias": float(found.bias.abs().mean()),
        }
        for width, found in widths.items()
    }
    return {
        "file": str(what.out),
        "prompts": len(what.prompts),
        "steps": what.settings.steps,
        "guidance_scale": what.settings.guidance_scale,
        "means_over_timesteps": rows,
    }
