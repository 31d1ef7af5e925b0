"""Put trained parts together as an ordinary StableDiffusionPipeline folder, in float16.

    python scripts/demo_model/assemble.py build/demo PARTS recipes/qlip_demo

Writes FOLDER/pipeline, and FOLDER/clip: the image tower with both projections, for image-text scores.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from architecture import ImageTower, autoencoder, scheduler, text_encoder, unet
from common import PART_BYTES, half, load_parts


def main(prepared: Path, parts: Path, folder: Path) -> None:
    """Write both folders."""
    tokenizer = CLIPTokenizer.from_pretrained(prepared / "tokenizer")
    encoder, denoiser, vae = text_encoder(len(tokenizer)), unet(), autoencoder()
    encoder.load_state_dict(load_file(parts / "text_encoder.safetensors"))
    denoiser.load_state_dict(load_parts(parts, "unet"))
    vae.load_state_dict(load_file(parts / "vae.safetensors"))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    target = folder / "pipeline"
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target, max_shard_size=PART_BYTES + 100_000)
    # Both generations of transformers read CLIP's two files; the other spelling is four times as large.
    shutil.rmtree(target / "tokenizer")
    shutil.copytree(prepared / "tokenizer", target / "tokenizer")
    _in_the_older_spelling(target / "text_encoder" / "model.safetensors")
    write_clip(parts, folder / "clip")
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*.safetensors"))}
    print(json.dumps(sizes, indent=1))
    print("pipeline", sum(size for name, size in sizes.items() if name.startswith("pipeline")))


def _in_the_older_spelling(path: Path) -> None:
    """Name CLIP's tensors as transformers before 5 did: both generations read that, the older reads no other."""
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})


def write_clip(parts: Path, folder: Path) -> None:
    """The image tower as transformers' ResNetModel folder, the projections beside it."""
    stored = load_file(parts / "image_tower.safetensors")
    tower = ImageTower()
    tower.load_state_dict(
        {k.removeprefix("image."): v.float() for k, v in stored.items() if k.startswith("image.")}
    )
    shutil.rmtree(folder, ignore_errors=True)
    tower.backbone.half().save_pretrained(folder)
    save_file(
        half(
            {
                "image_projection": tower.projection.weight,
                "text_projection": stored["text_projection.weight"],
                "log_scale": stored["log_scale"],
            }
        ),
        folder / "projections.safetensors",
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
