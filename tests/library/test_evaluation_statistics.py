"""Intervals and distances between sets, against formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.evaluation.bootstrap import clusters_of, mean_interval
from qlip_plugins.evaluation.distances import frechet_distance, kernel_distance, label
from qlip_plugins.prompts import PromptSet

pytest.importorskip("torchmetrics", reason="extra `evaluation`")
linalg = pytest.importorskip("scipy.linalg", reason="extra `evaluation`")


def features(n: int, seed: int, shift: float = 0.0, width: int = 6) -> Tensor:
    draw = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return draw * torch.linspace(0.5, 2, width) + shift


def test_the_mean_and_its_interval_are_those_of_a_plain_bootstrap() -> None:
    values = features(40, 0, width=1)[:, 0]
    found = mean_interval(values, range(40))
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert (found.n, found.clusters) == (40, 40)
    random = np.random.default_rng(0)
    means = values.numpy()[random.integers(0, 40, (20000, 40))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert mean_interval(values, range(40)) == found


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """With values of a cluster alike, drawing prompts instead of clusters would cover far too seldom."""
    covered = by_prompt = 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        values = torch.randn(30, generator=generator).repeat_interleave(4)
        clusters = [row // 4 for row in range(120)]
        for clustered in (True, False):
            found = mean_interval(values, clusters if clustered else range(120))
            assert found.low is not None
            assert found.high is not None
            inside = found.low <= 0 <= found.high
            covered, by_prompt = covered + (inside and clustered), by_prompt + (inside and not clustered)
    assert 87 <= covered <= 99
    assert by_prompt < 75


def test_clusters_are_concepts_and_one_cluster_has_no_interval() -> None:
    assert clusters_of(PromptSet(("a", "b"))) == ("a", "b")
    assert clusters_of(PromptSet(("a", "b"), {"concept": ("fox", "fox")})) == ("fox", "fox")
    alone = mean_interval(torch.tensor([1.0, 3.0]), ("fox", "fox"))
    assert (alone.mean, alone.low, alone.high) == (2.0, None, None)
    with pytest.raises(ValueError, match="for 3 prompts"):
        mean_interval(torch.zeros(2), range(3))


def test_frechet_distance_is_the_formula() -> None:
    ours, theirs = features(50, 0, 0.3), features(70, 1)
    a, b = ours.double().numpy(), theirs.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    found = frechet_distance(ours, theirs, range(50))
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert (found.n, found.references) == (50, 70)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found == frechet_distance(ours, theirs, range(50))
    assert frechet_distance(theirs, theirs).value == pytest.approx(0, abs=1e-6)
    assert frechet_distance(ours, theirs, ["one"] * 50).low is None


def test_the_interval_of_the_frechet_distance_is_its_spread() -> None:
    """The deviation over bootstrap draws is about that over fresh draws of pictures."""
    references = features(400, 0)
    fresh = [frechet_distance(features(200, seed, 0.3), references).value for seed in range(1, 31)]
    found = frechet_distance(features(200, 99, 0.3), references, range(200))
    assert found.high is not None
    half = found.high - found.value
    assert half / 1.96 == pytest.approx(float(np.std(fresh)), rel=0.6)


def test_kernel_distance_is_the_unbiased_formula() -> None:
    ours, theirs = features(40, 0, 0.3), features(40, 1)
    x, y = ours.double(), theirs.double()
    pieces = [(a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = [(kernel.sum() - kernel.trace()) / (40 * 39) for kernel in pieces[:2]]
    expected = float(within[0] + within[1] - 2 * pieces[2].mean())
    found = kernel_distance(ours, theirs)
    assert found.low is not None
    assert found.high is not None
    # Subsets of a quarter of the pictures, 100 of them: their mean is near the value of all pairs.
    assert abs(found.value - expected) < (found.high - found.low) / 2
    assert found == kernel_distance(ours, theirs)
    none = [kernel_distance(features(60, seed), features(60, seed + 50)).value for seed in range(10)]
    assert abs(float(np.mean(none))) < 2 * float(np.std(none))


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(IncompatibleModelError, match="needs at least 8 of each"):
        kernel_distance(features(7, 0), features(20, 0))
    with pytest.raises(IncompatibleModelError, match="of one length"):
        frechet_distance(features(7, 0), features(20, 0, width=5))


def test_only_inception_gives_fid() -> None:
    assert label("fid", "inception") == "FID (inception)"
    assert label("sfid", "demo") == "sFID-lite (demo)"
    assert label("kid", "efficientnet-lite0") == "KID-lite (efficientnet-lite0)"
