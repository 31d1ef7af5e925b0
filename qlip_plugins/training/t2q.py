"""Training of T2Q on labels."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..labels import Labels, pearson, spearman
from ..progress import progress
from ..t2q import T2Q
from ..work import WorkFolder
from .snapshot import (
    load_state,
    named,
    optimiser_tensors,
    restore_optimiser,
    restoring,
    save_state,
    seeded,
    without,
)

_BATCH = 128
_STOPPING_SHARE = 0.2
_STEPS_BETWEEN_LOOKS = 20
_STEPS_BETWEEN_SAVES = 100


@dataclass(frozen=True)
class T2QTraining:
    """How T2Q is trained.

    Args:
        hidden: width of the inner layers.
        steps: optimiser steps at most.
        lr: learning rate.
        weight_decay: of AdamW, on weights and biases.
        dropout: share of each inner layer's activations that a step leaves out.
        seed: of the split, the first parameters, the batches and the dropout.
    """

    hidden: int = 256
    steps: int = 1000
    lr: float = 3e-4
    weight_decay: float = 0.1
    dropout: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"a dropout of {self.dropout}, expected 0 or more, and less than 1")
        if min(self.hidden, self.steps) < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(f"need hidden and steps >= 1, lr > 0 and weight_decay >= 0, found {self}")


def train_t2q(
    labels: Labels,
    train_rows: Sequence[int],
    held_rows: Sequence[int],
    training: T2QTraining,
    stop_by: str = "concept",
    device: str = "cpu",
    work: WorkFolder | None = None,
) -> tuple[T2Q, dict[str, Any]]:
    """Learn the rank-normalised quality of a prompt's pictures from its embedding.

    Mean squared error, AdamW, batches of 128, dropout after each activation. A fifth of the training
    prompts, whole values of a tag, only tells when to stop: the parameters with the least error on them are
    kept. Embeddings are standardised by the mean and deviation of the rows that are fitted, which ends up
    inside the first layer. The same seed gives the same result on the same machine.

    Args:
        labels: the label set.
        train_rows: prompts to learn from, those for stopping included.
        held_rows: prompts that the result is judged on, and that nothing else looks at.
        training: how to train.
        stop_by: the tag whose values are not torn apart to stop by; prompts, where the labels lack it.
        device: where to train.
        work: keeps the state every 100 steps; a training that was interrupted goes on from there, and ends
            with the same parameters.

    Returns:
        T2Q on the CPU, and plain data on how good it is: rank and linear correlation (`srocc`, `plcc`)
        on fitted, stopping and held rows; the same of trivial predictors; and what bounds them
        (`sqrt_rho` for the label of one picture, `ceiling` for the mean over seeds that is learnt).

    Raises:
        ValueError: a row is both trained and held, or either set is too small.
        ArtefactError: the state in `work` is damaged.
    """
    if set(train_rows) & set(held_rows):
        raise ValueError("a row is both in train_rows and held_rows")
    fit_rows, stop_rows = _split_to_stop(labels, train_rows, stop_by, training.seed)
    if min(len(fit_rows), len(stop_rows), len(held_rows)) < 2:
        raise ValueError(
            f"{len(fit_rows)} rows to fit, {len(stop_rows)} to stop by and {len(held_rows)} held, need at least 2 of "
            "each: more prompts, or more concepts"
        )
    mean, deviation = _standardisation(labels.embeddings[fit_rows])
    z = ((labels.embeddings - mean) / deviation).to(device)
    targets = labels.targets.to(device)
    with seeded(training.seed):
        t2q = T2Q(z.shape[1], training.hidden)
        _centre(t2q, float(labels.targets[fit_rows].mean()))
        fit = _Fit(
            t2q.to(device),
            (z, targets),
            (fit_rows, stop_rows),
            torch.optim.AdamW(t2q.parameters(), lr=training.lr, weight_decay=training.weight_decay),
            training.dropout,
        )
        fit.run(training.steps, work)
    t2q = fold_standardisation(t2q.cpu(), mean, deviation).eval()
    rows = {"fit": fit_rows, "stopping": stop_rows, "held": list(held_rows)}
    facts = {
        "settings": {**asdict(training), "stop_by": stop_by},
        "best_step": fit.best_step,
        **_judge(t2q, labels, rows),
    }
    return t2q, facts


def fold_standardisation(t2q: T2Q, mean: Tensor, deviation: Tensor) -> T2Q:
    """A T2Q that takes z where `t2q` takes (z - mean) / deviation; the same function, up to rounding.

    Args:
        t2q: of embeddings of length D.
        mean: `(D,)`.
        deviation: `(D,)`, positive.
    """
    folded = copy.deepcopy(t2q)
    first: Any = folded.layers[0]
    with torch.no_grad():
        weight = first.weight.double() / deviation.double()
        first.bias.copy_(first.bias.double() - weight @ mean.double())
        first.weight.copy_(weight)
    return folded


def _split_to_stop(
    labels: Labels, rows: Sequence[int], stop_by: str, seed: int
) -> tuple[list[int], list[int]]:
    """Rows to fit and rows to stop by; prompts of one value are too alike to stand on both sides."""
    value = labels.tags.get(stop_by, labels.prompts)
    values = sorted({value[row] for row in rows})
    random.Random(seed).shuffle(values)
    stopping = set(values[: round(len(values) * _STOPPING_SHARE)])
    fit = [row for row in rows if value[row] not in stopping]
    return fit, [row for row in rows if value[row] in stopping]


def _standardisation(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = embeddings.mean(0), embeddings.std(0)
    # An entry that never varies says nothing: it is left at its scale.
    return mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def _centre(t2q: T2Q, target: float) -> None:
    """Start from the mean label, so that the first steps learn what differs between prompts."""
    last: Any = t2q.layers[-1]
    nn.init.constant_(last.bias, target)


@dataclass
class _Fit:
    """A T2Q in training; it keeps the parameters of the step with the least error on the stopping rows.

    Args:
        t2q: changed in place.
        data: z `(n, D)` and targets `(n,)`.
        rows: to fit, and to stop by.
        optimiser: of its parameters.
        dropout: share left out.
        step: the next one.
    """

    t2q: T2Q
    data: tuple[Tensor, Tensor]
    rows: tuple[list[int], list[int]]
    optimiser: torch.optim.Optimizer
    dropout: float
    step: int = 0
    best_error: float | None = None
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def run(self, steps: int, work: WorkFolder | None) -> None:
        """Train up to a step, from where the work folder left off, and put the best parameters in place."""
        self._restore(work)
        begun = self.step
        for step in progress(range(begun, steps + 1), "training T2Q"):
            self.step = step
            if work is not None and step > begun and step % _STEPS_BETWEEN_SAVES == 0:
                self._save(work)
            if step % _STEPS_BETWEEN_LOOKS == 0 or step == steps:
                self._look()
            self._learn()
        self.t2q.load_state_dict(self.best)

    def _look(self) -> None:
        z, targets = self.data
        stop_rows = self.rows[1]
        with torch.no_grad():
            error = float(F.mse_loss(self.t2q(z[stop_rows]), targets[stop_rows]))
        if self.best_error is None or error < self.best_error:
            self.best_error, self.best_step = error, self.step
            self.best = copy.deepcopy(self.t2q.state_dict())

    def _learn(self) -> None:
        z, targets = self.data
        rows = torch.tensor(self.rows[0])
        picked = rows[torch.randint(len(rows), (min(_BATCH, len(rows)),))].to(z.device)
        loss = F.mse_loss(_with_dropout(self.t2q, z[picked], self.dropout), targets[picked])
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def _save(self, work: WorkFolder) -> None:
        tensors = {
            **named("parameter", self.t2q.state_dict()),
            **named("best", self.best),
            **named("optimiser", optimiser_tensors(self.optimiser)),
            "generator": torch.get_rng_state(),
        }
        save_state(work, tensors, step=self.step, best_error=self.best_error, best_step=self.best_step)

    def _restore(self, work: WorkFolder | None) -> None:
        found = load_state(work)
        if work is None or found is None:
            return
        tensors, facts = found
        with restoring(work):
            self.t2q.load_state_dict(without("parameter", tensors))
            self.best = without("best", tensors)
            restore_optimiser(self.optimiser, without("optimiser", tensors))
            torch.set_rng_state(tensors["generator"])
            self.step = int(facts["step"])
            self.best_error, self.best_step = float(facts["best_error"]), int(facts["best_step"])


def _with_dropout(t2q: T2Q, z: Tensor, share: float) -> Tensor:
    for layer in t2q.layers:
        z = layer(z)
        if isinstance(layer, nn.GELU):
            # Drawn on the CPU, so that every device leaves out the same.
            z = z * (torch.rand(z.shape) >= share).to(z) / (1 - share)
    return z.squeeze(-1)


@torch.no_grad()
def _judge(t2q: T2Q, labels: Labels, rows: Mapping[str, list[int]]) -> dict[str, Any]:
    predicted, held = t2q(labels.embeddings), rows["held"]
    known = [*rows["fit"], *rows["stopping"]]
    trivial = {"words": torch.tensor([float(len(prompt.split())) for prompt in labels.prompts])}
    trivial |= {
        f"mean by {name}": _mean_by(values, labels.targets, known) for name, values in labels.tags.items()
    }
    rho = labels.reliability(held)
    return {
        "rows": {name: len(picked) for name, picked in rows.items()},
        **{
            name: {
                **_agreement(predicted, labels.targets, picked),
                "rmse": float((predicted - labels.targets)[picked].double().square().mean().sqrt()),
            }
            for name, picked in rows.items()
        },
        "trivial": {name: _agreement(guess, labels.targets, held) for name, guess in trivial.items()},
        "rho": labels.reliability(),
        "held_rho": rho,
        "sqrt_rho": None if rho is None else max(rho, 0.0) ** 0.5,
        "ceiling": None if rho is None else _ceiling(max(rho, 0.0), labels.scores.shape[1]),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people."""

    def number(value: float | None) -> str:
        return "   -" if value is None else f"{value:.3f}"

    rows = report["rows"]
    lines = ["prompts   | number | SROCC | PLCC"]
    lines += [
        f"{name:9} | {rows[name]:6} | {number(report[name]['srocc'])} | {number(report[name]['plcc'])}"
        for name in rows
    ]
    lines.append(
        f"held: rho {number(report['held_rho'])}, sqrt(rho) {number(report['sqrt_rho'])}, ceiling "
        f"{number(report['ceiling'])}"
    )
    reached, bound = report["held"]["srocc"], report["sqrt_rho"]
    if reached is not None and bound:
        lines.append(f"held: SROCC over sqrt(rho) {reached / bound:.3f}")
    lines.append("trivial predictors, held prompts: SROCC, PLCC")
    lines += [
        f"  {name}: {number(found['srocc'])}, {number(found['plcc'])}"
        for name, found in report["trivial"].items()
    ]
    return "\n".join(lines)


def _ceiling(rho: float, seeds: int) -> float:
    """The correlation that a perfect predictor has with the mean over seeds (Spearman-Brown)."""
    return float((seeds * rho / (1 + (seeds - 1) * rho)) ** 0.5)


def _mean_by(values: Sequence[str], targets: Tensor, known: list[int]) -> Tensor:
    """For each prompt the mean target of the known prompts with its value; of all, where there is none."""
    groups: dict[str, list[int]] = {}
    for row in known:
        groups.setdefault(values[row], []).append(row)
    return torch.stack([targets[groups.get(value, known)].mean() for value in values])


def _agreement(predicted: Tensor, targets: Tensor, rows: list[int]) -> dict[str, float | None]:
    """Rank and linear correlation; None where the prediction, or the target, is constant."""
    a, b = predicted[rows], targets[rows]
    found = {"srocc": spearman(a, b), "plcc": pearson(a, b)}
    return {name: None if math.isnan(value) else value for name, value in found.items()}
