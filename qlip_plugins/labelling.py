"""Making labels: what `qlip-plugins label` does, and the call beneath it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import load_quality_metric
from .artefacts import read_tensors, write_tensors
from .embeddings import EncodedPrompts, Pooling, encode
from .errors import ArtefactError, IncompatibleModelError, RecipeError
from .generation import Settings, load_pipeline, noise_seeds, placed, sample_encoded
from .labels import Labels
from .processes import Processes, launched
from .progress import counted
from .prompts import PromptSet
from .quality import Quality, open_quality
from .quality_metrics import metric_config
from .recipe import Recipe
from .work import WorkFolder, identity_of

WORK = "label set"
VERSION = 1


@dataclass(frozen=True)
class LabelRequest:
    """What labels are to be made.

    Args:
        recipe: names the pipeline, which runs in full precision; its base and controller are not used.
        prompts: distinct ones, with tags.
        metric: name of a quality metric.
        options: of the metric, by name.
        settings: how to sample.
        out: file to write.
        work: folder for what is finished.
        seeds: pictures of each prompt.
        batch: pictures at a time.
        pooling: how z comes from the text encoder's states; None: `mean` for a table of embeddings, else `eos`.
        allow_within_prompt: take a metric whose scores of different prompts cannot be compared.
    """

    recipe: Recipe
    prompts: PromptSet
    metric: str
    options: Mapping[str, Any]
    settings: Settings
    out: Path
    work: Path
    seeds: int = 2
    batch: int = 16
    pooling: Pooling | None = None
    allow_within_prompt: bool = False


def label(what: LabelRequest, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Make labels and write them; can be interrupted and resumed, and shared by launched processes.

    Args:
        what: to make.
        say: called with remarks.

    Returns:
        Facts for people; None in a process other than the main one.

    Raises:
        QlipError: any; what can be known beforehand is checked before the work.
    """
    _check(what)
    with launched(what.settings.device) as processes:
        pipe = _pipeline(what, processes.device)
        table = what.recipe.model.prompt_embeddings
        prompts = encode(pipe, table, what.prompts.prompts, what.pooling)
        score = open_quality(what.metric, what.options, pipe, what.prompts, processes.device)
        labelling = Labelling(pipe, prompts, score, what.settings.unnumbered(), what.seeds, what.batch)
        folder = _work_folder(what, labelling, processes)
        _share(labelling, folder, processes, say)
        if not processes.main:
            return None
        made = labelling.labels(what.prompts.tags, folder)
        made.save(what.out)
        folder.remove()
    return {
        "file": str(what.out),
        "prompts": len(made.prompts),
        "seeds": what.seeds,
        "metric": what.metric,
        "reliability": made.reliability(),
    }


def _check(what: LabelRequest) -> None:
    if what.out.suffix != ".safetensors" or what.out.is_dir():
        raise RecipeError(f"--out {what.out}: a label set is a .safetensors file")
    if what.seeds < 1 or what.batch < 1:
        raise RecipeError(
            f"--seeds {what.seeds}, --batch-size {what.batch}: expected at least one picture of each"
        )
    metric_config(what.metric, what.options)
    if load_quality_metric(what.metric).scope == "within_prompt" and not what.allow_within_prompt:
        raise RecipeError(
            f"--metric {what.metric}: compares pictures of one prompt (scope within_prompt), and T2Q learns which "
            "prompts have better pictures: it would learn which texts score high whatever is drawn. Take a metric "
            "across prompts, such as knn-giqa, or give --allow-within-prompt"
        )
    if what.recipe.model.prompt_embeddings is not None and what.pooling == "eos":
        raise RecipeError("--pooling eos: a table of prompt embeddings holds no pooled state; leave it out")


def _pipeline(what: LabelRequest, device: str) -> Any:
    pipe = load_pipeline(what.recipe)
    if getattr(pipe, "vae", None) is None:
        raise IncompatibleModelError(
            f"{what.recipe.model.pipeline}: {type(pipe).__name__} has no decoder, and a metric judges pictures"
        )
    return placed(pipe, replace(what.settings, device=device))


def _work_folder(what: LabelRequest, labelling: Labelling, processes: Processes) -> WorkFolder:
    tags = json.dumps({name: list(values) for name, values in what.prompts.tags.items()}, sort_keys=True)
    identity = {
        **identity_of(labelling.pipe, what.recipe.model, what.prompts.prompts),
        "tags": hashlib.sha256(tags.encode()).hexdigest(),
        "pooling": labelling.prompts.pooling,
        **{f"metric.{name}": value for name, value in labelling.score.facts.items()},
        "settings": asdict(labelling.settings),
        "seeds": what.seeds,
        "batch": what.batch,
    }
    if not processes.main:
        processes.wait()  # for the main process to have made the folder
    folder = WorkFolder(what.work, WORK, VERSION, identity)
    if processes.main:
        processes.wait()
    return folder


def _share(
    labelling: Labelling, folder: WorkFolder, processes: Processes, say: Callable[[str], None]
) -> None:
    """Judge this process's share of what is not finished; returns when all processes have."""
    parts = labelling.parts
    open_parts = [part for part in parts if not folder.file(part.name).exists()]
    processes.wait()  # all must see the same parts as unfinished
    if processes.main:
        say(
            f"{len(labelling.prompts.prompts)} prompts, {labelling.seeds} pictures each, in {len(parts)} batches"
            + (
                f"; {len(parts) - len(open_parts)} were finished before"
                if len(open_parts) < len(parts)
                else ""
            )
            + (f"; {processes.count} processes" if processes.count > 1 else "")
        )
    mine = open_parts[processes.index :: processes.count]
    with counted(len(mine) if processes.main else 0, "making labels") as done:
        for part in mine:
            _keep(folder.file(part.name), labelling.judge(part))
            done(part.name)
    processes.wait()


def _keep(path: Path, scores: Tensor) -> None:
    write_tensors(path, WORK, VERSION, {"scores": scores})


def _kept(path: Path, length: int) -> Tensor:
    tensors, _ = read_tensors(path, WORK, VERSION)
    scores = tensors.get("scores", torch.empty(0))
    if scores.shape != (length,):
        raise ArtefactError(f"{path}: scores of shape {tuple(scores.shape)}, expected {length}; remove it")
    return scores


@dataclass(frozen=True)
class Part:
    """A batch: one picture of each of some prompts.

    Args:
        seed: which picture of each prompt, from 0.
        rows: of the prompts.
    """

    seed: int
    rows: range

    @property
    def name(self) -> str:
        """Of its file."""
        return f"scores-{self.seed:03d}-{self.rows.start:06d}.safetensors"


@dataclass(frozen=True)
class Labelling:
    """Generates pictures of prompts in full precision, and judges them, batch by batch.

    Args:
        pipe: the float pipeline, on its device.
        prompts: n distinct ones.
        score: judges images.
        settings: how to sample.
        seeds: pictures of each prompt.
        batch: pictures at a time; with the prompts it fixes the batches, whoever computes which of them.
    """

    pipe: Any
    prompts: EncodedPrompts
    score: Quality
    settings: Settings
    seeds: int
    batch: int

    def __post_init__(self) -> None:
        if getattr(self.pipe, "safety_checker", None) is not None:
            raise IncompatibleModelError(
                f"{type(self.pipe).__name__} has a safety checker, which replaces some pictures by black ones: their "
                "labels would be wrong. Load it with safety_checker=None"
            )
        n = len(self.prompts.prompts)
        if len(set(self.prompts.prompts)) < n or self.seeds < 1 or self.batch < 1:
            raise ValueError(
                f"need distinct prompts, at least one seed and a batch of one, found {n} prompts, {self.seeds} seeds "
                f"and {self.batch} a batch"
            )

    @property
    def parts(self) -> list[Part]:
        """All batches: seed by seed, in the order of the prompts."""
        n = len(self.prompts.prompts)
        starts = range(0, n, self.batch)
        return [
            Part(seed, range(start, min(start + self.batch, n)))
            for seed in range(self.seeds)
            for start in starts
        ]

    def judge(self, part: Part) -> Tensor:
        """The scores of a batch, `(rows,)`, float32, on the CPU.

        Raises:
            ValueError: the score gives another number of values than pictures.
            IncompatibleModelError: a picture or its score is NaN or infinite.
        """
        prompts = self.prompts.only(part.rows)
        # As if each prompt had been drawn before, once for each earlier seed.
        noises = noise_seeds(prompts.prompts * (part.seed + 1), self.settings.seed)[-len(part.rows) :]
        images = _pictures(self.pipe, prompts, self.settings, noises)
        self._check_finite(images, prompts, "picture")
        values = self.score(images, prompts.prompts)
        if values.shape != (len(part.rows),):
            raise ValueError(f"the score gives shape {tuple(values.shape)} for {len(part.rows)} pictures")
        self._check_finite(values, prompts, "score")
        return values.detach().float().cpu()

    def _check_finite(self, found: Tensor, prompts: EncodedPrompts, what: str) -> None:
        good = found.isfinite().flatten(1).all(1) if found.ndim > 1 else found.isfinite()
        if not bool(good.all()):
            prompt = prompts.prompts[int((~good).nonzero()[0])]
            raise IncompatibleModelError(
                f"the {what} of {prompt!r} is NaN or infinite: no label can be made of it"
            )

    def labels(self, tags: Mapping[str, Sequence[str]], folder: WorkFolder | None = None) -> Labels:
        """The label set.

        Args:
            tags: name -> n strings.
            folder: holds the scores of finished batches; what it lacks is judged now.

        Raises:
            ValueError: as of `Labels` and `judge`.
            ArtefactError: a file in the folder is damaged.
        """
        found, parts = [], self.parts
        missing = sum(folder is None or not folder.file(part.name).exists() for part in parts)
        with counted(missing, "making labels") as done:
            for part in parts:
                if folder is not None and folder.file(part.name).exists():
                    found.append(_kept(folder.file(part.name), len(part.rows)))
                else:
                    found.append(self.judge(part))
                    done(part.name)
        return Labels(
            prompts=self.prompts.prompts,
            embeddings=self.prompts.embeddings,
            scores=torch.cat(found).reshape(self.seeds, len(self.prompts.prompts)).T.contiguous(),
            facts={
                **self.score.facts,
                "pooling": self.prompts.pooling,
                "seeds": self.seeds,
                "batch": self.batch,
                "pictures": asdict(self.settings),
            },
            tags={name: tuple(values) for name, values in tags.items()},
        )


def make_labels(
    pipe: Any,
    prompts: EncodedPrompts,
    score: Quality,
    settings: Settings,
    seeds: int = 2,
    tags: Mapping[str, Sequence[str]] | None = None,
    batch: int = 16,
) -> Labels:
    """Generate pictures of each prompt in full precision, and judge them.

    Seed s of a prompt has the noise that `qlip-plugins generate` gives its picture where the prompt is
    named for the (s + 1)-th time.

    Args:
        pipe: the float pipeline, without a recipe and without a safety checker, which would blacken
            pictures; it is moved to the device and type of `settings`.
        prompts: n distinct prompts.
        score: judges images; where the pipeline has no decoder it is given latents `(N, C, h, w)`.
        settings: as for `generate`.
        seeds: pictures of each prompt; two or more make the labels' reliability known.
        tags: name -> n strings.
        batch: pictures generated at once.

    Raises:
        ValueError: as of `Labels` and `Labelling`.
        IncompatibleModelError: the pipeline has a safety checker.
    """
    labelling = Labelling(pipe, prompts, score, settings, seeds, batch)
    placed(pipe, settings)
    return labelling.labels(tags or {})


def _pictures(pipe: Any, prompts: EncodedPrompts, settings: Settings, noises: Sequence[int]) -> Tensor:
    output_type = "latent" if getattr(pipe, "vae", None) is None else "pt"
    images: Tensor = sample_encoded(pipe, prompts, settings, noises, output_type)
    return images
