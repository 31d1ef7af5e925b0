"""SDXL and FLUX are calibrated as Stable Diffusion is: tiny models, few iterations, and the result is steered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from family_models import TOKENS, make
from qlip_plugins.calibration import command
from qlip_plugins.calibration.command import calibrate_pipeline
from qlip_plugins.calibration.settings import CalibrationSettings
from qlip_plugins.controller import apply
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.generation import Settings
from qlip_plugins.packed import read_packed
from qlip_plugins.recipe import Recipe

SETTINGS = CalibrationSettings(
    sampling=Settings(steps=1, guidance_scale=1.0),
    scheme="qdiffusion",
    weight_bits=4,
    activation_bits=(8,),
    softmax_bits=None,
    samples=8,
    iterations=20,
    activation_iterations=10,
    batch_size=4,
    activation_start=None,
)


def small(pipe: Any) -> Any:
    """The pipeline, drawing small pictures where nothing else is said."""

    class Small(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            return super().__call__(
                *args, **{"height": 16, "width": 16, "max_sequence_length": TOKENS, **options}
            )

    pipe.__class__ = Small
    return pipe


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_its_blocks_are_reconstructed_and_the_base_is_steered(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make(name, tmp_path)
    pipe = small(pipe) if name == "flux" else pipe
    monkeypatch.setattr(command, "load_model", lambda model: pipe)
    settings = replace(SETTINGS, sampling=Settings(steps=3, guidance_scale=3.0))
    said: list[str] = []
    prompts = ["a fox", "the dog", "cat"]
    result = calibrate_pipeline(
        "someone/model", None, prompts, settings, tmp_path / "base", None, tmp_path / "work", said.append
    )
    errors = result.report["errors"]
    assert errors["weights"] < 1.1 * errors["weights rounded to nearest"] < 0.2
    learned = [unit["weights"] for unit in result.report["units"]]
    assert sum(row["after"] for row in learned) < 0.95 * sum(row["before"] for row in learned)
    assert "units" in said[0]
    assert "minutes" in said[0]
    assert "peak memory" in said[-1]
    units = {unit["name"] for unit in result.report["units"]}
    expected = {
        "flux": {"x_embedder", "transformer_blocks.0", "single_transformer_blocks.1", "proj_out"},
        "sdxl": {"add_embedding.linear_1", "mid_block.attentions.0.transformer_blocks.1"},
    }
    assert expected[name] <= units
    state = read_packed(tmp_path / "base", 8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema_version: 1\nmodel: {pipeline: someone/model}\n"
        f"base: {{adapter: packed, folder: {tmp_path / 'base'}, activation_bits: 8}}\n"
        "backend: torch\nactivation_bits: {low: 4, medium: 8, high: 32}\n"
        "controller: {kind: static, bits: base}\n"
    )
    with apply(pipe, Recipe.from_yaml(recipe)) as controller:
        pipe(prompt=prompts[:1], num_inference_steps=2, output_type="latent")
        assert controller.state.fingerprint == state.fingerprint
        assert controller.report().mean.fab == 8


def test_ptqd_is_defined_on_stable_diffusion_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make("flux", tmp_path)
    monkeypatch.setattr(command, "load_model", lambda model: pipe)
    settings = replace(SETTINGS, scheme="ptqd")
    with pytest.raises(IncompatibleModelError, match="Use another scheme"):
        calibrate_pipeline(
            "x/y", None, ["a", "b"], settings, tmp_path / "base", None, tmp_path / "work", lambda text: None
        )
    assert not (tmp_path / "base").exists()
    assert torch.is_grad_enabled()
