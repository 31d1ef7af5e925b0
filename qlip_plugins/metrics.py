"""Cost of a bit plan: FAB and BitOPs (method.md 6). All of it is counted, none of it measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import BitsError
from .layers import kind_of, layer_of
from .plan import BitPlan
from .recipe import FULL_PRECISION
from .schema import nearest
from .state import OPERANDS

Profile = Literal["paper", "full"]

_KEPT_BY_PAPER = ("shortcut", "downsample")
"""Kinds that the `paper` profile counts at 32 x 32 bits, whatever quantizes them."""

_LAYER_NORM_OPERATIONS = 4
"""Operations an element of a LayerNorm, as the thop profiler counts an affine one."""

_FULL_COST = FULL_PRECISION * FULL_PRECISION


@dataclass
class MacCounts:
    """Multiply-accumulates of one call of a denoiser, for one row of the batch.

    Args:
        layers: convolution or linear -> MACs.
        products: attention path -> MACs of q k^T; the product with v costs the same.
        norms: operations of all LayerNorms.
        rows: rows of the batch that was counted.
    """

    layers: dict[str, float] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)
    norms: float = 0.0
    rows: int = 1

    def of(self, name: str) -> float:
        """MACs behind one activation quantizer; an operand answers for half of its product."""
        attention, _, operand = name.rpartition(".")
        if operand in OPERANDS:
            return self.products.get(attention, 0.0) / 2
        return self.layers.get(layer_of(name), 0.0)


def count_macs(denoiser: nn.Module, sample_inputs: Mapping[str, Any] | Sequence[Any]) -> MacCounts:
    """Run a denoiser once and count.

    Args:
        denoiser: may be on the meta device, where nothing is computed.
        sample_inputs: arguments of one call, by name or in order.
    """
    keywords = dict(sample_inputs) if isinstance(sample_inputs, Mapping) else {}
    positional = [] if isinstance(sample_inputs, Mapping) else list(sample_inputs)
    counts = MacCounts(rows=_rows(keywords, positional))
    lengths: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad(), _counting(denoiser, counts, lengths):
        denoiser(*positional, **keywords)
    for attention, found in lengths.items():
        if len(found) == 2:
            query, key = found["to_q"], found["to_k"]
            counts.products[attention] = query[0].numel() * key.shape[1]
    return counts


def _rows(keywords: Mapping[str, Any], positional: Sequence[Any]) -> int:
    sample = keywords.get("sample", keywords.get("hidden_states", positional[0] if positional else None))
    if not isinstance(sample, Tensor):
        raise BitsError(
            "sample_inputs must hold the denoiser's `sample` (or `hidden_states`), or start with it"
        )
    return int(sample.shape[0])


@contextmanager
def _counting(
    denoiser: nn.Module, counts: MacCounts, lengths: dict[str, dict[str, Tensor]]
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(module: nn.Module, args: Any, out: Tensor) -> None:
            elements = out.numel() / counts.rows
            if isinstance(module, nn.LayerNorm):
                counts.norms += _LAYER_NORM_OPERATIONS * elements
                return
            weight: Any = module.weight
            counts.layers[name] = counts.layers.get(name, 0.0) + elements * math.prod(weight.shape[1:])
            attention, _, part = name.rpartition(".")
            if part in ("to_q", "to_k"):
                lengths.setdefault(attention, {})[part] = out

        return count

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bitops(
    denoiser: nn.Module,
    sample_inputs: Mapping[str, Any] | Sequence[Any],
    weight_bits: float,
    activation_bits: float | Mapping[str, float],
    calls: int = 51,
    profile: Profile = "paper",
) -> float:
    """BitOPs in T (10^12) of a whole generation: `calls * sum MAC * b_w * b_a / 32^2`.

    `paper` is one pass a call, whatever the batch, with conv_shortcut, downsamplers and LayerNorm at
    32 x 32 bits and without the products of attention. `full` counts every row of `sample_inputs` (so
    guidance twice), every layer at its bits, and the products of attention at their operands' bits.

    Args:
        denoiser: may be on the meta device.
        sample_inputs: arguments of one call, by name or in order.
        weight_bits: of every convolution and linear.
        activation_bits: one number for all, or by layer (`attn1.q`, ... for operands); a layer the
            mapping does not name is not quantized, 32 bits.
        calls: calls of the denoiser; 50 steps of PNDM make 51.
        profile: what is counted.

    Raises:
        BitsError: the mapping names a layer that the denoiser has not, a width is not above 0, or
            `sample_inputs` lacks the sample.
    """
    counts = count_macs(denoiser, sample_inputs)
    if isinstance(activation_bits, Mapping):
        _check_names(counts, activation_bits)
        bits = activation_bits.get
        given = list(activation_bits.values())
    else:
        everywhere = float(activation_bits)
        given = [everywhere]

        def bits(name: str, default: float) -> float:  # type: ignore[misc]
            return everywhere

    if any(not 0 < width <= FULL_PRECISION for width in (*given, weight_bits)):
        raise BitsError(f"widths must lie above 0 and at most at {FULL_PRECISION}")
    return calls * call_bitops(counts, dict.fromkeys(counts.layers, weight_bits), bits, profile)


def call_bitops(
    counts: MacCounts,
    weight_bits: Mapping[str, float],
    activation_bits: Callable[[str, float], float],
    profile: Profile,
) -> float:
    """BitOPs in T of one call.

    Args:
        counts: what the call computes.
        weight_bits: by layer; 32 where a layer is not named.
        activation_bits: width of a quantizer by name, given the width to assume where it has none.
        profile: what is counted.
    """
    total = _FULL_COST * counts.norms
    for name, macs in counts.layers.items():
        if profile == "paper" and kind_of(name) in _KEPT_BY_PAPER:
            total += _FULL_COST * macs
        else:
            total += macs * weight_bits.get(name, FULL_PRECISION) * activation_bits(name, FULL_PRECISION)
    if profile == "full":
        for attention, macs in counts.products.items():
            q, k, v, softmax = (
                activation_bits(f"{attention}.{operand}", FULL_PRECISION) for operand in OPERANDS
            )
            total += macs * (q * k + softmax * v)
        total *= counts.rows
    return total / _FULL_COST / 1e12


def _check_names(counts: MacCounts, bits: Mapping[str, float]) -> None:
    known = {*counts.layers, *(f"{name}.{operand}" for name in counts.products for operand in OPERANDS)}
    for name in bits:
        if layer_of(name) not in known:
            raise BitsError(f"no layer {name!r} in the denoiser{nearest(name, known)}")


@dataclass(frozen=True)
class PromptCost:
    """What one prompt's generation costs.

    Args:
        fab: mean width over steps and controlled layers, each counted once.
        fab_mac_weighted: the same mean weighted by MACs.
        bitops_paper: T, profile `paper`.
        bitops_full: T, profile `full`, for this prompt's share of the batch.
        quality: what T2Q predicted, None without one.
    """

    fab: float
    fab_mac_weighted: float
    bitops_paper: float
    bitops_full: float
    quality: float | None


def cost_of(
    plan: BitPlan,
    counts: MacCounts,
    weight_bits: Mapping[str, float],
    base_bits: Mapping[str, int],
    visits: Counter[float],
) -> list[PromptCost]:
    """The cost of each prompt of a plan.

    A timestep that the scheduler visits twice counts once in FAB and twice in BitOPs; one that it does
    not visit (img2img starts late) counts in neither.

    Args:
        plan: the widths of the controlled quantizers.
        counts: MACs of one call; its `rows` are the calls' copies of one prompt (2 under guidance).
        weight_bits: by layer.
        base_bits: width of every activation quantizer that the plan leaves alone.
        visits: how often the denoiser was called at each timestep.
    """
    macs = torch.tensor([counts.of(name) for name in plan.layers], dtype=torch.float64)
    share = macs / macs.sum() if float(macs.sum()) > 0 else torch.full_like(macs, 1 / max(1, len(macs)))
    costs = []
    for prompt in range(plan.prompts):
        totals: dict[str, float] = {"paper": 0.0, "full": 0.0}
        for timestep, times in visits.items():
            row = dict(zip(plan.layers, plan.at(timestep)[prompt].tolist(), strict=True))
            widths = {**base_bits, **row}
            for profile in ("paper", "full"):
                totals[profile] += times * call_bitops(counts, weight_bits, widths.get, profile)
        bits = torch.stack([plan.at(timestep)[prompt] for timestep in visits]).double()
        costs.append(
            PromptCost(
                fab=float(bits.mean()) if bits.numel() else math.nan,
                fab_mac_weighted=float((bits * share).sum(1).mean()) if bits.numel() else math.nan,
                bitops_paper=totals["paper"],
                bitops_full=totals["full"],
                quality=None if plan.quality is None else plan.quality[prompt],
            )
        )
    return costs
