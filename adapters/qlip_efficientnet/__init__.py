"""Image features of EfficientNet-Lite0, an ImageNet classifier whose weights come as a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .features import EfficientNetFeatures

__all__ = ["open_features"]


def open_features(path: Path | None, device: str) -> EfficientNetFeatures:
    """See `qlip_plugins.image_features.ImageFeaturesPlugin`."""
    from .features import EfficientNetFeatures

    return EfficientNetFeatures(path, device)
