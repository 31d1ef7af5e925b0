"""What the torch backend does beyond the contract."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from golden_model import GoldenModel
from qlip_plugins import load_backend
from qlip_plugins.errors import BitsError, IncompatibleModelError
from qlip_plugins.grids import ActGrid, Ranges
from qlip_plugins.state import CalibratedState
from qlip_torch.quantizer import TorchActQuantizer


def quantizer(**fitted: ActGrid) -> TorchActQuantizer:
    ranges = Ranges({"layer": {grid.bits: grid for grid in fitted.values()}})
    return TorchActQuantizer("layer", ActGrid.asymmetric(8, 0.05, 128), ranges)


def test_rows() -> None:
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    act = quantizer(a=ActGrid.asymmetric(4, 0.5, 8))
    alone = []
    for bits in (4, 8, 32):
        act.set_bits(bits)
        alone.append(act(x))
    for kind in (torch.int64, torch.int32, torch.uint8):
        act.set_bits(torch.tensor([4, 8, 32], dtype=kind))
        mixed = act(x)
        for row in range(3):
            assert torch.equal(mixed[row], alone[row][row])
    assert torch.equal(alone[2], x)
    act.set_bits(torch.tensor(8))
    assert torch.equal(act(x), alone[1])


def test_rows_must_be_those_of_the_batch() -> None:
    act = quantizer()
    act.set_bits(torch.tensor([8, 32]))
    with pytest.raises(BitsError, match="bits were set for 2 rows, the batch has 3"):
        act(torch.zeros(3, 4))
    act.set_mixture((8, 32), torch.full((2, 2), 0.5), 8)
    with pytest.raises(BitsError, match="a mixture was set for 2 rows, the batch has 3"):
        act(torch.zeros(3, 4))
    with pytest.raises(BitsError, match=r"expected \(2,\) or \(N, 2\)"):
        act.set_mixture((8, 32), torch.full((2, 3), 0.3), 8)
    with pytest.raises(BitsError, match=r"4 bits are chosen, the mixture is of \(8, 32\)"):
        act.set_mixture((8, 32), torch.full((2, 2), 0.5), torch.tensor([8, 4]))


def test_a_bad_width_leaves_the_old_one() -> None:
    act = quantizer()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    before = act(x)
    with pytest.raises(BitsError):
        act.set_bits(torch.tensor([8, 99]))
    assert torch.equal(act(x), before)


def test_gradients_reach_the_input() -> None:
    act = quantizer()
    x = torch.tensor([[0.3, 100.0]], requires_grad=True)
    act(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == pytest.approx([1.0, 0.0])


def test_half_precision(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    unet = model.unet().to(torch.bfloat16)
    plain = {name: p.clone() for name, p in unet.named_parameters()}
    quantizers = load_backend("torch").install(unet, states["w4a8"])
    call = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in model.call(5).items()}
    with torch.no_grad():
        out = unet(**call).sample
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    quantizers.remove()
    assert all(torch.equal(p, plain[name]) for name, p in unet.named_parameters())


def test_a_failing_install_is_rolled_back(
    model: GoldenModel, states: dict[str, CalibratedState], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = model.unet()
    before = {name: id(p) for name, p in unet.named_parameters()}
    processors = dict(unet.attn_processors)
    calls = []
    original = Attention.set_processor

    def third_fails(self: Attention, processor: object) -> None:
        calls.append(processor)
        if len(calls) == 3:
            raise MemoryError
        original(self, processor)

    monkeypatch.setattr(Attention, "set_processor", third_fails)
    with pytest.raises(MemoryError):
        load_backend("torch").install(unet, states["w4a8"])
    assert {name: id(p) for name, p in unet.named_parameters()} == before
    assert unet.attn_processors == processors
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_unusual_attention_is_refused(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    unet = model.unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.fuse_projections()
    with pytest.raises(
        IncompatibleModelError, match=r"to_qkv\.weight .* is in the model, not in the checkpoint"
    ):
        load_backend("torch").install(unet, states["w4a8"])
    unet = model.unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.rescale_output_factor = 2.0
    with pytest.raises(IncompatibleModelError, match=r"attn1: its attention has rescale_output_factor=2\.0"):
        load_backend("torch").install(unet, states["w4a8"])


def test_offloaded_weights_are_refused(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    unet = accelerate.cpu_offload(model.unet(), execution_device=torch.device("cpu"))
    with pytest.raises(IncompatibleModelError, match="offloaded by accelerate"):
        load_backend("torch").install(unet, states["w4a8"])


def test_a_taken_out_quantizer_is_noticed(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    unet = model.unet()
    quantizers = load_backend("torch").install(unet, states["w4a8"])
    quantizers.verify()
    unet.conv_in._forward_pre_hooks.clear()
    with pytest.raises(IncompatibleModelError, match="conv_in: its activation quantizer has been taken out"):
        quantizers.verify()
    quantizers.remove()
    quantizers = load_backend("torch").install(unet, states["w4a8"])
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(IncompatibleModelError, match="its attention processor has been replaced"):
        quantizers.verify()
