"""The run folder: what an evaluation wrote, and reading it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from ..artefacts import check_version, read_tensors
from ..errors import ArtefactError, RecipeError
from ..schema import nearest

RUN_FORMAT = "qlip-plugins evaluation"
RUN_VERSION = 2
RUN_NAME = "evaluation.json"
RESULTS_NAME = "results.safetensors"
OWNED = (RESULTS_NAME, "pictures", "plans", "pareto.png", "grid.png")
FULL = "full precision"

COSTS = ("fab_mac_weighted", "fab", "bitops_paper", "bitops_full")
UNITS = {"fab": "bits", "fab_mac_weighted": "bits", "bitops_paper": "T", "bitops_full": "T", "psnr": "dB"}
PRIMARY = "error_led"
_ORDER = (PRIMARY, "error_own", "picture_mse", "psnr", "distance.", "score.", *COSTS)


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metrics as tables show them, the primary one first."""
    return sorted(
        metrics, key=lambda name: next(n for n, start in enumerate(_ORDER) if name.startswith(start))
    )


def file_name(allocation: str) -> str:
    """The name of an allocation in paths."""
    return allocation.replace(" ", "-")


@dataclass(frozen=True)
class Run:
    """An evaluation.

    Args:
        folder: where it stands.
        facts: what `evaluation.json` holds.
        results: `noises`, `(n, S)`; and, for each allocation, `NAME/METRIC`: `(n, S, C)` of errors of
            predictions, `(n, S)` of pictures, `(n,)` of costs.
    """

    folder: Path
    facts: Mapping[str, Any]
    results: Mapping[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run folder.

        Raises:
            ArtefactError: missing, damaged, or no run.
        """
        path = folder / RUN_NAME
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path}: no readable run of `qlip-plugins evaluate`: {error}") from None
        if not isinstance(facts, dict) or facts.get("format") != RUN_FORMAT:
            raise ArtefactError(f"{path}: expected {RUN_FORMAT!r}, found another format")
        check_version(path, facts, RUN_VERSION)
        results, described = read_tensors(folder / RESULTS_NAME, RUN_FORMAT, RUN_VERSION)
        if described.get("fingerprint") != facts.get("fingerprint"):
            raise ArtefactError(f"{folder}: {RUN_NAME} and {RESULTS_NAME} are of different runs")
        return cls(folder, facts, results)

    @property
    def fingerprint(self) -> str:
        """Of the protocol."""
        return str(self.facts["fingerprint"])

    @property
    def prompts(self) -> list[str]:
        """The n prompts."""
        return list(self.facts["prompts"])

    def check_has(self, allocation: str) -> None:
        """Check that an allocation was evaluated.

        Raises:
            RecipeError: it was not.
        """
        known = self.facts["allocations"]
        if allocation not in known:
            raise RecipeError(
                f"{self.folder}: no allocation {allocation!r}{nearest(allocation, known)} (evaluated: "
                f"{', '.join(known)})"
            )

    def of(self, allocation: str) -> dict[str, Tensor]:
        """Metric -> values by prompt of one allocation; of errors of predictions, the mean over calls, `(n, S)`."""
        start = f"{allocation}/"
        found = {
            key.removeprefix(start): value for key, value in self.results.items() if key.startswith(start)
        }
        return {name: value.mean(-1) if value.ndim == 3 else value for name, value in found.items()}

    def picture(self, allocation: str, row: int, seed: int) -> Path:
        """Where a picture stands, if the run kept it."""
        return self.folder / "pictures" / file_name(allocation) / picture_name(row, seed)


def picture_name(row: int, seed: int) -> str:
    """Of the picture of a prompt and a seed."""
    return f"{row:04d}-{seed:02d}.png"
