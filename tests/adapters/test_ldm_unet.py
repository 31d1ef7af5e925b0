"""The embedded demo's UNet is LDM's UNetModel under other names, so Q-Diffusion's and PTQD's code can run on it.

`ldm_unet` is that class written anew for these tests; the recorded outputs of the real one anchor it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from golden_model import GoldenModel
from ldm_unet import DEMO, UNetModel
from qlip_plugins.ldm_names import diffusers_names, ldm_names

PROMPTS = ["", "a red fox", "smiling face with sunglasses, flat drawing"]


@pytest.fixture(scope="module")
def demo_ldm(demo_pipe: Any) -> UNetModel:
    model = UNetModel(**DEMO).eval()
    model.load_state_dict(renamed(demo_pipe.unet), strict=True)
    return model


def renamed(unet: Any) -> dict[str, Tensor]:
    """A diffusers UNet's state dict under LDM's names."""
    state = unet.state_dict()
    names = ldm_names(module_of(name) for name in state)
    found = {f"{names[module_of(name)]}.{name.rpartition('.')[2]}": tensor for name, tensor in state.items()}
    assert len(found) == len(state), "two tensors share a name"
    return found


def module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def modules_of(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(module_of(name) for name in model.state_dict()))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_our_ldm_computes_what_the_real_one_recorded(model: GoldenModel) -> None:
    told = json.loads((model.folder / "model_v" / "unet_config.json").read_text())
    names = {*DEMO, "norm_groups"}
    arguments = {key: value for key, value in {**told["unet"], **told}.items() if key in names}
    ldm = UNetModel(**arguments).eval()
    ldm.load_state_dict(load_file(model.folder / "model_v" / "float_unet.safetensors"), strict=True)
    assert sum(p.numel() for p in ldm.parameters()) == told["n_params"]
    recorded = load_file(model.folder / "qdiffusion" / "w4" / "outputs.safetensors")
    for index in range(6):
        x, t, context = (model.inputs[f"{name}_{index}"] for name in ("x", "t", "context"))
        with torch.no_grad():
            assert relative(ldm(x, t, context), recorded[f"out_fp_{index}"]) <= 1e-5, index


def test_the_golden_model_goes_there_and_back(model: GoldenModel) -> None:
    stored = load_file(model.folder / "model_v" / "float_unet.safetensors")
    found = renamed(model.unet())
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


def test_the_demo_names_are_a_bijection_in_ldm_s_order(demo_pipe: Any, demo_ldm: UNetModel) -> None:
    ours, theirs = modules_of(demo_pipe.unet), modules_of(demo_ldm)
    there = ldm_names(ours)
    assert list(there.values()) == theirs
    back = diffusers_names(theirs)
    assert {back[name]: name for name in theirs} == there
    assert sorted(back.values()) == sorted(ours)


def test_every_tensor_of_the_demo_has_its_place(demo_pipe: Any, demo_ldm: UNetModel) -> None:
    state = demo_pipe.unet.state_dict()
    back = diffusers_names(modules_of(demo_ldm))
    for name, tensor in demo_ldm.state_dict().items():
        module, _, parameter = name.rpartition(".")
        assert torch.equal(state.pop(f"{back[module]}.{parameter}"), tensor), name
    assert not state


def test_norms_have_ldm_s_epsilon(demo_pipe: Any, demo_ldm: UNetModel) -> None:
    """Too small to show in an output: 1e-6 in front of a transformer, 1e-5 elsewhere."""
    norms = {name: m for name, m in demo_ldm.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    for name, ours in diffusers_names(modules_of(demo_ldm)).items():
        if name in norms:
            assert demo_pipe.unet.get_submodule(ours).eps == norms[name].eps, name
    assert {norm.eps for norm in norms.values()} == {1e-5, 1e-6}


def test_the_demo_computes_the_same_as_ldm(demo_pipe: Any, demo_ldm: UNetModel) -> None:
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = demo_pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)[0]
    for timestep in (1, 201, 481, 961):
        t = torch.tensor([timestep, timestep, 999 - timestep])
        with torch.no_grad():
            expected = demo_pipe.unet(x, t, encoder_hidden_states=text).sample
            found = demo_ldm(x, t, text)
        print(f"t={timestep}: relative RMS {relative(found, expected):.1e}")
        assert relative(found, expected) <= 1e-5, timestep


@pytest.mark.parametrize(
    "change", [{"num_heads": 8}, {"attention_resolutions": (1, 2, 4)}, {"channel_mult": (1, 2, 4)}]
)
def test_other_arguments_are_another_model(
    change: dict[str, Any], demo_pipe: Any, demo_ldm: UNetModel
) -> None:
    """The comparison above would see a wrong argument: sizes do not fit, or another output comes."""
    other = UNetModel(**{**DEMO, **change}).eval()
    if change.get("num_heads") is None:
        with pytest.raises(RuntimeError, match="Error"):
            other.load_state_dict(renamed(demo_pipe.unet))
        return
    other.load_state_dict(renamed(demo_pipe.unet))
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 16, 16, generator=draw), torch.randn(1, 77, 256, generator=draw)
    t = torch.tensor([501])
    with torch.no_grad():
        assert relative(other(x, t, text), demo_ldm(x, t, text)) > 1e-3
