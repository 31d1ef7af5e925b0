"""`qlip-plugins label`: what it writes, refuses, resumes and shares."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip_plugins import labelling
from qlip_plugins.cli import main
from qlip_plugins.generation import Settings, noise_seeds
from qlip_plugins.labelling import Labelling, LabelRequest, label
from qlip_plugins.labels import Labels
from qlip_plugins.prompts import read_prompts
from qlip_plugins.recipe import Recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts, and pictures to compare with."""
    folder, random = tmp_path_factory.mktemp("label"), np.random.default_rng(0)
    references = folder / "references"
    references.mkdir()
    rows = [{"file_name": f"{n}.png", "concept": ("fox", "cat")[n % 2]} for n in range(8)]
    for row in rows:
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(references / row["file_name"])
    (references / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = [{"prompt": f"a {name}", "concept": name} for name in ("fox", "cat", "dog")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return folder


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("label", "demo-w4a8", "--prompts", str(inputs / "prompts.jsonl"), "--out", str(out)),
        *("--metric", "knn-giqa", "--set", "k=3", "--set", "features=demo"),
        *("--set", f"references={inputs / 'references'}", "--steps", "1", "--guidance", "1"),
        *("--batch-size", "2", *more),
    ]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, demo_pipe: Any) -> list[str]:
    """The batches that were judged; the demo's pipeline is loaded once for all."""
    seen: list[str] = []
    original = Labelling.judge

    def judge(self: Labelling, part: labelling.Part) -> torch.Tensor:
        seen.append(part.name)
        return original(self, part)

    monkeypatch.setattr(Labelling, "judge", judge)
    monkeypatch.setattr(labelling, "load_pipeline", lambda recipe: demo_pipe)
    return seen


def test_the_verb_writes_labels(
    inputs: Path, tmp_path: Path, judged: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "labels.safetensors"
    assert main(command(inputs, out, "--json")) == 0
    printed = capsys.readouterr()
    made = Labels.load(out)
    assert json.loads(printed.out) == {
        "file": str(out),
        "prompts": 3,
        "seeds": 2,
        "metric": "knn-giqa",
        "reliability": made.reliability(),
    }
    assert "3 prompts, 2 pictures each, in 4 batches" in printed.err
    assert made.prompts == ("a fox", "a cat", "a dog")
    assert made.tags == {"concept": ("fox", "cat", "dog")}
    assert made.scores.shape == (3, 2)
    assert made.embeddings.shape[0] == 3
    assert {key: made.facts[key] for key in ("metric", "k", "pooling", "seeds", "exclude")} == {
        **{"metric": "knn-giqa", "k": 3, "pooling": "eos", "seeds": 2, "exclude": "concept"}
    }
    assert (made.facts["pictures"]["steps"], made.facts["pictures"]["device"]) == (1, "cpu")
    assert len(judged) == 4
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "the work folder is gone"


def test_an_interrupted_run_goes_on_where_it_stopped(
    inputs: Path, tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, out = tmp_path / "whole.safetensors", tmp_path / "labels.safetensors"
    assert main(command(inputs, whole)) == 0
    keep = labelling._keep

    def interrupted(path: Path, scores: torch.Tensor) -> None:
        keep(path, scores)
        if len(list(path.parent.glob("*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(labelling, "_keep", interrupted)
        assert main(command(inputs, out)) == 130
    assert "long work goes on where it stopped" in capsys.readouterr().err
    assert not out.exists()
    assert main(command(inputs, out, "--seed", "1")) == 2
    assert "begun otherwise (settings." in capsys.readouterr().err
    judged.clear()
    assert main(command(inputs, out)) == 0
    assert judged == ["scores-001-000000.safetensors", "scores-001-000002.safetensors"]
    assert "4 batches; 2 were finished before" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()


def test_other_references_are_another_work(inputs: Path, tmp_path: Path, judged: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "labels.safetensors"

    def interrupted(path: Path, scores: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(labelling, "_keep", interrupted)
        assert main(command(inputs, out)) == 130
    references = tmp_path / "references"
    references.mkdir()
    for file in (inputs / "references").iterdir():
        (references / file.name).write_bytes(file.read_bytes())
    (references / "0.png").write_bytes((references / "1.png").read_bytes())
    assert main([*command(inputs, out), "--set", "standardise=true"]) == 2
    assert "metric.standardised: False, now True" in capsys.readouterr().err
    changed = [text.replace(str(inputs / "references"), str(references)) for text in command(inputs, out)]
    assert main(changed) == 2
    assert "metric.references_digest: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--metric", "demo-clip-score"], 2, "scope within_prompt.*--allow-within-prompt"),
        (["--metric", "knn"], 2, "no quality metric 'knn'.*knn-giqa"),
        (["--set", "depth=3"], 2, "--set depth: unknown key"),
        (["--set", "exclude=style"], 2, "the prompts: no tag 'style'"),
        (["--set", "exclude=x", "--set", "exclude=y"], 2, "'exclude' is set twice"),
        (["--set", "k=7"], 2, "4 references without concept"),
        (["--seeds", "0"], 2, "at least one picture"),
        (["--out", "labels.pt"], 2, "a label set is a .safetensors file"),
        (["--set", "references=none"], 2, "'references' is set twice"),
    ],
)
def test_what_cannot_be_labelled_is_refused(
    inputs: Path, tmp_path: Path, judged: list[str], capsys: pytest.CaptureFixture[str],
    more: list[str], code: int, message: str,
) -> None:  # fmt: skip
    arguments = command(inputs, tmp_path / "labels.safetensors", *more)
    if more[1] == "k=7":
        arguments.remove("k=3")
        arguments.remove("--set")
    if more[0] == "--metric":
        arguments = [*arguments[: arguments.index("--set")], "--steps", "1", *more]
    assert main(arguments) == code
    assert re.search(message, capsys.readouterr().err)
    assert not judged


def test_a_metric_within_a_prompt_can_be_asked_for(inputs: Path, tmp_path: Path, judged: list[str]) -> None:
    out = tmp_path / "labels.safetensors"
    arguments = ["label", "demo-w4a8", "--prompts", str(inputs / "prompts.jsonl"), "--out", str(out)]
    arguments += ["--metric", "demo-clip-score", "--steps", "1", "--guidance", "1", "--seeds", "1"]
    assert main([*arguments, "--allow-within-prompt"]) == 0
    made = Labels.load(out)
    assert made.facts["metric"] == "demo-clip-score"
    assert made.reliability() is None


def test_a_pipeline_without_a_decoder_is_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(inputs, tmp_path / "labels.safetensors")
    arguments[1] = "golden-w4a8"
    assert main(arguments) == 4
    assert "has no decoder, and a metric judges pictures" in capsys.readouterr().err


def test_processes_split_the_work_and_give_the_same_bytes(
    inputs: Path, tmp_path: Path, judged: list[str]
) -> None:
    """Two processes by torchrun's variables, which are accelerate's; the other run is this process alone."""
    alone, shared = tmp_path / "alone.safetensors", tmp_path / "shared.safetensors"
    assert main(command(inputs, alone)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "qlip_plugins", *command(inputs, shared)],
            env=os.environ
            | variables
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert "4 batches; 2 processes" in printed[0][1]
    assert ("prompts: 3" in printed[0][0], printed[1][0]) == (True, "")
    assert shared.read_bytes() == alone.read_bytes()


def test_a_process_that_comes_late_finds_its_batches(inputs: Path, tmp_path: Path, judged: list[str]) -> None:
    """Another plain run on the same work folder finishes first, and takes the folder away."""
    out = tmp_path / "labels.safetensors"
    prompts = read_prompts(inputs / "prompts.jsonl")
    given = {"k": 3, "features": "demo", "references": str(inputs / "references")}
    what = LabelRequest(
        recipe=Recipe.load("demo-w4a8"),
        prompts=prompts,
        metric="knn-giqa",
        options=given,
        settings=Settings(steps=1, guidance_scale=1),
        out=out,
        work=tmp_path / "work",
        batch=2,
    )
    other: list[bytes] = []

    def say(text: str) -> None:
        if not other:
            other.append(b"")
            label(what, say)
            other.append(out.read_bytes())

    label(what, say)
    assert out.read_bytes() == other[1]
    assert len(judged) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.safetensors"]


def test_every_picture_has_a_noise_of_its_own(demo_pipe: Any) -> None:
    prompts = ("a", "b", "c")
    expected = noise_seeds(prompts * 3, seed=5)
    assert len(set(expected)) == 9
    found = [noise_seeds(prompts[1:] * (seed + 1), 5)[-2:] for seed in range(3)]
    assert found == [expected[3 * seed + 1 : 3 * seed + 3] for seed in range(3)]
