"""A trained T2Q as a folder on disk, with what its numbers mean and what it was judged on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint import check_finite
from ..embeddings import Pooling
from ..errors import ArtefactError, RecipeError
from ..files import folder_written_whole
from ..labels import Labels, average_ranks
from ..prompts import PromptSet
from ..schema import StrictModel, nearest
from ..t2q import T2Q
from ..text_to_bits import CONFIG_NAME, WEIGHTS_NAME, read_config

FORMAT: Literal["qlip-plugins t2q"] = "qlip-plugins t2q"
REPORT_NAME = "report.json"
OWNED = (WEIGHTS_NAME, REPORT_NAME)


class HeldShare(StrictModel):
    """Hold out a share of the values of a tag, drawn at random.

    Args:
        by: the tag; in a label set without any tags its prompts stand for its values.
        share: of the values, between 0 and 1.
        seed: of the draw.
    """

    by: str
    share: float = Field(gt=0, lt=1)
    seed: int

    @property
    def tag(self) -> str:
        """The tag whose values are held out."""
        return self.by

    def held_values(self, labels: Labels) -> set[str]:
        """The values that are held out."""
        order = sorted(set(self._values(labels)))
        random.Random(self.seed).shuffle(order)
        return set(order[: round(len(order) * self.share)])

    def held(self, labels: Labels) -> list[bool]:
        """For each prompt whether it is held out."""
        chosen = self.held_values(labels)
        return [value in chosen for value in self._values(labels)]

    def _values(self, labels: Labels) -> Sequence[str]:
        return _tag(labels, self.by) if labels.tags else labels.prompts


class HeldValue(StrictModel):
    """Hold out the prompts whose tag has a value.

    Args:
        tag: its name.
        value: of the held prompts.
    """

    tag: str
    value: str

    def held_values(self, labels: Labels) -> set[str]:
        """The values that are held out: one."""
        values = _tag(labels, self.tag)
        if self.value not in values:
            raise RecipeError(
                f"--held: no prompt of the label set has {self.tag}={self.value}{nearest(self.value, set(values))}"
            )
        return {self.value}

    def held(self, labels: Labels) -> list[bool]:
        """For each prompt whether it is held out."""
        chosen = self.held_values(labels)
        return [value in chosen for value in _tag(labels, self.tag)]


Split = HeldShare | HeldValue
"""Which prompts of a label set are held out; `rows_of` says which those are."""


def rows_of(split: Split, labels: Labels) -> tuple[list[int], list[int]]:
    """The rows that a split trains on, and those that it holds out.

    Raises:
        RecipeError: the label set has no such tag or value.
    """
    held = split.held(labels)
    rows = range(len(held))
    return [row for row in rows if not held[row]], [row for row in rows if held[row]]


def _tag(labels: Labels, name: str) -> Sequence[str]:
    if name not in labels.tags:
        known = ", ".join(sorted(labels.tags)) or "none"
        raise RecipeError(
            f"--held or --split-by: the label set has no tag {name!r}{nearest(name, labels.tags)} (it has: {known})"
        )
    return labels.tags[name]


@dataclass(frozen=True)
class RankNormaliser:
    """Where scores stand among those of a label set: what a predicted quality of 0.7 means.

    Args:
        scores: `(n, S)`, the label set's, ascending in each seed.
        mean_ranks: `(n,)` float64, its ranks averaged over seeds, ascending.
    """

    scores: Tensor
    mean_ranks: Tensor

    @classmethod
    def of(cls, labels: Labels) -> Self:
        """That of a label set."""
        ranks = torch.stack([average_ranks(seed) for seed in labels.scores.T]).mean(0)
        return cls(labels.scores.sort(0).values, ranks.sort().values)

    def __call__(self, scores: Tensor) -> Tensor:
        """The qualities `(m,)`, 0 to 1, of raw scores `(m, S)`; the labels' own scores give the targets."""
        seeds = zip(self.scores.T, scores.T, strict=True)
        ranks = torch.stack([_rank_among(known.contiguous(), one) for known, one in seeds]).mean(0)
        last = max(len(self.mean_ranks) - 1, 1)
        return (_rank_among(self.mean_ranks, ranks) / last).clamp(0, 1).float()


def _rank_among(known: Tensor, values: Tensor) -> Tensor:
    """The average rank of values among ascending ones, as if each were one of them."""
    values = values.contiguous()
    below, up_to = torch.searchsorted(known, values), torch.searchsorted(known, values, right=True)
    return (below + up_to - 1).double() / 2


class TrainedT2QConfig(StrictModel):
    """What a T2Q was trained for, and on.

    Args:
        embedding_dim: D, the length of z.
        pooling: how z comes from the text encoder's states.
        hidden: width of its inner layers.
        labels: the facts of the label set: metric, sampling.
        labels_digest: SHA-256 of the label set's file.
        split: which of its prompts were held out.
        held: the values of the split's tag that were, sorted; empty where the label set had no tags.
        held_prompts: `prompt_digest` of each prompt that was.
        training: the settings.
    """

    format: Literal["qlip-plugins t2q"] = FORMAT
    version: Literal[2] = 2
    embedding_dim: int = Field(ge=1)
    pooling: Pooling
    hidden: int = Field(ge=1)
    labels: dict[str, Any]
    labels_digest: str
    split: Split
    held: tuple[str, ...] = Field(strict=False)
    held_prompts: tuple[str, ...] = Field(strict=False)
    training: dict[str, Any]


@dataclass(frozen=True)
class TrainedT2Q:
    """A T2Q with its description, a folder on disk.

    Args:
        config: the description.
        t2q: the network, on the CPU.
        normaliser: what its numbers mean.
    """

    config: TrainedT2QConfig
    t2q: T2Q
    normaliser: RankNormaliser

    def digest(self) -> str:
        """SHA-256 of description and weights."""
        found = hashlib.sha256(self.config.model_dump_json().encode())
        for name, tensor in self._tensors().items():
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"t2q.{name}": tensor.detach() for name, tensor in self.t2q.state_dict().items()}
        known = {"scores": self.normaliser.scores, "mean_ranks": self.normaliser.mean_ranks}
        return {**weights, **{f"normaliser.{name}": tensor for name, tensor in known.items()}}

    def save_pretrained(self, folder: str | Path, report: Mapping[str, Any]) -> None:
        """Write `config.json`, `model.safetensors` and `report.json`, all or none.

        Raises:
            ArtefactError: a parameter is NaN or infinite, or the folder holds something else.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        check_finite(Path(folder), tensors)
        with folder_written_whole(Path(folder), FORMAT, CONFIG_NAME, *OWNED) as temporary:
            described = self.config.model_dump_json(indent=2)
            (temporary / CONFIG_NAME).write_text(described + "\n", encoding="utf-8")
            (temporary / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, temporary / WEIGHTS_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            ArtefactError: missing, damaged, no T2Q, or newer than this package.
        """
        folder = Path(folder)
        config = read_config(folder / CONFIG_NAME, TrainedT2QConfig, "T2Q")
        path = folder / WEIGHTS_NAME
        # Loading must not move the random numbers that pictures are drawn with.
        with torch.random.fork_rng(devices=[]):
            t2q = T2Q(config.embedding_dim, config.hidden)
        try:
            tensors: dict[str, Tensor] = load_file(path)
            t2q.load_state_dict(
                {
                    name.removeprefix("t2q."): tensor
                    for name, tensor in tensors.items()
                    if name.startswith("t2q.")
                }
            )
            normaliser = RankNormaliser(tensors["normaliser.scores"], tensors["normaliser.mean_ranks"])
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path}: missing or damaged: {error}") from None
        except (RuntimeError, KeyError) as error:
            raise ArtefactError(f"{path}: does not fit {CONFIG_NAME}: {error}") from None
        check_finite(path, tensors)
        return cls(config, t2q.eval(), normaliser)


def without_held(config: TrainedT2QConfig, prompts: PromptSet, path: Path) -> tuple[PromptSet, list[str]]:
    """Prompts that a user names, without those that a T2Q is to be judged on.

    Args:
        config: of the T2Q.
        prompts: of the file.
        path: of the file, for messages.

    Returns:
        The prompts that are left, and remarks.

    Raises:
        RecipeError: none is left.
    """
    texts, tag = set(config.held_prompts), config.split.tag
    values = prompts.tags.get(tag)
    held = [
        prompt_digest(prompt) in texts or (values is not None and values[row] in config.held)
        for row, prompt in enumerate(prompts.prompts)
    ]
    left = [row for row, out in enumerate(held) if not out]
    if not left:
        raise RecipeError(
            f"{path}: T2Q held out all of its {len(held)} prompts, to be judged on: give others"
        )
    remarks = []
    if len(left) < len(held):
        remarks.append(
            f"{len(held) - len(left)} of {len(held)} prompts of {path} were left out: T2Q held them out"
        )
    if values is None and config.held:
        remarks.append(
            f"{path} has no tag {tag!r}: other captions of what T2Q held out cannot be told from the rest"
        )
    return prompts.only(left), remarks


def prompt_digest(prompt: str) -> str:
    """What stands for a held-out prompt in a T2Q's folder, and for what CLIP's tokenizer makes the same of."""
    return hashlib.sha256(" ".join(prompt.lower().split()).encode()).hexdigest()[:16]
