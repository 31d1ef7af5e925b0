"""What SIGKILL does to `qlip-plugins label`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_tests.py"


@pytest.mark.timeout(200)
def test_kill_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL at three random moments; `scripts/kill_tests.py labels` does it fifty times."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "labels", "--kills", "3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=190,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^3 \| (\d+) \| \1 of \1 \| 0$", done.stdout, re.M), done.stdout
