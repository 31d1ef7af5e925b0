from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RecipeError
from ..generation import Settings
from .schemes import SCHEMES, Scheme, SchemeName, Start

WEIGHT_WIDTHS = range(2, 9)
ACTIVATION_WIDTHS = range(2, 17)


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate.

    Args:
        sampling: how the pipeline makes the calibration inputs; its device is where all is computed.
        scheme: what is quantized, and on which grids.
        weight_bits: of the convolutions and linears, 2..8; those that a scheme keeps at 8 bits excepted.
        activation_bits: widths to calibrate activations for, each 2..16; none leaves them in floating point.
        softmax_bits: of the attention weights, 2..16; None: the scheme's own. `softmax` is what counts.
        samples: rows of denoiser calls to calibrate on, at most; both halves of a guided call count.
        iterations: of the rounding, for each unit.
        activation_iterations: of the activation steps, for each unit and width.
        batch_size: samples of one iteration.
        activation_start: the grid that training starts from: over running extremes of all samples
            (`running`), or with the least error on a few of them (`mse`); None: the scheme's own. `start`
            is what counts.

    Raises:
        RecipeError: a value is outside its range, or means nothing under the scheme.
    """

    sampling: Settings
    scheme: SchemeName = "qdiffusion"
    weight_bits: int = 4
    activation_bits: tuple[int, ...] = (8,)
    softmax_bits: int | None = None
    samples: int = 512
    iterations: int = 1000
    activation_iterations: int = 500
    batch_size: int = 32
    activation_start: Start | None = None

    def __post_init__(self) -> None:
        _check("weight bits", self.weight_bits, WEIGHT_WIDTHS)
        for bits in self.activation_bits:
            _check("activation bits", bits, ACTIVATION_WIDTHS)
        if self.softmax_bits is not None:
            _check("softmax bits", self.softmax_bits, ACTIVATION_WIDTHS)
        self._check_meaning()
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

    def _check_meaning(self) -> None:
        if self.scheme not in SCHEMES:
            raise RecipeError(f"scheme: expected {' or '.join(SCHEMES)}, found {self.scheme}")
        if self.softmax_bits is not None and self.rules.softmax_bits is None:
            raise RecipeError(
                f"softmax bits: {self.scheme} leaves the products of attention in floating point, found "
                f"{self.softmax_bits}; leave it out"
            )
        if self.start not in self.rules.starts:
            raise RecipeError(
                f"activation start: expected {' or '.join(self.rules.starts)} under {self.scheme}, found {self.start}"
            )

    @property
    def rules(self) -> Scheme:
        """The scheme itself."""
        return SCHEMES[self.scheme]

    @property
    def softmax(self) -> int | None:
        """Width of the attention weights; None: attention's products stay in floating point."""
        return self.rules.softmax_bits if self.softmax_bits is None else self.softmax_bits

    @property
    def start(self) -> Start:
        """The grid that the training of activation steps starts from."""
        return self.rules.starts[0] if self.activation_start is None else self.activation_start

    def described(self) -> dict[str, Any]:
        """As JSON holds them, with what counts where nothing was chosen."""
        chosen = asdict(self) | {"softmax_bits": self.softmax, "activation_start": self.start}
        data: dict[str, Any] = json.loads(json.dumps(chosen))
        return data


def _check(what: str, bits: int, widths: range) -> None:
    if bits not in widths:
        raise RecipeError(f"{what}: expected {widths[0]} to {widths[-1]}, found {bits}")
