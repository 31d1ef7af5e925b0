"""A small calibration of the golden pipeline, made once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qlip_plugins.calibration import Calibration, CalibrationSettings, calibrate
from qlip_plugins.generation import Settings, load_model
from qlip_plugins.packed import write_packed
from qlip_plugins.recipe import ModelSection, Recipe

SETTINGS = CalibrationSettings(
    sampling=Settings(steps=5, guidance_scale=3.0),
    activation_bits=(8, 16),
    samples=24,
    iterations=12,
    activation_iterations=4,
    batch_size=8,
)
SMALL = replace(SETTINGS, activation_bits=(8,), samples=8, iterations=2, activation_iterations=1)
PROMPTS = [f"row {row}" for row in range(6)]


def golden_section() -> ModelSection:
    return Recipe.load("golden-w4a8").model


def small(work: Path, settings: CalibrationSettings = SMALL) -> dict[str, str]:
    """The digest of each file of a calibration's packed folder."""
    pipe = load_model(golden_section())
    calibration, folder = calibrate(pipe, golden_section(), PROMPTS, settings, work)
    out = work.with_name(f"{work.name}-out")
    write_packed(out, calibration.weights, calibration.grids, calibration.report, "a test")
    folder.remove()
    assert not work.exists()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def command(tmp_path: Path, *more: str, prompts: str = "row 1\nrow 2\n\nrow 3\n") -> list[str]:
    """Arguments of a small `qlip-plugins calibrate` of the golden pipeline."""
    section = golden_section()
    (tmp_path / "prompts.txt").write_text(prompts)
    given = {
        "--prompts": tmp_path / "prompts.txt",
        "--prompt-embeddings": section.prompt_embeddings,
        "--out": tmp_path / "out",
        "--steps": 4,
        "--guidance": 3,
        "--samples": 8,
        "--iterations": 2,
        "--activation-iterations": 1,
        "--batch-size": 4,
    }
    flags = [str(item) for pair in given.items() for item in pair]
    return ["calibrate", str(section.pipeline), *flags, *more]


@dataclass(frozen=True)
class Calibrated:
    """The pipeline, what was calibrated on it, and the folder of finished work, which is kept."""

    pipe: Any
    calibration: Calibration
    work: Path


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    pipe = load_model(golden_section())
    work = tmp_path_factory.mktemp("calibration") / "work"
    calibration, _ = calibrate(pipe, golden_section(), PROMPTS, SETTINGS, work)
    return Calibrated(pipe, calibration, work)
