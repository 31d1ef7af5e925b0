"""The widths of a PTQD file: from the recipe, its name or its tensors, never one against another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlip_plugins.calibration.grid_search import search_grid
from qlip_plugins.errors import ArtefactError

from .config import PTQDConfig
from .contents import Contents

_NAME = re.compile(r"quantw(?P<weights>\d+)(?:a(?P<activations>\d+))?_ldm_brecq\.pth")
_WIDTHS = range(2, 9)
_LAYERS_READ = 8
_AGREEMENT = 0.7
"""Measured on the golden files: 0.99 at the width that was calibrated, at most 0.63 at any other."""


@dataclass(frozen=True)
class Options:
    """The settings of a run. `activation_bits` None: activations stay in floating point."""

    weight_bits: int
    activation_bits: int | None


def resolve(config: PTQDConfig, contents: Contents, side_bits: int | None) -> Options:
    """Settle the widths of a file.

    Args:
        config: what the recipe says.
        contents: the file.
        side_bits: the activation width that a file of zero points states, if there is one.

    Raises:
        ArtefactError: two witnesses contradict each other, or none knows a width that matters.
    """
    named = widths_in_name(contents.path)
    witnesses = {"the recipe says": config.weight_bits, "the file's name says": named[0]}
    weight_bits = _agreed(contents, "weight_bits", witnesses)
    possible = possible_weight_bits(contents)
    if weight_bits is None:
        if len(possible) != 1:
            raise _gap(contents, "weight_bits", f" (their rounding fits {_listed(possible)})")
        weight_bits = possible[0]
    if weight_bits not in possible:
        raise ArtefactError(
            f"{contents.path}: contradiction: weight_bits is given as {weight_bits}, the rounding of the weights fits "
            f"{_listed(possible)}, with one step a layer as PTQD's scripts have it"
        )
    return Options(weight_bits, _activation_bits(config, contents, named[1], side_bits))


def _activation_bits(
    config: PTQDConfig, contents: Contents, named: int | None, side_bits: int | None
) -> int | None:
    if config.weights_only:
        return None
    if not contents.has_activations:
        if config.activation_bits is not None:
            raise ArtefactError(
                f"{contents.path}: contradiction: activation_bits is given as {config.activation_bits}, the file is of "
                "the first stage and holds weights only. Write `activation_bits: null`, or give the file of the second"
            )
        return None
    witnesses = {
        "the recipe says": config.activation_bits,
        "the file's name says": named,
        "the zero points are of": side_bits,
    }
    bits = _agreed(contents, "activation_bits", witnesses)
    if bits is None:
        raise _gap(contents, "activation_bits", "")
    return bits


def widths_in_name(path: Path) -> tuple[int | None, int | None]:
    """Weight and activation width as PTQD's scripts name their files; None where the name does not say."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return None, None
    activations = found["activations"]
    return int(found["weights"]), None if activations is None else int(activations)


def _agreed(contents: Contents, option: str, witnesses: dict[str, int | None]) -> int | None:
    said = {who: bits for who, bits in witnesses.items() if bits is not None}
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{who} {bits}" for who, bits in said.items())
        raise ArtefactError(f"{contents.path}: contradiction: {option}: {shown}")
    return next(iter(said.values()), None)


def _gap(contents: Contents, option: str, why: str) -> ArtefactError:
    return ArtefactError(
        f"{contents.path}: {option} is unknown: neither the recipe nor the file's name gives it, and the tensors do "
        f"not tell{why}. Set base.{option}"
    )


def _listed(widths: list[int]) -> str:
    return " or ".join(map(str, widths)) or "no width from 2 to 8"


@torch.no_grad()
def possible_weight_bits(contents: Contents) -> list[int]:
    """The widths at which the learned rounding mostly is rounding to nearest, ascending.

    AdaRound starts at each weight's own fraction and turns few of them; at a wrong width the steps are
    others, and half of all weights seem to be rounded the wrong way.
    """
    layers = sorted(contents.alphas, key=lambda name: contents.alphas[name].numel())[-_LAYERS_READ:]
    small = [name for name in layers if contents.alphas[name].numel() <= 2**20] or layers[:1]
    return [bits for bits in _WIDTHS if _agreement(contents, small, bits) >= _AGREEMENT]


def _agreement(contents: Contents, layers: list[str], bits: int) -> float:
    agreeing = counted = 0
    for name in layers:
        weight = contents.floats[f"{name}.weight"].float()
        scale, zero_point = weight_grid(weight, bits)
        ratio = weight / scale
        fraction, code = ratio - ratio.floor(), ratio.floor() + zero_point
        free = (code >= 0) & (code < 2**bits - 1)
        agreeing += int(((contents.alphas[name] >= 0) == (fraction >= 0.5))[free].sum())
        counted += int(free.sum())
    return agreeing / max(1, counted)


def weight_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a whole weight, `()` each: PTQD's search, one step a layer."""
    row = weight.flatten()[None]
    scale, zero_point = search_grid(row, row.amin(1), row.amax(1), bits)
    return scale[0], zero_point[0]
