"""The shipped demo pipeline is the one that was trained, whichever hosts load it."""

from __future__ import annotations

import pytest
import torch

from qlip_plugins.generation import load_pipeline
from qlip_plugins.recipe import Recipe


@torch.no_grad()
def test_every_component_computes_what_it_was_trained_to() -> None:
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    ids = pipe.tokenizer(["rocket"], padding="max_length", return_tensors="pt").input_ids
    encoded = pipe.text_encoder(ids)
    # Loaders only warn where names in a file do not fit: the model is then random.
    assert encoded.pooler_output[0, :4].tolist() == pytest.approx(
        [-0.7617, -0.0691, -1.4465, -1.0092], abs=1e-3
    )
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    predicted = pipe.unet(noise, 961, encoded.last_hidden_state).sample
    assert float((predicted - noise).norm() / noise.norm()) < 0.2
    picture = torch.full((1, 3, 64, 64), 1.0)
    found = pipe.vae.decode(pipe.vae.encode(picture).latent_dist.mode()).sample
    assert float((found - picture).abs().max()) < 0.1
