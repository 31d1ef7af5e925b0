"""Quality metrics as plug-ins: options, GIQA over folders of references, CLIP scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from qlip_plugins import quality
from qlip_plugins.adapter import QUALITY_METRICS, QualityMetric, installed, load_quality_metric
from qlip_plugins.clip_score import ClipScore
from qlip_plugins.errors import AdapterNotFoundError, ArtefactError, IncompatibleModelError, RecipeError
from qlip_plugins.giqa import GmmGiqa
from qlip_plugins.image_features import open_features
from qlip_plugins.pictures import PictureFolder
from qlip_plugins.prompts import PromptSet
from qlip_plugins.quality import Quality, open_quality
from qlip_plugins.quality_metrics import GmmGiqaConfig, metric_config, parse_options
from qlip_plugins.schema import StrictModel

PROMPTS = PromptSet(("a fox", "a cat", "a dog"), {"concept": ("fox", "cat", "new")})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("references"), np.random.default_rng(0)
    rows = [
        {"file_name": f"{n:02d}.png", "concept": ("fox", "cat", "owl", "emu")[n % 4], "style": "flat"}
        for n in range(16)
    ]
    for row in rows:
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def options(references: Path, **more: Any) -> dict[str, Any]:
    return {"features": "demo", "references": str(references), **more}


def test_every_installed_metric_is_one() -> None:
    assert set(installed(QUALITY_METRICS)) >= {"clip-score", "demo-clip-score", "gmm-giqa", "knn-giqa"}
    for name in installed(QUALITY_METRICS):
        metric = load_quality_metric(name)
        assert isinstance(metric, QualityMetric)
        assert issubclass(metric.config_class, StrictModel)
        assert metric.scope == ("within_prompt" if "clip" in name else "across_prompts")


def test_options_are_yaml_scalars() -> None:
    found = parse_options(["k=5", "standardise=true", "references=a=b.d", "exclude=null", "pca=0.95"])
    assert found == {"k": 5, "standardise": True, "references": "a=b.d", "exclude": None, "pca": 0.95}
    for settings, message in ((["k"], "expected KEY=VALUE"), (["k=1", "k=2"], "'k' is set twice")):
        with pytest.raises(RecipeError, match=message):
            parse_options(settings)


def test_wrong_options_are_named(references: Path) -> None:
    with pytest.raises(RecipeError, match=r"--set nearest: unknown key.*\n?.*") as caught:
        metric_config("knn-giqa", options(references, nearest=3, k=0))
    assert "--set k: Input should be greater than or equal to 1" in str(caught.value)
    with pytest.raises(RecipeError, match="--set features: Field required"):
        metric_config("gmm-giqa", {"references": str(references)})
    with pytest.raises(AdapterNotFoundError, match="did you mean 'knn-giqa'"):
        metric_config("knn-gica", {})


def test_knn_giqa_of_a_folder_is_its_definition(references: Path) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    chosen = options(references, k=3, standardise=True)
    found = open_quality("knn-giqa", chosen, None, PROMPTS, "cpu")
    features, folder = open_features("demo", "cpu"), PictureFolder(references)
    known, asked = features(torch.cat(list(folder.batches(16)))), features(images)
    deviation = known.std(0).clamp(min=1e-6)
    expected = []
    for row, concept in zip(asked / deviation, ("fox", "cat", "new"), strict=True):
        kept = [i for i, name in enumerate(folder.tags["concept"]) if name != concept]
        distances = sorted(float((row - known[i] / deviation).abs().sum()) for i in kept)
        expected.append(sum(1 / distance for distance in distances[:3]))
    assert found(images, PROMPTS.prompts).tolist() == pytest.approx(expected, rel=1e-4)
    facts = found.facts
    assert (facts["metric"], facts["k"], facts["references"], facts["exclude"]) == (
        "knn-giqa",
        3,
        16,
        "concept",
    )
    assert facts["references_digest"] == folder.digest()
    assert facts["features_digest"] == features.digest
    assert facts["own_concept_excluded"] is True


def test_references_without_what_is_needed_are_refused(references: Path) -> None:
    untagged = PromptSet(PROMPTS.prompts)
    with pytest.raises(RecipeError, match=r"the prompts: no tag 'concept' \(found: none\).*exclude=null"):
        open_quality("knn-giqa", options(references, k=3), None, untagged, "cpu")
    with pytest.raises(RecipeError, match=r"12 references without concept '.*', expected at least k = 13"):
        open_quality("knn-giqa", options(references, k=13), None, PROMPTS, "cpu")
    everything = open_quality("knn-giqa", options(references, k=16, exclude=None), None, untagged, "cpu")
    assert everything.facts["own_concept_excluded"] is False
    with pytest.raises(ArtefactError, match="no such folder of pictures"):
        open_quality("knn-giqa", options(references / "none"), None, PROMPTS, "cpu")


def config(**more: Any) -> GmmGiqaConfig:
    return GmmGiqaConfig.model_validate({"features": "none", "references": Path("references"), **more})


def test_one_gaussian_gives_its_log_density() -> None:
    known, asked = draw(40, 3), draw(5, 3, seed=1)
    found = GmmGiqa(known, None, config(components=1, covariance="full"))(asked)
    covariance = torch.cov(known.double().T, correction=0) + 1e-6 * torch.eye(3)
    density = torch.distributions.MultivariateNormal(known.double().mean(0), covariance)
    assert found.dtype == torch.float64
    assert torch.allclose(found, density.log_prob(asked.double()))


def test_a_mixture_is_fitted_without_the_judged_concept() -> None:
    groups = [f"g{row % 10}" for row in range(200)]
    known = draw(200, 4)
    shifted = known.clone()
    own = torch.tensor([group == "g3" for group in groups])
    shifted[own] += 50
    settings = config(components=1, folds=4)
    picture = known[own][:1]
    first, second = (GmmGiqa(features, groups, settings) for features in (known, shifted))
    assert first.mixtures == 4
    assert float(first(picture, ["g3"])) == float(second(picture, ["g3"]))
    other = next(group for group in groups if first._fold(group) != first._fold("g3"))
    assert float(first(picture, [other])) != float(second(picture, [other]))
    # Groups without references are judged, too, and each picture by its own mixture.
    pair = first(torch.cat([picture, picture]), ["g3", "new"])
    assert pair.tolist() == [float(first(picture, [name])) for name in ("g3", "new")]


def test_gmm_giqa_repeats_and_projects(references: Path) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    chosen = options(references, components=2, folds=2, pca=0.9)
    first, second = (open_quality("gmm-giqa", chosen, None, PROMPTS, "cpu") for _ in range(2))
    assert torch.equal(first(images, PROMPTS.prompts), second(images, PROMPTS.prompts))
    assert (first.facts["pca"], first.facts["mixtures"], first.facts["folds"]) == (0.9, 2, 2)
    with pytest.raises(RecipeError, match="references are left outside a fold, expected at least 17"):
        open_quality("gmm-giqa", options(references, components=17), None, PROMPTS, "cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = shape | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shape | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_the_model_s_own_embeddings(clip: Path) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    prompts = ["a cat", "dog on a hill that is far too long"]
    score = ClipScore(clip, "cpu")
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    tokens = tokenizer(prompts, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    mean, deviation = (
        torch.tensor(row).view(3, 1, 1)
        for row in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    with torch.no_grad():
        logits = model(pixel_values=(images - mean) / deviation, **tokens).logits_per_image
    expected = (logits / model.logit_scale.exp()).diag()
    assert torch.allclose(score(images, prompts), expected, atol=1e-6)
    wide = torch.cat([images, images.flip(3), images], dim=3)  # cropped to its middle
    assert score(wide, prompts).shape == (2,)
    assert torch.allclose(score(wide, prompts), score(images.flip(3), prompts), atol=1e-6)
    with pytest.raises(ArtefactError, match="no CLIP model"):
        ClipScore(clip.parent, "cpu")


def test_the_demo_s_score_tells_fitting_pictures_and_needs_the_demo(demo_pipe: Any, text_pipe: Any) -> None:
    score = open_quality("demo-clip-score", {}, demo_pipe, PROMPTS, "cpu")
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 64, 64)
    blue = torch.tensor([0, 0, 1.0]).view(3, 1, 1).expand(3, 64, 64)
    found = score(
        torch.stack([red, blue, red, blue]), ["red circle", "red circle", "blue circle", "blue circle"]
    )
    assert found[0] - found[1] > found[2] - found[3], "red fits red better"
    with pytest.raises(IncompatibleModelError, match="text encoder is not the demo's"):
        open_quality("demo-clip-score", {}, text_pipe, PROMPTS, "cpu")


class Ugliness:
    """Lower is better."""

    config_class: ClassVar[type[StrictModel]] = StrictModel
    scope: ClassVar[Any] = "across_prompts"
    higher_is_better: ClassVar[bool] = False

    def open(self, config: StrictModel, pipe: Any, prompts: PromptSet, device: str) -> Quality:
        return _Mean()


class _Mean:
    def __init__(self) -> None:
        self.facts: Mapping[str, Any] = {"metric": "ugliness"}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


def test_where_lower_is_better_the_sign_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "load_quality_metric", lambda name: Ugliness())
    monkeypatch.setattr(quality, "metric_config", lambda name, given: StrictModel())
    found = open_quality("ugliness", {}, None, PROMPTS, "cpu")
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(found(images, ["a", "b"]), -images.mean((1, 2, 3)))
    assert found.facts == {"metric": "ugliness", "negated": True}
