"""The demo's image-text score as a quality metric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qlip_plugins.adapter import Scope
from qlip_plugins.schema import StrictModel

if TYPE_CHECKING:
    from qlip_plugins.prompts import PromptSet
    from qlip_plugins.quality import Quality


class DemoClipScoreConfig(StrictModel):
    """It has no options."""


class DemoClipScoreMetric:
    """How well a picture fits its prompt, by the demo's own CLIP; needs the demo's pipeline."""

    config_class: ClassVar[type[StrictModel]] = DemoClipScoreConfig
    scope: ClassVar[Scope] = "within_prompt"
    higher_is_better: ClassVar[bool] = True

    def open(self, config: DemoClipScoreConfig, pipe: Any, prompts: PromptSet, device: str) -> Quality:
        """See `qlip_plugins.adapter.QualityMetric.open`."""
        from .image_text import ImageFeatures, ImageTextScore

        return ImageTextScore(pipe, ImageFeatures(device))


clip_score = DemoClipScoreMetric()
