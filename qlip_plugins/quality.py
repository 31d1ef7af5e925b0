"""How good a picture is: what a metric gives, and KNN-GIQA, by distance to pictures known to be good."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .adapter import load_quality_metric
from .prompts import PromptSet
from .quality_metrics import metric_config

LEAST_DISTANCE = 1e-6
"""Stands in for the distance of a duplicate, which would divide by zero."""

_DISTANCES_AT_ONCE = 1 << 24


class Quality(Protocol):
    """Judges pictures; greater is better, the scale is its own.

    `facts` describes it in plain data (its name under `metric`), for the label set.
    """

    facts: Mapping[str, Any]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `(N,)` of images `(N, 3, H, W)` in 0..1, made from N prompts."""
        ...


class KnnGiqa:
    """KNN-GIQA: the sum over the K nearest reference pictures of 1 / distance, by L1 distance.

    Source: Gu et al., "GIQA: Generated Image Quality Assessment", ECCV 2020, from the definition. The
    authors give no answer to a distance of zero; here it counts as `LEAST_DISTANCE`.

    Args:
        reference_features: `(R, D)`, of real pictures.
        groups: what each reference picture shows, R names; None where nothing is ever excluded.
        k: K; the score of K = 50 repeats far better than that of K = 1.

    Raises:
        ValueError: the sizes do not fit, there are fewer than `k` references, or a value is not finite.
    """

    def __init__(self, reference_features: Tensor, groups: Sequence[str] | None = None, k: int = 50) -> None:
        if reference_features.ndim != 2 or not reference_features.isfinite().all():
            raise ValueError(
                f"reference features of shape {tuple(reference_features.shape)}, expected (R, D), all finite"
            )
        if groups is not None and len(groups) != len(reference_features):
            raise ValueError(f"{len(groups)} groups for {len(reference_features)} reference pictures")
        if not 1 <= k <= len(reference_features):
            raise ValueError(f"k = {k} nearest of {len(reference_features)} reference pictures")
        self.k = k
        self._reference = reference_features.float()
        self._rows = {name: row for row, name in enumerate(dict.fromkeys(groups or ()))}
        self._groups = torch.tensor([self._rows[name] for name in groups or ()])

    @property
    def size(self) -> int:
        """R, the number of reference pictures."""
        return len(self._reference)

    @torch.no_grad()
    def __call__(self, features: Tensor, exclude: Sequence[str] | None = None) -> Tensor:
        """Scores `(N,)`, float32, on the device of the features.

        Args:
            features: `(N, D)`.
            exclude: for each picture a group whose references do not count, so that a picture is not
                judged by references of its own subject. A group without references excludes nothing.

        Raises:
            ValueError: the sizes do not fit, a feature is not finite, or an exclusion leaves fewer than K.
        """
        if features.ndim != 2 or features.shape[1] != self._reference.shape[1]:
            raise ValueError(
                f"features of shape {tuple(features.shape)}, the references have length {self._reference.shape[1]}"
            )
        if not features.isfinite().all():
            raise ValueError("a picture's features are NaN or infinite")
        if exclude is not None and len(exclude) != len(features):
            raise ValueError(f"{len(exclude)} groups to exclude for {len(features)} pictures")
        chunk = max(1, _DISTANCES_AT_ONCE // self.size)
        reference = self._reference.to(features.device)
        scores = [
            self._scores(
                features[start : start + chunk].float(),
                reference,
                None if exclude is None else exclude[start : start + chunk],
            )
            for start in range(0, len(features), chunk)
        ]
        return torch.cat(scores) if scores else features.new_empty(0, dtype=torch.float32)

    def _scores(self, features: Tensor, reference: Tensor, exclude: Sequence[str] | None) -> Tensor:
        distances = torch.cdist(features, reference, p=1)
        if exclude is not None and len(self._groups):
            unwanted = torch.tensor([self._rows.get(name, -1) for name in exclude])
            distances[(unwanted[:, None] == self._groups).to(distances.device)] = torch.inf
        nearest = distances.topk(self.k, dim=1, largest=False).values
        if bool(nearest.isinf().any()):
            raise ValueError(
                f"without the excluded group fewer than k = {self.k} reference pictures are left"
            )
        return nearest.clamp(min=LEAST_DISTANCE).reciprocal().sum(1)


class GiqaQuality:
    """GIQA of pictures, each judged without the references of its prompt's own concept.

    Args:
        features: describes pictures.
        giqa: knows the references, described by the same features; called with features `(N, D)` and, for
            each picture, the concept to leave out.
        concepts: prompt -> the concept that does not count for its pictures; None excludes nothing.
        facts: of the metric, for the label set.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        giqa: Callable[[Tensor, Sequence[str] | None], Tensor],
        concepts: Mapping[str, str] | None,
        facts: Mapping[str, Any],
    ) -> None:
        self._features = features
        self._giqa = giqa
        self._concepts = concepts
        self.facts: Mapping[str, Any] = {**facts, "own_concept_excluded": concepts is not None}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Quality`."""
        exclude = None if self._concepts is None else [self._concepts[prompt] for prompt in prompts]
        return self._giqa(self._features(images), exclude)


class Turned:
    """A metric where lower is better, its sign turned so that greater is better."""

    def __init__(self, quality: Quality) -> None:
        self._quality = quality
        self.facts: Mapping[str, Any] = {**quality.facts, "negated": True}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Quality`."""
        return -self._quality(images, prompts)


def open_quality(
    name: str, options: Mapping[str, Any], pipe: Any, prompts: PromptSet, device: str
) -> Quality:
    """Open an installed metric; whatever its direction, what it gives is greater where better.

    Args:
        name: of the plug-in.
        options: of the metric, by name.
        pipe: the pipeline that draws the pictures.
        prompts: every prompt that will be judged, with its tags.
        device: where it computes.

    Raises:
        AdapterNotFoundError: there is no such metric.
        RecipeError: an option is unknown, missing, or has a wrong value.
        QlipError: as of the metric.
    """
    metric = load_quality_metric(name)
    quality = metric.open(metric_config(name, options), pipe, prompts, device)
    return quality if metric.higher_is_better else Turned(quality)
