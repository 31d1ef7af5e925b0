"""The families at their true sizes: what is controlled, what is left, what a call costs (docs/families.md).

    python scripts/families.py structure               # on a CPU, without weights; docs/families/structure.*
    python scripts/families.py run NAME --device cuda  # a generation under a plan, with random weights

`structure` compares every figure with torch's own counter of floating-point operations.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qlip_plugins.layers import UNCONTROLLED, kind_of
from qlip_plugins.metrics import bitops, count_macs

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


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(required=True)
    one = steps.add_parser("structure")
    one.set_defaults(run_step=structure)
    options = parser.parse_args()
    options.run_step(options)


if __name__ == "__main__":
    main()
