"""Fixtures of every test that runs a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_model import CASES, GoldenModel
from qlip_plugins import load_base_quantizer
from qlip_plugins.state import CalibratedState


@pytest.fixture(scope="session")
def model(golden: Path) -> GoldenModel:
    return GoldenModel(golden)


@pytest.fixture(scope="session")
def states(golden: Path) -> dict[str, CalibratedState]:
    adapter = load_base_quantizer("qdiffusion")
    return {
        case: adapter.load(adapter.config_class(checkpoint=golden / "qdiffusion" / case / "ckpt.pth"))  # type: ignore[call-arg]
        for case in CASES
    }


@pytest.fixture
def edited(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """`edited(case, change)`: a copy of a golden checkpoint after `change(tensors)`."""

    def edit(case: str, change: Callable[[dict[str, Tensor]], Any], record: bool = True) -> Path:
        source = golden / "qdiffusion" / case
        tensors = torch.load(source / "ckpt.pth", weights_only=True)
        changed = change(tensors)
        path = tmp_path / "ckpt.pth"
        torch.save(tensors if changed is None else changed, path)
        if record:
            text = (source / "sampling_config.yaml").read_text()
            (tmp_path / "sampling_config.yaml").write_text(text)
        return path

    return edit
