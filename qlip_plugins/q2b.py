from __future__ import annotations

import torch
from torch import Tensor, nn


class Q2B(nn.Module):
    """Quality to bits: a three-way choice for each layer and group of steps.

    With p_q = sigmoid((quality - 0.5) * slope + offset), p_m = sigmoid(medium_logit) and
    p_h = sigmoid(high_logit), the probabilities are low = (1 - p_q)(1 - p_m),
    medium = (1 - p_q) p_m + p_q (1 - p_h), high = p_q p_h (docs/method.md). `slope` and `offset` are
    `(K,)`, the logits `(G, K)` for G groups of steps; all start at 0, which gives the medium width
    everywhere.

    Args:
        layers: K, the number of controlled quantizers.
        timesteps: the T timesteps of the schedule it is made for, in sampling order.
        group: M, consecutive steps that share one set of parameters.
        early: m, first steps with p_q = 1, which rules the low width out.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(self, layers: int, timesteps: tuple[float, ...], group: int = 1, early: int = 0) -> None:
        super().__init__()
        steps = len(timesteps)
        if not (layers >= 1 and 1 <= group <= steps and 0 <= early <= steps):
            raise ValueError(
                "need layers >= 1, 1 <= group <= steps and 0 <= early <= steps, found "
                f"layers={layers}, {steps} steps, group={group}, early={early}"
            )
        self.timesteps, self.group, self.early = timesteps, group, early
        groups = -(-steps // group)
        self.slope = nn.Parameter(torch.zeros(layers))
        self.offset = nn.Parameter(torch.zeros(layers))
        self.medium_logit = nn.Parameter(torch.zeros(groups, layers))
        self.high_logit = nn.Parameter(torch.zeros(groups, layers))

    def step_of(self, timestep: float) -> int:
        """The step of its own schedule that is nearest in time, the earlier of two equally near.

        On the schedule it is made for that is the step itself; on another, whatever its number of steps
        or spacing, it is the one with the most similar noise.
        """
        return min(range(len(self.timesteps)), key=lambda step: abs(self.timesteps[step] - timestep))

    def forward(self, quality: Tensor, timesteps: tuple[float, ...]) -> Tensor:
        """Probabilities of low, medium and high, `(N, S, K, 3)`, summing to 1.

        Args:
            quality: `(N,)`.
            timesteps: S timesteps of the scheduler.
        """
        steps = torch.tensor([self.step_of(t) for t in timesteps], device=quality.device)
        groups = steps // self.group
        p_q = torch.sigmoid((quality[:, None] - 0.5) * self.slope + self.offset)[:, None, :]
        p_q = torch.where((steps < self.early)[None, :, None], torch.ones_like(p_q), p_q)
        p_m = torch.sigmoid(self.medium_logit)[groups]
        p_h = torch.sigmoid(self.high_logit)[groups]
        low = (1 - p_q) * (1 - p_m)
        medium = (1 - p_q) * p_m + p_q * (1 - p_h)
        high = p_q * p_h
        return torch.stack([low, medium, high], dim=-1)


def choose(probabilities: Tensor) -> Tensor:
    """Index 0, 1 or 2 of the likeliest width; medium wins a tie with either end, high one with low.

    Args:
        probabilities: `(..., 3)`.
    """
    low, medium, high = probabilities.unbind(-1)
    is_high = (high > medium) & (high >= low)
    is_low = (low > medium) & (low > high)
    return torch.where(is_high, 2, torch.where(is_low, 0, 1))
