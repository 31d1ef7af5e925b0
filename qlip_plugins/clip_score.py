"""CLIP score: how well a picture fits its prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ArtefactError

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipScore:
    """Cosine of a picture's and its prompt's CLIP embeddings, -1..1.

    Only pictures of one prompt are comparable: some texts fit every picture better than others. Pictures are
    resized (bicubic, antialiased) so that the shorter side fits, cropped to the middle, and normalised as
    `preprocessor_config.json` says, or with OpenAI's constants without one. Prompts beyond the text tower's
    length are cut off.

    Args:
        folder: a CLIP model with its tokenizer, as transformers saves them.
        device: where to compute.

    Raises:
        ArtefactError: the folder is missing, or holds no CLIP model.
    """

    def __init__(self, folder: Path, device: str) -> None:
        if not folder.is_dir():
            raise ArtefactError(f"{folder}: no such folder of a CLIP model")
        try:
            from transformers import AutoTokenizer, CLIPModel

            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ArtefactError(f"{folder}: no CLIP model: {str(error).splitlines()[0]}") from None
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)
        self._mean, self._deviation = (row.to(device) for row in _constants(folder))
        self.facts: Mapping[str, Any] = {"metric": "clip-score", "model_digest": _digest(model)}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `qlip_plugins.quality.Quality`; float32, on the CPU."""
        model = self._model
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(self._device)
        # The towers by themselves: what get_text_features gives differs between versions of transformers.
        texts = model.text_projection(
            model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        )
        pictures = model.visual_projection(
            model.vision_model(pixel_values=self._prepared(images)).pooler_output
        )
        return F.cosine_similarity(pictures, texts).cpu()

    def _prepared(self, images: Tensor) -> Tensor:
        side = self._model.config.vision_config.image_size
        height, width = images.shape[-2:]
        scale = side / min(height, width)
        size = (max(side, round(height * scale)), max(side, round(width * scale)))
        resized = F.interpolate(
            images.to(self._device, torch.float32), size, mode="bicubic", antialias=True
        ).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        cropped = resized[..., top : top + side, left : left + side]
        return (cropped - self._mean) / self._deviation


def _constants(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels, `(3, 1, 1)` each."""
    file = folder / "preprocessor_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        mean = torch.tensor(found.get("image_mean", _MEAN)).view(3, 1, 1)
        return mean, torch.tensor(found.get("image_std", _DEVIATION)).view(3, 1, 1)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtefactError(f"{file}: no image_mean and image_std of three numbers: {error}") from None


def _digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
