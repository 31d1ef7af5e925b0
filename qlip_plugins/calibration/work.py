"""What an interrupted calibration has finished, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefacts import read_tensors, write_tensors
from ..errors import ArtefactError
from ..grids import ActGrid
from ..state import CalibratedLayer, WeightPart
from ..work import WorkFolder

FORMAT = "qlip-plugins calibration work"
VERSION = 1


@dataclass(frozen=True)
class UnitErrors:
    """Relative squared error of a unit's output before and after learning."""

    before: float
    after: float


class CalibrationFolder(WorkFolder):
    """The finished units of one calibration."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        super().__init__(path, "calibration", VERSION, identity)

    def save_weights(
        self, number: int, unit: str, layers: Mapping[str, CalibratedLayer], errors: UnitErrors
    ) -> None:
        """Keep a unit's rounded weights."""
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            for place, part in enumerate(layer.weight):
                key = f"{name}|{place}|{part.bits}"
                tensors |= {
                    f"{key}|codes": part.codes,
                    f"{key}|scale": part.scale,
                    f"{key}|zero": part.zero_point,
                }
        self._save(self._weights(number), unit, tensors, errors)

    def load_weights(self, number: int, unit: str) -> tuple[dict[str, CalibratedLayer], UnitErrors] | None:
        """What `save_weights` kept; None where the unit is not finished."""
        found = self._load(self._weights(number), unit)
        if found is None:
            return None
        tensors, errors = found
        parts: dict[str, list[WeightPart]] = {}
        for key in sorted(key for key in tensors if key.endswith("|codes")):
            name, _, bits, _ = key.split("|")
            stem = key.removesuffix("|codes")
            part = WeightPart(tensors[key], tensors[f"{stem}|scale"], tensors[f"{stem}|zero"], int(bits))
            parts.setdefault(name, []).append(part)
        return {name: CalibratedLayer(tuple(found)) for name, found in parts.items()}, errors

    def save_grids(
        self, bits: int, number: int, unit: str, grids: Mapping[str, ActGrid], errors: UnitErrors
    ) -> None:
        """Keep a unit's activation grids at one width."""
        tensors = {
            name: torch.tensor([grid.bits, grid.scale, grid.zero_point], dtype=torch.float64)
            for name, grid in grids.items()
        }
        self._save(self._activations(bits, number), unit, tensors, errors)

    def load_grids(self, bits: int, number: int, unit: str) -> tuple[dict[str, ActGrid], UnitErrors] | None:
        """What `save_grids` kept; None where the unit is not finished."""
        found = self._load(self._activations(bits, number), unit)
        if found is None:
            return None
        tensors, errors = found
        rows = {name: tensor.tolist() for name, tensor in tensors.items()}
        return {
            name: ActGrid.asymmetric(int(width), scale, int(zero))
            for name, (width, scale, zero) in rows.items()
        }, errors

    def _weights(self, number: int) -> Path:
        return self.file(f"weights-{number:04d}.safetensors")

    def _activations(self, bits: int, number: int) -> Path:
        return self.file(f"activations-{bits}-{number:04d}.safetensors")

    def _save(self, path: Path, unit: str, tensors: Mapping[str, Tensor], errors: UnitErrors) -> None:
        write_tensors(path, FORMAT, VERSION, tensors, unit=unit, before=errors.before, after=errors.after)

    def _load(self, path: Path, unit: str) -> tuple[dict[str, Tensor], UnitErrors] | None:
        if not path.exists():
            return None
        tensors, facts = read_tensors(path, FORMAT, VERSION)
        if facts.get("unit") != unit:
            raise ArtefactError(
                f"{path}: holds {facts.get('unit')}, expected {unit}; remove it and run again"
            )
        return tensors, UnitErrors(facts["before"], facts["after"])
