"""The course of a sampling: what the denoiser predicted at every call, and where the sampler went."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Course:
    """One sampling of a batch of N prompts, C calls of the scheduler's `step`.

    Args:
        timesteps: of the calls, C numbers.
        predictions: what the scheduler was given at each call (after guidance), C tensors `(N, ...)`.
        samples: where it went after each call, C tensors `(N, ...)`.
    """

    timesteps: list[float] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)

    def error(self, other: Course) -> Tensor:
        """Mean squared difference of the predictions, `(N, C)` float64.

        It says how far two models are apart at the same samples where one course was led along the other.
        """
        differences = [
            (ours.float() - theirs.float()).square().flatten(1).mean(1)
            for ours, theirs in zip(self.predictions, other.predictions, strict=True)
        ]
        return torch.stack(differences, dim=1).double()


@contextmanager
def recording(pipe: Any, along: Sequence[Tensor] | None = None) -> Iterator[Course]:
    """Record the next sampling of a pipeline, whatever its scheduler.

    Args:
        pipe: a diffusers pipeline; its scheduler is as it was afterwards.
        along: the samples of another course of the same prompts and noises. The scheduler then goes where
            that course went, whatever the predictions, so that both models are asked at the same samples.
    """
    scheduler, course = pipe.scheduler, Course()
    original = scheduler.step

    @functools.wraps(original)  # pipelines ask for its signature
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        place = len(course.predictions)
        course.timesteps.append(float(timestep))
        course.predictions.append(model_output.detach())
        if along is None:
            stepped = original(model_output, timestep, sample, *args, **options)
            course.samples.append(
                (stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample).detach()
            )
            return stepped
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        after = along[place]
        course.samples.append(after)
        return SchedulerOutput(prev_sample=after) if options.get("return_dict", True) else (after,)

    scheduler.step = step
    try:
        yield course
    finally:
        del scheduler.step
