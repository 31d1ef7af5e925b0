"""Calibration of the golden pipeline as a whole: what it gains, that it can be resumed, the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration_fixtures import PROMPTS, SETTINGS, Calibrated, command, golden_section, small
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.calibration import run as running
from qlip_plugins.calibration.inputs import DenoiserInputs
from qlip_plugins.calibration.work import CalibrationFolder
from qlip_plugins.cli import main
from qlip_plugins.errors import ArtefactError, RecipeError
from qlip_plugins.packed import read_packed
from qlip_plugins.recipe import Recipe


def test_learning_pays(calibrated: Calibrated) -> None:
    """No unit is worse than at its start, most are better, and so is the whole model."""
    report = calibrated.calibration.report
    phases = [[unit["weights"] for unit in report["units"]]]
    phases += [[unit["activations"][bits] for unit in report["units"]] for bits in ("8", "16")]
    assert len(report["units"]) == 26
    for phase, least in zip(phases, (20, 8, 5), strict=True):
        assert all(unit["after"] <= unit["before"] for unit in phase)
        assert sum(unit["after"] < unit["before"] for unit in phase) >= least
    errors = report["errors"]
    assert 0 < errors["weights"] < 0.8 * errors["weights rounded to nearest"]
    assert errors["weights, activations at 16 bits"] < 1.1 * errors["weights"]
    assert errors["weights, activations at 8 bits"] < 1.5 * errors["weights"]


@pytest.mark.parametrize("bits", [None, 8, 16])
def test_reported_errors_are_those_of_the_installed_state(calibrated: Calibrated, bits: int | None) -> None:
    held_out = DenoiserInputs.load(calibrated.work / "held-out.safetensors")
    call = held_out.call(slice(None), torch.device("cpu"))
    unet = calibrated.pipe.unet
    with torch.no_grad():
        exact = unet(**call)[0]
        installed = load_backend("torch").install(unet, calibrated.calibration.state(bits))
        found = unet(**call)[0]
        installed.remove()
    name = "weights" if bits is None else f"weights, activations at {bits} bits"
    error = float((found - exact).square().sum() / exact.square().sum())
    # Activation rounding makes a difference of the last bit jump by a step: batches differ here.
    assert error == pytest.approx(calibrated.calibration.report["errors"][name], rel=0.05)


def test_the_pipeline_is_left_as_it_was(calibrated: Calibrated) -> None:
    floats = calibrated.calibration.weights.float_parameters
    for name, parameter in calibrated.pipe.unet.named_parameters():
        assert torch.equal(parameter, floats[name])
    assert not any(module._forward_pre_hooks for module in calibrated.pipe.unet.modules())


def test_every_quantizer_is_there(calibrated: Calibrated) -> None:
    """The same layers, splits, operands and widths as in Q-Diffusion's own file of this model."""
    golden = load_base_quantizer("qdiffusion").load(Recipe.load("golden-w4a8").base)
    for bits in (8, 16):
        state = calibrated.calibration.state(bits)
        assert {n: layer.split for n, layer in state.layers.items()} == {
            n: layer.split for n, layer in golden.layers.items()
        }
        assert set(state.activations) == set(golden.activations)
        softmax = [name for name in state.operands if name.endswith(".softmax")]
        assert all(state.operands[name].zero_point == 0 for name in softmax)
        assert {g.bits for n, g in state.activations.items() if n not in softmax} == {bits}
        assert {state.operands[name].bits for name in softmax} == {16}
        assert all(grid.scale > 0 for grid in state.activations.values())


@pytest.mark.parametrize("phase", ["weights", "activations"])
def test_an_interrupted_calibration_ends_alike(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a unit, then run again: the same bytes as in one go, nothing done twice."""
    whole = small(tmp_path / "whole")
    method = f"_unit_{phase}"
    original: Any = getattr(running._Job, method)
    stop = {"weights": 11, "activations": 19}[phase]
    done: list[int] = []

    def unit(job: Any, *args: Any) -> Any:
        number = args[-2]
        if number == stop and stop not in done:
            done.append(stop)
            torch.manual_seed(len(done))  # what ran before must not matter
            raise KeyboardInterrupt
        done.append(number)
        return original(job, *args)

    monkeypatch.setattr(running._Job, method, unit)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "parts")
    assert (tmp_path / "parts").exists()
    assert small(tmp_path / "parts") == whole
    assert done == [*range(stop), stop, *range(stop, 26)]


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    folder = CalibrationFolder(tmp_path / "work", {"seed": 0, "prompts": "a"})
    CalibrationFolder(folder.path, {"seed": 0, "prompts": "a"})
    with pytest.raises(RecipeError, match=r"begun otherwise .seed: 0, now 1"):
        CalibrationFolder(folder.path, {"seed": 1, "prompts": "a"})
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    with pytest.raises(ArtefactError, match=r"no work folder \(calibration\)"):
        CalibrationFolder(other, {"seed": 0})
    assert (other / "thesis.txt").exists()


def test_the_identity_is_all_that_matters(calibrated: Calibrated) -> None:
    def identity(prompts: list[str] = PROMPTS, **change: Any) -> str:
        settings = replace(SETTINGS, **change)
        return json.dumps(running._identity(calibrated.pipe, golden_section(), prompts, settings))

    same = identity()
    assert same == identity()
    sampling = replace(SETTINGS.sampling, seed=1)
    others = [identity(PROMPTS[1:]), identity(sampling=sampling), identity(weight_bits=5)]
    bias = calibrated.pipe.unet.conv_in.bias
    with torch.no_grad():
        kept = bias.clone()
        bias.add_(1)
        others.append(identity())
        bias.copy_(kept)
    assert same not in others
    assert identity() == same


def test_the_identity_covers_what_encodes_prompts(text_pipe: Any) -> None:
    """Text encoder and tokenizer decide what a prompt means, so another one is another run."""

    def identity() -> str:
        return json.dumps(running._identity(text_pipe, golden_section(), PROMPTS, SETTINGS))

    same = identity()
    weight = next(text_pipe.text_encoder.parameters())
    with torch.no_grad():
        kept = weight.clone()
        weight.add_(1)
        other_encoder = identity()
        weight.copy_(kept)
    assert identity() == same
    text_pipe.tokenizer.add_tokens(["fox"])
    assert same not in (other_encoder, identity())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From prompts to a recipe that generates, and Q-Diffusion's own file beside it."""
    arguments = command(tmp_path, "--activation-bits", "8", "--native", str(tmp_path / "native"))
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "# weights rounded to nearest: relative squared error" in captured.out
    assert "26 units, " in captured.err
    assert "peak memory: " in captured.err
    assert not (tmp_path / "out.work").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "out", "prompts.txt"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(captured.out)
    picture = tmp_path / "picture"
    sampling = ["--steps", "2", "--guidance", "3"]
    assert main(["generate", str(recipe), "--prompt", "row 9", *sampling, "--out", str(picture)]) == 0
    adapter = load_base_quantizer("qdiffusion")
    config: Any = adapter.config_class
    native = adapter.load(config(checkpoint=tmp_path / "native" / "w4a8" / "ckpt.pth"))
    assert native.fingerprint == read_packed(tmp_path / "out", 8).fingerprint
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "# format: packed" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "native")
    assert main(command(tmp_path, "--activation-bits", "--json")) == 0
    assert "activation_bits: null" in json.loads(capsys.readouterr().out)["recipe"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "report.json",
        "weights.safetensors",
    ]


@pytest.mark.parametrize(
    ("more", "prompts", "code", "message"),
    [
        ([], "\n \n", 2, "the file holds no prompt"),
        ([], "row 1\n", 2, "at least two are needed"),
        ([], "row 1\nrow 900\n", 2, "'row 900' is not among"),
        (["--weight-bits", "1"], "row 1\nrow 2\n", 2, "weight bits: expected 2 to 8, found 1"),
        (["--prompt-embeddings", "none.safetensors"], "row 1\nrow 2\n", 3, "none.safetensors: no such file"),
        (["--prompts", "nowhere.txt"], "", 2, "nowhere.txt: cannot be read"),
        (["--device", "cuda:77"], "row 1\nrow 2\n", 4, "device 'cuda:77' cannot be used"),
        (["--out", "."], "row 1\nrow 2\n", 3, "was not written by this command"),
    ],
)
def test_command_errors(
    more: list[str],
    prompts: str,
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(tmp_path, *more, prompts=prompts)) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"], "something was left behind"


def test_a_native_folder_of_others_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], golden: Path
) -> None:
    theirs = tmp_path / "native" / "w4a8"
    shutil.copytree(golden / "qdiffusion" / "w4a8", theirs)
    assert main(command(tmp_path, "--native", str(tmp_path / "native"))) == 3
    assert "exists and was not written by this command" in capsys.readouterr().err
    assert not (tmp_path / "out.work").exists()
