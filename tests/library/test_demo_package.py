"""The embedded demo as it is shipped: its size, its types, and that its parts belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from qlip_demo import FOLDER
from qlip_plugins import load_base_quantizer
from qlip_plugins.adapter import CheckpointWriter
from qlip_plugins.cli import main
from qlip_plugins.grids import Ranges
from qlip_plugins.layers import controlled
from qlip_plugins.packed import read_config
from qlip_plugins.recipe import FULL_PRECISION, QlipController, Recipe, shipped_recipes
from qlip_plugins.text_to_bits import TextToBits

MB = 1_000_000
RECIPES = [name for name in shipped_recipes() if name.startswith("demo-")]
MENUS = ((4, 6, 8), (8, 16, 32))
TEXTS = ["", "a red fox", "Café «naïve» 3rd — 🦊", "smiling face with sunglasses, " * 40]


def size(*patterns: str) -> int:
    files = list(chain.from_iterable(FOLDER.glob(pattern) for pattern in patterns))
    assert files
    return sum(path.stat().st_size for path in files if path.is_file())


def test_it_is_small() -> None:
    assert size("pipeline/**/*.safetensors") <= 45 * MB
    assert size("base/**/*", "ranges-*.safetensors", "controller-*/**/*") <= 9 * MB
    assert [path.name for path in FOLDER.rglob("*") if path.stat().st_size > 15 * MB] == []


@pytest.mark.parametrize("folder", ["pipeline", "clip"])
def test_stored_numbers_are_half_precision(folder: str) -> None:
    tensors = {
        name: t for path in (FOLDER / folder).rglob("*.safetensors") for name, t in load_file(path).items()
    }
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    assert floating
    assert [name for name, t in floating.items() if not torch.equal(t.half().float(), t.float())] == []


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_what_is_stored_is_loaded_in_single_precision(part: str, demo_pipe: Any) -> None:
    """Whole: a tensor that a host does not recognise would be drawn at random. Hosts differ in names."""
    parameters = dict(getattr(demo_pipe, part).named_parameters())
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    stored = [
        t for path in (FOLDER / "pipeline" / part).glob("*.safetensors") for t in load_file(path).values()
    ]
    assert digests(parameters.values()) == digests(t for t in stored if t.is_floating_point())


def digests(tensors: Iterable[Tensor]) -> list[str]:
    return sorted(hashlib.sha256(t.detach().float().numpy().tobytes()).hexdigest() for t in tensors)


def test_the_unet_is_one_that_ldm_can_express(demo_pipe: Any, tmp_path: Path) -> None:
    adapter = load_base_quantizer("qdiffusion")
    assert isinstance(adapter, CheckpointWriter)
    adapter.check_writable(demo_pipe.unet, tmp_path / "new")
    first, *others = demo_pipe.unet.config.block_out_channels
    assert [channels % first for channels in others] == [0] * len(others)
    assert demo_pipe.unet.config.sample_size == 16


def test_the_noise_is_stable_diffusion_s(demo_pipe: Any) -> None:
    noise = demo_pipe.scheduler.config
    assert noise.prediction_type == "epsilon"
    assert (noise.beta_schedule, noise.beta_start, noise.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert noise.num_train_timesteps == 1000
    assert demo_pipe.vae.config.scaling_factor == 1


def test_the_tokenizer_is_the_same_after_a_round_trip(demo_pipe: Any, tmp_path: Path) -> None:
    demo_pipe.tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text).input_ids == demo_pipe.tokenizer(text).input_ids, text
    ids = demo_pipe.tokenizer(TEXTS).input_ids
    assert max(chain.from_iterable(ids)) < demo_pipe.text_encoder.config.vocab_size
    assert len({tuple(row) for row in ids}) == len(TEXTS)


def test_the_tokenizer_ends_every_prompt_at_77(demo_pipe: Any) -> None:
    tokenizer = demo_pipe.tokenizer
    assert tokenizer.model_max_length == 77
    rows = tokenizer(TEXTS, padding="max_length", truncation=True).input_ids
    assert {len(row) for row in rows} == {77}
    assert {(row[0], row[-1]) for row in rows} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}
    assert tokenizer.eos_token_id not in rows[-1][:-1], "the last prompt is longer than 77 tokens"


def test_the_recipes_are_there() -> None:
    assert {"demo-w4a8", "demo-w4a16", "demo-qlip-468", "demo-qlip-81632"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_its_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", name]) == 0, capsys.readouterr().err
    assert Recipe.load(name).missing_files() == []


@pytest.mark.parametrize("name", RECIPES)
def test_ranges_and_controller_belong_to_the_base(name: str) -> None:
    recipe = Recipe.load(name)
    base: Any = recipe.base
    table = read_config(base.folder).table(base.activation_bits)
    state = load_base_quantizer(base.adapter).load(base)
    assert table is not None
    assert state.fingerprint == table.fingerprint
    assert recipe.ranges is not None
    assert recipe.ranges.table is not None
    assert Ranges.load(recipe.ranges.table).fingerprint == table.fingerprint
    if isinstance(recipe.controller, QlipController):
        layers = controlled(state.activations, **recipe.controls)
        controller = TextToBits.from_pretrained(recipe.controller.path)
        controller.check_made_for(table.fingerprint, recipe.activation_bits, layers)


@pytest.mark.parametrize("bits", [8, 16])
def test_ranges_hold_every_width_of_both_menus(bits: int) -> None:
    recipe = Recipe.load(f"demo-w4a{bits}")
    assert recipe.ranges is not None
    assert recipe.ranges.table is not None
    fitted = Ranges.load(recipe.ranges.table).fitted
    grids = load_base_quantizer("packed").load(recipe.base).activations
    assert fitted.keys() == grids.keys()
    for name, grid in grids.items():
        wanted = set(chain(*MENUS)) - {FULL_PRECISION, grid.bits}
        assert wanted <= fitted[name].keys(), name
        assert all(found.bits == width for width, found in fitted[name].items()), name
