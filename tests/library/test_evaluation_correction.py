"""Evaluating a recipe whose sampler corrects the error."""

from __future__ import annotations

from typing import Any

import numpy as np

from qlip_plugins import apply
from qlip_plugins.evaluation.errors import Batch, Judges, Measuring, paired
from qlip_plugins.generation import Settings, sample_model
from qlip_plugins.recipe import Recipe


def test_a_correction_is_in_the_sampler_for_its_plan_alone(demo_pipe: Any) -> None:
    """Its pictures are those that the recipe itself draws."""
    recipe = Recipe.load("demo-qlip-468-corrected")
    settings = Settings(steps=25, guidance_scale=3.0)
    own = demo_pipe.scheduler
    with paired(demo_pipe, recipe, ("rocket",), settings) as pair:
        found = Measuring(pair, Judges({}, {}), Batch(0, range(1))).allocation(pair.recipe_plan)["pictures"]
        assert pair.controller.pipe.scheduler is own
    with apply(demo_pipe, recipe):
        (expected,) = sample_model(demo_pipe, recipe.model, ("rocket",), settings, "pil")
    assert demo_pipe.scheduler is own
    assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - np.array(expected, dtype=int)).max() <= 1
