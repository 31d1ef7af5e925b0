"""The families at their true sizes: what is controlled, what is left, what a call costs (docs/families.md).

    python scripts/families.py structure               # on a CPU, without weights; docs/families/structure.*
    python scripts/families.py run NAME --device cuda  # a generation under a plan, with random weights

`structure` compares every figure with torch's own counter of floating-point operations.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qlip_plugins.adapter import load_backend
from qlip_plugins.artefacts import versions
from qlip_plugins.calibration.nearest import nearest_state
from qlip_plugins.controller import BitController, PromptPlanner
from qlip_plugins.embeddings import source_for
from qlip_plugins.families import family_of
from qlip_plugins.grids import Ranges
from qlip_plugins.layers import UNCONTROLLED, controlled, kind_of
from qlip_plugins.metrics import bitops, count_macs
from qlip_plugins.state import CalibratedState
from qlip_plugins.text_to_bits import TextToBits, TextToBitsConfig

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "families"
TOKENS = 77
FLUX_TOKENS = 512

_SD: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_FOUR: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD-v1.4": ("UNet2DConditionModel", {**_SD, **_FOUR, "layers_per_block": 2}),
    "BK-SDM-Base": ("UNet2DConditionModel", {**_SD, **_FOUR, "layers_per_block": 1}),
    "BK-SDM-Small": ("UNet2DConditionModel", {**_SD, **_FOUR, "layers_per_block": 1, "mid_block_type": None}),
    "BK-SDM-Tiny": (
        "UNet2DConditionModel",
        {
            **_SD,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
            "mid_block_type": None,
        },
    ),
    "SDXL": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
}
"""Name -> class and configuration of the denoiser, as published with the weights; sizes of their own pictures."""


def make_denoiser(name: str) -> Any:
    """The denoiser at its true size, on the device at hand, with random weights."""
    import diffusers

    kind, config = CONFIGS[name]
    return getattr(diffusers, kind)(**config).eval()


def one_call(name: str, rows: int = 1, **where: Any) -> dict[str, Any]:
    """The arguments of one call of it."""
    if name == "FLUX.1":
        side = 64  # 1024 pixels: latents of 128 x 128, packed 2 x 2
        return {
            "hidden_states": torch.randn(rows, side * side, 64, **where),
            "encoder_hidden_states": torch.randn(rows, FLUX_TOKENS, 4096, **where),
            "pooled_projections": torch.randn(rows, 768, **where),
            "timestep": torch.full((rows,), 0.5, **where),
            "guidance": torch.full((rows,), 3.5, **where),
            "img_ids": torch.zeros(side * side, 3, **where),
            "txt_ids": torch.zeros(FLUX_TOKENS, 3, **where),
            "return_dict": False,
        }
    config = CONFIGS[name][1]
    size, width = config["sample_size"], config["cross_attention_dim"]
    call = {
        "sample": torch.randn(rows, 4, size, size, **where),
        "timestep": torch.full((), 500.0, **where),
        "encoder_hidden_states": torch.randn(rows, TOKENS, width, **where),
        "return_dict": False,
    }
    if name == "SDXL":
        call["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 1280, **where),
            "time_ids": torch.zeros(rows, 6, **where),
        }
    return call


def structure(options: argparse.Namespace) -> None:
    """Account for every convolution and linear layer, and for what a call costs."""
    found = {}
    for name in CONFIGS:
        with torch.device("meta"):
            denoiser, call = make_denoiser(name), one_call(name)
        found[name] = _accounted(denoiser, call)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "structure.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (OUT / "structure.md").write_text(_table(found), encoding="utf-8")
    print(_table(found))


def _accounted(denoiser: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    layers = [n for n, module in denoiser.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    kinds = Counter(map(kind_of, layers))
    counts = count_macs(denoiser, call)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(**call)
    ours = sum(counts.layers.values()) + 2 * sum(counts.products.values())
    return {
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "layers": len(layers),
        "controlled": {kind: count for kind, count in kinds.items() if kind not in UNCONTROLLED},
        "left": {kind: count for kind, count in kinds.items() if kind in UNCONTROLLED},
        "of no known kind": kinds.get("other", 0),
        "GMACs of layers": sum(counts.layers.values()) / 1e9,
        "GMACs of attention's products": 2 * sum(counts.products.values()) / 1e9,
        "by torch's flop counter": counter.get_total_flops() / 2e9,
        "agrees": counter.get_total_flops() == 2 * ours,
        "BitOPs paper, 51 calls (T)": {
            f"W{weights}A{activations:g}": bitops(denoiser, call, weights, activations, calls=51)
            for weights, activations in ((32, 32), (4, 16), (4, 10.58), (4, 8))
        },
    }


def _table(found: dict[str, Any]) -> str:
    lines = [
        "| | parameters | conv and linear | controlled | left at the base's width | of no known kind "
        "| GMACs a call, layers | products of attention | torch's counter says "
        "| BitOPs W32A32 | W4A16 | W4A10.58 | W4A8 |",
        "|---" * 13 + "|",
    ]
    for name, entry in found.items():
        costs = entry["BitOPs paper, 51 calls (T)"].values()
        left = ", ".join(f"{kind} {count}" for kind, count in entry["left"].items())
        lines.append(
            f"| {name} | {entry['parameters'] / 1e6:,.0f} M | {entry['layers']} "
            f"| {sum(entry['controlled'].values())} | "
            f"{sum(entry['left'].values())} ({left}) | {entry['of no known kind']} | {entry['GMACs of layers']:,.3f} | "
            f"{entry[_PRODUCTS]:,.3f} | {entry[_COUNTER]:,.3f} {'(equal)' if entry['agrees'] else '(DIFFERS)'} | "
            + " | ".join(f"{cost:.2f}" for cost in costs)
            + " |"
        )
    return "\n".join(lines) + "\n"


_PRODUCTS = "GMACs of attention's products"
_COUNTER = "by torch's flop counter"


def run(options: argparse.Namespace) -> None:
    """A generation of random weights, plain and under a controller's plan: that it runs, its time and its memory."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = options.out / f"run-{options.name}.json"
    device = torch.device(options.device)
    torch.manual_seed(0)
    with device, _dtype(getattr(torch, options.dtype)):
        denoiser = make_denoiser(options.name).requires_grad_(False)
    pipe, call = (
        _pipeline(options.name, denoiser),
        one_call(options.name, device=device, dtype=denoiser.dtype),
    )
    prompts = _prompts(call, options.prompts)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": options.dtype,
        "steps": options.steps,
        "prompts": options.prompts,
        "versions": versions(),
        "weights": "random",
    }
    found["plain"] = _timed(pipe, prompts, options, device)
    begun = time.perf_counter()
    state = nearest_state(denoiser, call, 4, 16)
    ranges = Ranges({name: {8: grid.at_width(8)} for name, grid in state.activations.items()})
    quantizers = load_backend("torch").install(denoiser, state, ranges)
    found["seconds to quantize and install"] = time.perf_counter() - begun
    family = family_of(pipe)
    planner = _random_planner(state, "pooled" if family.pooled else "mean", pipe, prompts)
    with BitController(pipe, state, quantizers, planner, ranges) as controller:
        found["under the plan"] = _timed(pipe, prompts, options, device)
        report = controller.report()
        found["report"] = {
            "fab": [cost.fab for cost in report.prompts],
            "bitops_paper": report.mean.bitops_paper,
            "calls": report.calls,
            "controlled": report.controlled,
        }
    found["after removing"] = _timed(pipe, prompts, options, device)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _pipeline(name: str, denoiser: Any) -> Any:
    """A pipeline without text encoders and decoder, as published otherwise."""
    import diffusers

    if name == "FLUX.1":
        kind, component = diffusers.FluxPipeline, "transformer"
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        absent = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    else:
        kind, component = diffusers.StableDiffusionPipeline, "unet"
        scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        absent = ["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"]
    more: dict[str, Any] = {"requires_safety_checker": False} if component == "unet" else {}
    if name == "SDXL":
        kind, more = diffusers.StableDiffusionXLPipeline, {"add_watermarker": False}
        absent = ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    pipe = kind(**{component: denoiser}, scheduler=scheduler, **dict.fromkeys(absent), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _prompts(call: dict[str, Any], count: int) -> dict[str, Any]:
    """Random text of as many prompts, as arguments of the pipeline."""
    states = call["encoder_hidden_states"]
    pooled = call.get("pooled_projections", call.get("added_cond_kwargs", {}).get("text_embeds"))
    found = {"prompt_embeds": torch.randn_like(states.repeat(count, 1, 1))}
    if pooled is not None:
        found["pooled_prompt_embeds"] = torch.randn_like(pooled.repeat(count, 1))
    if "guidance" not in call:
        found |= {f"negative_{key}": torch.zeros_like(value) for key, value in found.items()}
    return found


def _random_planner(
    state: CalibratedState, pooling: Any, pipe: Any, prompts: dict[str, Any]
) -> PromptPlanner:
    """A controller with random parameters: its plans differ by prompt, layer and step, and mean nothing."""
    known = prompts["pooled_prompt_embeds" if pooling == "pooled" else "prompt_embeds"]
    controller = TextToBits(
        TextToBitsConfig(
            embedding_dim=known.shape[-1],
            pooling=pooling,
            menu={"low": 8, "medium": 16, "high": 32},  # type: ignore[arg-type]
            layers=controlled(state.activations, attention=False),
            timesteps=tuple(float(t) for t in range(975, 0, -40)),
            base_fingerprint="random",
            origin="random, to show that it runs",
        )
    )
    with torch.no_grad():
        for parameter in controller.q2b.parameters():
            parameter.normal_(0, 2)
    return PromptPlanner(controller, source_for(pipe, pooling))


def _timed(
    pipe: Any, prompts: dict[str, Any], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds a step and the peak of allocated memory of a whole generation, the second of two."""
    cuda = device.type == "cuda"
    if cuda:
        _generated(pipe, prompts, options)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begun = time.perf_counter()
    images = _generated(pipe, prompts, options)
    if cuda:
        torch.cuda.synchronize()
    return {
        "seconds a step (measured)": (time.perf_counter() - begun) / options.steps,
        "peak GiB (measured)": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "shape": list(images.shape),
        "finite": bool(images.isfinite().all()),
    }


def _generated(pipe: Any, prompts: dict[str, Any], options: argparse.Namespace) -> torch.Tensor:
    images: torch.Tensor = pipe(
        **prompts,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(options.prompts)],
        output_type="latent",
    ).images
    return images


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(required=True)
    one = steps.add_parser("structure")
    one.set_defaults(run_step=structure)
    one = steps.add_parser("run")
    one.add_argument("name", choices=tuple(CONFIGS))
    one.add_argument("--device", default="cpu")
    one.add_argument("--dtype", default="bfloat16")
    one.add_argument("--steps", type=int, default=20)
    one.add_argument("--prompts", type=int, default=2)
    one.add_argument("--guidance", type=float, default=5.0)
    one.add_argument("--out", type=Path, default=OUT)
    one.set_defaults(run_step=run)
    options = parser.parse_args()
    options.run_step(options)


if __name__ == "__main__":
    main()
