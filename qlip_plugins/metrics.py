"""Cost of a bit plan: FAB and BitOPs (docs/method.md). All of it is counted, none of it measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .errors import BitsError
from .layers import kind_of, layer_of
from .plan import BitPlan
from .recipe import FULL_PRECISION
from .schema import nearest
from .state import OPERANDS, SPLIT_SUFFIX

Profile = Literal["paper", "full"]

Widths = Callable[[str, float], float]
"""The width of a layer by its name, given the width to assume where it has none."""

KEPT_BY_PAPER = ("shortcut", "downsample")
"""Kinds that the `paper` profile counts at 32 x 32 bits, whatever quantizes them."""

_LAYER_NORM_OPERATIONS = 4
"""Operations an element of a LayerNorm, as the thop profiler counts an affine one."""

_QUERIES = ("to_q", "add_q_proj")
_KEYS = ("to_k", "add_k_proj")

_FULL_COST = FULL_PRECISION * FULL_PRECISION


@dataclass
class MacCounts:
    """Multiply-accumulates of one call of a denoiser, for one row of the batch.

    Args:
        layers: convolution or linear -> MACs.
        products: attention path -> MACs of q k^T; the product with v costs the same.
        norms: operations of all LayerNorms.
        rows: rows of the batch that was counted.
        first_parts: layer with a split input -> the first part's share of its input channels.
    """

    layers: dict[str, float] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)
    norms: float = 0.0
    rows: int = 1
    first_parts: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """MACs behind one activation quantizer; an operand answers for half of its product."""
        attention, _, operand = name.rpartition(".")
        if operand in OPERANDS:
            return self.products.get(attention, 0.0) / 2
        layer = layer_of(name)
        share = self.first_parts.get(layer, 1.0)
        return self.layers.get(layer, 0.0) * (share if name == layer else 1 - share)


def count_macs(denoiser: nn.Module, sample_inputs: Mapping[str, Any] | Sequence[Any]) -> MacCounts:
    """Run a denoiser once and count.

    Args:
        denoiser: may be on the meta device, where nothing is computed.
        sample_inputs: arguments of one call, by name or in order, on any device.

    Raises:
        BitsError: `sample_inputs` lacks the sample.
    """
    device = next(denoiser.parameters()).device
    keywords = dict(sample_inputs) if isinstance(sample_inputs, Mapping) else {}
    positional = [] if isinstance(sample_inputs, Mapping) else list(sample_inputs)
    counts = MacCounts(rows=_rows(keywords, positional))
    projected: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad(), _counting(denoiser, counts, projected):
        denoiser(*_moved(positional, device), **_moved(keywords, device))
    for attention, found in projected.items():
        queries, keys = ([found[name] for name in names if name in found] for names in (_QUERIES, _KEYS))
        if queries and keys:
            # Where image and text attend together, each has projections of its own.
            counts.products[attention] = sum(query[0].numel() for query in queries) * sum(
                key.shape[1] for key in keys
            )
    return counts


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _rows(keywords: Mapping[str, Any], positional: Sequence[Any]) -> int:
    sample = keywords.get("sample", keywords.get("hidden_states", positional[0] if positional else None))
    if not isinstance(sample, Tensor):
        raise BitsError(
            "sample_inputs must hold the denoiser's `sample` (or `hidden_states`), or start with it"
        )
    return int(sample.shape[0])


@contextmanager
def _counting(
    denoiser: nn.Module, counts: MacCounts, projected: dict[str, dict[str, Tensor]]
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
            if part in (*_QUERIES, *_KEYS):
                projected.setdefault(attention, {})[part] = out

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
    weight_bits: float | Mapping[str, float],
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
        sample_inputs: arguments of one call, by name or in order, on any device.
        weight_bits: one number for every convolution and linear, or by layer; a layer the mapping does
            not name has float weights, 32 bits.
        activation_bits: likewise; `attn1.q`, ... name the operands of attention.
        calls: calls of the denoiser; 50 steps of PNDM make 51.
        profile: what is counted.

    Raises:
        BitsError: a mapping names a layer that the denoiser has not, a width is not above 0, the
            profile is unknown, or `sample_inputs` lacks the sample.
    """
    counts = count_macs(denoiser, sample_inputs)
    weights, activations = (_lookup(counts, bits) for bits in (weight_bits, activation_bits))
    rows = counts.rows if profile == "full" else 1
    return calls * rows * call_bitops(counts, weights, activations, profile)


def _lookup(counts: MacCounts, bits: float | Mapping[str, float]) -> Widths:
    """Bits by layer, whether given as one number or as a mapping."""
    given = list(bits.values()) if isinstance(bits, Mapping) else [bits]
    if any(not 0 < width <= FULL_PRECISION for width in given):
        raise BitsError(f"widths must lie above 0 and at most at {FULL_PRECISION}")
    if isinstance(bits, Mapping):
        _check_names(counts, bits)
        return bits.get
    everywhere = float(bits)
    return lambda name, default: everywhere


def call_bitops(counts: MacCounts, weight_bits: Widths, activation_bits: Widths, profile: Profile) -> float:
    """BitOPs in T of one row in one call.

    Args:
        counts: what the call computes.
        weight_bits: width of a layer's weights by its name, given the width to assume without one.
        activation_bits: likewise of an activation quantizer.
        profile: what is counted.

    Raises:
        BitsError: the profile is unknown, or the two parts of an input have different widths and
            `counts` does not know where the input is split.
    """
    if profile not in get_args(Profile):
        raise BitsError(f"no BitOPs profile {profile!r}, expected one of {', '.join(get_args(Profile))}")
    total = _FULL_COST * counts.norms
    for name, macs in counts.layers.items():
        if profile == "paper" and kind_of(name) in KEPT_BY_PAPER:
            total += _FULL_COST * macs
        else:
            total += macs * weight_bits(name, FULL_PRECISION) * _input_bits(counts, name, activation_bits)
    if profile == "full":
        for attention, macs in counts.products.items():
            q, k, v, softmax = (
                activation_bits(f"{attention}.{operand}", FULL_PRECISION) for operand in OPERANDS
            )
            total += macs * (q * k + softmax * v)
    return total / _FULL_COST / 1e12


def _input_bits(counts: MacCounts, name: str, activation_bits: Widths) -> float:
    first = activation_bits(name, FULL_PRECISION)
    second = activation_bits(name + SPLIT_SUFFIX, first)
    if second is first or bool(torch.all(torch.as_tensor(first == second))):
        return first
    if name not in counts.first_parts:
        raise BitsError(
            f"{name}: its input's parts have {first} and {second} bits, but where it is split is unknown"
        )
    share = counts.first_parts[name]
    return share * first + (1 - share) * second


def _check_names(counts: MacCounts, bits: Mapping[str, float]) -> None:
    known = {*counts.layers, *(f"{name}.{operand}" for name in counts.products for operand in OPERANDS)}
    for name in bits:
        if layer_of(name) not in known:
            raise BitsError(f"no layer {name!r} in the denoiser{nearest(name, known)}")


@dataclass(frozen=True)
class Cost:
    """What a prompt's generation costs, or the mean of several.

    Args:
        fab: mean width over the steps taken and the controlled layers, each counted once; None where
            nothing is controlled.
        fab_mac_weighted: the same mean weighted by MACs.
        bitops_paper: T, profile `paper`.
        bitops_full: T, profile `full`, for one prompt's share of the batch.
        quality: what T2Q predicted, None without one.
    """

    fab: float | None
    fab_mac_weighted: float | None
    bitops_paper: float
    bitops_full: float
    quality: float | None


Visits = Counter[tuple[float, int]]
"""(timestep, rows of one prompt in the call: 2 under guidance) -> calls of the denoiser."""


def cost_of(
    plan: BitPlan,
    counts: MacCounts,
    weight_bits: Mapping[str, float],
    base_bits: Mapping[str, float],
    visits: Visits,
) -> list[Cost]:
    """The cost of each prompt of a plan.

    A timestep that the scheduler visits twice counts once in FAB and twice in BitOPs; one that it does
    not visit (img2img starts late) counts in neither.

    Args:
        plan: the widths of the controlled quantizers.
        counts: MACs of one call.
        weight_bits: by layer.
        base_bits: width of every activation quantizer that the plan leaves alone.
        visits: the calls that were made.
    """
    paper = full = torch.zeros(plan.prompts, dtype=torch.float64)
    for (timestep, rows), calls in visits.items():
        columns = dict(zip(plan.layers, plan.at(timestep).double().unbind(1), strict=True))
        # Widths are numbers, or one for each prompt: all prompts are counted at once.
        widths: Any = {**base_bits, **columns}
        paper = paper + calls * call_bitops(counts, weight_bits.get, widths.get, "paper")
        full = full + calls * rows * call_bitops(counts, weight_bits.get, widths.get, "full")
    fab, weighted = _mean_bits(plan, counts, visits)
    quality = plan.quality or [None] * plan.prompts
    return [Cost(*row) for row in zip(fab, weighted, paper.tolist(), full.tolist(), quality, strict=True)]


def _mean_bits(plan: BitPlan, counts: MacCounts, visits: Visits) -> tuple[list[Any], list[Any]]:
    """FAB of each prompt, plain and weighted by MACs; None where nothing is controlled."""
    if not plan.layers:
        return [None] * plan.prompts, [None] * plan.prompts
    steps = dict.fromkeys(timestep for timestep, _ in visits)
    bits = torch.stack([plan.at(timestep) for timestep in steps], dim=1).double()
    macs = torch.tensor([counts.of(name) for name in plan.layers], dtype=torch.float64)
    return bits.mean((1, 2)).tolist(), (bits @ (macs / macs.sum())).mean(1).tolist()


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """The mean over the prompts of a batch, field by field; None where any prompt has none."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    return Cost(
        fab=mean([cost.fab for cost in costs]),
        fab_mac_weighted=mean([cost.fab_mac_weighted for cost in costs]),
        bitops_paper=sum(cost.bitops_paper for cost in costs) / len(costs),
        bitops_full=sum(cost.bitops_full for cost in costs) / len(costs),
        quality=mean([cost.quality for cost in costs]),
    )
