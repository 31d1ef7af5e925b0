from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from qlip_plugins.adapter import AdapterConfig, CorrectionConfig
from qlip_plugins.schema import RecipePath

WeightWidth = Annotated[int, Field(ge=2, le=8)]
# float32 holds the codes of 24 bits exactly, and no more.
ActivationWidth = Annotated[int, Field(ge=2, le=24)]


class PTQDConfig(AdapterConfig):
    """What a PTQD file does not say of itself.

    A width left out is taken from the file's own name, `quantw4a8_ldm_brecq.pth`; that of the weights
    is also compared with what their rounding reveals. A contradiction is an error.

    Args:
        checkpoint: the file that `quantize_ldm_brecq.py` or `quantize_ldm_brecqA.py` wrote.
        weight_bits: `n_bits_w`; three layers have 8 in any case.
        activation_bits: `n_bits_a`; an explicit null loads the weights only.
        calibration_inputs: safetensors with `x` `(N, C, h, w)`, `t` `(N,)` and `context` `(N, L, D)`,
            the batch that the activation quantizers were initialised on: the zero points, which are
            not in the file, come from a run of the model on it.
        zero_points: or a JSON file with them (docs/ptqd.md).
    """

    adapter: Literal["ptqd"] = "ptqd"
    checkpoint: RecipePath
    weight_bits: WeightWidth | None = None
    activation_bits: ActivationWidth | None = None
    calibration_inputs: RecipePath | None = None
    zero_points: RecipePath | None = None

    @property
    def weights_only(self) -> bool:
        """Whether floating-point activations were asked for in so many words."""
        return "activation_bits" in self.model_fields_set and self.activation_bits is None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("calibration_inputs", "zero_points") if getattr(self, name) is not None]
        if len(given) > 1:
            raise PydanticCustomError(
                "zero_points", "give one of `calibration_inputs` and `zero_points`, not both"
            )
        if given and self.weights_only:
            raise PydanticCustomError(
                "zero_points",
                "`activation_bits: null` loads the weights only, so `{given}` has no use: remove one of the two",
                {"given": given[0]},
            )
        return self


class PTQDCorrectionConfig(CorrectionConfig):
    """Where the statistics of the error are.

    Args:
        statistics: a file that `qlip-plugins fit-correction` wrote, or the folder with the three files of
            PTQD's scripts, `kt.npy`, `t_std_dict.npy` and `idx_bias.npy`.
    """

    adapter: Literal["ptqd"] = "ptqd"
    statistics: RecipePath
