"""Descriptions of pictures by vectors, which quality metrics and distances are computed on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .adapter import IMAGE_FEATURES, check_installed
from .errors import ArtefactError, RecipeError
from .pictures import PictureFolder
from .progress import progress


@runtime_checkable
class ImageFeatures(Protocol):
    """Describes pictures by vectors, such as the states of an image classifier.

    `name` says what it is in words that cannot be mistaken for another extractor; `digest` is the SHA-256
    of its weights.
    """

    name: str
    digest: str

    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features `(N, D)`, float32, of images `(N, 3, H, W)`, floating, 0..1."""
        ...

    def spatial(self, images: Tensor) -> Tensor:
        """Features with their places, flattened, `(N, S)`, for sFID; of the same images."""
        ...


class ImageFeaturesPlugin(Protocol):
    """Opens an extractor; found by entry point in the group `qlip_plugins.image_features`."""

    def __call__(self, path: Path | None, device: str) -> ImageFeatures:
        """Open it.

        Args:
            path: of its weights; None where they come with the plug-in.
            device: where it computes.

        Raises:
            ArtefactError: the weights are missing or damaged.
            RecipeError: a path is needed and was not given, or the other way round.
        """
        ...


def open_features(text: str, device: str) -> ImageFeatures:
    """Open the extractor that a user names.

    Args:
        text: `NAME`, or `NAME=PATH` with the path of its weights.
        device: where it computes.

    Raises:
        AdapterNotFoundError: none of that name is installed.
        RecipeError: no path after `=`, or one that the extractor does not take, or it needs one.
        ArtefactError: the weights are missing or damaged.
    """
    name, given, path = text.partition("=")
    if given and not path:
        raise RecipeError(f"image features {text!r}: a path is needed after the equals sign")
    plugin: ImageFeaturesPlugin = check_installed(IMAGE_FEATURES, "image features", name).load()
    return plugin(Path(path).expanduser() if path else None, device)


def features_of(features: ImageFeatures, pictures: PictureFolder, batch: int = 64) -> Tensor:
    """Pooled features `(N, D)`, float32, on the CPU, of all pictures of a folder.

    Raises:
        ArtefactError: a picture is broken.
    """
    batches = progress(pictures.batches(batch), f"pictures of {pictures.path.name}")
    return torch.cat([features(images).float().cpu() for images in batches])


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict that `torch.save` wrote, into a model whose names and shapes it must have.

    Counters of batches that a normalisation has seen, which older files lack, are passed over.

    Raises:
        ArtefactError: the file is missing, damaged, holds more than tensors, or another network's weights.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file of weights")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ArtefactError(f"{path}: damaged, or no file of weights: {str(error).splitlines()[0]}") from None
    state = found if isinstance(found, dict) else {}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not _counts(name)}
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in state.items() if not _counts(name)}
    differing = sorted(name for name in wanted.keys() | shapes if wanted.get(name) != shapes.get(name))
    if differing:
        first = differing[0]
        raise ArtefactError(
            f"{path}: not the weights of a {type(model).__name__}: {len(differing)} tensors differ, such as {first!r}: "
            f"found {_shape(shapes.get(first))}, expected {_shape(wanted.get(first))}"
        )
    if not all(bool(state[name].isfinite().all()) for name in wanted):
        raise ArtefactError(f"{path}: a weight is NaN or infinite")
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)


def _counts(name: str) -> bool:
    return str(name).endswith("num_batches_tracked")


def _shape(found: torch.Size | None) -> str:
    return "nothing" if found is None else str(tuple(found))
