"""The work folder: what an interrupted calibration has finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefacts import read_tensors, write_tensors
from ..errors import ArtefactError, RecipeError
from ..files import written_whole
from ..grids import ActGrid
from ..state import CalibratedLayer, WeightPart

FORMAT = "qlip-plugins calibration work"
VERSION = 1
_IDENTITY = "work.json"


@dataclass(frozen=True)
class UnitErrors:
    """Relative squared error of a unit's output before and after learning."""

    before: float
    after: float


class WorkFolder:
    """Finished parts of one calibration, each a file written whole; removed when all is done."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open a folder, or begin one.

        Args:
            path: the folder.
            identity: all that the result depends on, as JSON can hold it.

        Raises:
            RecipeError: what stands there was begun with another identity; the message says what differs.
            ArtefactError: the folder holds something else.
        """
        self.path = path
        ours: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **identity}))
        marker = path / _IDENTITY
        if marker.is_file():
            _check_same(path, marker, ours)
        elif path.exists() and (not path.is_dir() or any(_visible(path))):
            raise ArtefactError(
                f"{path}: exists and is no work folder of a calibration; name another with --work"
            )
        else:
            with written_whole(marker) as temporary:
                temporary.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")

    def file(self, name: str) -> Path:
        """The path of a file in it."""
        return self.path / name

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

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

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


def _visible(path: Path) -> list[Path]:
    return [item for item in path.iterdir() if not item.name.startswith(".")]


def _check_same(path: Path, marker: Path, ours: dict[str, Any]) -> None:
    try:
        theirs = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{marker}: unreadable: {error}; remove {path} to begin again") from None
    if not isinstance(theirs, dict) or theirs.get("format") != FORMAT:
        raise ArtefactError(f"{marker}: no work folder of a calibration; name another with --work")
    differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if differing:
        shown = ", ".join(f"{key}: {theirs.get(key)!r}, now {ours.get(key)!r}" for key in differing[:3])
        raise RecipeError(
            f"{path}: holds a calibration that was begun otherwise ({shown}). Run it with those settings to finish it, "
            "name another folder with --work, or remove this one"
        )
