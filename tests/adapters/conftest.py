from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from qlip_plugins import load_base_quantizer
from qlip_plugins.state import CalibratedState

CASES = ("w4a8", "w8a8", "w4a16", "w4")


class GoldenModel:
    """The tiny UNet of the golden files, as diffusers has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        described = json.loads((folder / "model_v" / "diffusers_map.json").read_text())
        self.config: dict[str, Any] = described["unet_config"]
        self.modules: dict[str, str] = described["module_map"]
        self.parameters: dict[str, str] = described["parameter_map"]
        weights = load_file(folder / "model_v" / "float_unet.safetensors")
        self._unet: nn.Module = UNet2DConditionModel(**self.config).eval()
        self._unet.load_state_dict({self.parameters[name]: tensor for name, tensor in weights.items()})
        self.inputs = load_file(folder / "model_v" / "inputs.safetensors")
        self.text = load_file(folder / "model_v" / "text_table.safetensors")["table"]

    def unet(self) -> Any:
        """A fresh float UNet."""
        return copy.deepcopy(self._unet)

    def pipe(self) -> Any:
        """A pipeline without encoder and decoder, with the scheduler of the recorded PLMS runs."""
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        )
        absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        pipe = StableDiffusionPipeline(
            unet=self.unet(), scheduler=scheduler, requires_safety_checker=False, **dict.fromkeys(absent)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, index: int) -> dict[str, Tensor]:
        """The keyword arguments of recorded input `index`."""
        return {
            "sample": self.inputs[f"x_{index}"],
            "timestep": self.inputs[f"t_{index}"],
            "encoder_hidden_states": self.inputs[f"context_{index}"],
        }


@pytest.fixture(scope="session")
def model(golden: Path) -> GoldenModel:
    return GoldenModel(golden)


@pytest.fixture(scope="session")
def states(golden: Path) -> dict[str, CalibratedState]:
    adapter = load_base_quantizer("qdiffusion")
    return {
        case: adapter.load(adapter.config_class(checkpoint=golden / "qdiffusion" / case / "ckpt.pth"))  # type: ignore[call-arg]
        for case in CASES
    }


@pytest.fixture
def edited(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """`edited(case, change)`: a copy of a golden checkpoint after `change(tensors)`."""

    def edit(case: str, change: Callable[[dict[str, Tensor]], Any], record: bool = True) -> Path:
        source = golden / "qdiffusion" / case
        tensors = torch.load(source / "ckpt.pth", weights_only=True)
        changed = change(tensors)
        path = tmp_path / "ckpt.pth"
        torch.save(tensors if changed is None else changed, path)
        if record:
            text = (source / "sampling_config.yaml").read_text()
            (tmp_path / "sampling_config.yaml").write_text(text)
        return path

    return edit
