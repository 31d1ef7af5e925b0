"""A small calibration of the golden pipeline, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlip_plugins.calibration import Calibration, CalibrationSettings, calibrate
from qlip_plugins.generation import Settings, load_model
from qlip_plugins.recipe import ModelSection, Recipe

SETTINGS = CalibrationSettings(
    sampling=Settings(steps=5, guidance_scale=3.0),
    activation_bits=(8, 16),
    samples=24,
    iterations=12,
    activation_iterations=4,
    batch_size=8,
)
PROMPTS = [f"row {row}" for row in range(6)]


def golden_section() -> ModelSection:
    return Recipe.load("golden-w4a8").model


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
