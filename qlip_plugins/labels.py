"""Labels for T2Q: how good the full-precision model's pictures of each prompt are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .artefacts import read_tensors, write_tensors
from .errors import ArtefactError

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
