"""The demo model quantized by ModelOpt and by brevitas, and one checkpoint through every backend (docs/frameworks.md).

    python scripts/frameworks.py quantize build/frameworks   # W4A8, each with its own calibration; and recipes
    python scripts/frameworks.py show build/frameworks       # before and after, saved and reloaded in a fresh process
    python scripts/frameworks.py golden                      # docs/frameworks/golden.json and golden.md
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from qlip_plugins import apply
from qlip_plugins.adapter import Installed, load_backend, load_base_quantizer
from qlip_plugins.artefacts import versions
from qlip_plugins.generation import load_model, load_pipeline
from qlip_plugins.recipe import Recipe
from qlip_plugins.sharing import convert
from qlip_plugins.state import CalibratedState

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "frameworks"
FRAMEWORKS = ("modelopt", "brevitas")
STEPS, GUIDANCE, SEED = 25, 3.0, 0
CALIBRATION_PROMPTS = 32
PROMPTS = ("rocket", "castle", "cat", "a pencil drawing of a slice of pizza, food")


def sample(pipe: Any, prompts: list[str], seed: int = SEED) -> list[Image.Image]:
    """One picture of each prompt, always from the same noise."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generators}
    found: list[Image.Image] = pipe(prompts, **options).images
    return found


def demo_pipe() -> Any:
    """The demo pipeline in full precision."""
    pipe = load_pipeline(Recipe.load("demo-w4a8"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _calibration() -> list[str]:
    text = (ROOT / "scripts" / "demo_model" / "calibration.txt").read_text(encoding="utf-8")
    return text.splitlines()[:CALIBRATION_PROMPTS]


def by_modelopt(pipe: Any) -> None:
    """W4A8 by `mtq.quantize`, max calibration, in place."""
    import modelopt.torch.quantization as mtq

    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
            {"quantizer_name": "*", "parent_class": "nn.LayerNorm", "enable": False},
        ],
        "algorithm": "max",
    }
    pipe.unet = mtq.quantize(pipe.unet, config, lambda _: sample(pipe, _calibration(), 1000))


def by_brevitas(pipe: Any) -> None:
    """W4A8 by `layerwise_quantize`, ranges from the largest value seen."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    class W4(Int8WeightPerChannelFloat):  # type: ignore[misc]
        bit_width = 4

    class A8(Int8ActPerTensorFloat):  # type: ignore[misc]
        scaling_stats_op = "max"

    options = {"weight_quant": W4, "input_quant": A8, "bias_quant": None, "return_quant_tensor": False}
    layers = {nn.Conv2d: (qnn.QuantConv2d, dict(options)), nn.Linear: (qnn.QuantLinear, dict(options))}
    pipe.unet = layerwise_quantize(pipe.unet, compute_layer_map=layers)
    with torch.no_grad(), calibration_mode(pipe.unet):
        sample(pipe, _calibration(), 1000)
    pipe.unet.eval()


def save(name: str, pipe: Any, path: Path) -> None:
    """Write a quantized denoiser in its framework's own way."""
    if name == "modelopt":
        import modelopt.torch.opt as mto

        mto.save(pipe.unet, path)
    else:
        torch.save(pipe.unet.state_dict(), path)


def restore(name: str, path: Path) -> Any:
    """A pipeline with a quantized denoiser, as its framework gives it back."""
    pipe = demo_pipe()
    if name == "modelopt":
        import modelopt.torch.opt as mto

        pipe.unet = mto.restore(pipe.unet, path)
    else:
        global CALIBRATION_PROMPTS  # noqa: PLW0603 (the state dict has the ranges)
        CALIBRATION_PROMPTS = 1
        by_brevitas(pipe)
        pipe.unet.load_state_dict(torch.load(path, weights_only=True))
    return pipe


QUANTIZE: dict[str, Callable[[Any], None]] = {"modelopt": by_modelopt, "brevitas": by_brevitas}
WIDTHS = {"modelopt": "", "brevitas": ", weight_bits: 4, activation_bits: 8"}


def recipe_text(base: str, backend: str, controller: str) -> str:
    """A recipe over a quantized demo model."""
    return (
        "schema_version: 1\n"
        "model: {pipeline: 'package://qlip_demo/pipeline'}\n"
        f"base: {base}\nbackend: {backend}\n"
        "activation_bits: {low: 4, medium: 6, high: 8}\n"
        "ranges: {table: ranges.safetensors}\n"
        f"controller: {controller}\n"
    )


def quantize(out: Path) -> None:
    """Quantize the demo model by each framework and write file, recipes and a copy that needs no framework."""
    for name in FRAMEWORKS:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        pipe = demo_pipe()
        QUANTIZE[name](pipe)
        save(name, pipe, folder / "unet.pth")
        base = f"{{adapter: {name}, checkpoint: unet.pth{WIDTHS[name]}}}"
        static, qlip = "{kind: static, bits: base}", "{kind: qlip, path: controller}"
        (folder / "base.yaml").write_text(recipe_text(base, name, static).replace("ranges: {table: ranges.safetensors}\n", ""))
        (folder / "qlip.yaml").write_text(recipe_text(base, name, qlip))
        packed = "{adapter: packed, folder: packed, activation_bits: 8}"
        (folder / "portable.yaml").write_text(recipe_text(packed, "torch", qlip))
        convert(Recipe.load(folder / "base.yaml").base, "package://qlip_demo/pipeline", folder / "packed")
        print(name, load_base_quantizer(name).inspect(folder / "unet.pth").base)


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quantize", "show", "reload", "golden"])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "frameworks")
    options = parser.parse_args()
    quantize(options.folder)


if __name__ == "__main__":
    main()
