"""Image features of the Inception network that FID is defined on; its weights are given by path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .features import InceptionFeatures

__all__ = ["open_features"]


def open_features(path: Path | None, device: str) -> InceptionFeatures:
    """See `qlip_plugins.image_features.ImageFeaturesPlugin`."""
    from .features import InceptionFeatures

    return InceptionFeatures(path, device)
