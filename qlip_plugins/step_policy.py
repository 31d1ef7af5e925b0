"""The step policy of diffusers, vllm-omni and sglang: two precisions, chosen by the place of a step alone.

`quantization_config.runtime.diffusion_step_policy` in a denoiser's `config.json` says that the first and last
steps run with 16-bit activations, and all others on the checkpoint's own quantizers. Its readers follow it on their own
low-precision checkpoints (diffusers: ModelOpt FP8 of Cosmos3) and leave others alone. It knows neither layers nor
prompts, so a controller's plans are collapsed to it, and lose what the collapse costs; as a plan it can be read
and followed here. Source: `diffusers/pipelines/cosmos/mixed_precision.py` of diffusers 0.42, schema version 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from .errors import ArtefactError, BitsError
from .files import written_whole
from .plan import BitPlan
from .schema import StrictModel

KEYS = ("quantization_config", "runtime", "diffusion_step_policy")


class Steps(StrictModel):
    """Steps at one end of the sampling."""

    count: int = Field(ge=0)
    mode: Literal["a16", "native"]

    @property
    def wide(self) -> int:
        """How many of them run with 16-bit activations."""
        return self.count if self.mode == "a16" else 0


class StepPolicy(StrictModel):
    """A `first_last_n` policy; every field must be there, and no other, as its readers ask."""

    schema_version: Literal[1]
    type: Literal["first_last_n"]
    index_space: Literal["denoising_loop_iteration"]
    scope: list[Literal["transformer"]] = Field(min_length=1, max_length=1)
    """Their word for the denoiser, whatever it is in a pipeline."""
    default_mode: Literal["native"]
    first_steps: Steps
    last_steps: Steps
    overlap: Literal["a16", "native"]
    reasoner: Literal["a16", "native"]

    @classmethod
    def first_last(cls, first: int, last: int) -> StepPolicy:
        """16-bit activations in the first and last steps."""
        return cls(
            schema_version=1,
            type="first_last_n",
            index_space="denoising_loop_iteration",
            scope=["transformer"],
            default_mode="native",
            first_steps=Steps(count=first, mode="a16"),
            last_steps=Steps(count=last, mode="a16"),
            overlap="a16",
            reasoner="a16",
        )

    @classmethod
    def load(cls, path: Path) -> StepPolicy:
        """The policy of a denoiser's `config.json`, or of what `save` wrote.

        Raises:
            ArtefactError: missing, unreadable, without a policy, or with one of another schema.
        """
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            for key in KEYS:
                found = found[key]
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtefactError(f"{path}: {'.'.join(KEYS)}: {where}: {first['msg']}") from None
        except (KeyError, TypeError):
            raise ArtefactError(f"{path}: holds no {'.'.join(KEYS)}") from None
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path}: no readable JSON: {error}") from None

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write it where its readers look for it in a `config.json`, with what is known of it beside."""
        policy: Any = self.model_dump(mode="json")
        for key in reversed(KEYS):
            policy = {key: policy}
        text = json.dumps({**policy, "qlip_plugins": dict(facts)}, indent=2)
        with written_whole(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def wide(self, calls: int) -> list[bool]:
        """For each iteration of the denoising loop whether it runs with 16-bit activations."""
        if calls == 1:
            return [False]  # as its readers have it
        first = [index < self.first_steps.wide for index in range(calls)]
        last = [index >= calls - self.last_steps.wide for index in range(calls)]
        both = self.overlap == "a16"
        return [both if a and b else a or b for a, b in zip(first, last, strict=True)]

    def plan(self, calls: Sequence[float], layers: tuple[str, ...], native: int, a16: int) -> BitPlan:
        """The policy as a plan of one prompt.

        Args:
            calls: the timesteps of the loop's iterations.
            layers: K quantizers, all of which follow it.
            native: the width of a native step.
            a16: the width that stands for 16-bit activations.

        Raises:
            BitsError: two iterations at one timestep differ, which a plan cannot say.
        """
        widths: dict[float, int] = {}
        for timestep, wide in zip(calls, self.wide(len(calls)), strict=True):
            width = a16 if wide else native
            if widths.setdefault(timestep, width) != width:
                raise BitsError(
                    f"the step policy gives two calls at timestep {timestep:g} different widths, and a plan has one a "
                    "timestep: use a scheduler that visits each once, or other counts"
                )
        row = torch.tensor(list(widths.values()), dtype=torch.uint8)
        return BitPlan(row[None, :, None].expand(1, -1, len(layers)).clone(), tuple(widths), layers)


def collapsed(plan: BitPlan, calls: Sequence[float], weights: Tensor, native: int, a16: int) -> StepPolicy:
    """The policy nearest to the mean plan of some prompts.

    Nearest by the squared difference of the mean width, summed over the loop's iterations; of equally near ones
    the one with fewer wide steps.

    Args:
        plan: of P prompts.
        calls: the timesteps of the loop's iterations.
        weights: `(K,)`, what a layer counts in the mean, such as its MACs.
        native: the width of a native step.
        a16: the width of a wide step.
    """
    share = weights.double() / weights.sum()
    mean = {
        timestep: float((plan.at(timestep).double().mean(0) * share).sum()) for timestep in plan.timesteps
    }
    # What a wide step costs more, or less, than a native one, summed from the first step and from the last.
    gain = [(a16 - mean[timestep]) ** 2 - (native - mean[timestep]) ** 2 for timestep in calls]
    first = list(accumulate(gain, initial=0.0))
    last = list(accumulate(reversed(gain), initial=0.0))
    # Iterations at one timestep stay together: a policy may end only between two timesteps.
    ends = [i for i in range(len(calls) + 1) if i in (0, len(calls)) or calls[i - 1] != calls[i]]
    pairs = ((begin, len(calls) - end) for begin in ends for end in ends if begin <= end)
    best = min(pairs, key=lambda pair: (round(first[pair[0]] + last[pair[1]], 9), sum(pair), pair))
    return StepPolicy.first_last(*best)
