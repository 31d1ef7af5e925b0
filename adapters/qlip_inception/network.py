"""Inception v3 as FID's weights expect it.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, with what
is particular to the TensorFlow graph of 2015-12-05 that FID was defined on: average pools do not count
the padding, the pool of the last block takes the maximum, and there are 1008 classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 1008
Pool = Literal["average", "maximum"]


class Step(NamedTuple):
    """A convolution of a branch; it keeps height and width unless its stride is 2."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Branch = Sequence[Step | tuple[Step, Step]]
"""Steps one after another; a pair at the end stands side by side."""


class Convolution(nn.Module):
    """Convolution, normalisation, rectifier."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, outputs, H, W)`."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, joined along the channels.

    Args:
        inputs: channels that come in.
        branches: of convolutions.
        pooled: channels of a convolution after a pool of 3 x 3, the last branch; None where the block
            halves height and width, and the last branch is a bare pool.
        pool: what that pool takes.
    """

    def __init__(
        self, inputs: int, branches: Sequence[Branch], pooled: int | None = None, pool: Pool = "average"
    ) -> None:
        super().__init__()
        self._branches = branches
        self._pool = pool
        for branch in branches:
            width = inputs
            for step in branch:
                for part in (step,) if isinstance(step, Step) else step:
                    unit = Convolution(width, part.channels, part.kernel, part.stride, part.stride == 1)
                    self.add_module(part.name, unit)
                if isinstance(step, Step):
                    width = step.channels
        self.branch_pool = None if pooled is None else Convolution(inputs, pooled, (1, 1), 1, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, all channels, H, W)`, or half of H and W."""
        found = [self._run(branch, x) for branch in self._branches]
        if self.branch_pool is None:
            return torch.cat([*found, F.max_pool2d(x, 3, stride=2)], dim=1)
        if self._pool == "average":
            surrounding = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            surrounding = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*found, self.branch_pool(surrounding)], dim=1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for step in branch:
            parts = (step,) if isinstance(step, Step) else step
            x = torch.cat([self.get_submodule(part.name)(x) for part in parts], dim=1)
        return x


def _mixed_5(inputs: int, pooled: int) -> Mixed:
    return Mixed(
        inputs,
        (
            (Step("branch1x1", 64),),
            (Step("branch5x5_1", 48), Step("branch5x5_2", 64, (5, 5))),
            (
                Step("branch3x3dbl_1", 64),
                Step("branch3x3dbl_2", 96, (3, 3)),
                Step("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        pooled,
    )


def _mixed_6(channels: int) -> Mixed:
    wide, high = (1, 7), (7, 1)
    return Mixed(
        768,
        (
            (Step("branch1x1", 192),),
            (
                Step("branch7x7_1", channels),
                Step("branch7x7_2", channels, wide),
                Step("branch7x7_3", 192, high),
            ),
            (
                Step("branch7x7dbl_1", channels),
                Step("branch7x7dbl_2", channels, high),
                Step("branch7x7dbl_3", channels, wide),
                Step("branch7x7dbl_4", channels, high),
                Step("branch7x7dbl_5", 192, wide),
            ),
        ),
        192,
    )


def _mixed_7(inputs: int, pool: Pool) -> Mixed:
    wide, high = (1, 3), (3, 1)
    return Mixed(
        inputs,
        (
            (Step("branch1x1", 320),),
            (Step("branch3x3_1", 384), (Step("branch3x3_2a", 384, wide), Step("branch3x3_2b", 384, high))),
            (
                Step("branch3x3dbl_1", 448),
                Step("branch3x3dbl_2", 384, (3, 3)),
                (Step("branch3x3dbl_3a", 384, wide), Step("branch3x3dbl_3b", 384, high)),
            ),
        ),
        192,
        pool,
    )


class FidInception(nn.Module):
    """The network; modules are called as in the weights' file. `fc` is there for the file's sake."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), 2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), 1, padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), 1, padded=True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1), 1, padded=False)
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), 1, padded=False)
        self.Mixed_5b = _mixed_5(192, 32)
        self.Mixed_5c = _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = Mixed(
            288,
            (
                (Step("branch3x3", 384, (3, 3), 2),),
                (
                    Step("branch3x3dbl_1", 64),
                    Step("branch3x3dbl_2", 96, (3, 3)),
                    Step("branch3x3dbl_3", 96, (3, 3), 2),
                ),
            ),
        )
        self.Mixed_6b = _mixed_6(128)
        self.Mixed_6c = _mixed_6(160)
        self.Mixed_6d = _mixed_6(160)
        self.Mixed_6e = _mixed_6(192)
        self.Mixed_7a = Mixed(
            768,
            (
                (Step("branch3x3_1", 192), Step("branch3x3_2", 320, (3, 3), 2)),
                (
                    Step("branch7x7x3_1", 192),
                    Step("branch7x7x3_2", 192, (1, 7)),
                    Step("branch7x7x3_3", 192, (7, 1)),
                    Step("branch7x7x3_4", 192, (3, 3), 2),
                ),
            ),
        )
        self.Mixed_7b = _mixed_7(1280, "average")
        self.Mixed_7c = _mixed_7(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)

    def mixed_6(self, x: Tensor) -> Tensor:
        """`mixed_6/conv` of TensorFlow's graph, `(N, 192, 17, 17)`: the first branch of `Mixed_6d`."""
        found: Tensor = self.Mixed_6d.get_submodule("branch1x1")(self._until_6c(x))
        return found

    def pooled(self, x: Tensor) -> Tensor:
        """`pool_3`, `(N, 2048)`, of pictures `(N, 3, 299, 299)` in -1..1."""
        x = self.Mixed_6e(self.Mixed_6d(self._until_6c(x)))
        last: Tensor = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return last.mean((2, 3))

    def _until_6c(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        found: Tensor = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        return found
