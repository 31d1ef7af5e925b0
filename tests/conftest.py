from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

# Nothing may be fetched: a test that tries fails at once instead of hanging.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CI"] = "1"


def _seed() -> None:
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


# A module's random weights are the same in every run, whichever tests ran before in its process.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The checkpoints that the real Q-Diffusion code wrote, with their recorded outputs."""
    return GOLDEN
