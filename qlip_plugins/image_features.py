"""Descriptions of pictures by vectors, which quality metrics and distances are computed on."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ImageFeatures(Protocol):
    """Describes pictures by vectors, such as the states of an image classifier.

    `name` says what it is in words that cannot be mistaken for another extractor; `digest` is the SHA-256
    of its weights.
    """

    name: str
    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features `(N, D)`, float32, of images `(N, 3, H, W)`, floating, 0..1."""
        ...

    def spatial(self, images: Tensor) -> Tensor:
        """Features with their places, flattened, `(N, S)`, for sFID; of the same images."""
        ...


class ImageFeaturesPlugin(Protocol):
    """Opens an extractor; found by entry point in the group `qlip_plugins.image_features`."""

    def __call__(self, path: Path | None, device: str) -> ImageFeatures:
        """Open it.

        Args:
            path: of its weights; None where they come with the plug-in.
            device: where it computes.

        Raises:
            ArtefactError: the weights are missing or damaged.
            RecipeError: a path is needed and was not given, or the other way round.
        """
        ...
