"""Labels for T2Q: how good the full-precision model's pictures of each prompt are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .artefacts import read_tensors, write_tensors
from .embeddings import EncodedPrompts
from .errors import ArtefactError, IncompatibleModelError
from .generation import Settings, noise_seeds, placed
from .progress import progress
from .quality import Quality

LABELS_FORMAT = "qlip-plugins labels"
LABELS_VERSION = 1


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 0 .. n - 1 of `(n,)` values, float64; equal values share the mean of their ranks."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    ranks: Tensor = (ends - (counts + 1) / 2.0).double()[group]
    return ranks


def rank_normalise(values: Tensor) -> Tensor:
    """Average ranks of `(n,)` values, scaled to 0..1, float32; a single value is 0.5."""
    if len(values) < 2:
        return torch.full((len(values),), 0.5)
    return (average_ranks(values) / (len(values) - 1)).float()


def pearson(first: Tensor, second: Tensor) -> float:
    """Linear correlation (PLCC) of two `(n,)` tensors; NaN where one of them does not vary."""
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = a.norm() * b.norm()
    return float((a @ b) / scale) if bool(scale > 0) else float("nan")


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation (SROCC) of two `(n,)` tensors, ties at their mean rank; NaN where one does not vary."""
    return pearson(average_ranks(first), average_ranks(second))


@dataclass(frozen=True)
class Labels:
    """What T2Q learns from.

    Args:
        prompts: n distinct prompts.
        embeddings: z, `(n, D)` float32, as the controller will see them.
        scores: `(n, S)` float32, raw, of S pictures of each prompt with independent noises.
        facts: the metric and its settings, how the pictures were made; anything that JSON can hold.
        tags: name -> n strings, such as concept, level, seen.

    Raises:
        ValueError: the sizes do not fit, a prompt comes twice, or a value is not finite.
    """

    prompts: tuple[str, ...]
    embeddings: Tensor
    scores: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if len(set(self.prompts)) < n:
            raise ValueError("a prompt is listed twice")
        for name, tensor in (("embeddings", self.embeddings), ("scores", self.scores)):
            if tensor.ndim != 2 or len(tensor) != n or 0 in tensor.shape or not tensor.isfinite().all():
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)} for {n} prompts, expected two axes, all finite"
                )
        for name, values in self.tags.items():
            if len(values) != n:
                raise ValueError(f"the tag {name!r} has {len(values)} values for {n} prompts")

    @property
    def targets(self) -> Tensor:
        """`(n,)` in 0..1: within each seed the ranks of the scores, averaged over seeds, ranked again.

        Ranks, because a raw score has an arbitrary scale and a long tail.
        """
        return rank_normalise(torch.stack([average_ranks(seed) for seed in self.scores.T]).mean(0))

    def reliability(self, rows: Sequence[int] | None = None) -> float | None:
        """rho, the rank correlation between the scores of two seeds, averaged over all pairs of seeds.

        Args:
            rows: of these prompts alone; None means all.

        Returns:
            None with one seed, or where a seed's scores do not vary.
        """
        scores = self.scores if rows is None else self.scores[list(rows)]
        pairs = [spearman(a, b) for a, b in itertools.combinations(scores.T, 2)]
        mean = sum(pairs) / len(pairs) if pairs else float("nan")
        return None if math.isnan(mean) else mean

    def save(self, path: Path) -> None:
        """Write as safetensors, whole or not at all."""
        write_tensors(
            path,
            LABELS_FORMAT,
            LABELS_VERSION,
            {"embeddings": self.embeddings, "scores": self.scores},
            prompts=self.prompts,
            facts=dict(self.facts),
            tags=dict(self.tags),
            reliability=self.reliability(),
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, damaged, or no label set.
        """
        tensors, facts = read_tensors(path, LABELS_FORMAT, LABELS_VERSION)
        try:
            return cls(
                prompts=tuple(facts["prompts"]),
                embeddings=tensors["embeddings"],
                scores=tensors["scores"],
                facts=facts["facts"],
                tags={name: tuple(values) for name, values in facts["tags"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtefactError(f"{path}: not a label set: {error}") from None


def make_labels(
    pipe: Any,
    prompts: EncodedPrompts,
    score: Quality,
    settings: Settings,
    seeds: int = 2,
    tags: Mapping[str, Sequence[str]] | None = None,
    batch: int = 16,
) -> Labels:
    """Generate pictures of each prompt in full precision, and judge them.

    Seed s of a prompt has the noise that `qlip-plugins generate` gives its picture where the prompt is
    named for the (s + 1)-th time.

    Args:
        pipe: the float pipeline, without a recipe and without a safety checker, which would blacken
            pictures; it is moved to the device and type of `settings`.
        prompts: n distinct prompts.
        score: judges images; where the pipeline has no decoder it is given latents `(N, C, h, w)`.
        settings: as for `generate`.
        seeds: pictures of each prompt; two or more make the labels' reliability known.
        tags: name -> n strings.
        batch: pictures generated at once.

    Raises:
        ValueError: as of `Labels`, or the score gives another number of values than pictures.
        IncompatibleModelError: the pipeline has a safety checker.
    """
    if getattr(pipe, "safety_checker", None) is not None:
        raise IncompatibleModelError(
            f"{type(pipe).__name__} has a safety checker, which replaces some pictures by black ones: their labels "
            "would be wrong. Load it with safety_checker=None"
        )
    n = len(prompts.prompts)
    if len(set(prompts.prompts)) < n or seeds < 1:
        raise ValueError(f"need distinct prompts and at least one seed, found {n} prompts and {seeds} seeds")
    pipe = placed(pipe, settings)
    noises = noise_seeds(prompts.prompts * seeds, settings.seed)
    starts = [(seed, row) for seed in range(seeds) for row in range(0, n, batch)]
    found = []
    for seed, start in progress(starts, "making labels"):
        rows = range(start, min(start + batch, n))
        images = _pictures(pipe, prompts.only(rows), settings, [noises[seed * n + row] for row in rows])
        values = score(images, prompts.prompts[start : start + batch])
        if values.shape != (len(rows),):
            raise ValueError(f"the score gives shape {tuple(values.shape)} for {len(rows)} pictures")
        found.append(values.detach().float().cpu())
    return Labels(
        prompts=prompts.prompts,
        embeddings=prompts.embeddings,
        scores=torch.cat(found).reshape(seeds, n).T.contiguous(),
        facts={**score.facts, "pooling": prompts.pooling, "seeds": seeds, "pictures": asdict(settings)},
        tags={name: tuple(values) for name, values in (tags or {}).items()},
    )


def _pictures(pipe: Any, prompts: EncodedPrompts, settings: Settings, noises: Sequence[int]) -> Tensor:
    images: Tensor = pipe(
        prompt_embeds=prompts.states.to(pipe.device, pipe.unet.dtype),
        negative_prompt_embeds=prompts.empty.expand_as(prompts.states).to(pipe.device, pipe.unet.dtype),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(noise) for noise in noises],
        output_type="latent" if getattr(pipe, "vae", None) is None else "pt",
    ).images
    return images
