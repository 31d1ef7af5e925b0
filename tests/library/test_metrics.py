"""FAB and BitOPs against the paper's figures and against sums written out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from golden_model import GoldenModel
from qlip_plugins import bitops
from qlip_plugins.errors import BitsError
from qlip_plugins.layers import controlled, count_by_kind, kind_of
from qlip_plugins.metrics import MacCounts, call_bitops, cost_of, count_macs, mean_cost
from qlip_plugins.plan import BitPlan
from qlip_plugins.state import CalibratedState


@pytest.fixture(scope="module")
def bk_sdm_tiny() -> tuple[Any, dict[str, Any]]:
    """BK-SDM-Tiny's UNet without data, and one call at 512 pixels."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=[320, 640, 1280],
            layers_per_block=1,
            down_block_types=["CrossAttnDownBlock2D"] * 3,
            up_block_types=["CrossAttnUpBlock2D"] * 3,
            mid_block_type=None,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        call = {
            "sample": torch.empty(1, 4, 64, 64),
            "timestep": torch.empty(1),
            "encoder_hidden_states": torch.empty(1, 77, 768),
        }
    return unet, call


def test_macs_of_bk_sdm_tiny(bk_sdm_tiny: Any) -> None:
    counts = count_macs(*bk_sdm_tiny)
    assert sum(counts.layers.values()) + counts.norms == 205_035_274_240
    convolutions = sum(
        m for n, m in counts.layers.items() if len(bk_sdm_tiny[0].get_submodule(n).weight.shape) == 4
    )
    assert convolutions / 1e9 == pytest.approx(136.200, abs=5e-4)
    assert counts.norms / 1e9 == pytest.approx(0.0826, abs=5e-5)
    assert 2 * sum(counts.products.values()) / 1e9 == pytest.approx(37.8, abs=0.05)


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "published"),
    [(32, 32, "10.46"), (4, 16, "1.03"), (4, 10.58, "0.82"), (4, 12.14, "0.88")],
)
def test_published_bitops(bk_sdm_tiny: Any, weight_bits: int, activation_bits: float, published: str) -> None:
    unet, call = bk_sdm_tiny
    assert f"{bitops(unet, call, weight_bits, activation_bits):.2f}" == published
    # Guidance doubles the batch, and the paper's count does not.
    doubled = {key: torch.cat([value, value]) for key, value in call.items()}
    assert bitops(unet, list(doubled.values()), weight_bits, activation_bits) == bitops(
        unet, call, weight_bits, activation_bits
    )


def test_a_mapping_with_the_published_mean(bk_sdm_tiny: Any) -> None:
    """Layers at 8 or 16 bits whose MAC-weighted mean is 10.58 cost 0.82 T as well."""
    unet, call = bk_sdm_tiny
    counts = count_macs(unet, call)
    counted = {n: m for n, m in counts.layers.items() if kind_of(n) not in ("shortcut", "downsample")}
    wanted = (10.58 - 8) / 8 * sum(counted.values())
    bits, taken = dict.fromkeys(counted, 8.0), 0.0
    for name, macs in counted.items():
        part = min(1.0, max(0.0, (wanted - taken) / macs))
        bits[name], taken = 8 + 8 * part, taken + macs * part
    assert f"{bitops(unet, call, 4, bits):.2f}" == "0.82"


def test_full_profile_counts_everything(bk_sdm_tiny: Any) -> None:
    unet, call = bk_sdm_tiny
    counts = count_macs(unet, call)
    everything = sum(counts.layers.values()) + counts.norms + 2 * sum(counts.products.values())
    assert bitops(unet, call, 32, 32, calls=1, profile="full") == pytest.approx(everything / 1e12)
    doubled = {key: torch.cat([value, value]) for key, value in call.items()}
    assert bitops(unet, doubled, 32, 32, calls=1, profile="full") == pytest.approx(2 * everything / 1e12)
    one = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    bits = {f"{one}.q": 8, f"{one}.k": 4, f"{one}.v": 8, f"{one}.softmax": 16}
    saved = counts.products[one] * (2 - (8 * 4 + 16 * 8) / 1024)
    assert bitops(unet, call, 32, bits, calls=1, profile="full") == pytest.approx((everything - saved) / 1e12)


def test_unknown_layers_and_widths_are_refused(bk_sdm_tiny: Any) -> None:
    unet, call = bk_sdm_tiny
    with pytest.raises(BitsError, match="did you mean 'conv_in'"):
        bitops(unet, call, 4, {"conv_inn": 8})
    with pytest.raises(BitsError, match="above 0"):
        bitops(unet, call, 4, 0)
    with pytest.raises(BitsError, match="no BitOPs profile 'papers', expected one of paper, full"):
        bitops(unet, call, 4, 8, profile="papers")  # type: ignore[arg-type]
    with pytest.raises(BitsError, match="must hold the denoiser's `sample`"):
        bitops(unet, {"timestep": 1}, 4, 8)


def test_macs_on_real_tensors_equal_those_on_meta(model: GoldenModel) -> None:
    real = count_macs(model.unet(), model.call(5))
    with torch.device("meta"):
        twin = UNet2DConditionModel(**model.config)
    meta = count_macs(twin, {key: value.to("meta") for key, value in model.call(5).items()})
    assert real == meta
    assert real.rows == 3


def test_k_by_kind(states: dict[str, CalibratedState]) -> None:
    names = states["w4a8"].activations
    k = controlled(names, attention=False)
    assert count_by_kind(k) == {
        "attention_projection": 32,
        "resnet": 16,
        "transformer_projection": 8,
        "feed_forward": 8,
        "upsample": 1,
    }
    assert len(controlled(names, attention=True)) == len(k) + 32
    times = set(controlled(names, attention=False, time=True)) - set(k)
    assert times == {name for name in names if "time_emb" in name}
    left = set(names) - set(controlled(names, attention=True))
    assert {kind_of(name) for name in left} == {
        "conv_in",
        "conv_out",
        "time_embedding",
        "shortcut",
        "downsample",
    }
    assert "other" not in {kind_of(name) for name in names}


def test_a_repeated_step_counts_once_in_fab_and_twice_in_bitops() -> None:
    counts = MacCounts(layers={"a": 1e12, "b": 3e12})
    plan = BitPlan(torch.tensor([[[8, 16], [32, 4]]], dtype=torch.uint8), (9.0, 5.0), ("a", "b"), (0.25,))
    visits = Counter({(9.0, 2): 1, (5.0, 2): 2})
    cost = cost_of(plan, counts, {"a": 4, "b": 4}, {"a": 8, "b": 8}, visits)[0]
    assert cost.fab == (8 + 16 + 32 + 4) / 4
    assert cost.fab_mac_weighted == ((8 + 3 * 16) / 4 + (32 + 3 * 4) / 4) / 2
    expected = (4 * (8 + 3 * 16) + 2 * 4 * (32 + 3 * 4)) / 1024
    assert cost.bitops_paper == pytest.approx(expected)
    assert cost.bitops_full == pytest.approx(2 * expected)
    assert cost.quality == 0.25


def test_guidance_that_ends_in_mid_run_counts_as_it_was() -> None:
    counts = MacCounts(layers={"a": 1e12})
    plan = BitPlan(torch.tensor([[[8], [16]]], dtype=torch.uint8), (9.0, 5.0), ("a",))
    cost = cost_of(plan, counts, {"a": 4}, {"a": 8}, Counter({(9.0, 2): 1, (5.0, 1): 1}))[0]
    assert cost.bitops_full == pytest.approx((2 * 4 * 8 + 4 * 16) / 1024)
    assert cost.bitops_paper == pytest.approx((4 * 8 + 4 * 16) / 1024)
    assert mean_cost([cost, replace(cost, fab=20.0)]).fab == (12 + 20) / 2
    assert mean_cost([cost]).quality is None


def test_split_inputs_cost_by_their_parts() -> None:
    counts = MacCounts(layers={"b.conv_shortcut": 1e12}, first_parts={"b.conv_shortcut": 0.75})
    bits = {"b.conv_shortcut": 8, "b.conv_shortcut.skip": 16}
    widths: Any = bits.get
    found = call_bitops(counts, lambda name, default: 4, widths, "full")
    assert found == pytest.approx(4 * (0.75 * 8 + 0.25 * 16) / 1024)
    counts.first_parts = {}
    with pytest.raises(BitsError, match="where it is split is unknown"):
        call_bitops(counts, lambda name, default: 4, widths, "full")
    assert counts.of("b.conv_shortcut") == 1e12
