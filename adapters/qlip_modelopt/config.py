from __future__ import annotations

from typing import Literal

from qlip_plugins.adapter import AdapterConfig
from qlip_plugins.schema import RecipePath


class ModelOptConfig(AdapterConfig):
    """Which model that ModelOpt quantized.

    Args:
        checkpoint: what `mto.save` wrote, or a folder of `save_pretrained` with its `modelopt_state.pth`. Left out,
            the pipeline that the recipe is applied to has to hold a denoiser that ModelOpt has quantized.
    """

    adapter: Literal["modelopt"] = "modelopt"
    checkpoint: RecipePath | None = None
