"""Make the golden demos that ship in recipes/qlip_recipes: golden_w4a8 and golden_ptqd_w4a8.

From the golden files that the tests read (a tiny UNet, its W4A8 checkpoints by Q-Diffusion and by PTQD, and
its text table) it makes an ordinary diffusers pipeline without text encoder and decoder, the table as
prompt embeddings, ranges fitted on prompts that the README does not use, and hand-set controllers; for
PTQD's checkpoint also the statistics of its correction, for the widths of the menu.

    python scripts/make_golden_demo.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from qlip_plugins.adapter import CorrectionFit
from qlip_plugins.controller import load_base
from qlip_plugins.embeddings import PromptEmbeddings
from qlip_plugins.generation import Settings, fit_recipe_ranges, load_pipeline
from qlip_plugins.layers import controlled
from qlip_plugins.recipe import ActivationBits, Recipe
from qlip_plugins.state import CalibratedState
from qlip_plugins.text_to_bits import TextToBits, TextToBitsConfig
from qlip_ptqd import PTQDConfig, adapter, correction, write_zero_points

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
LIBRARY = ROOT / "recipes" / "qlip_recipes"
FOLDER = LIBRARY / "golden_w4a8"
PTQD_FOLDER = LIBRARY / "golden_ptqd_w4a8"
EMPTY_ROW = 64
MENU = ActivationBits(low=8, medium=16, high=32)
CALIBRATION = [f"row {row}" for row in range(32, 48)]
SAMPLING = Settings(steps=10, guidance_scale=3.0)
PTQD_SAMPLING = Settings(steps=20, guidance_scale=3.0)
"""What PTQD's own statistics of this model hold for."""


def main() -> None:
    """Make every file of the demos."""
    for folder in (FOLDER, PTQD_FOLDER):
        folder.mkdir(exist_ok=True)
    for name in ("ckpt.pth", "sampling_config.yaml"):
        shutil.copyfile(GOLDEN / "qdiffusion" / "w4a8" / name, FOLDER / name)
    _pipeline().save_pretrained(FOLDER / "pipeline")
    prompts = (*(f"row {row}" for row in range(EMPTY_ROW)), "")
    table = PromptEmbeddings(prompts, load_file(GOLDEN / "model_v" / "text_table.safetensors")["table"])
    table.save(FOLDER / "prompt_embeddings.safetensors")
    _on_base("golden-w4a8", FOLDER, table, SAMPLING)
    ptqd = GOLDEN / "ptqd" / "w4a8"
    shutil.copyfile(ptqd / "quantw4a8_ldm_brecq.pth", PTQD_FOLDER / "quantw4a8_ldm_brecq.pth")
    config = PTQDConfig(checkpoint=ptqd / "quantw4a8_ldm_brecq.pth", zero_points=ptqd / "quantizers.json")
    write_zero_points(PTQD_FOLDER / "zero_points.json", adapter.load(config))
    for path in (ptqd / "correct_data" / "imagenet_20steps_w4a8").iterdir():
        (PTQD_FOLDER / "correct_data").mkdir(exist_ok=True)
        shutil.copyfile(path, PTQD_FOLDER / "correct_data" / path.name)
    recipe = _on_base("golden-ptqd-w4a8", PTQD_FOLDER, table, PTQD_SAMPLING)
    out = PTQD_FOLDER / "correction.safetensors"
    what = CorrectionFit(recipe, CALIBRATION, PTQD_SAMPLING, False, 8, work=out.with_suffix(".work"), out=out)
    correction.fit(what, print)


def _on_base(name: str, folder: Path, table: PromptEmbeddings, sampling: Settings) -> Recipe:
    """Ranges and controller of one base."""
    recipe = Recipe.from_yaml(LIBRARY / f"{name}.yaml")
    state = load_base(recipe, load_pipeline(recipe).unet)
    fit_recipe_ranges(recipe, CALIBRATION, sampling).save(folder / "ranges.safetensors")
    embeddings = table.states[:EMPTY_ROW].double().mean(1)
    _controller(state, embeddings, sampling.steps).save_pretrained(folder / "controller")
    return recipe


def _pipeline() -> Any:
    model = json.loads((GOLDEN / "model_v" / "diffusers_map.json").read_text())
    weights = load_file(GOLDEN / "model_v" / "float_unet.safetensors")
    unet = UNet2DConditionModel(**model["unet_config"])
    unet.load_state_dict({model["parameter_map"][name]: tensor for name, tensor in weights.items()})
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, requires_safety_checker=False, **dict.fromkeys(absent)
    )


def _controller(state: CalibratedState, embeddings: Tensor, steps: int) -> TextToBits:
    """A controller set by hand, to show the mechanism; nothing here was learnt from pictures.

    Quality: a fixed random direction of the embedding, scaled so that the 64 rows of the table spread
    over 0..1. Bits: wider for higher quality, for early steps, and in the middle of the UNet.
    """
    layers = controlled(state.activations, attention=False)
    config = TextToBitsConfig(
        embedding_dim=embeddings.shape[1],
        pooling="mean",
        hidden=16,
        menu=MENU,
        layers=layers,
        timesteps=tuple(float(t) for t in range(1001 - 1000 // steps, 0, -(1000 // steps))),
        group=2,
        early=2,
        base_fingerprint=state.fingerprint,
        origin="set by hand to show the mechanism; not trained (scripts/make_golden_demo.py)",
    )
    torch.manual_seed(0)
    model = TextToBits(config)
    with torch.no_grad():
        last: Any = model.t2q.layers[-1]
        raw = model.t2q(embeddings.float())
        last.weight.div_(raw.max() - raw.min())
        last.bias.sub_(raw.min()).div_(raw.max() - raw.min())
        depth = torch.linspace(-1, 1, len(layers)).abs()
        time = torch.linspace(1, -1, model.q2b.medium_logit.shape[0])[:, None]
        model.q2b.slope.fill_(8.0)
        model.q2b.offset.fill_(-1.0)
        model.q2b.medium_logit.copy_(time * 1.2 - depth * 1.5)
        model.q2b.high_logit.copy_(time * 1.2 - depth * 1.5 - 0.3)
    return model


if __name__ == "__main__":
    main()
