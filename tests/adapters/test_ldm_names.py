from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from golden_model import GoldenModel
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.ldm_names import LayoutError, diffusers_names, ldm_names


def test_golden_model(model: GoldenModel) -> None:
    with_parameters = {name.rpartition(".")[0] for name in model.parameters}
    expected = {ldm: name for ldm, name in model.modules.items() if ldm in with_parameters}
    assert diffusers_names(with_parameters) == expected
    assert ldm_names(expected.values()) == {name: ldm for ldm, name in expected.items()}


SD_V1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def test_sd_v1_file_maps_without_a_leftover(golden: Path, tmp_path: Path) -> None:
    """The 2,412 keys of an SD v1 file, read as a file, on diffusers' SD v1 UNet without data."""
    expected = json.loads((golden / "sd_v1_expected_keys.json").read_text())
    assert len(expected["keys"]) == 2412
    path = tmp_path / "ckpt.pth"
    # One stored value a tensor: the shapes are true, the file is small.
    torch.save({name: torch.ones(()).expand(shape) for name, shape in expected["keys"].items()}, path)
    adapter = load_base_quantizer("qdiffusion")
    config_class: Any = adapter.config_class
    config = config_class(checkpoint=path, weight_bits=4, activation_bits=8, softmax_bits=16, symmetric=False)
    state = adapter.load(config)
    assert len(state.layers) == expected["quant_modules"] == 282
    splits = {
        f"output_blocks.{block * 3 + index}": (block, index) for block in range(4) for index in range(3)
    }
    for block, sizes in expected["splits"].items():
        up, index = splits[block]
        layer = state.layers[f"up_blocks.{up}.resnets.{index}.conv_shortcut"]
        assert [part.codes.shape[1] for part in layer.weight] == [sizes["h"], sizes["skip"]]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_V1)
    state.check_fits(unet)
    assert set(state.float_parameters) == {name for name, _ in unet.named_parameters()}
    assert len(state.activations) == 844 // 2
    assert len(expected["splits"]) == sum(layer.split is not None for layer in state.layers.values())
    quantizers = load_backend("torch").install(unet, state)
    assert len(quantizers) == 844 // 2
    quantizers.remove()


LAYOUTS: dict[str, dict[str, Any]] = {
    "one level": {"down": ["CrossAttnDownBlock2D"], "up": ["CrossAttnUpBlock2D"], "layers": 2},
    "attention deep only": {
        "down": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "no attention but mid": {"down": ["DownBlock2D"] * 3, "up": ["UpBlock2D"] * 3, "layers": 3},
    "four levels": {"down": ["CrossAttnDownBlock2D"] * 4, "up": ["CrossAttnUpBlock2D"] * 4, "layers": 2},
    "deep transformers": {"down": ["CrossAttnDownBlock2D"] * 2, "up": ["CrossAttnUpBlock2D"] * 2, "depth": 3},
    "blocks differ by level": {"down": ["DownBlock2D"] * 2, "up": ["UpBlock2D"] * 2, "layers": [1, 3]},
    "residual resampling": {"down": ["ResnetDownsampleBlock2D"] * 3, "up": ["ResnetUpsampleBlock2D"] * 3},
}

_TO_LDM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TO_LDM_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_layout(unet: Any) -> dict[str, str]:
    """LDM's name of every module, built from the blocks' objects: an inverse written on its own."""
    homes: dict[str, str] = {}
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for index in range(len(block.resnets)):
            homes[f"down_blocks.{level}.resnets.{index}"] = f"input_blocks.{number}.0"
            homes[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{number}.1"
            number += 1
        homes[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{number}.0"
        number += bool(block.downsamplers)
    homes |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    homes["mid_block.resnets.1"] = "middle_block.2"
    number = 0
    for level, block in enumerate(unet.up_blocks):
        attended = bool(getattr(block, "attentions", None))
        for index in range(len(block.resnets)):
            homes[f"up_blocks.{level}.resnets.{index}"] = f"output_blocks.{number}.0"
            homes[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{number}.1"
            number += 1
        homes[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{2 if attended else 1}"
    return {
        path: ldm_name(path, homes) for path in {n.rpartition(".")[0] for n, _ in unet.named_parameters()}
    }


def ldm_name(path: str, homes: dict[str, str]) -> str:
    if path in _TO_LDM_TOP:
        return _TO_LDM_TOP[path]
    home = next(home for home in homes if path.startswith(f"{home}."))
    inner = path.removeprefix(f"{home}.")
    inner = "op" if inner == "conv" and "downsamplers" in home else _TO_LDM_RESNET.get(inner, inner)
    return f"{homes[home]}.{inner}"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_other_layouts(layout: dict[str, Any]) -> None:
    levels = len(layout["down"])
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=layout["down"],
            up_block_types=layout["up"],
            block_out_channels=[8 * (level + 1) for level in range(levels)],
            layers_per_block=layout.get("layers", 1),
            transformer_layers_per_block=layout.get("depth", 1),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    expected = {ldm: name for name, ldm in ldm_layout(unet).items()}
    assert diffusers_names(expected) == expected
    assert ldm_names(expected.values()) == ldm_layout(unet)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("down_blocks.0.motion_modules.0.proj_in", "has no place in LDM's UNetModel"),
        ("mid_block.resnets.2.conv1", "has no place in LDM's UNetModel"),
        ("add_embedding.linear_3", "has no place in LDM's UNetModel"),
        ("down_blocks.0.resnets.0.spatial_res_block", "has no place in LDM's UNetModel"),
        ("down_blocks.0.resnets.3.conv1", "should start with a residual block"),
    ],
)
def test_modules_without_a_place_in_ldm(model: GoldenModel, name: str, message: str) -> None:
    modules = {name.rpartition(".")[0] for name in model.parameters.values()}
    with pytest.raises(LayoutError, match=message):
        ldm_names({*modules, name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.replace("input_blocks.2.0.op", "input_blocks.2.0.pool"), "not part of LDM"),
        (lambda n: n.replace("middle_block.0", "middle_block.7.0"), "not part of LDM"),
        (lambda n: n.replace("proj_in", "qkv"), "AttentionBlock"),
        (lambda n: "" if n == "input_blocks.2.0.op" else n, "conv_resample"),
        (lambda n: "" if n.startswith("output_blocks.1.") else n, "no parameters in block 1"),
        (lambda n: "" if n.startswith("middle_block.2") else n, "two residual blocks"),
        (lambda n: "" if n.startswith("output_blocks.1.1.conv") else n, "should start with a residual block"),
    ],
)
def test_other_names_are_refused(model: GoldenModel, change: Any, message: str) -> None:
    modules = {name.rpartition(".")[0] for name in model.parameters}
    with pytest.raises(LayoutError, match=message):
        diffusers_names({changed for name in modules if (changed := change(name))})
