"""Families of models: how diffusers calls their denoisers. A further family is a row here, and a test.

What differs between them is where things are in a call, not what is done with them: which argument is the
sample, where the text is, how guidance lays out its calls. Everything else in this package asks a `Family`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .errors import IncompatibleModelError

Guidance = Literal["halves", "calls"]
"""How classifier-free guidance asks for both predictions: one call on a batch of two halves, [without text;
with text], or two calls at the same timestep, the first with text."""


@dataclass(frozen=True)
class Conditioning:
    """The text that a denoiser is conditioned on, a row for each image.

    Args:
        states: `(P, T, D)`.
        pooled: `(P, E)`; None where the family's denoiser gets none.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Family:
    """How the pipelines of a family call their denoiser.

    Args:
        name: of the family.
        component: the denoiser's attribute in a pipeline.
        denoiser: its class in diffusers.
        config: entries of its configuration that tell it from others of the class.
        sample: argument that holds the noisy sample, `(N, ...)`.
        states: argument that holds the text states, `(N, T, D)`.
        guidance: how classifier-free guidance is laid out.
        pooled: path to the pooled text embedding `(N, E)` among the arguments; empty where the denoiser gets
            none.
        timestep_unit: what the timestep in a call is multiplied by to be the scheduler's.
        encoders: text encoders of a pipeline.
        encode_options: what its `encode_prompt` is called with beside the prompt.
        places: where its result holds the states and the pooled embedding (None: it does not).
        example: the arguments of one call for a picture of the model's own size.
        schedule: the timesteps of that picture's calls, in order.
        shared: arguments of a call that all its rows share.
        ldm_names: whether Q-Diffusion's and PTQD's files of such models exist (`ldm_names.py`).
    """

    name: str
    component: str
    denoiser: str
    config: Mapping[str, Any]
    sample: str
    states: str
    guidance: Guidance
    pooled: tuple[str, ...] = ()
    timestep_unit: float = 1.0
    encoders: tuple[str, ...] = ("text_encoder",)
    encode_options: Mapping[str, Any] = field(default_factory=dict)
    places: tuple[int, int | None] = (0, None)
    example: Callable[[Any, Conditioning], dict[str, Any]] = field(kw_only=True, repr=False)
    schedule: Callable[[Any, int], list[float]] = field(kw_only=True, repr=False)
    shared: tuple[str, ...] = ()
    ldm_names: bool = False

    def denoiser_of(self, pipe: Any) -> Any:
        """The denoiser of one of its pipelines, a model of diffusers."""
        return getattr(pipe, self.component)

    @torch.no_grad()
    def encoded(self, pipe: Any, prompt: str) -> Conditioning:
        """One prompt as one of its pipelines encodes it."""
        # Where the encoder is, not `pipe.device`: the denoiser may be elsewhere, or hold no data.
        device = getattr(pipe, self.encoders[0]).device
        found = pipe.encode_prompt(
            prompt=prompt, device=device, num_images_per_prompt=1, **self.encode_options
        )
        states, pooled = self.places
        return Conditioning(found[states], None if pooled is None else found[pooled])

    def empty(self, pipe: Any) -> Conditioning:
        """What one of its pipelines guides away from where no negative prompt is given."""
        text = self.encoded(pipe, "")
        if not pipe.config.get("force_zeros_for_empty_prompt", False):
            return text
        return Conditioning(
            torch.zeros_like(text.states), None if text.pooled is None else torch.zeros_like(text.pooled)
        )

    def guides_by_halves(self, denoiser: Any) -> bool:
        """Whether its pipelines double the batch to guide; a denoiser that is told the scale needs no second half."""
        return self.guidance == "halves" and denoiser.config.get("time_cond_proj_dim") is None

    def matches(self, denoiser: Any) -> bool:
        """Whether a denoiser is of this family."""
        return type(denoiser).__name__ == self.denoiser and all(
            denoiser.config.get(key) == value for key, value in self.config.items()
        )


def _unet_call(denoiser: Any, text: Conditioning) -> dict[str, Any]:
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "sample": torch.zeros(1, denoiser.config.in_channels, height, width),
        "timestep": torch.zeros(()),
        "encoder_hidden_states": text.states[:1],
        "return_dict": False,
    }


def _sdxl_call(denoiser: Any, text: Conditioning) -> dict[str, Any]:
    assert text.pooled is not None
    sizes = torch.zeros(1, 6)
    return _unet_call(denoiser, text) | {
        "added_cond_kwargs": {"text_embeds": text.pooled[:1], "time_ids": sizes}
    }


def _flux_call(denoiser: Any, text: Conditioning) -> dict[str, Any]:
    assert text.pooled is not None
    return {
        "hidden_states": torch.zeros(1, _FLUX_PATCHES, denoiser.config.in_channels),
        "encoder_hidden_states": text.states[:1],
        "pooled_projections": text.pooled[:1],
        "timestep": torch.zeros(1),
        "guidance": torch.ones(1) if denoiser.config.guidance_embeds else None,
        "img_ids": torch.zeros(_FLUX_PATCHES, 3),
        "txt_ids": torch.zeros(text.states.shape[1], 3),
        "return_dict": False,
    }


_FLUX_PATCHES = 64 * 64
"""Of a picture of 1024 pixels: latents of 128 x 128, taken 2 x 2 at a time."""


def _plain_schedule(scheduler: Any, steps: int) -> list[float]:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return [float(timestep) for timestep in scheduler.timesteps.tolist()]


def _flux_schedule(scheduler: Any, steps: int) -> list[float]:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

    scheduler, config = copy.deepcopy(scheduler), scheduler.config
    mu = calculate_shift(
        _FLUX_PATCHES,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return [float(timestep) for timestep in timesteps.tolist()]


FAMILIES = (
    # Stable Diffusion 1.x, and what has its calls: BK-SDM in all sizes, 2.x, distilled forms.
    Family(
        name="sd",
        component="unet",
        denoiser="UNet2DConditionModel",
        config={"addition_embed_type": None},
        sample="sample",
        states="encoder_hidden_states",
        guidance="halves",
        encode_options={"do_classifier_free_guidance": False},
        example=_unet_call,
        schedule=_plain_schedule,
        ldm_names=True,
    ),
    Family(
        name="sdxl",
        component="unet",
        denoiser="UNet2DConditionModel",
        config={"addition_embed_type": "text_time"},
        sample="sample",
        states="encoder_hidden_states",
        guidance="halves",
        pooled=("added_cond_kwargs", "text_embeds"),
        encoders=("text_encoder", "text_encoder_2"),
        encode_options={"prompt_2": None, "do_classifier_free_guidance": False},
        places=(0, 2),
        example=_sdxl_call,
        schedule=_plain_schedule,
    ),
    Family(
        name="flux",
        component="transformer",
        denoiser="FluxTransformer2DModel",
        config={},
        sample="hidden_states",
        states="encoder_hidden_states",
        guidance="calls",
        pooled=("pooled_projections",),
        timestep_unit=1000.0,
        encoders=("text_encoder", "text_encoder_2"),
        encode_options={"prompt_2": None},
        places=(0, 1),
        shared=("img_ids", "txt_ids"),
        example=_flux_call,
        schedule=_flux_schedule,
    ),
)


COMPONENTS = tuple(dict.fromkeys(family.component for family in FAMILIES))
"""Attributes of pipelines that may be a denoiser."""


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        IncompatibleModelError: it has no denoiser of a known family.
    """
    for family in FAMILIES:
        if family.matches(getattr(pipe, family.component, None)):
            return family
    known = "; ".join(
        f"{family.name}: a {family.denoiser} as `{family.component}`"
        + (
            f" with {', '.join(f'{key}={value!r}' for key, value in family.config.items())}"
            if family.config
            else ""
        )
        for family in FAMILIES
    )
    found = next(
        (
            f"{name}: {type(part).__name__}"
            for name in COMPONENTS
            if isinstance(part := getattr(pipe, name, None), nn.Module)
        ),
        "none",
    )
    raise IncompatibleModelError(
        f"{type(pipe).__name__} is of no family that this version steers (its denoiser: {found}; known: {known})"
    )


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a pipeline, a model of diffusers.

    Raises:
        IncompatibleModelError: it has none of a known family.
    """
    return family_of(pipe).denoiser_of(pipe)


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, by the family's names.

    Args:
        arguments: all, by name.
        sample: `(N, ...)`.
        states: `(N, T, D)`.
        pooled: `(N, E)` or None.
        timestep: in the scheduler's unit, as precise as the call's own type.
    """

    arguments: Mapping[str, Any] = field(repr=False)
    sample: Tensor
    states: Tensor
    pooled: Tensor | None
    timestep: float

    @property
    def rows(self) -> int:
        """N."""
        return int(self.sample.shape[0])

    def conditioning(self, copies: int) -> Conditioning:
        """The text of the rows that have some: all, or the second of two halves."""
        first = self.rows // copies * (copies - 1)
        pooled = None if self.pooled is None else self.pooled[first:]
        return Conditioning(self.states[first:], pooled)


def read_call(family: Family, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """A call of a family's denoiser.

    Args:
        family: of the denoiser.
        denoiser: that is called.
        args: its positional arguments.
        kwargs: its arguments by name.

    Raises:
        IncompatibleModelError: it lacks the text, or its rows have different timesteps.
    """
    arguments: dict[str, Any] = dict(
        inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
    )
    pooled: Any = arguments if family.pooled else None
    for key in family.pooled:
        pooled = (pooled or {}).get(key)
    sample: Any = arguments.get(family.sample)
    states: Any = arguments.get(family.states)
    lacking = [
        name
        for name, value in (
            (family.sample, sample),
            (family.states, states),
            (".".join(family.pooled), pooled),
        )
        if name and not isinstance(value, Tensor)
    ]
    if lacking:
        raise IncompatibleModelError(
            f"{type(denoiser).__name__} is called without {', '.join(lacking)}, which a model of the family "
            f"{family.name} gets"
        )
    timestep = _one_timestep(arguments["timestep"]) * family.timestep_unit
    return Call(arguments, sample, states, pooled, timestep)


def _one_timestep(timestep: Any) -> float:
    values = set(timestep.reshape(-1).tolist()) if isinstance(timestep, Tensor) else {timestep}
    if len(values) != 1:
        raise IncompatibleModelError(
            f"one call of the denoiser with {len(values)} timesteps: a plan has one width a layer and step"
        )
    return float(values.pop())


def scheduled(
    family: Family, timestep: float, known: list[float], dtype: torch.dtype, now: float | None
) -> float:
    """The scheduler's timestep that a call means; the call may hold it scaled, and in a coarser type.

    Args:
        family: of the denoiser.
        timestep: as `read_call` gives it.
        known: the scheduler's distinct timesteps.
        dtype: of the call's own timestep.
        now: what the pipeline says it is at, where it says so.

    Raises:
        IncompatibleModelError: it means none of them, or two.
    """
    if family.timestep_unit == 1 and timestep in known:
        return timestep

    def told(one: float) -> float:
        return float(torch.tensor(one).to(dtype) / family.timestep_unit) * family.timestep_unit

    found = [one for one in known if abs(told(one) - timestep) <= 1e-6 * max(abs(timestep), 1.0)]
    if now in found:
        assert now is not None
        return now
    if len(found) != 1:
        raise IncompatibleModelError(
            f"the denoiser is called at the timestep {timestep:g}, the scheduler has "
            + (f"{len(found)} that are the same in {dtype}" if found else "none like it")
            + f" ({', '.join(f'{one:g}' for one in known[:4])}, ...)"
        )
    return found[0]
