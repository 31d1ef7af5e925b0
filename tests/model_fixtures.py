"""Fixtures of every test that runs a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from golden_model import CASES, GoldenModel
from qlip_plugins import load_base_quantizer
from qlip_plugins.generation import load_pipeline
from qlip_plugins.recipe import Recipe
from qlip_plugins.state import CalibratedState


@pytest.fixture(scope="session")
def model(golden: Path) -> GoldenModel:
    return GoldenModel(golden)


@pytest.fixture
def calibrate(model: GoldenModel) -> Callable[[nn.Module], None]:
    """Shows the golden UNet's recorded inputs to a copy that some framework calibrates."""

    @torch.no_grad()
    def run(unet: nn.Module) -> None:
        for index in range(2):
            unet(**model.call(index))

    return run


@pytest.fixture(scope="session")
def states(golden: Path) -> dict[str, CalibratedState]:
    adapter = load_base_quantizer("qdiffusion")
    return {
        case: adapter.load(adapter.config_class(checkpoint=golden / "qdiffusion" / case / "ckpt.pth"))  # type: ignore[call-arg]
        for case in CASES
    }


@pytest.fixture
def edited(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """`edited(case, change)`: a copy of a golden checkpoint after `change(tensors)`."""

    def edit(case: str, change: Callable[[dict[str, Tensor]], Any], record: bool = True) -> Path:
        source = golden / "qdiffusion" / case
        tensors = torch.load(source / "ckpt.pth", weights_only=True)
        changed = change(tensors)
        path = tmp_path / "ckpt.pth"
        torch.save(tensors if changed is None else changed, path)
        if record:
            text = (source / "sampling_config.yaml").read_text()
            (tmp_path / "sampling_config.yaml").write_text(text)
        return path

    return edit


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


@pytest.fixture(scope="session")
def demo_pipe() -> Any:
    """The embedded demo's pipeline, shared: leave it as it is."""
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe


@pytest.fixture
def text_pipe(model: GoldenModel, tokenizer: CLIPTokenizer) -> Any:
    """The golden UNet behind a real (untrained) CLIP text encoder."""
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    plain = model.pipe()
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=plain.unet,
        scheduler=plain.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
