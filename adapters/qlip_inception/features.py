"""FID's Inception as an image-feature extractor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from qlip_plugins.errors import RecipeError
from qlip_plugins.files import file_digest
from qlip_plugins.image_features import load_weights

from .network import FidInception

NAME = "inception"
WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
_SIDE = 299
_SPATIAL_CHANNELS = 7


class InceptionFeatures:
    """The network of published FID and sFID.

    Pictures are resized to 299 x 299 (bilinear, not antialiased) and mapped to -1..1, as FID has it.
    Pooled features are `pool_3` (2048), spatial ones the first 7 channels of `mixed_6/conv` (17 x 17).

    The weights are TensorFlow's of 2015-12-05 as pytorch-fid converted them; this package neither holds
    nor fetches them. Its tests run on random weights of the same names and shapes: how near features from
    the real file come to those of another implementation has not been measured.

    Args:
        path: of `pt_inception-2015-12-05-6726825d.pth`.
        device: where to compute.

    Raises:
        RecipeError: no path.
        ArtefactError: the weights are missing, damaged, or another network's.
    """

    name = NAME

    def __init__(self, path: Path | None, device: str) -> None:
        if path is None:
            raise RecipeError(
                f"image features {NAME!r}: name the weights, {NAME}=PATH/TO/{WEIGHTS_NAME} (pytorch-fid publishes "
                "the file)"
            )
        model = FidInception()
        load_weights(model, path)
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self.digest = file_digest(path)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features `(N, 2048)`, float32, of images `(N, 3, H, W)` in 0..1."""
        return self._model.pooled(self._prepared(images))

    @torch.no_grad()
    def spatial(self, images: Tensor) -> Tensor:
        """Features with their places, `(N, 7 * 17 * 17)`, float32, of the same images."""
        return self._model.mixed_6(self._prepared(images))[:, :_SPATIAL_CHANNELS].flatten(1)

    def _prepared(self, images: Tensor) -> Tensor:
        images = images.to(self._device, torch.float32)
        return F.interpolate(images, (_SIDE, _SIDE), mode="bilinear") * 2 - 1
