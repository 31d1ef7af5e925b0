"""The bits of a Q-Diffusion file: from the recipe or the run's record, never against the tensors.

The file stores no width. Three witnesses are heard: the recipe, the `sampling_config.yaml` that the
calibration writes beside its checkpoint, and the tensors themselves. An option that the record does
not mention is unknown, not False.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlip_plugins.errors import ArtefactError, RecipeError
from qlip_plugins.yaml_lines import read_document

from .config import QDiffusionConfig
from .contents import Contents

RECORD = "sampling_config.yaml"
_CHANNELS_READ = 16
_CLIPPED = 0.2
_STRAY = 0.05
_TELLING = 8
_WIDTHS = range(2, 17)


@dataclass(frozen=True)
class Options:
    """The settings of a calibration run. `activation_bits` None: activations stay in floating point."""

    weight_bits: int
    activation_bits: int | None
    softmax_bits: int | None
    symmetric: bool


class _Witnesses:
    """What the recipe and the run's record say of each option."""

    def __init__(self, config: QDiffusionConfig, contents: Contents) -> None:
        self.config = config
        self.contents = contents
        self.record = read_record(config.checkpoint.parent / RECORD)

    def agreed(self, option: str, recorded_as: str) -> Any:
        """The value that the recipe or the record gives; None when neither does."""
        said, recorded = getattr(self.config, option), self.record.get(recorded_as)
        if said is not None and recorded is not None and said != recorded:
            raise self.contradiction(
                f"{option}: the recipe says {said}, {RECORD} beside it says {recorded_as}: {recorded}"
            )
        return recorded if said is None else said

    def gap(self, option: str, recorded_as: str, why: str) -> ArtefactError:
        return ArtefactError(
            f"{self.contents.path}: {option} is unknown: neither the recipe nor a {RECORD} beside the "
            f"checkpoint gives it ({recorded_as}), and the tensors do not tell{why}. Set base.{option}"
        )

    def contradiction(self, what: str) -> ArtefactError:
        return ArtefactError(f"{self.contents.path}: contradiction: {what}")


def resolve(config: QDiffusionConfig, contents: Contents) -> Options:
    """Settle every option of a file.

    Raises:
        ArtefactError: two witnesses contradict each other, or none knows an option that matters.
    """
    witnesses = _Witnesses(config, contents)
    _check_split(witnesses)
    weight_bits = _weight_bits(witnesses)
    activation_bits = _activation_bits(witnesses)
    if activation_bits is None:
        return Options(weight_bits, None, None, symmetric=False)
    symmetric = _symmetric(witnesses)
    return Options(weight_bits, activation_bits, _softmax_bits(witnesses, symmetric), symmetric)


def read_record(path: Path) -> dict[str, Any]:
    """The options a calibration run wrote; empty when there is no such file.

    Raises:
        ArtefactError: the file is there, but is not the plain YAML that the run writes.
    """
    if not path.is_file():
        return {}
    try:
        document = read_document(path)
    except RecipeError as error:
        raise ArtefactError(str(error)) from None
    if document.problems:
        raise ArtefactError("\n".join(document.report(document.problems)))
    kinds = {
        "weight_bit": int,
        "act_bit": int,
        "sm_abit": int,
        "split": bool,
        "quant_act": bool,
        "a_sym": bool,
    }
    for key, kind in kinds.items():
        value = document.data.get(key)
        if value is not None and type(value) is not kind:
            line = document.lines[(key,)]
            raise ArtefactError(f"{path}:{line}: {key}: expected {kind.__name__}, found {value!r}")
    return dict(document.data)


def _check_split(witnesses: _Witnesses) -> None:
    recorded, found = witnesses.record.get("split"), witnesses.contents.split_layers
    if recorded is not None and recorded != bool(found):
        state = f"{len(found)} split shortcuts" if found else "no split shortcut"
        raise witnesses.contradiction(f"split: {RECORD} says {recorded}, the tensors show {state}")


def _weight_bits(witnesses: _Witnesses) -> int:
    said = witnesses.agreed("weight_bits", "weight_bit")
    possible = possible_weight_bits(witnesses.contents)
    if said is None:
        if possible is None or len(possible) != 1:
            shown = "" if not possible else f" ({' or '.join(map(str, possible))} would fit them)"
            raise witnesses.gap("weight_bits", "weight_bit", shown)
        return possible[0]
    if possible is not None and said not in possible:
        shown = " or ".join(map(str, possible)) or "no width from 2 to 16"
        raise witnesses.contradiction(
            f"weight_bits is given as {said}, the weights and their steps fit {shown}"
        )
    return int(said)


def _activation_bits(witnesses: _Witnesses) -> int | None:
    config, contents, record = witnesses.config, witnesses.contents, witnesses.record
    if "activation_bits" in config.model_fields_set and config.activation_bits is None:
        return None
    if not contents.has_activations:
        if config.activation_bits is not None:
            raise witnesses.contradiction(
                f"activation_bits is given as {config.activation_bits}, the file holds weights only. "
                "Write `activation_bits: null`, or give the file calibrated with --quant_act"
            )
        if record.get("quant_act"):
            raise witnesses.contradiction(f"{RECORD} says quant_act: True, the file holds weights only")
        return None
    if record.get("quant_act") is False:
        raise witnesses.contradiction(f"{RECORD} says quant_act: False, the file holds activation quantizers")
    said = witnesses.agreed("activation_bits", "act_bit")
    if said is None:
        raise witnesses.gap("activation_bits", "act_bit", "")
    _check_zero_points(witnesses, int(said))
    return int(said)


def _zero_points(contents: Contents) -> dict[str, int]:
    found = {name: act for name, acts in contents.inputs.items() for act in acts}
    found |= {name: act for name, act in contents.operands.items() if not name.endswith(".w")}
    return {name: int(act.zero_point.item()) for name, act in found.items()}


def _check_zero_points(witnesses: _Witnesses, bits: int) -> None:
    """A zero point is a code, so it is below 2^bits; and among many inputs some are centred."""
    points = _zero_points(witnesses.contents)
    name, largest = max(points.items(), key=lambda item: item[1])
    # An mse initialisation can put a rare one beyond the codes, where an input has only one sign.
    if sum(point >= 2**bits for point in points.values()) > _STRAY * len(points):
        raise witnesses.contradiction(
            f"activation_bits is given as {bits}, but the zero point of {name} is {largest}, beyond "
            f"the last code {2**bits - 1}"
        )
    if len(set(points.values())) >= _TELLING and largest < 2**bits / 4:
        raise witnesses.contradiction(
            f"activation_bits is given as {bits}, but no zero point of {len(points)} exceeds {largest}: "
            f"with {2**bits} codes, inputs centred on 0 have one near {2 ** (bits - 1)}"
        )


def _symmetric(witnesses: _Witnesses) -> bool:
    said = witnesses.agreed("symmetric", "a_sym")
    points = _zero_points(witnesses.contents)
    off_zero = next((name for name, point in points.items() if point != 0), None)
    if said is None:
        if off_zero is None:
            raise witnesses.gap("symmetric", "a_sym", " (every zero point is 0, which fits both)")
        return False
    # With --a_sym and an mse initialisation the code does write other zero points; only its own
    # record of the run is trusted for that.
    if said and off_zero is not None and not witnesses.record.get("a_sym"):
        raise witnesses.contradiction(
            f"symmetric is given as true, but the zero point of {off_zero} is {points[off_zero]}, not 0. If "
            f"the run did use --a_sym, with an mse initialisation, `a_sym: true` in its {RECORD} says so"
        )
    return bool(said)


def _softmax_bits(witnesses: _Witnesses, symmetric: bool) -> int | None:
    steps = {n: abs(float(a.delta)) for n, a in witnesses.contents.operands.items() if n.endswith(".w")}
    if not steps:
        return None
    said = witnesses.agreed("softmax_bits", "sm_abit")
    if said is None:
        raise witnesses.gap("softmax_bits", "sm_abit", "")
    if len(set(steps.values())) < 2:
        return int(said)  # equal steps were not measured on anything, and tell nothing
    levels = 2 ** (said - symmetric) - 1
    reach = torch.tensor([step * levels for step in steps.values()])
    # A softmax lies in 0..1. Training moves the steps (not those of 16 bits, which are left as they
    # were found), so only a reach that no training explains counts as a contradiction.
    if float(reach.max()) < 1 / 8:
        raise witnesses.contradiction(
            f"softmax_bits is given as {said}, but then no softmax quantizer reaches beyond "
            f"{float(reach.max()):.2g} of 1: the steps belong to more bits"
        )
    if said == 16 and float(reach.median()) > 4:
        raise witnesses.contradiction(
            f"softmax_bits is given as 16, but then half the softmax quantizers reach beyond "
            f"{float(reach.median()):.3g}, where a softmax ends at 1: the steps belong to fewer bits"
        )
    return int(said)


def possible_weight_bits(contents: Contents) -> list[int] | None:
    """The widths that fit the weights and their steps, ascending; None where they tell nothing.

    At width n both initialisations give every channel at least 2^n - 1 steps between its extremes,
    and leave few weights (measured: at most 2 % for normal, Laplace and t4 weights) outside the codes
    0 .. 2^n - 1; at n - 1 about half of them would fall outside.
    """
    spans: list[Tensor] = []
    clipped: list[Tensor] = []
    for name, parts in contents.weights.items():
        weight, start = contents.floats[f"{name}.weight"], 0
        for part in parts:
            stop = start + part.alpha.shape[1]
            span, outside = _evidence(weight[:, start:stop], part.delta, part.zero_point)
            start = stop
            if float(span.max()) >= 1:
                spans.append(span)
                clipped.append(outside)
    if not spans:
        return None
    span, outside = torch.cat(spans).median(), torch.stack(clipped).mean(0)
    return [
        n
        for n, share in zip(_WIDTHS, outside, strict=True)
        if share <= _CLIPPED and span >= 0.95 * (2**n - 1)
    ]


def _evidence(weight: Tensor, delta: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Steps between the extremes, `(channels,)`, and the share outside the codes at each width."""
    stride = max(1, weight.shape[0] // _CHANNELS_READ)
    weight = weight[::stride].float().flatten(1)
    delta, zero_point = (
        (t.float().flatten()[::stride] if t.numel() > 1 else t.float().flatten()).unsqueeze(1)
        for t in (delta, zero_point)
    )
    codes = (weight / delta).floor() + zero_point
    span = ((weight.amax(1) - weight.amin(1)) / delta.flatten()).abs()
    outside = torch.stack([((codes < -1) | (codes > 2**n - 1)).float().mean() for n in _WIDTHS])
    return span, outside
