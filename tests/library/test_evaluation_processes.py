"""`qlip-plugins evaluate` shared by the processes of a launch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlip_plugins.cli import main

pytest.importorskip("matplotlib", reason="extra `evaluation`")


def test_processes_split_the_work_and_give_the_same_bytes(tmp_path: Path) -> None:
    """Two processes by torchrun's variables, which are accelerate's; the other run is this process alone."""
    alone, shared, prompts = (tmp_path / name for name in ("alone", "shared", "prompts.txt"))
    prompts.write_text("row 1\nrow 2\nrow 3\n")
    given = ["evaluate", "golden-w4a8", "--prompts", str(prompts), "--seeds", "2", "--steps", "3"]
    given += ["--guidance", "2", "--batch-size", "2", "--out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    variables |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "qlip_plugins", *given, str(shared)],
            env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert "; 2 processes" in printed[0][1]
    assert (printed[0][0].startswith("protocol "), printed[1][0]) == (True, "")
    assert main([*given, str(alone)]) == 0
    for name in ("evaluation.json", "results.safetensors"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
