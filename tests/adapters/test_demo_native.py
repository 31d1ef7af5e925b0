"""The embedded demo's base as a native Q-Diffusion file: what the packed folder and the pipeline hold, together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm_unet import DEMO, UNetModel
from qlip_demo import FOLDER
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.adapter import CheckpointWriter
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.packed import read_config, read_packed
from qlip_plugins.state import CalibratedState

BASE = FOLDER / "base"


def written(state: CalibratedState, folder: Path) -> Path:
    adapter = load_base_quantizer("qdiffusion")
    assert isinstance(adapter, CheckpointWriter)
    return adapter.write(state, folder)


def read(path: Path) -> CalibratedState:
    adapter = load_base_quantizer("qdiffusion")
    config: Any = adapter.config_class
    return adapter.load(config(checkpoint=path))


def expected_keys(ldm: nn.Module) -> set[str]:
    """What Q-Diffusion's strict loading asks for: every convolution and linear quantized, shortcuts split."""
    keys = {f"model.{name}" for name in ldm.state_dict()}
    for name, module in ldm.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            split = name.startswith("output_blocks.") and name.endswith(".skip_connection")
            for part in ("", "_0") if split else ("",):
                keys |= {f"model.{name}.weight_quantizer{part}.{t}" for t in ("alpha", "delta", "zero_point")}
                keys |= {f"model.{name}.act_quantizer{part}.{t}" for t in ("delta", "zero_point")}
        if name.endswith((".attn1", ".attn2")):
            keys |= {f"model.{name}.act_quantizer_{o}.{t}" for o in "qkvw" for t in ("delta", "zero_point")}
    return keys


def output(unet: Any, state: CalibratedState) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(shape, generator=draw) for shape in ((2, 4, 16, 16), (2, 77, 256)))
    installed = load_backend("torch").install(unet, state)
    try:
        with torch.no_grad():
            found: Tensor = unet(sample, torch.tensor([601, 41]), encoder_hidden_states=text).sample
    finally:
        installed.remove()
    return found


@pytest.mark.parametrize("bits", [8, 16])
def test_the_demo_as_a_q_diffusion_file(bits: int, demo_pipe: Any, tmp_path: Path) -> None:
    table = read_config(BASE).table(bits)
    assert table is not None
    packed = read_packed(BASE, bits)
    path = written(packed.with_float_weights(demo_pipe.unet), tmp_path)
    stored = torch.load(path, weights_only=True, mmap=True)
    assert set(stored) == expected_keys(UNetModel(**DEMO))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    del stored
    native = read(path)
    path.unlink()  # 109 MB, which pytest would keep
    assert native.fingerprint == packed.fingerprint == table.fingerprint
    assert native.activations == packed.activations
    assert torch.equal(output(demo_pipe.unet, native), output(demo_pipe.unet, packed))


def test_the_float_weights_are_the_pipeline_s_own(demo_pipe: Any) -> None:
    state = read_packed(BASE, None)
    parameters = dict(demo_pipe.unet.named_parameters())
    filled = state.with_float_weights(demo_pipe.unet)
    assert not any(f"{name}.weight" in state.float_parameters for name in state.layers)
    assert filled.float_parameters.keys() == parameters.keys()
    assert all(torch.equal(filled.float_parameters[name], tensor) for name, tensor in parameters.items())
    assert filled.fingerprint == state.fingerprint


def test_other_float_weights_are_refused(demo_pipe: Any) -> None:
    state = read_packed(BASE, None)
    torch.manual_seed(0)
    with pytest.raises(IncompatibleModelError, match="not those the checkpoint was calibrated on"):
        state.with_float_weights(UNet2DConditionModel.from_config(demo_pipe.unet.config))
    with torch.device("meta"):
        smaller = UNet2DConditionModel.from_config({**demo_pipe.unet.config, "cross_attention_dim": 128})
    with pytest.raises(IncompatibleModelError, match="another architecture"):
        state.with_float_weights(smaller)


def test_weights_that_the_codes_do_not_round_are_refused(demo_pipe: Any, tmp_path: Path) -> None:
    """A pipeline that differs between the sampled values is still not written."""
    filled = read_packed(BASE, 8).with_float_weights(demo_pipe.unet)
    moved = {**filled.float_parameters, "conv_in.weight": -filled.float_parameters["conv_in.weight"]}
    with pytest.raises(IncompatibleModelError, match=r"conv_in: .* none of the two nearest"):
        written(replace(filled, float_parameters=moved), tmp_path / "native")
    assert not (tmp_path / "native").exists()
