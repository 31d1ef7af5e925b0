from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qlip_plugins.adapter import AdapterConfig
from qlip_plugins.schema import RecipePath

WeightWidth = Annotated[int, Field(ge=2, le=16)]
# float32 holds the codes of 24 bits exactly, and no more.
ActivationWidth = Annotated[int, Field(ge=2, le=24)]


class QDiffusionConfig(AdapterConfig):
    """What a Q-Diffusion file does not say of itself.

    An option left out is taken from the `sampling_config.yaml` beside the checkpoint. Whatever its
    source, it is compared with what the tensors reveal, and a contradiction is an error.

    Args:
        checkpoint: the `ckpt.pth` that calibration wrote.
        weight_bits: `--weight_bit`.
        activation_bits: `--act_bit`; an explicit null loads the weights only, as Q-Diffusion does
            without `--quant_act`.
        softmax_bits: `--sm_abit`.
        symmetric: `--a_sym`.
    """

    adapter: Literal["qdiffusion"] = "qdiffusion"
    checkpoint: RecipePath
    weight_bits: WeightWidth | None = None
    activation_bits: ActivationWidth | None = None
    softmax_bits: ActivationWidth | None = None
    symmetric: bool | None = None
