"""The tiny model of the golden files, as diffusers has it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

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
