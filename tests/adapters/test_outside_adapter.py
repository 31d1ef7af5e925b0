"""A package outside this repository, unknown to the core, works through its entry points alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from golden_model import GoldenModel
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.adapter import BASE_QUANTIZERS, installed
from qlip_plugins.cli import main
from qlip_plugins.contract import BASE_QUANTIZER_CHECKS, BaseQuantizerCase, BaseQuantizerCheck
from qlip_plugins.errors import AdapterNotFoundError

OUTSIDE = Path(__file__).parents[1] / "outside"


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `pip install` had put the package there: code and metadata on the path."""
    monkeypatch.syspath_prepend(OUTSIDE)


@pytest.fixture
def checkpoint(model: GoldenModel, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.unet().state_dict().items()}, path)
    return path


@pytest.mark.usefixtures("outside")
def test_it_is_found_by_name() -> None:
    assert {"outside", "qdiffusion"} <= set(installed(BASE_QUANTIZERS))
    assert type(load_base_quantizer("outside")).__name__ == "Outside"
    with pytest.raises(ModuleNotFoundError, match=r"qlip_outside\.nowhere"):
        load_base_quantizer("broken")
    with pytest.raises(AdapterNotFoundError, match=r"did you mean 'outside'\? \(installed: .*qdiffusion"):
        load_base_quantizer("outsid")


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("check", BASE_QUANTIZER_CHECKS.values(), ids=list(BASE_QUANTIZER_CHECKS))
def test_it_keeps_the_contract(check: BaseQuantizerCheck, checkpoint: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pth"
    foreign.write_bytes(b"")
    adapter = load_base_quantizer("outside")
    check(BaseQuantizerCase("outside", adapter, {"checkpoint": checkpoint}, checkpoint, foreign))


@pytest.mark.usefixtures("outside")
def test_it_runs_a_recipe(
    model: GoldenModel, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe: DiffusionPipeline = model.pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    recipe = tmp_path / "r.yaml"
    text = (
        "schema_version: 1\n"
        "model: {pipeline: pipe, prompt_embeddings: 'package://qlip_recipes/golden_w4a8/prompt_embeddings.safetensors'}\n"
        "base:\n  adapter: outside\n  checkpoint: weights.safetensors\n  reach: 6.0\n"
        "backend: elsewhere\n"
        "activation_bits: {low: 4, medium: 8, high: 32}\n"
        "ranges: {keep_calibrated: true}\n"
        "controller: {kind: static, bits: 4}\n"
    )
    recipe.write_text(text)
    out = tmp_path / "out"
    command = [
        "generate",
        str(recipe),
        "--prompt",
        "row 1",
        "--steps",
        "2",
        "--guidance",
        "3",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    assert "calibrated ranges kept at 4 bits" in capsys.readouterr().out
    recipe.write_text(text.replace("reach: 6.0", "reach: -1.0"))
    assert main(command) == 2
    assert f"{recipe}:6: base.reach: Input should be greater than 0" in capsys.readouterr().err
    assert load_backend("elsewhere") is not load_backend("torch")


@pytest.mark.usefixtures("outside")
def test_a_broken_neighbour_disturbs_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", "golden-w4a8"]) == 0
    checkpoint = OUTSIDE.parent / "golden" / "qdiffusion" / "w4" / "ckpt.pth"
    assert main(["inspect", str(checkpoint)]) == 0
    assert main(["inspect", str(OUTSIDE / "nothing.pth")]) == 3
    assert main(["recipe", "show", "--schema"]) == 0
    assert "the options of 'broken' are missing" in capsys.readouterr().err
    assert main(["doctor"]) == 4
    assert "NOT broken (qlip_outside.nowhere:adapter) ModuleNotFoundError" in capsys.readouterr().out
