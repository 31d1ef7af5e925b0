"""Progress: lines for a log where there is no terminal, nothing in CI."""

from __future__ import annotations

import time

import pytest

from qlip_plugins import progress


def test_a_log_gets_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm", reason="comes with diffusers")
    monkeypatch.delenv("CI")
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.1)
    with progress.counted(4, "measuring") as done:
        for number in range(4):
            time.sleep(0.06)
            done(f"layer {number}")
    assert list(progress.progress(range(3), "short")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all("measuring" in line and "/4" in line for line in lines), "short work says nothing"
    assert "layer 3" in lines[-1]


def test_nothing_is_said_in_ci(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    monkeypatch.setattr(progress, "_LOG_EVERY", 0)
    assert list(progress.progress(range(3), "x")) == [0, 1, 2]
    with progress.counted(1, "x") as done:
        done("")
    assert capsys.readouterr().err == ""
