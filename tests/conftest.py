from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

# Nothing may be fetched: a test that tries fails at once instead of hanging.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CI"] = "1"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The checkpoints that the real Q-Diffusion code wrote, with their recorded outputs."""
    return GOLDEN
