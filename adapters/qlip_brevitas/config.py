from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qlip_plugins.adapter import AdapterConfig
from qlip_plugins.schema import RecipePath

WeightWidth = Annotated[int, Field(ge=2, le=8)]
ActivationWidth = Annotated[int, Field(ge=2, le=24)]


class BrevitasConfig(AdapterConfig):
    """Which model that brevitas quantized, and what its state dict does not say.

    Args:
        checkpoint: a saved `state_dict()`, `.pth` or `.safetensors`. Left out, the pipeline that the recipe is
            applied to has to hold a denoiser that brevitas has quantized, which says all the rest itself.
        weight_bits: of every layer whose input is quantized.
        activation_bits: of every input.
        weight_quant: the quantizer of `brevitas.quant` that the weights had.
        input_quant: the same for the inputs.
        fingerprint: of the model in memory, or the beginning of it (`controller.state.fingerprint`); compared, since a
            state dict reads without an error under some other quantizers, too.
    """

    adapter: Literal["brevitas"] = "brevitas"
    checkpoint: RecipePath | None = None
    weight_bits: WeightWidth | None = None
    activation_bits: ActivationWidth | None = None
    weight_quant: str = "Int8WeightPerChannelFloat"
    input_quant: str = "Int8ActPerTensorFloat"
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")] | None = None

    @model_validator(mode="after")
    def _widths_of_a_file(self) -> Self:
        given = [self.weight_bits, self.activation_bits]
        named = {"weight_quant", "input_quant"} & self.model_fields_set
        if self.checkpoint is not None and None in given:
            raise ValueError(
                "a state dict of brevitas does not hold its widths: give weight_bits and activation_bits"
            )
        if self.checkpoint is None and (given != [None, None] or named):
            raise ValueError(
                "without a checkpoint the model says its widths and quantizers itself: leave them out"
            )
        return self
