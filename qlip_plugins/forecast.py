"""What a recipe will do to prompts, before any picture is made: quality, bits and cost, from the text alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import load_base_quantizer
from .controller import GenerationCosts, check_ranges, load_ranges, make_planner, with_splits
from .embeddings import EncodedPrompts, PromptEmbeddings, check_table_serves
from .errors import ArtefactError, IncompatibleModelError
from .families import Conditioning, Family, family_of
from .files import folder_written_whole
from .generation import Settings, load_text_side
from .metrics import Cost, MacCounts, cost_of, count_macs, mean_cost
from .plan import BitPlan
from .recipe import QlipController, Recipe
from .state import CalibratedState
from .text_to_bits import TextToBits

FORECAST_FORMAT = "qlip-plugins forecast"
FORECAST_NAME = "forecast.json"
OWNED = ("[0-9][0-9][0-9]-bits.png", "plan.safetensors")


@dataclass(frozen=True)
class Forecast:
    """What was foreseen of P prompts.

    Args:
        prompts: the texts.
        plan: their bits.
        costs: of each; simulated.
        quality_error: how far the predicted quality lay off on prompts that T2Q had not seen (root mean
            square, in units of quality, 0 to 1); None where the controller does not say, or predicts none.
        base_bitops: BitOPs (T, profile paper) of the base at its own width.
        seconds: that encoding, predicting and deciding took, all prompts together; measured.
    """

    prompts: tuple[str, ...]
    plan: BitPlan
    costs: tuple[Cost, ...]
    quality_error: float | None
    base_bitops: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "format": FORECAST_FORMAT,
            "bitops_are": "simulated: counted from the plan, not measured",
            "prompts": [
                {"prompt": prompt, **asdict(cost), "relative": cost.bitops_paper / self.base_bitops}
                for prompt, cost in zip(self.prompts, self.costs, strict=True)
            ],
            "mean": asdict(mean_cost(self.costs)),
            "quality_error": self.quality_error,
            "base_bitops_paper": self.base_bitops,
            "steps": len(self.plan.timesteps),
            "controlled": len(self.plan.layers),
            "plan_digest": self.plan.digest(),
            "seconds_measured": self.seconds,
        }

    def __str__(self) -> str:
        lines = ["quality            FAB  BitOPs paper (T)  of base  BitOPs full (T)  prompt"]
        for prompt, cost in zip(self.prompts, self.costs, strict=True):
            fab = "     -" if cost.fab is None else f"{cost.fab:6.2f}"
            relative = cost.bitops_paper / self.base_bitops
            lines.append(
                f"{self._quality(cost):15}  {fab}  {cost.bitops_paper:16.6g}  {relative:7.3f}  "
                f"{cost.bitops_full:15.6g}  {prompt}"
            )
        last = (
            f"{len(self.plan.timesteps)} steps, K = {len(self.plan.layers)}; BitOPs are simulated; no picture was "
            f"made; {1000 * self.seconds / len(self.prompts):.1f} ms a prompt (measured)"
        )
        return "\n".join([*lines, last])

    def _quality(self, cost: Cost) -> str:
        if cost.quality is None:
            return "-"
        return f"{cost.quality:.3f}" + ("" if self.quality_error is None else f" +- {self.quality_error:.2f}")


def forecast(recipe: Recipe, prompts: Sequence[str], settings: Settings) -> Forecast:
    """Foresee what a recipe will do to prompts; the denoiser's and decoder's weights are not loaded.

    Args:
        recipe: its pipeline's text encoder and schedule, its base's widths and its controller are used.
        prompts: P of them; at least one.
        settings: `steps`, and whether `guidance_scale` guides.

    Raises:
        ArtefactError: a file that the recipe names is missing or damaged.
        IncompatibleModelError: base, controller and pipeline do not belong together.
    """
    pipe = load_text_side(recipe.model)
    family = family_of(pipe)
    state = _base(recipe, family, pipe)
    planner = make_planner(pipe, recipe, state)
    check_ranges(load_ranges(recipe.ranges, state), recipe, state, planner)
    calls = family.schedule(pipe.scheduler, settings.steps)
    try:
        begun = time.perf_counter()
        text = _conditioning(family, pipe, recipe, prompts)
        encoded = time.perf_counter() - begun
        counts = with_splits(_counted(family, pipe, text), state)
        base_bits = {name: grid.bits for name, grid in state.activations.items()}
        costs = GenerationCosts(lambda: counts, state.weight_bits(), base_bits, planner.layers, calls)
        begun = time.perf_counter()
        plan = planner.plan(text, tuple(dict.fromkeys(calls)), costs)
        seconds = encoded + time.perf_counter() - begun
    finally:
        planner.remove()
    rows = 2 if settings.guidance_scale > 1 and family.guides_by_halves(family.denoiser_of(pipe)) else 1
    visits = Counter((timestep, rows) for timestep in calls)
    found = cost_of(plan, counts, state.weight_bits(), base_bits, visits)
    return Forecast(tuple(prompts), plan, tuple(found), _quality_error(recipe), costs.base_bitops(), seconds)


def write_forecast(found: Forecast, out: Path) -> None:
    """Write the figures, the plan and a picture of each prompt's bits, all or nothing."""
    with folder_written_whole(out, FORECAST_FORMAT, FORECAST_NAME, *OWNED) as folder:
        for index, prompt in enumerate(found.prompts):
            if found.plan.layers:
                title = f"{prompt[:60]}: FAB {found.plan.fab()[index]:.2f}"
                found.plan.draw(index, title).save(folder / f"{index:03d}-bits.png")
        found.plan.save(folder / "plan.safetensors")
        text = json.dumps(found.to_dict(), indent=2)
        (folder / FORECAST_NAME).write_text(text + "\n", encoding="utf-8")


def _base(recipe: Recipe, family: Family, pipe: Any) -> CalibratedState:
    state = load_base_quantizer(recipe.base.adapter).load(recipe.base)
    if state.to_complete is not None:
        raise IncompatibleModelError(
            f"{state.source}: its activation grids are known only after a run of the model, so nothing can be foreseen "
            "without one: give the file of zero points (docs/ptqd.md)"
        )
    state.check_fits(family.denoiser_of(pipe))
    return state


def _conditioning(family: Family, pipe: Any, recipe: Recipe, prompts: Sequence[str]) -> Conditioning:
    if recipe.model.prompt_embeddings is not None:
        check_table_serves(pipe)
        table = PromptEmbeddings.load(recipe.model.prompt_embeddings)
        return EncodedPrompts.from_table(table, prompts).conditioning
    if any(getattr(pipe, name, None) is None for name in family.encoders):
        raise ArtefactError(f"{recipe.model.pipeline}: no text encoder, so a prompt cannot be encoded")
    # Each alone: what a text encoder gives must not depend on the other prompts.
    found = [family.encoded(pipe, prompt) for prompt in prompts]
    pooled = [text.pooled for text in found if text.pooled is not None]
    return Conditioning(torch.cat([text.states for text in found]), torch.cat(pooled) if pooled else None)


def _counted(family: Family, pipe: Any, text: Conditioning) -> MacCounts:
    with torch.random.fork_rng(devices=[]):
        denoiser = family.denoiser_of(pipe)
        return count_macs(denoiser, _on_meta(family.example(denoiser, text)))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return {key: _on_meta(item) for key, item in value.items()} if isinstance(value, dict) else value


def _quality_error(recipe: Recipe) -> float | None:
    section = recipe.controller
    if not isinstance(section, QlipController):
        return None
    return TextToBits.from_pretrained(section.path).config.quality_error
