from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError
from ..generation import Settings

WEIGHT_WIDTHS = range(2, 9)
ACTIVATION_WIDTHS = range(2, 17)

Start = Literal["running", "mse"]


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    Args:
        sampling: how the pipeline makes the calibration inputs; its device is where all is computed.
        weight_bits: of every convolution and linear layer, 2..8.
        activation_bits: widths to calibrate activations for, each 2..16; none leaves them in floating point.
        softmax_bits: of the attention weights, 2..16.
        samples: rows of denoiser calls to calibrate on, at most; both halves of a guided call count.
        iterations: of the rounding, for each unit.
        activation_iterations: of the activation steps, for each unit and width.
        batch_size: samples of one iteration.
        seed: of the noise and of the order of the samples.
        activation_start: the grid that training starts from: over running extremes of all samples
            (`running`), or with the least error on a few of them (`mse`).

    Raises:
        RecipeError: a value is outside its range.
    """

    sampling: Settings
    weight_bits: int = 4
    activation_bits: tuple[int, ...] = (8,)
    softmax_bits: int = 16
    samples: int = 512
    iterations: int = 1000
    activation_iterations: int = 500
    batch_size: int = 32
    activation_start: Start = "running"

    def __post_init__(self) -> None:
        _check("weight bits", self.weight_bits, WEIGHT_WIDTHS)
        for bits in self.activation_bits:
            _check("activation bits", bits, ACTIVATION_WIDTHS)
        _check("softmax bits", self.softmax_bits, ACTIVATION_WIDTHS)
        if len(set(self.activation_bits)) < len(self.activation_bits):
            raise RecipeError(f"activation bits: {self.activation_bits} lists a width twice")
        for name, least in {
            "samples": 2,
            "batch_size": 1,
            "iterations": 0,
            "activation_iterations": 0,
        }.items():
            if getattr(self, name) < least:
                raise RecipeError(
                    f"{name.replace('_', ' ')}: expected {least} or more, found {getattr(self, name)}"
                )


def _check(what: str, bits: int, widths: range) -> None:
    if bits not in widths:
        raise RecipeError(f"{what}: expected {widths[0]} to {widths[-1]}, found {bits}")
