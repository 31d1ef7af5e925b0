"""Means with intervals, by a bootstrap that draws whole clusters of prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..prompts import PromptSet

DRAWS = 2000
LEVEL = 0.95
SEED = 0
CLUSTER_TAG = "concept"


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies in 95 of 100 bootstrap draws.

    Args:
        mean: over n prompts.
        low: lower end; None with a single cluster, which leaves nothing to draw.
        high: upper end, likewise.
        n: prompts.
        clusters: groups of prompts that were drawn as a whole.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def clusters_of(prompts: PromptSet) -> tuple[str, ...]:
    """The cluster of each prompt: its tag `concept`, or, without such tags, the prompt itself."""
    return prompts.tags.get(CLUSTER_TAG, prompts.prompts)


def numbered(names: Sequence[Hashable]) -> Tensor:
    """Each name as a number, `(n,)` int64, counted up from 0 by first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.long)


def drawn(clusters: int, draws: int = DRAWS, seed: int = SEED) -> Tensor:
    """How often each cluster is in each draw with replacement, `(draws, clusters)` float64."""
    picked = torch.randint(clusters, (draws, clusters), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(draws, clusters, dtype=torch.float64)
    return counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))


def mean_interval(values: Tensor, clusters: Sequence[Hashable]) -> Interval:
    """The mean of values, with the percentile interval of a clustered bootstrap.

    The same clusters give the same draws, whatever the values.

    Args:
        values: `(n,)`; for a paired difference, the differences.
        clusters: n names; prompts of one name are drawn together.

    Raises:
        ValueError: the sizes do not fit, or there is no value.
    """
    if values.ndim != 1 or len(values) != len(clusters) or not len(values):
        raise ValueError(f"values of shape {tuple(values.shape)} for {len(clusters)} prompts")
    values = values.double().cpu()
    groups = numbered(clusters)
    count = int(groups.max()) + 1
    mean = float(values.mean())
    if count < 2:
        return Interval(mean, None, None, len(values), count)
    zeros = torch.zeros(count, dtype=torch.float64)
    sums, sizes = zeros.index_add(0, groups, values), zeros.index_add(0, groups, torch.ones_like(values))
    weights = drawn(count)
    means = (weights @ sums) / (weights @ sizes)
    tail = (1 - LEVEL) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean, low, high, len(values), count)
