"""The protocol of an evaluation: all that its numbers depend on, but the allocations compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from ..families import denoiser_of
from ..pictures import PictureFolder
from ..prompts import PromptSet
from ..work import flat, identity_of
from . import bootstrap, distances
from .bootstrap import clusters_of
from .errors import Judges, Pair

_PACKAGES = ("numpy", "scipy", "torchmetrics")


def protocol_of(
    pair: Pair, prompts: PromptSet, seeds: int, batch: int, judges: Judges, references: PictureFolder | None
) -> dict[str, Any]:
    """Plain data on how allocations are measured; what belongs to an allocation is not in it.

    Args:
        pair: of models.
        prompts: n of them, with tags.
        seeds: noises of each prompt.
        batch: prompts at a time.
        judges: of pictures.
        references: what sets of pictures are compared with.
    """
    pipe, settings = pair.teacher, pair.settings
    identity = identity_of(pipe, pair.recipe.model, prompts.prompts)
    vae = getattr(pipe, "vae", None)
    return {
        "prompts": {
            "n": len(prompts.prompts),
            "sha256": identity["prompts"],
            "clusters_sha256": _sha256(list(clusters_of(prompts))),
            "precomputed_embeddings": identity["prompt_embeddings"],
        },
        "noises": {"rule": "sha256(seed, number, prompt)", "seed": settings.seed, "per_prompt": seeds},
        "pipeline": identity["pipeline"],
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": _plain(pipe.scheduler.config)},
        "steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "dtype": settings.dtype,
        "device": torch.device(settings.device).type,
        "latent_size": denoiser_of(pipe).config.get("sample_size"),
        "decoder": None if vae is None else _weights_digest(vae),
        "pixels": "rounded to 8 bits, resized by each extractor in its own way",
        "base_fingerprint": pair.controller.state.fingerprint,
        "ranges_digest": pair.controller.ranges.digest(),
        "backend": pair.recipe.backend,
        "features": {
            name: {"name": found.name, "digest": found.digest} for name, found in judges.features.items()
        },
        "scores": {name: dict(found.facts) for name, found in judges.scores.items()},
        "references": None
        if references is None
        else {"n": len(references), "sha256": references.digest(), "size": list(references.size)},
        "batch_size": batch,
        "statistics": {
            "draws": bootstrap.DRAWS,
            "level": bootstrap.LEVEL,
            "fid_draws": distances.FID_DRAWS,
            "kid_subsets": distances.KID_SUBSETS,
            "kid_largest_subset": distances.KID_LARGEST_SUBSET,
        },
        "versions": {**identity["versions"], **{name: _version(name) for name in _PACKAGES}},
    }


def fingerprint_of(protocol: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the protocol's SHA-256, which stand beside every number."""
    return _sha256(protocol)[:12]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The fields in which two protocols differ, `field: first, second`."""
    ours, theirs = flat(first), flat(second)
    return [
        f"{name}: {ours.get(name, 'absent')!r}, {theirs.get(name, 'absent')!r}"
        for name in sorted(ours.keys() | theirs)
        if ours.get(name, "absent") != theirs.get(name, "absent")
    ]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's options as JSON can hold them, without the remarks of whoever wrote its file."""
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str, sort_keys=True))
    return plain


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _weights_digest(module: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
