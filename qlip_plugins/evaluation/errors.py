"""What an allocation does to the prediction and to the picture, against full precision at the same noise."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapter import load_correction
from ..controller import BitController, apply_base, check_ranges, load_base
from ..embeddings import EncodedPrompts, encode
from ..errors import IncompatibleModelError
from ..families import family_of
from ..generation import Settings, noise_seeds, sample_encoded
from ..image_features import ImageFeatures
from ..metrics import Cost, cost_of
from ..plan import BitPlan
from ..quality import Quality
from ..recipe import FULL_PRECISION, Recipe
from ..recording import Course, recording

LEAST_MSE = 1e-10
"""Of two pictures, for PSNR: equal ones have 100 dB, not infinitely many."""

Measured = dict[str, Tensor]
"""Name -> values, one row for each picture."""


@dataclass(frozen=True)
class Judges:
    """What pictures are described and judged by.

    Args:
        features: name -> extractor.
        scores: name -> metric of single pictures; greater is better.
    """

    features: Mapping[str, ImageFeatures]
    scores: Mapping[str, Quality]


class Pair:
    """The full-precision model and, on a copy of its denoiser, the quantized one; made by `paired`.

    Args:
        teacher: the float pipeline, on its device.
        recipe: gives the base, its backend and ranges, and the correction.
        controller: of the quantized pipeline.
        prompts: n of them.
        settings: how to sample.
        recipe_plan: the recipe's own plan of the n prompts.
    """

    def __init__(
        self,
        teacher: Any,
        recipe: Recipe,
        controller: BitController,
        prompts: EncodedPrompts,
        settings: Settings,
        recipe_plan: BitPlan,
    ) -> None:
        self.teacher = teacher
        self.recipe = recipe
        self.controller = controller
        self.prompts = prompts
        self.settings = settings
        self.recipe_plan = recipe_plan

    @property
    def base_plan(self) -> BitPlan:
        """Every quantizer of the recipe's plan at the base's width, for one prompt."""
        widths, plan = self.controller.base_bits(), self.recipe_plan
        row = torch.tensor([widths[name] for name in plan.layers], dtype=torch.uint8)
        return BitPlan(
            row.expand(1, len(plan.timesteps), len(plan.layers)).clone(), plan.timesteps, plan.layers
        )

    def check(self, name: str, plan: BitPlan) -> None:
        """Check that a plan can be evaluated, before any work.

        Raises:
            IncompatibleModelError: it is of other prompts, layers or timesteps, or a width has no range.
        """
        n = len(self.prompts.prompts)
        if plan.prompts not in (1, n):
            raise IncompatibleModelError(
                f"allocation {name!r}: a plan of {plan.prompts} prompts, there are {n}"
            )
        if set(plan.timesteps) != set(self.recipe_plan.timesteps):
            raise IncompatibleModelError(
                f"allocation {name!r}: a plan of {len(plan.timesteps)} timesteps, the sampler visits "
                f"{len(self.recipe_plan.timesteps)}, or others: make it for these steps"
            )
        self.controller.follow(plan)
        check_ranges(self.controller.ranges, self.recipe, self.controller.state, self.controller.planner)

    def costs(self, plan: BitPlan) -> list[Cost]:
        """What each of the n prompts costs."""
        costs = self.controller.costs_of(replace(plan, quality=None))
        return costs * len(self.prompts.prompts) if plan.prompts == 1 else costs

    def full_precision_costs(self) -> list[Cost]:
        """What each of the n prompts costs with no quantizer anywhere."""
        plan, controller = self.base_plan, self.controller
        wide = replace(plan, bits=torch.full_like(plan.bits, FULL_PRECISION))
        return cost_of(wide, controller.counts(), {}, {}, controller.visits) * len(self.prompts.prompts)


@contextmanager
def paired(pipe: Any, recipe: Recipe, prompts: Sequence[str], settings: Settings) -> Iterator[Pair]:
    """Put a recipe on a copy of a pipeline's denoiser, so that both models are at hand.

    Args:
        pipe: the float pipeline, on its device; it is left as it is.
        recipe: to evaluate.
        prompts: n texts.
        settings: how to sample.

    Raises:
        ArtefactError: a file that the recipe names is missing or damaged.
        IncompatibleModelError: the recipe and the pipeline do not belong together, or the pipeline has a
            safety checker.
    """
    if getattr(pipe, "safety_checker", None) is not None:
        raise IncompatibleModelError(
            f"{type(pipe).__name__} has a safety checker, which replaces some pictures by black ones. Load it with "
            "safety_checker=None"
        )
    student = copy.copy(pipe)
    family = family_of(pipe)
    denoiser = copy.deepcopy(family.denoiser_of(pipe))
    setattr(student, family.component, denoiser)
    state = load_base(recipe, denoiser)
    state.check_plain(denoiser)
    plain = recipe.model_copy(update={"correction": None})
    # Before the prompts are encoded: the planner recognises what the text encoder gives from then on.
    with apply_base(student, plain, state) as controller:
        encoded = encode(pipe, recipe.model.prompt_embeddings, prompts)
        # One generation: plans and costs depend on the calls that are made.
        sample_encoded(student, encoded.only([0]), settings, [0], "latent")
        plan = controller.plan_for(encoded.conditioning)
        yield Pair(pipe, recipe, controller, encoded, settings, plan)


@dataclass(frozen=True)
class Batch:
    """One picture of each of some prompts.

    Args:
        seed: which picture of each prompt, from 0.
        rows: of the prompts.
    """

    seed: int
    rows: range

    @property
    def name(self) -> str:
        """Part of a file's name."""
        return f"{self.seed:03d}-{self.rows.start:06d}"


def batches(prompts: int, seeds: int, size: int) -> list[Batch]:
    """All batches: seed by seed, in the order of the prompts."""
    starts = range(0, prompts, size)
    return [
        Batch(seed, range(start, min(start + size, prompts))) for seed in range(seeds) for start in starts
    ]


def noises_of(prompts: Sequence[str], seed: int, number: int) -> list[int]:
    """The noise of picture `number` of each of some distinct prompts, as `qlip-plugins generate` gives it.

    Args:
        prompts: distinct texts.
        seed: of the run.
        number: how often each prompt has been drawn before.
    """
    return [noise_seeds([prompt] * (number + 1), seed)[-1] for prompt in prompts]


class Measuring:
    """A batch in full precision, which any number of allocations are then compared with.

    Args:
        pair: of models.
        judges: of pictures; used where the pipeline has a decoder.
        batch: which pictures.
        skip: `own`, the errors on the plan's own way; `pictures`, all that is said of pictures. Both take
            time that the primary metric does not need.
    """

    def __init__(self, pair: Pair, judges: Judges, batch: Batch, skip: Collection[str] = ()) -> None:
        self._pair = pair
        self._skip = skip
        self._judges = judges
        self._batch = batch
        self._prompts = pair.prompts.only(batch.rows)
        self._noises = noises_of(self._prompts.prompts, pair.settings.seed, batch.seed)
        self._course, self._pictures = self._sampled(pair.teacher, None, self.pictures_are)
        self._described = self._describe(self._pictures)

    @property
    def timesteps(self) -> list[float]:
        """Of the C calls of the denoiser."""
        return self._course.timesteps

    @property
    def pictures_are(self) -> str:
        """What the pipeline gives: `pt`, pictures `(N, 3, H, W)` in 0..1, or `latent` without a decoder."""
        undecoded = getattr(self._pair.teacher, "vae", None) is None or "pictures" in self._skip
        return "latent" if undecoded else "pt"

    def full_precision(self) -> Measured:
        """What there is to say of the full-precision pictures themselves."""
        shape = (len(self._noises), len(self.timesteps))
        kinds = ["error_led"] if "own" in self._skip else ["error_led", "error_own"]
        none = {name: torch.zeros(shape, dtype=torch.float64) for name in kinds}
        return self._on_cpu({**none, **self._compared(self._pictures)})

    def allocation(self, plan: BitPlan) -> Measured:
        """What a plan does.

        Args:
            plan: of all prompts of the pair, or of one for all of them.

        Returns:
            `error_led` and `error_own`, `(N, C)` float64: mean squared difference of the two models'
            predictions after guidance, at each call, at the samples of the full-precision model, and at those
            that the quantized one visits by itself, unless skipped. Then of the pictures that it draws by itself,
            `(N,)`: `picture_mse` and `psnr` (dB, of 0..1; latents have none) against the full-precision picture
            of the same noise, `distance.NAME`, the cosine distance of their features, and `score.NAME`; and
            `features.NAME`, `(N, D)`, `spatial.NAME`, `(N, S)`, `pictures`, uint8.
            The errors are those of the denoiser, before a correction in the sampler.

        Raises:
            IncompatibleModelError: the plan does not fit, the recipe's correction does not hold for it or calls
                the denoiser at other timesteps, or a prediction is NaN or infinite.
        """
        pair, rows = self._pair, list(self._batch.rows)
        controller = pair.controller
        controller.follow(plan if plan.prompts == 1 else _rows_of(plan, rows))
        with _corrected(controller, pair.recipe):
            led, _ = self._sampled(controller.pipe, self._course.samples, "latent")
            self._check_same_calls(led)
            found = {"error_led": led.error(self._course)}
            own: Course | None = None
            if not {"own", "pictures"} <= set(self._skip):
                own, pictures = self._sampled(controller.pipe, None, self.pictures_are)
                self._check_same_calls(own)
                found |= self._compared(pictures)
        if own is not None and "own" not in self._skip:
            teacher, _ = self._sampled(pair.teacher, own.samples, "latent")
            found["error_own"] = own.error(teacher)
        for name in found.keys() & {"error_led", "error_own"}:
            if not bool(found[name].isfinite().all()):
                raise IncompatibleModelError(
                    f"a prediction is NaN or infinite ({name}), prompts {self._prompts.prompts[0]!r} and following"
                )
        return self._on_cpu(found)

    def _check_same_calls(self, own: Course) -> None:
        if own.timesteps != self._course.timesteps:
            raise IncompatibleModelError(
                f"the recipe samples with {len(own.timesteps)} calls at other timesteps than the pipeline "
                f"({len(self._course.timesteps)}): give the pipeline the sampler of the correction (DDIM)"
            )

    def _sampled(self, pipe: Any, along: Sequence[Tensor] | None, output_type: str) -> tuple[Course, Tensor]:
        with recording(pipe, along) as course:
            given = sample_encoded(pipe, self._prompts, self._pair.settings, self._noises, output_type)
        pictures: Tensor = given.float()
        # As a file holds them, and the references: 8 bits a channel.
        return course, (pictures * 255).round() / 255 if output_type == "pt" else pictures

    def _describe(self, pictures: Tensor) -> Measured:
        if self.pictures_are == "latent" or "pictures" in self._skip:
            return {}
        described = {}
        for name, features in self._judges.features.items():
            described[f"features.{name}"] = features(pictures).float()
            described[f"spatial.{name}"] = features.spatial(pictures).float()
        return described

    def _compared(self, pictures: Tensor) -> Measured:
        if "pictures" in self._skip:
            return {}
        described = self._described if pictures is self._pictures else self._describe(pictures)
        mse = (pictures - self._pictures).double().square().flatten(1).mean(1)
        found = {"picture_mse": mse, **described}
        if self.pictures_are == "latent":
            return found
        found["pictures"] = (pictures * 255).round().byte()
        found["psnr"] = -10 * mse.clamp(min=LEAST_MSE).log10()
        for name in self._judges.features:
            ours, theirs = (kept[f"features.{name}"].double() for kept in (described, self._described))
            # Rounding can take the cosine of equal features above 1.
            found[f"distance.{name}"] = (1 - F.cosine_similarity(ours, theirs)).clamp(min=0)
        for name, score in self._judges.scores.items():
            found[f"score.{name}"] = score(pictures, self._prompts.prompts).double()
        return found

    def _on_cpu(self, found: Measured) -> Measured:
        return {name: value.detach().cpu() for name, value in found.items()}


def _rows_of(plan: BitPlan, rows: Sequence[int]) -> BitPlan:
    return replace(plan, bits=plan.bits[list(rows)], quality=None)


@contextmanager
def _corrected(controller: BitController, recipe: Recipe) -> Iterator[None]:
    """The recipe's correction in the quantized pipeline's sampler, for the plan at hand."""
    if recipe.correction is None:
        yield
        return
    correction = load_correction(recipe.correction.adapter)
    controller.correct(correction.scheduler(recipe.correction, recipe, controller))
    try:
        yield
    finally:
        controller.uncorrect()
