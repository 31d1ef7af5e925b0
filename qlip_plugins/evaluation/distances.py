"""Distances between two sets of pictures: FID, sFID and KID, by torchmetrics, on features of any extractor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EVALUATION_HINT, HostError, IncompatibleModelError
from .bootstrap import drawn, numbered

FID_DRAWS = 30
KID_SUBSETS = 100
KID_LARGEST_SUBSET = 1000
LEAST_PICTURES = 8
"""Of which KID can draw subsets."""

FEW = 5000
"""Below so many pictures FID's bias is large, and KID is the one to read."""

_NORMAL = 1.96


@dataclass(frozen=True)
class SetDistance:
    """A distance between pictures and references.

    Args:
        value: the distance.
        low: lower end of its interval; None where there is nothing to draw.
        high: upper end, likewise.
        n: pictures.
        references: pictures they are compared with.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    references: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


class _Given(nn.Module):
    """Stands where torchmetrics expects an extractor: it is handed features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_torchmetrics() -> None:
    """Check that torchmetrics is at hand.

    Raises:
        HostError: it is not.
    """
    try:
        import torchmetrics.image  # noqa: F401
    except ImportError as error:
        raise HostError(f"FID, sFID and KID need torchmetrics ({error}): {EVALUATION_HINT}") from None


def label(kind: str, extractor: str) -> str:
    """What a distance is called: published figures of that name are those on Inception features alone.

    Args:
        kind: `fid`, `sfid` or `kid`.
        extractor: name of the plug-in.
    """
    name = {"fid": "FID", "sfid": "sFID", "kid": "KID"}[kind]
    return f"{name} ({extractor})" if extractor == "inception" else f"{name}-lite ({extractor})"


def frechet_distance(
    features: Tensor, references: Tensor, clusters: Sequence[Hashable] | None = None
) -> SetDistance:
    """Frechet distance of two sets of features (FID of pooled ones, sFID of spatial ones), in float64.

    The value is that of all pictures; it is biased upwards, the more the fewer they are. The interval is
    value +- 1.96 s, s being the deviation over bootstrap draws of whole clusters: it shows the spread
    between draws of pictures, and not the bias.

    Args:
        features: `(n, D)`.
        references: `(m, D)`; they are not drawn.
        clusters: n names; None, or a single name, gives no interval.

    Raises:
        HostError: torchmetrics is not installed.
        IncompatibleModelError: fewer than two of either, or they are of different length.
    """
    _check(features, references)
    check_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    features, references = features.double(), references.double()
    metric = FrechetInceptionDistance(_Given(features.shape[1])).to(features.device)
    metric.update(references, real=True)
    metric.update(features, real=False)
    value = float(metric.compute())
    spread = None if clusters is None else _fid_spread(features, references, clusters)
    low, high = (None, None) if spread is None else (value - _NORMAL * spread, value + _NORMAL * spread)
    return SetDistance(value, low, high, len(features), len(references))


def _fid_spread(features: Tensor, references: Tensor, clusters: Sequence[Hashable]) -> float | None:
    groups = numbered(clusters).to(features.device)
    count = int(groups.max()) + 1
    if count < 2:
        return None
    mean, covariance = _moments(references, torch.ones_like(references[:, 0]))
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    found = []
    for weights in drawn(count, FID_DRAWS).to(features.device):
        ours, spread = _moments(features, weights[groups])
        # The product of two covariances has the eigenvalues of this symmetric matrix.
        product = torch.linalg.eigvalsh(root @ spread @ root).clamp(min=0).sqrt().sum()
        found.append((ours - mean).square().sum() + covariance.trace() + spread.trace() - 2 * product)
    return float(torch.stack(found).std())


def _moments(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of features, each counted as often as its weight says."""
    total = weights.sum()
    mean = weights @ features / total
    centred = (features - mean) * weights.sqrt()[:, None]
    return mean, centred.T @ centred / (total - 1)


def kernel_distance(features: Tensor, references: Tensor, seed: int = 0) -> SetDistance:
    """KID, in float64: unbiased squared MMD with the kernel `(x y / D + 1)^3`, mean over 100 random subsets.

    A subset holds a quarter of the smaller set, at most 1,000 pictures. The interval is value +- 1.96 s, with
    s the deviation over the subsets brought to the smaller set's size, `sd sqrt(k / (N - k))` for subsets of k
    out of N; pictures of one concept count as independent there.

    Args:
        features: `(n, D)`.
        references: `(m, D)`.
        seed: of the subsets.

    Raises:
        HostError: torchmetrics is not installed.
        IncompatibleModelError: fewer than `LEAST_PICTURES` of either, or they are of different length.
    """
    _check(features, references)
    smaller = min(len(features), len(references))
    size = min(KID_LARGEST_SUBSET, smaller // 4)
    if smaller < LEAST_PICTURES:
        raise IncompatibleModelError(
            f"KID of {len(features)} pictures and {len(references)} references: needs at least {LEAST_PICTURES} of each"
        )
    check_torchmetrics()
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        torch.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(_Given(features.shape[1]), subsets=KID_SUBSETS, subset_size=size)
        metric.update(references.double(), real=True)
        metric.update(features.double(), real=False)
        mean, deviation = (float(found) for found in metric.compute())
    half = _NORMAL * deviation * math.sqrt(size / (smaller - size))
    return SetDistance(mean, mean - half, mean + half, len(features), len(references))


def _check(features: Tensor, references: Tensor) -> None:
    if features.shape[1:] != references.shape[1:] or min(len(features), len(references)) < 2:
        raise IncompatibleModelError(
            f"pictures with features {tuple(features.shape)}, references with {tuple(references.shape)}: need at "
            "least two of each, of one length"
        )
