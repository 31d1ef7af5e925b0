"""What the training scripts of the demo model share: data on the device, wall-clock deadlines, logs."""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 64
LEVELS = 5
TOKENS = 77
PART_BYTES = 14_000_000


class Data:
    """Every picture and caption, on one device.

    `pictures` `(n, 3, 64, 64)` uint8, `tokens` `(n, 5, 77)` int64, `facts` one mapping a picture;
    `train` and `held_out` are row numbers, at most `limit` of each (for trials).
    """

    def __init__(self, folder: Path, device: torch.device | str, limit: int | None = None) -> None:
        stored = load_file(folder / "dataset.safetensors")
        self.facts: list[dict[str, Any]] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        content, offsets = stored_pictures(folder)
        decoded = [_decoded(content[start:end]) for start, end in pairwise(offsets)]
        self.pictures = torch.stack(decoded).to(device)
        self.tokens = stored["tokens"].long().to(device)
        held = torch.tensor([fact["held_out"] for fact in self.facts])
        self.train = (~held).nonzero().flatten()[:limit].to(device)
        self.held_out = held.nonzero().flatten()[:limit].to(device)
        concepts = {name: number for number, name in enumerate(dict.fromkeys(f["hex"] for f in self.facts))}
        self.concept = torch.tensor([concepts[fact["hex"]] for fact in self.facts], device=device)

    def images(self, rows: Tensor) -> Tensor:
        """Pictures as `(N, 3, 64, 64)` floats in -1 .. 1."""
        return self.pictures[rows].float().div(127.5).sub(1)


def stored_pictures(folder: Path) -> tuple[bytes, list[int]]:
    """The pictures as they are stored, WebP one after the other, and where each begins; the end stands last."""
    stored = load_file(folder / "dataset.safetensors")
    return bytes(stored["webp"].numpy()), stored["offsets"].tolist()


def _decoded(content: bytes) -> Tensor:
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        .reshape(SIDE, SIDE, 3)
        .permute(2, 0, 1)
    )


def jitter(images: Tensor, degrees: float, shift: float, scale: float) -> Tensor:
    """Each picture slightly turned, moved and resized on white; `shift` is a share of the side."""
    n, device = len(images), images.device

    def around(width: float) -> Tensor:
        return (torch.rand(n, device=device) * 2 - 1) * width

    angle, zoom = around(math.radians(degrees)), 1 + around(scale)
    rows = [
        torch.stack([angle.cos() / zoom, -angle.sin() / zoom, around(2 * shift)], 1),
        torch.stack([angle.sin() / zoom, angle.cos() / zoom, around(2 * shift)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # White is the padding: grid_sample pads with 0.
    return F.grid_sample(images - 1, grid, align_corners=False, padding_mode="zeros") + 1


class Clock:
    """A budget of seconds that a schedule follows."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def part(self) -> float:
        """How much of the budget is used, 0 .. 1."""
        return min(1.0, self.elapsed / self.seconds)

    def learning_rate(self, peak: float, step: int, warm_up: int = 200) -> float:
        """Linear warm-up by step, cosine to a hundredth by wall clock."""
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.part))
        return peak * min(1.0, (step + 1) / warm_up) * cosine


class Average:
    """Exponential moving average of a module's parameters and floating buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        source = module.state_dict()
        self.values = {name: tensor.detach().clone() for name, tensor in source.items()}
        floats = [name for name, tensor in source.items() if tensor.is_floating_point()]
        self._pairs = [self.values[name] for name in floats], [source[name] for name in floats]
        self._others = [(self.values[name], source[name]) for name in source if name not in floats]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the module; short memory at first."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(*self._pairs, weight)
        for value, current in self._others:
            value.copy_(current)


def training_options(seconds: float, batch: int) -> argparse.ArgumentParser:
    """The options of every training script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=batch, help="over all processes")
    parser.add_argument("--pictures", type=int, help="use the first so many only (for trials)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Timer:
    """Says once a minute that it is time to save."""

    def __init__(self, every: float = 60) -> None:
        self._every, self._last = every, time.monotonic()

    def due(self) -> bool:
        """Whether a minute has passed since it was last due."""
        if time.monotonic() - self._last < self._every:
            return False
        self._last = time.monotonic()
        return True


class Log:
    """Lines of JSON, on the terminal and in a file."""

    def __init__(self, path: Path, shown: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.shown = path, shown
        path.write_text("")

    def __call__(self, **facts: Any) -> None:
        """Write one line."""
        if self.shown:
            line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in facts.items()})
            with self.path.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict rounded to float16, on the CPU."""
    return {
        name: tensor.detach()
        .to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype)
        .contiguous()
        for name, tensor in state.items()
    }


def save_parts(state: dict[str, Tensor], folder: Path, name: str) -> None:
    """Save as `name-0.safetensors`, `name-1.safetensors`, ..., each under 14 MB and written whole."""
    parts: list[dict[str, Tensor]] = [{}]
    for key, tensor in state.items():
        size = sum(t.numel() * t.element_size() for t in parts[-1].values())
        if size + tensor.numel() * tensor.element_size() > PART_BYTES:
            parts.append({})
        parts[-1][key] = tensor
    for number, part in enumerate(parts):
        temporary = folder / f".{name}-{number}.part"
        save_file(part, temporary)
        temporary.replace(folder / f"{name}-{number}.safetensors")


def load_parts(folder: Path, name: str) -> dict[str, Tensor]:
    """What `save_parts` wrote, as float32 where floating."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        state |= load_file(path)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def random_captions(data: Data, rows: Tensor) -> tuple[Tensor, Tensor]:
    """A caption of a random level for each row: tokens `(N, 77)` and levels `(N,)` 0 .. 4."""
    levels = torch.randint(LEVELS, (len(rows),), device=rows.device)
    return data.tokens[rows, levels], levels
