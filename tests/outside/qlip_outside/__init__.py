"""An adapter package that the core has never heard of: found by its entry points alone.

Its checkpoint is a safetensors file of float weights; it rounds them to the nearest of 2^bits codes and
takes the activations' range from an option. Its backend is the torch one under another name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from qlip_plugins.adapter import AdapterConfig, Inspection
from qlip_plugins.schema import RecipePath
from qlip_torch import TorchBackend

if TYPE_CHECKING:
    from qlip_plugins.state import CalibratedState


class OutsideConfig(AdapterConfig):
    adapter: Literal["outside"] = "outside"
    checkpoint: RecipePath
    weight_bits: Annotated[int, Field(ge=2, le=8)] = 8
    reach: Annotated[float, Field(gt=0)] = 8.0


class Outside:
    config_class: ClassVar[type[OutsideConfig]] = OutsideConfig

    def load(self, config: OutsideConfig) -> CalibratedState:
        from safetensors.torch import load_file

        from qlip_plugins.errors import ArtefactError
        from qlip_plugins.grids import ActGrid
        from qlip_plugins.state import CalibratedLayer, CalibratedState, WeightPart

        if not config.checkpoint.is_file():
            raise ArtefactError(f"{config.checkpoint}: no such file")
        tensors = load_file(config.checkpoint)
        grid = ActGrid.over(8, -config.reach, config.reach)
        layers = {}
        for name, weight in tensors.items():
            if name.endswith(".weight") and weight.ndim > 1:
                low, high = weight.min(), weight.max()
                scale = (high - low) / (2**config.weight_bits - 1)
                zero = (-low / scale).round()
                codes = ((weight / scale).round() + zero).clamp(0, 2**config.weight_bits - 1)
                part = WeightPart(codes.byte(), scale, zero, config.weight_bits)
                layers[name.removesuffix(".weight")] = CalibratedLayer((part,), (grid,))
        return CalibratedState("outside", layers, float_parameters=tensors, source=str(config.checkpoint))

    def inspect(self, path: Path) -> Inspection:
        from qlip_plugins.errors import ForeignFormatError

        if path.suffix != ".safetensors":
            raise ForeignFormatError(f"{path}: not safetensors")
        state = self.load(OutsideConfig(checkpoint=path))
        base = {"adapter": "outside", "checkpoint": str(path)}
        return Inspection("outside", 8, 8, True, len(state.layers), 0, base)


adapter = Outside()
backend = TorchBackend()
