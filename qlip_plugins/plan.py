"""The bit plan: which width every controlled quantizer has, for each prompt and step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .artefacts import read_tensors, write_tensors
from .errors import ArtefactError, BitsError
from .recipe import FULL_PRECISION

PLAN_FORMAT = "qlip-plugins plan"
PLAN_VERSION = 1


@dataclass(frozen=True)
class BitPlan:
    """Widths by prompt, step and layer.

    Args:
        bits: `(P, S, K)` uint8, each 2..32.
        timesteps: S distinct timesteps of the scheduler, in the order of the first visit.
        layers: K names of activation quantizers.
        quality: P predicted qualities, or None where no prediction made the plan.
    """

    bits: Tensor
    timesteps: tuple[float, ...]
    layers: tuple[str, ...]
    quality: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        expected = (len(self.timesteps), len(self.layers))
        if self.bits.ndim != 3 or tuple(self.bits.shape[1:]) != expected:
            raise BitsError(
                f"a plan of shape {tuple(self.bits.shape)}, expected (prompts, {expected[0]}, {expected[1]})"
            )
        if self.bits.numel() and not 2 <= int(self.bits.min()) <= int(self.bits.max()) <= FULL_PRECISION:
            raise BitsError(
                f"a plan with widths {int(self.bits.min())} to {int(self.bits.max())}, expected 2 to 32"
            )
        if len(set(self.timesteps)) != len(self.timesteps):
            raise BitsError("a plan lists each timestep once")

    @property
    def prompts(self) -> int:
        """P, the prompts it covers."""
        return self.bits.shape[0]

    def at(self, timestep: float) -> Tensor:
        """The widths `(P, K)` at one timestep.

        Raises:
            BitsError: the plan does not cover it.
        """
        try:
            return self.bits[:, self.timesteps.index(timestep)]
        except ValueError:
            known = ", ".join(f"{t:g}" for t in self.timesteps[:6])
            raise BitsError(
                f"timestep {timestep:g} is not in the plan ({len(self.timesteps)} timesteps: {known}, ...): the plan "
                "was made for another scheduler or another number of steps"
            ) from None

    def only(self, prompt: int) -> BitPlan:
        """The plan of one prompt."""
        quality = None if self.quality is None else self.quality[prompt : prompt + 1]
        return BitPlan(self.bits[prompt : prompt + 1], self.timesteps, self.layers, quality)

    def fab(self) -> list[float]:
        """Feature average bit of each prompt: the mean over steps and layers, each counted once."""
        averages: list[float] = self.bits.double().mean(dim=(1, 2)).tolist()
        return averages

    def digest(self) -> str:
        """SHA-256 of the decisions: the same for equal widths, timesteps and layers."""
        named = json.dumps([self.timesteps, self.layers]).encode()
        return hashlib.sha256(named + self.bits.contiguous().numpy().tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the plan as safetensors, whole or not at all."""
        write_tensors(
            Path(path),
            PLAN_FORMAT,
            PLAN_VERSION,
            {"bits": self.bits},
            timesteps=self.timesteps,
            layers=self.layers,
            quality=self.quality,
        )

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, damaged, or no plan.
        """
        tensors, facts = read_tensors(Path(path), PLAN_FORMAT, PLAN_VERSION)
        try:
            quality = facts["quality"]
            return cls(
                bits=tensors["bits"].to(torch.uint8),
                timesteps=tuple(facts["timesteps"]),
                layers=tuple(facts["layers"]),
                quality=None if quality is None else tuple(quality),
            )
        except (KeyError, TypeError, BitsError) as error:
            raise ArtefactError(f"{path}: not a plan: {error}") from None

    def draw(self, prompt: int = 0, title: str = "") -> Image.Image:
        """A picture of one prompt's widths: a column for each step, a row for each layer.

        Raises:
            BitsError: there is no such prompt, or the plan sets no layer.
        """
        if not (0 <= prompt < self.prompts and self.layers):
            raise BitsError(
                f"a plan of {self.prompts} prompts and {len(self.layers)} layers, asked for prompt {prompt}"
            )
        return _Drawing(self, prompt, title).image()


class _Drawing:
    """Layers downwards, steps to the right; darker is wider."""

    cell_height = 7
    margin = 14
    line = 14

    def __init__(self, plan: BitPlan, prompt: int, title: str) -> None:
        self.plan = plan
        self.bits = plan.bits[prompt].T.numpy()
        self.title = " ".join(title.split())
        self.cell_width = max(10, min(40, 560 // max(1, len(plan.timesteps))))

    def image(self) -> Image.Image:
        layers, steps = self.bits.shape
        labels = block_labels(self.plan.layers)
        left = self.margin + 7 * max((len(label) for _, label in labels), default=0) + 8
        top = self.margin + 3 * self.line
        width = left + max(steps * self.cell_width, 330) + self.margin
        height = top + layers * self.cell_height + 2 * self.line + self.margin
        image = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(image)
        draw.text((self.margin, self.margin // 2), self.title, fill="black")
        self._legend(draw, left, self.margin // 2 + self.line)
        grid = Image.fromarray(colours(self.bits)).resize(
            (steps * self.cell_width, layers * self.cell_height), Image.Resampling.NEAREST
        )
        image.paste(grid, (left, top))
        for row, label in labels:
            y = top + row * self.cell_height
            draw.line([(left - 4, y), (left + steps * self.cell_width, y)], fill="white")
            draw.text((self.margin, y - 2), label, fill="black")
        bottom = top + layers * self.cell_height + 3
        first, last = self.plan.timesteps[0], self.plan.timesteps[-1]
        draw.text((left, bottom), f"t = {first:g} (first step)", fill="black")
        end = f"t = {last:g} (last step)"
        if steps > 1:
            draw.text(
                (max(left + 130, left + steps * self.cell_width - 6 * len(end)), bottom), end, fill="black"
            )
        return image

    def _legend(self, draw: ImageDraw.ImageDraw, left: int, y: int) -> None:
        x = left
        for bits in sorted(set(self.bits.flatten().tolist())):
            colour = tuple(int(c) for c in colours(np.array([[bits]], dtype=np.uint8))[0, 0])
            draw.rectangle([x, y + 1, x + 10, y + 11], fill=colour)
            share = float((self.bits == bits).mean())
            text = f"{bits} bits {share:.0%}"
            draw.text((x + 14, y), text, fill="black")
            x += 14 + 7 * len(text) + 8


def colours(bits: np.ndarray) -> np.ndarray:
    """Widths `(R, C)` as RGB `(R, C, 3)`: from near white for 2 bits over yellow and red to dark violet for 32."""
    # A stop for each doubling, so that 4, 6 and 8 can be told apart as well as 8, 16 and 32.
    stops = np.array(
        [[255, 250, 225], [254, 222, 128], [224, 72, 82], [134, 38, 128], [38, 14, 76]], dtype=np.float64
    )
    position = np.log2(bits.astype(np.float64)) - 1
    below = np.clip(position.astype(int), 0, len(stops) - 2)
    part = (position - below)[..., None]
    mixed: np.ndarray = stops[below] * (1 - part) + stops[below + 1] * part
    return mixed.astype(np.uint8)


def block_labels(layers: tuple[str, ...]) -> list[tuple[int, str]]:
    """The first row of each block and that block's name."""
    labels: list[tuple[int, str]] = []
    for row, name in enumerate(layers):
        block = ".".join(name.split(".")[: 1 if name.startswith("mid") else 2])
        if not labels or labels[-1][1] != block:
            labels.append((row, block))
    return labels
