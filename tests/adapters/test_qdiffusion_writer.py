"""Writing Q-Diffusion's own format, checked against the files that its own code wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from calibration_fixtures import Calibrated
from golden_model import CASES, GoldenModel
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.adapter import CheckpointWriter
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.grids import ActGrid
from qlip_plugins.packed import read_packed, write_packed
from qlip_plugins.state import CalibratedState


def writer() -> CheckpointWriter:
    adapter = load_base_quantizer("qdiffusion")
    assert isinstance(adapter, CheckpointWriter)
    return adapter


def read(path: Path) -> CalibratedState:
    adapter = load_base_quantizer("qdiffusion")
    config: Any = adapter.config_class
    return adapter.load(config(checkpoint=path))


@pytest.mark.parametrize("case", CASES)
def test_golden_file_read_and_written(
    case: str, golden: Path, states: dict[str, CalibratedState], tmp_path: Path
) -> None:
    """Keys, their order, shapes and types are the file's own, and every value but alpha's size."""
    path = writer().write(states[case], tmp_path)
    written = torch.load(path, weights_only=True)
    original = torch.load(golden / "qdiffusion" / case / "ckpt.pth", weights_only=True)
    assert type(written) is type(original)
    assert list(written) == list(original)
    for name, tensor in original.items():
        assert (written[name].shape, written[name].dtype) == (tensor.shape, tensor.dtype), name
        if name.endswith(".alpha"):
            assert written[name].isfinite().all()
        else:
            assert torch.equal(written[name], tensor), name
    again = read(path)
    assert again.fingerprint == states[case].fingerprint
    assert again.activations == states[case].activations


def test_an_interrupted_write_leaves_no_checkpoint_beside_another_runs_record(
    states: dict[str, CalibratedState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise OSError("no space left")

    path = writer().write(states["w4a8"], tmp_path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtefactError, match="no space left"):
        writer().write(states["w8a8"], tmp_path)
    assert not path.exists()


def test_alpha_says_which_way_it_was_rounded(
    golden: Path, states: dict[str, CalibratedState], tmp_path: Path
) -> None:
    """Wherever the sign matters, it is that of Q-Diffusion's own alpha."""
    path = writer().write(states["w4a8"], tmp_path)
    written = torch.load(path, weights_only=True)
    original = torch.load(golden / "qdiffusion" / "w4a8" / "ckpt.pth", weights_only=True)
    seen = 0
    for name in original:
        if not name.endswith("weight_quantizer.alpha"):
            continue
        stem = name.removesuffix(".alpha")
        weight = original[f"{stem.removesuffix('.weight_quantizer')}.weight"][:, : original[name].shape[1]]
        below = (weight / original[f"{stem}.delta"]).floor() + original[f"{stem}.zero_point"]
        matters = (below >= 0) & (below < 15)
        assert torch.equal((written[name] >= 0)[matters], (original[name] >= 0)[matters]), name
        seen += int(matters.sum())
    assert seen > 80_000


@pytest.mark.parametrize("bits", [8, 16])
def test_a_calibrated_model_is_read_back_exactly(calibrated: Calibrated, bits: int, tmp_path: Path) -> None:
    """Fingerprints and outputs of the native file and of the packed folder are equal."""
    state = calibrated.calibration.state(bits)
    native = read(writer().write(state, tmp_path / "native"))
    result = calibrated.calibration
    write_packed(tmp_path / "packed", result.weights, result.grids, result.report, "a test")
    packed = read_packed(tmp_path / "packed", bits)
    assert native.fingerprint == packed.fingerprint == state.fingerprint
    outputs = []
    unet = calibrated.pipe.unet
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    for one in (state, native, packed):
        installed = load_backend("torch").install(unet, one)
        with torch.no_grad():
            outputs.append(unet(sample, torch.tensor([501, 1]), encoder_hidden_states=text).sample)
        installed.remove()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_equal_states_give_equal_bytes(states: dict[str, CalibratedState], tmp_path: Path) -> None:
    first, second = (writer().write(states["w4"], tmp_path / name).read_bytes() for name in "ab")
    assert first == second
    assert writer().write(states["w4"], tmp_path / "a").read_bytes() == first


def test_files_of_others_are_not_replaced(states: dict[str, CalibratedState], tmp_path: Path) -> None:
    (tmp_path / "ckpt.pth").write_text("of somebody else")
    with pytest.raises(ArtefactError, match="exists and was not written by this command"):
        writer().write(states["w4"], tmp_path)
    assert (tmp_path / "ckpt.pth").read_text() == "of somebody else"


def without_float_weight(state: CalibratedState) -> CalibratedState:
    floats = {name: t for name, t in state.float_parameters.items() if name != "conv_in.weight"}
    return replace(state, float_parameters=floats)


def with_layer(state: CalibratedState, **change: Any) -> CalibratedState:
    layer = state.layers["conv_in"]
    other = replace(layer, weight=(replace(layer.weight[0], **change),))
    return replace(state, layers={**state.layers, "conv_in": other})


def far_code(codes: Tensor) -> Tensor:
    changed = codes.clone()
    changed.view(-1)[0] = (int(changed.view(-1)[0]) + 8) % 16
    return changed


def narrower(state: CalibratedState) -> CalibratedState:
    return state.with_activations(state.activations | {"conv_in": ActGrid.asymmetric(6, 0.1, 3)})


REFUSED: dict[str, tuple[Any, str]] = {
    "a float layer": (
        lambda s: replace(s, layers={n: layer for n, layer in s.layers.items() if n != "conv_in"}),
        "conv_in is not quantized",
    ),
    "no float weight": (without_float_weight, "the unquantized weight of conv_in is not known"),
    "another weight width": (lambda s: with_layer(s, bits=8), r"weights of different widths: \[4, 8\]"),
    "another activation width": (narrower, "activations of different widths"),
    "no operand": (
        lambda s: s.with_activations({n: g for n, g in s.activations.items() if not n.endswith("attn1.q")}),
        r"attn1\.q has no activation quantizer",
    ),
    "a far code": (
        lambda s: with_layer(s, codes=far_code(s.layers["conv_in"].weight[0].codes)),
        "conv_in: 1 of its weight codes are none of the two nearest",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_a_state_that_the_format_cannot_hold(
    change: Any, message: str, states: dict[str, CalibratedState], tmp_path: Path
) -> None:
    with pytest.raises(IncompatibleModelError, match=message):
        writer().write(change(states["w4a8"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ldm_shaped_models_are_writable(model: GoldenModel, tmp_path: Path) -> None:
    writer().check_writable(model.unet(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [12, 20]}, r"block_out_channels are \(12, 20\), expected whole multiples"),
        ({"attention_head_dim": [2, 3]}, r"\(2, 3\) heads of \(6, 8\) channels"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', expected 'silu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block is \(1, 2\), expected one"),
        ({"mid_block_type": None}, "mid_block_type is None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift'"),
        # These leave every name and shape as it is: Q-Diffusion would load the file and compute something else.
        ({"norm_eps": 1e-3}, "norm_eps is 0.001, expected 1e-05"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act is True"),
        ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor is 2.0"),
        ({"downsample_padding": 0}, "downsample_padding is 0"),
        ({"time_embedding_act_fn": "gelu"}, "time_embedding_act_fn is 'gelu'"),
        ({"timestep_post_act": "silu"}, "timestep_post_act is 'silu'"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm is 'layer_norm'"),
    ],
)
def test_other_models_are_refused(
    change: dict[str, Any], message: str, model: GoldenModel, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel(**{**model.config, **change})
    with pytest.raises(IncompatibleModelError, match=message):
        writer().check_writable(unet, tmp_path)


@pytest.mark.parametrize("heads", [[2, 4], [2, 2]])
def test_heads_or_their_channels_may_be_one_number(
    heads: list[int], model: GoldenModel, tmp_path: Path
) -> None:
    writer().check_writable(UNet2DConditionModel(**{**model.config, "attention_head_dim": heads}), tmp_path)
