"""Quality scores, rank statistics and label sets, against their definitions one number at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins import quality
from qlip_plugins.embeddings import EncodedPrompts, EndOfTextState, PromptEmbeddings
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.families import Conditioning
from qlip_plugins.generation import Settings, sample
from qlip_plugins.labelling import make_labels
from qlip_plugins.labels import Labels, pearson, rank_normalise, spearman
from qlip_plugins.quality import LEAST_DISTANCE, GiqaQuality, KnnGiqa
from qlip_plugins.recipe import Recipe


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def giqa(feature: list[float], references: list[list[float]], k: int) -> float:
    distances = sorted(sum(abs(a - b) for a, b in zip(feature, row, strict=True)) for row in references)
    return sum(1 / max(distance, LEAST_DISTANCE) for distance in distances[:k])


def test_knn_giqa_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_DISTANCES_AT_ONCE", 60)  # several chunks, the last one short
    references, features = draw(20, 5), draw(8, 5, seed=1)
    features[3] = references[7]
    groups = [f"group {row % 4}" for row in range(20)]
    exclude = [f"group {row % 4}" for row in range(7)] + ["none of them"]
    score = KnnGiqa(references, groups, k=6)
    assert score(features).tolist() == pytest.approx(
        [giqa(row, references.tolist(), 6) for row in features.tolist()], rel=1e-5
    )
    expected = []
    for feature, group in zip(features.tolist(), exclude, strict=True):
        left = [row for row, name in zip(references.tolist(), groups, strict=True) if name != group]
        expected.append(giqa(feature, left, 6))
    assert score(features, exclude).tolist() == pytest.approx(expected, rel=1e-5)
    assert float(score(features)[3]) > 1 / LEAST_DISTANCE > float(score(features, exclude)[3])


def test_knn_giqa_refuses_what_has_no_score() -> None:
    for references, groups, k in ((draw(3, 2), None, 4), (draw(3, 2), ["a"], 1), (draw(3), None, 1)):
        with pytest.raises(ValueError, match="reference"):
            KnnGiqa(references, groups, k)
    score = KnnGiqa(draw(4, 2), ["a", "a", "b", "c"], k=3)
    with pytest.raises(ValueError, match="fewer than k = 3"):
        score(draw(1, 2), ["a"])
    with pytest.raises(ValueError, match="references have length 2"):
        score(draw(1, 3))
    with pytest.raises(ValueError, match="NaN"):
        score(torch.full((1, 2), torch.nan))


def test_a_picture_is_not_judged_by_its_own_concept() -> None:
    def mean_colour(images: Tensor) -> Tensor:
        return images.mean((2, 3))

    references = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    metric = KnnGiqa(references, ["red", "green", "blue"], k=1)
    image = torch.tensor([0.75, 0.25, 0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    judged = GiqaQuality(mean_colour, metric, {"a fox": "red"}, {"metric": "m"})(image, ["a fox"])
    assert float(judged) == pytest.approx(1 / 1.5)
    anyhow = GiqaQuality(mean_colour, metric, None, {"metric": "m"})
    assert float(anyhow(image, ["a fox"])) == pytest.approx(1 / 0.5)
    assert (anyhow.facts["metric"], anyhow.facts["own_concept_excluded"]) == ("m", False)


def ranks(values: list[float]) -> list[float]:
    """The mean of the places, from 0, that each value could have."""
    places: list[float] = []
    for value in values:
        below, equal = sum(v < value for v in values), sum(v == value for v in values)
        places.append(below + (equal - 1) / 2)
    return places


def correlation(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def test_rank_statistics_are_their_definitions() -> None:
    pick = random.Random(0)
    for _ in range(20):
        a = [float(pick.randrange(6)) for _ in range(15)]  # many ties
        b = [x + pick.gauss(0, 2) for x in a]
        first, second = torch.tensor(a), torch.tensor(b)
        assert spearman(first, second) == pytest.approx(correlation(ranks(a), ranks(b)), abs=1e-9)
        assert pearson(first, second) == pytest.approx(correlation(a, b), abs=1e-6)
        assert rank_normalise(first).tolist() == pytest.approx([rank / 14 for rank in ranks(a)])
    assert rank_normalise(torch.tensor([-1e7, 1e5, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert rank_normalise(torch.tensor([3.0])).tolist() == [0.5]
    assert math.isnan(spearman(torch.ones(3), torch.arange(3.0)))


def labels(**changes: Any) -> Labels:
    scores = torch.tensor([[1.0, 3.0], [2.0, 4.0], [9e6, 1.0], [4.0, 7.0]])
    parts: dict[str, Any] = {"prompts": ("a", "b", "c", "d"), "embeddings": draw(4, 3), "scores": scores}
    return Labels(**(parts | {"facts": {"metric": "m"}, "tags": {"level": ("x", "y", "x", "y")}} | changes))


def test_targets_and_reliability() -> None:
    # Ranks by seed: 0 1 3 2 and 1 2 0 3, sums 1 3 3 5.
    assert labels().targets.tolist() == pytest.approx([0, 0.5, 0.5, 1])
    assert labels().reliability() == pytest.approx(correlation([0, 1, 3, 2], [1, 2, 0, 3]))
    assert labels().reliability([0, 1, 3]) == pytest.approx(1)
    assert labels(scores=draw(4, 1)).reliability() is None
    three = draw(4, 3)
    pairs = [spearman(three[:, i], three[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert labels(scores=three).reliability() == pytest.approx(sum(pairs) / 3)


def test_labels_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "labels.safetensors"
    labels().save(path)
    again = Labels.load(path)
    assert (again.prompts, again.facts, again.tags) == (labels().prompts, labels().facts, labels().tags)
    assert torch.equal(again.scores, labels().scores)
    assert torch.equal(again.embeddings, labels().embeddings)
    PromptEmbeddings(("a",), draw(1, 2, 3)).save(path)
    with pytest.raises(ArtefactError, match="expected a file of 'qlip-plugins labels'"):
        Labels.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a", "b", "c", "a")}, "twice"),
        ({"prompts": ("a", "b", "c")}, "for 3 prompts"),
        ({"scores": torch.full((4, 2), torch.nan)}, "scores of shape"),
        ({"embeddings": draw(4)}, "embeddings of shape"),
        ({"tags": {"level": ("x",)}}, "'level' has 1 values"),
    ],
)
def test_bad_labels_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels(**changes)


class Brightness:
    """A score that remembers what it was shown."""

    def __init__(self) -> None:
        self.facts: Mapping[str, Any] = {"metric": "brightness"}
        self.seen: list[tuple[str, Tensor]] = []

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen += list(zip(prompts, images, strict=True))
        return images.mean((1, 2, 3))


def test_labels_judge_the_pictures_that_generate_draws(model: GoldenModel) -> None:
    recipe = Recipe.load("golden-w4a8")
    assert recipe.model.prompt_embeddings is not None
    table = PromptEmbeddings.load(recipe.model.prompt_embeddings)
    names, settings, score = ["row 3", "row 4", "row 9"], Settings(steps=3, guidance_scale=3.0), Brightness()
    prompts = EncodedPrompts.from_table(table, names)
    assert torch.allclose(prompts.embeddings, table.of(names).mean(1), atol=1e-6)
    pipe = model.pipe()
    found = make_labels(pipe, prompts, score, settings, tags={"level": ["x", "y", "y"]}, batch=2)
    expected = sample(pipe, recipe, names * 2, settings)
    assert [prompt for prompt, _ in score.seen] == names * 2
    for (prompt, image), latent in zip(score.seen, expected, strict=True):
        assert torch.allclose(image, latent, atol=1e-4), prompt
    assert torch.allclose(found.scores.T.reshape(-1), expected.mean((1, 2, 3)), atol=1e-5)
    assert found.facts["metric"] == "brightness"
    assert found.facts["pictures"]["steps"] == 3
    assert found.tags == {"level": ("x", "y", "y")}
    with pytest.raises(ValueError, match="distinct prompts"):
        make_labels(pipe, prompts.only([0, 0]), score, settings)


def test_pictures_that_a_safety_checker_may_blacken_are_refused(model: GoldenModel) -> None:
    pipe = model.pipe()
    pipe.safety_checker = torch.nn.Identity()
    prompts = EncodedPrompts(("a",), draw(1, 4, 8), draw(4, 8), draw(1, 8), "mean")
    with pytest.raises(IncompatibleModelError, match="safety checker"):
        make_labels(pipe, prompts, Brightness(), Settings())


def test_prompts_are_encoded_as_the_controller_sees_them(text_pipe: Any) -> None:
    names = ["a cat", "dog on a hill"]
    encoded = EncodedPrompts.from_pipeline(text_pipe, names, "eos")
    source = EndOfTextState(text_pipe.text_encoder)
    states, empty = text_pipe.encode_prompt(names, "cpu", 1, True)
    assert torch.equal(encoded.embeddings, source.embed(Conditioning(states)).float())
    source.remove()
    assert torch.allclose(encoded.states, states, atol=1e-5)
    assert torch.allclose(encoded.empty, empty[0], atol=1e-5)
    mean = EncodedPrompts.from_pipeline(text_pipe, names, "mean")
    assert torch.allclose(mean.embeddings, states.mean(1), atol=1e-5)
    assert mean.only([1]).prompts == ("dog on a hill",)
    assert torch.equal(mean.only([1]).states, mean.states[1:])
    assert not text_pipe.text_encoder._forward_hooks


def test_a_pipeline_without_an_encoder_is_refused(model: GoldenModel) -> None:
    with pytest.raises(IncompatibleModelError, match="no tokenizer or no text encoder"):
        EncodedPrompts.from_pipeline(model.pipe(), ["a"], "mean")
