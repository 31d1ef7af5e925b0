"""The demo model's own CLIP: features of pictures, and how well a picture fits its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from qlip_plugins.errors import IncompatibleModelError, RecipeError
from qlip_plugins.files import file_digest

from . import FOLDER

SIDE = 64
_TOWER = FOLDER / "clip" / "model.safetensors"
_SPATIAL_STAGE, _SPATIAL_CHANNELS = 3, 7


def open_features(path: Path | None, device: str) -> ImageFeatures:
    """The image tower as a plug-in; see `qlip_plugins.image_features.ImageFeaturesPlugin`."""
    if path is not None:
        raise RecipeError(
            f"image features 'demo': found the path {path}, expected none: the weights are shipped"
        )
    return ImageFeatures(device)


class ImageFeatures:
    """Features of the image tower, trained on the same pictures as the generator; see the model card.

    Its text tower gives the demo's z, so it is no independent judge of a controller.

    Args:
        device: where to compute.
    """

    name = "demo image tower"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        from transformers import ResNetModel

        backbone: Any = ResNetModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
        # The stock stem halves twice before the first block; the tower was trained with one halving.
        backbone.embedder.pooler = nn.Identity()
        self._backbone = backbone.eval().to(device)
        self.device = torch.device(device)
        self.digest = file_digest(_TOWER)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features `(N, 288)` of images `(N, 3, H, W)` in 0..1; others than 64 x 64 are resized."""
        pooled: Tensor = self._backbone(self._prepared(images)).pooler_output
        return pooled.flatten(1)

    @torch.no_grad()
    def spatial(self, images: Tensor) -> Tensor:
        """The first 7 channels of the third stage, with their places, `(N, 7 * 8 * 8)`, of the same images."""
        states = self._backbone(self._prepared(images), output_hidden_states=True).hidden_states
        chosen: Tensor = states[_SPATIAL_STAGE][:, :_SPATIAL_CHANNELS]
        return chosen.flatten(1)

    def _prepared(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return images * 2 - 1


class ImageTextScore:
    """Cosine of a picture's and a prompt's joint embeddings, -1..1.

    Args:
        pipe: the demo pipeline, whose text encoder is CLIP's text tower.
        features: of pictures.

    Raises:
        IncompatibleModelError: another pipeline.
    """

    def __init__(self, pipe: Any, features: ImageFeatures) -> None:
        _check_text_tower(pipe)
        self._pipe, self._features = pipe, features
        projections = FOLDER / "clip" / "projections.safetensors"
        self.facts: Mapping[str, Any] = {
            "metric": "demo-clip-score",
            "features_digest": features.digest,
            "projections_digest": file_digest(projections),
        }
        weights = load_file(projections)
        self._image, self._text = (weights[f"{part}_projection"].float() for part in ("image", "text"))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores `(N,)` of images `(N, 3, H, W)` in 0..1, made from N prompts."""
        tokens = self._pipe.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        pooled = (
            self._pipe.text_encoder(tokens.to(self._pipe.text_encoder.device)).pooler_output.float().cpu()
        )
        pictures = self._features(images).cpu() @ self._image.T
        return F.cosine_similarity(pictures, pooled @ self._text.T)


def _check_text_tower(pipe: Any) -> None:
    """Another text encoder would give scores that mean nothing."""
    expected = load_file(FOLDER / "pipeline" / "text_encoder" / "model.safetensors")
    encoder = getattr(pipe, "text_encoder", None)
    found = {} if encoder is None else encoder.state_dict()
    # Versions of transformers differ in this prefix.
    found = {name.removeprefix("text_model."): tensor.float().cpu() for name, tensor in found.items()}
    same = all(
        torch.equal(found.get(name.removeprefix("text_model."), torch.empty(0)), tensor.float())
        for name, tensor in expected.items()
    )
    if not same:
        raise IncompatibleModelError(
            f"{type(pipe).__name__}: its text encoder is not the demo's, whose text tower the demo's score needs; "
            "use a recipe of the demo, or clip-score with a CLIP of your own"
        )
