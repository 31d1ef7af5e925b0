"""`qlip-plugins train t2q` and `train q2b`: folders, resuming, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlip_plugins.cli import main
from qlip_plugins.embeddings import EncodedPrompts, PromptEmbeddings
from qlip_plugins.evaluation.run import Run
from qlip_plugins.labels import Labels
from qlip_plugins.recipe import Recipe
from qlip_plugins.text_to_bits import TextToBits
from qlip_plugins.training import TrainedT2Q, q2b, t2q
from qlip_plugins.training.trained_t2q import prompt_digest

RECIPE = "golden-w4a8"
PROMPTS = [f"row {row}" for row in range(48)]


def golden_labels(path: Path) -> Labels:
    """Labels that rise with one direction of the golden prompts' embeddings."""
    recipe = Recipe.load(RECIPE)
    assert recipe.model.prompt_embeddings is not None
    prompts = EncodedPrompts.from_table(PromptEmbeddings.load(recipe.model.prompt_embeddings), PROMPTS)
    z = prompts.embeddings
    generator = torch.Generator().manual_seed(0)
    signal = (z - z.mean(0)) @ torch.randn(z.shape[1], generator=generator)
    scores = torch.stack([signal + 0.1 * torch.randn(len(z), generator=generator) for _ in range(2)], 1)
    tags = {
        "concept": tuple(f"c{row // 2}" for row in range(len(z))),
        "split": tuple("held" if row >= 36 else "train" for row in range(len(z))),
    }
    made = Labels(tuple(PROMPTS), z, scores, {"metric": "a test", "pooling": "mean"}, tags)
    made.save(path)
    return made


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.safetensors"
    golden_labels(path)
    return path


def t2q_command(labels: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "t2q", RECIPE, "--labels", str(labels), "--out", str(out)),
        *("--hidden", "8", "--train-steps", "250", "--lr", "3e-3", "--dropout", "0", *more),
    ]


def q2b_command(t2q: Path, labels: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "q2b", RECIPE, "--t2q", str(t2q), "--prompts", str(labels), "--out", str(out)),
        *(
            "--steps",
            "3",
            "--guidance",
            "2",
            "--batch-size",
            "2",
            "--limit",
            "4",
            "--bit-weight",
            "1e-3",
            *more,
        ),
    ]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_t2q_is_a_folder_that_says_what_it_is(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(t2q_command(labels, tmp_path / "t2q", "--held", "split=held")) == 0
    shown = capsys.readouterr().out
    assert "sqrt(rho)" in shown
    assert "mean by split" in shown
    report = json.loads((tmp_path / "t2q" / "report.json").read_text())
    assert report["rows"]["held"] == 12
    assert report["held"]["srocc"] > 0.5
    assert report["trivial"]["words"]["srocc"] is None, "all prompts have two words"
    trained = TrainedT2Q.from_pretrained(tmp_path / "t2q")
    assert trained.config.pooling == "mean"
    assert trained.config.labels["metric"] == "a test"
    assert not (tmp_path / "t2q.work").exists()
    made = Labels.load(labels)
    assert torch.equal(trained.normaliser(made.scores), made.targets)
    best = made.scores.max(0).values[None] + 1
    assert float(trained.normaliser(best)) == 1.0


def test_a_share_of_a_tag_is_held_out(labels: Path, tmp_path: Path) -> None:
    command = t2q_command(labels, tmp_path / "t2q", "--split-by", "concept", "--held-share", "0.5")
    assert main(command) == 0
    assert json.loads((tmp_path / "t2q" / "report.json").read_text())["rows"]["held"] == 24


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--held", "split=hold"], 2, "did you mean 'held'"),
        (["--held", "split"], 2, "expected TAG=VALUE"),
        (["--split-by", "concepts"], 2, "did you mean 'concept'"),
        (["--held-share", "1"], 2, "less than 1"),
        (["--dropout", "1"], 2, "less than 1"),
    ],
)
def test_what_cannot_be_held_out_is_refused(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    assert main(t2q_command(labels, tmp_path / "t2q", *more)) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t2q").exists()


def test_labels_of_another_text_encoder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "labels.safetensors"
    made = golden_labels(path)
    Labels(made.prompts, made.embeddings.flip(1), made.scores, made.facts, made.tags).save(path)
    assert main(t2q_command(path, tmp_path / "t2q")) == 4
    assert "make the labels with this pipeline" in capsys.readouterr().err


def test_q2b_is_trained_on_what_t2q_saw(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="extra `evaluation`")
    assert main(t2q_command(labels, tmp_path / "t2q", "--held", "split=held")) == 0
    out = tmp_path / "controller"
    command = q2b_command(
        tmp_path / "t2q", labels, out, "--trajectories", "2", "--cost", "macs", "--slope", "positive"
    )
    assert main(command) == 0
    controller = TextToBits.from_pretrained(out)
    assert len(controller.config.population) == 36
    assert bool((controller.q2b.slope > 0).all())
    facts = json.loads((out / "training.json").read_text())
    assert len(facts["records"]) == 2
    assert {int(prompt.split()[1]) for prompt in facts["prompts"]} <= set(range(36))
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert facts["plans"]["prompts"] == 36
    assert 8 <= facts["plans"]["fab"] <= 32
    assert facts["plans"]["negative_slopes"] == 0
    assert "plans of 36 prompts (simulated): FAB" in capsys.readouterr().out
    # It can go on from there, and an older one is replaced.
    again = [*command[:-4], "--start", str(out), "--trajectories", "0"]
    assert main(again) == 0
    continued = TextToBits.from_pretrained(out)
    assert all(
        torch.equal(a, b) for a, b in zip(controller.parameters(), continued.parameters(), strict=True)
    )


def test_q2b_refuses_what_does_not_belong_together(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(t2q_command(labels, tmp_path / "t2q")) == 0
    out = tmp_path / "controller"
    assert main(q2b_command(tmp_path / "t2q", labels, out, "--start", "sensitivity")) == 2
    assert "belong together" in capsys.readouterr().err
    without = [
        part for part in q2b_command(tmp_path / "t2q", labels, out) if part not in ("--bit-weight", "1e-3")
    ]
    assert main(without) == 2
    assert "--bit-weight is needed" in capsys.readouterr().err
    golden_labels(labels)
    made = Labels.load(labels)
    Labels(made.prompts, made.embeddings, made.scores + 1, made.facts, made.tags).save(labels)
    assert main(q2b_command(tmp_path / "t2q", labels, out, "--trajectories", "0")) == 4
    assert "not the label set" in capsys.readouterr().err
    assert not out.exists()


def q2b_prompts(tmp_path: Path, rows: list[dict[str, str]]) -> tuple[int, list[str]]:
    """What `train q2b` returns, and the prompts that it trained on, given a prompt file."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "controller"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    code = main(q2b_command(tmp_path / "t2q", prompts, out, "--trajectories", "0"))
    return code, json.loads((out / "training.json").read_text())["prompts"] if code == 0 else []


def test_prompts_that_t2q_held_out_are_no_training_prompts(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(t2q_command(labels, tmp_path / "t2q", "--split-by", "concept", "--held-share", "0.5")) == 0
    config = TrainedT2Q.from_pretrained(tmp_path / "t2q").config
    made = Labels.load(labels)
    out = made.prompts[made.tags["concept"].index(config.held[0])]
    stays = next(
        p for p, concept in zip(made.prompts, made.tags["concept"], strict=True) if concept not in config.held
    )
    other = {"prompt": "row 0", "concept": config.held[0]}
    rows = [{"prompt": stays, "concept": "elsewhere"}, {"prompt": out, "concept": "elsewhere"}, other]
    assert q2b_prompts(tmp_path, rows) == (0, [stays])
    assert "2 of 3 prompts" in capsys.readouterr().out
    assert q2b_prompts(tmp_path, [{"prompt": stays}, {"prompt": out}]) == (0, [stays])
    shown = capsys.readouterr().out
    assert "1 of 2 prompts" in shown
    assert "has no tag 'concept'" in shown
    assert q2b_prompts(tmp_path, rows[1:])[0] == 2
    assert "held out all of its 2 prompts" in capsys.readouterr().err


def test_without_tags_the_held_prompts_themselves_are_known(tmp_path: Path, labels: Path) -> None:
    made = Labels.load(labels)
    Labels(made.prompts, made.embeddings, made.scores, made.facts, {}).save(labels)
    assert main(t2q_command(labels, tmp_path / "t2q", "--held-share", "0.5")) == 0
    config = TrainedT2Q.from_pretrained(tmp_path / "t2q").config
    assert config.held == ()
    held = [prompt for prompt in made.prompts if prompt_digest(prompt) in config.held_prompts]
    assert len(held) == len(made.prompts) // 2
    rows = [{"prompt": prompt, "concept": "x"} for prompt in made.prompts[:8]]
    assert set(q2b_prompts(tmp_path, rows)[1]) == {p for p in made.prompts[:8] if p not in held}


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("part", ["t2q", "q2b"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    pytest.importorskip("matplotlib", reason="extra `evaluation`")
    folder = tmp_path / "t2q"
    assert main(t2q_command(labels, folder)) == 0

    def command(out: str, *more: str) -> list[str]:
        if part == "t2q":
            return t2q_command(labels, tmp_path / out, *more)
        return q2b_command(folder, labels, tmp_path / out, "--trajectories", "3", *more)

    assert main(command("whole")) == 0
    calls: list[Any] = []
    owner: Any = t2q._Fit if part == "t2q" else q2b._Q2BTrainer
    name = "_learn" if part == "t2q" else "trajectory"
    original = getattr(owner, name)

    def killed(self: Any, *given: Any) -> Any:
        calls.append(given)
        if len(calls) == (170 if part == "t2q" else 2):
            raise _KilledError
        return original(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(_KilledError):
            main(command("resumed"))
    assert (tmp_path / "resumed.work" / "state.safetensors").exists()
    assert not (tmp_path / "resumed").exists()
    assert main(command("resumed", "--lr", "0.5")) == 2, "a training begun otherwise is not finished"
    assert main(command("resumed")) == 0
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_t2q_learns_how_little_an_allocation_errs(labels: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="extra `evaluation`")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, "concept": f"c{row // 2}"} for row, prompt in enumerate(PROMPTS[:24])]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    evaluate = [
        *("evaluate", RECIPE, "--prompts", str(prompts), "--out", str(run), "--allocations", "A8"),
        *("--seeds", "2", "--steps", "2", "--guidance", "1", "--skip", "own", "--skip", "pictures"),
    ]
    assert main(evaluate) == 0
    command = [
        part for part in t2q_command(labels, tmp_path / "t2q") if part not in ("--labels", str(labels))
    ]
    assert main([*command, "--errors-of", f"{run}:A8"]) == 0
    trained = TrainedT2Q.from_pretrained(tmp_path / "t2q")
    assert trained.config.labels["metric"] == "-ln error_led"
    errors = Run.load(run).of("A8")["error_led"]
    assert torch.equal(trained.normaliser.scores, (-errors.log()).float().sort(0).values)
    assert main([*command, "--errors-of", f"{run}:full precision"]) == 2
