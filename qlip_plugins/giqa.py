"""GIQA over a folder of reference pictures: what they are, KNN-GIQA opened on them, and GMM-GIQA."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import EVALUATION_HINT, ArtefactError, HostError, RecipeError
from .image_features import features_of, open_features
from .pictures import PictureFolder
from .prompts import PromptSet
from .quality import GiqaQuality, KnnGiqa
from .quality_metrics import GiqaConfig, GmmGiqaConfig, KnnGiqaConfig

LEAST_DEVIATION = 1e-6
_ROUNDS = 500


@dataclass(frozen=True)
class References:
    """Reference pictures as features.

    Args:
        describe: pictures `(N, 3, H, W)` -> features `(N, D)`, as the references'.
        features: `(R, D)`, of the references.
        groups: what each shows, R names; None where nothing is excluded.
        concepts: prompt -> what its pictures show; None where nothing is excluded.
        facts: which pictures, features and exclusion these are.
    """

    describe: Callable[[Tensor], Tensor]
    features: Tensor
    groups: tuple[str, ...] | None
    concepts: dict[str, str] | None
    facts: dict[str, Any]


def read_references(config: GiqaConfig, prompts: PromptSet, device: str) -> References:
    """Describe the reference pictures of a metric.

    Raises:
        RecipeError: prompts or references lack the tag that excludes.
        ArtefactError: a picture or the weights are unusable.
        AdapterNotFoundError: no such image features.
    """
    folder = PictureFolder(config.references)
    groups, concepts = _exclusion(config, folder, prompts)
    features = open_features(config.features, device)
    known = features_of(features, folder)
    deviation = torch.ones(known.shape[1])
    if config.standardise:
        if len(folder) < 2:
            raise ArtefactError(f"{folder.path}: one picture has no deviation, expected two or more")
        deviation = known.std(0).clamp(min=LEAST_DEVIATION)

    def describe(images: Tensor) -> Tensor:
        found = features(images)
        return found / deviation.to(found.device)

    facts = {
        "features": features.name,
        "features_digest": features.digest,
        "references": len(folder),
        "references_digest": folder.digest(),
        "standardised": config.standardise,
        "exclude": config.exclude,
        "groups_digest": groups and hashlib.sha256(json.dumps(groups).encode()).hexdigest(),
    }
    return References(describe, known / deviation, groups, concepts, facts)


def _exclusion(
    config: GiqaConfig, folder: PictureFolder, prompts: PromptSet
) -> tuple[tuple[str, ...] | None, dict[str, str] | None]:
    tag = config.exclude
    if tag is None:
        return None, None
    for what, tags in (("the prompts", prompts.tags), (f"{folder.path}", folder.tags)):
        if tag not in tags:
            known = ", ".join(tags) or "none"
            raise RecipeError(
                f"{what}: no tag {tag!r} (found: {known}), so references of a prompt's own {tag} cannot be left out. "
                "Give both that tag, in .jsonl and metadata.jsonl, or --set exclude=null to judge by all references"
            )
    return folder.tags[tag], dict(zip(prompts.prompts, prompts.tags[tag], strict=True))


def open_knn_giqa(config: KnnGiqaConfig, prompts: PromptSet, device: str) -> GiqaQuality:
    """KNN-GIQA on a folder of references; see `KnnGiqa` and `read_references`."""
    found = read_references(config, prompts, device)
    own = Counter(found.groups or ())
    for concept in {None, *(found.concepts or {}).values()}:
        left = len(found.features) - (own[concept] if concept is not None else 0)
        if left < config.k:
            without = "" if concept is None else f" without {config.exclude} {concept!r}"
            raise RecipeError(
                f"{config.references}: {left} references{without}, expected at least k = {config.k}: add some, or "
                "--set k=..."
            )
    giqa = KnnGiqa(found.features, found.groups, config.k)
    facts = {"metric": "knn-giqa", "k": config.k, **found.facts}
    return GiqaQuality(found.describe, giqa, found.concepts, facts)


def open_gmm_giqa(config: GmmGiqaConfig, prompts: PromptSet, device: str) -> GiqaQuality:
    """GMM-GIQA on a folder of references; see `GmmGiqa` and `read_references`."""
    found = read_references(config, prompts, device)
    giqa = GmmGiqa(found.features, found.groups, config)
    facts = {
        "metric": "gmm-giqa",
        "components": config.components,
        "covariance": config.covariance,
        "pca": config.pca,
        "folds": None if found.groups is None else config.folds,
        "seed": config.seed,
        "mixtures": giqa.mixtures,
        "mixtures_converged": giqa.converged,
        **found.facts,
    }
    return GiqaQuality(found.describe, giqa, found.concepts, facts)


class GmmGiqa:
    """GMM-GIQA: the log-likelihood of a picture's features under a Gaussian mixture of the references'.

    Its range is arbitrary: it ranks pictures, no more. Source: Gu et al., "GIQA: Generated Image Quality
    Assessment", ECCV 2020, from the definition; computed in float64 by scikit-learn. Where references have
    groups, these are dealt into folds by the SHA-256 of their names, and a picture is judged by the mixture
    that was fitted without the fold of its own group.

    Args:
        reference_features: `(R, D)`, of real pictures.
        groups: what each reference shows, R names; None: one mixture of all.
        config: how to fit.

    Raises:
        HostError: scikit-learn is not installed.
        RecipeError: a fold leaves fewer references than the mixture has Gaussians.
    """

    def __init__(
        self, reference_features: Tensor, groups: Sequence[str] | None, config: GmmGiqaConfig
    ) -> None:
        known = reference_features.double().cpu().numpy()
        self._folds = 1 if groups is None else config.folds
        of_rows = np.array([self._fold(group) for group in groups or ()])
        chosen = (
            [np.ones(len(known), dtype=bool)]
            if groups is None
            else [of_rows != fold for fold in range(config.folds)]
        )
        self._fits = [_Mixture(known[rows], config) for rows in chosen]
        self.mixtures = len(self._fits)
        self.converged = sum(fit.converged for fit in self._fits)

    def __call__(self, features: Tensor, exclude: Sequence[str] | None = None) -> Tensor:
        """Scores `(N,)`, float64, on the CPU.

        Args:
            features: `(N, D)`.
            exclude: for each picture the group that its judge has not seen; needed where there are groups.
        """
        described = features.detach().double().cpu().numpy()
        if exclude is None:
            return torch.from_numpy(self._fits[0].score(described))
        scores = np.empty(len(described))
        folds = np.array([self._fold(group) for group in exclude])
        for fold in np.unique(folds):
            scores[folds == fold] = self._fits[fold].score(described[folds == fold])
        return torch.from_numpy(scores)

    def _fold(self, group: str) -> int:
        return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % self._folds


class _Mixture:
    """One fit, after a projection where one is asked for."""

    def __init__(self, known: np.ndarray[Any, Any], config: GmmGiqaConfig) -> None:
        try:
            from sklearn.decomposition import PCA
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.mixture import GaussianMixture
        except ImportError as error:
            raise HostError(f"metric gmm-giqa: {error}: {EVALUATION_HINT}") from None
        if len(known) < max(2, config.components):
            raise RecipeError(
                f"{config.references}: {len(known)} references are left outside a fold, expected at least "
                f"{max(2, config.components)} for {config.components} Gaussians"
            )
        self._projection = None if config.pca is None else PCA(config.pca, svd_solver="full").fit(known)
        self._mixture = GaussianMixture(
            config.components, covariance_type=config.covariance, random_state=config.seed, max_iter=_ROUNDS
        )
        with warnings.catch_warnings():
            # Whether it converged stands in the facts.
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._mixture.fit(self._projected(known))
        self.converged = bool(self._mixture.converged_)

    def score(self, features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Log-likelihoods `(N,)`."""
        scores: np.ndarray[Any, Any] = self._mixture.score_samples(self._projected(features))
        return scores

    def _projected(self, features: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        projected: np.ndarray[Any, Any] = (
            features if self._projection is None else self._projection.transform(features)
        )
        return projected
