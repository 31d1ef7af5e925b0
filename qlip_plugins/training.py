"""Training of the controller: T2Q on labels, then Q2B on a quantized model's own trajectories (docs/method.md)."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import ActQuantizer, load_backend
from .controller import PromptPlanner, check_ranges, check_something_to_control, load_base, load_ranges
from .embeddings import EncodedPrompts, MeanOfStates
from .errors import IncompatibleModelError
from .generation import Settings, placed
from .labels import Labels, pearson, spearman
from .layers import controlled
from .progress import progress
from .q2b import choose
from .recipe import Recipe
from .t2q import T2Q
from .text_to_bits import TextToBits, TextToBitsConfig

_T2Q_BATCH = 128
_STOPPING_SHARE = 0.2
_STEPS_BETWEEN_LOOKS = 20


def train_t2q(
    labels: Labels,
    train_rows: Sequence[int],
    held_rows: Sequence[int],
    hidden: int = 256,
    steps: int = 1000,
    lr: float = 3e-4,
    weight_decay: float = 0.1,
    dropout: float = 0.5,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[T2Q, dict[str, Any]]:
    """Learn the rank-normalised quality of a prompt's pictures from its embedding.

    Mean squared error, AdamW, batches of 128, dropout after each activation. A fifth of the training
    concepts (tag `concept`; without it, of the training prompts) only tells when to stop: the parameters
    with the least error on them are kept. Embeddings are standardised by the mean and deviation of the
    rows that are fitted, which ends up inside the first layer. The same seed gives the same result on
    the same machine.

    Args:
        labels: the label set.
        train_rows: prompts to learn from, those for stopping included.
        held_rows: prompts that the result is judged on, and that nothing else looks at.
        hidden: width of the inner layers.
        steps: optimiser steps at most.
        lr: learning rate.
        weight_decay: of AdamW, on weights and biases.
        dropout: share of each inner layer's activations that a step leaves out.
        seed: of the split, the first parameters, the batches and the dropout.
        device: where to train.

    Returns:
        T2Q on the CPU, and plain data on how good it is: rank and linear correlation (`srocc`, `plcc`)
        on fitted, stopping and held rows; the same of trivial predictors; and what bounds them
        (`sqrt_rho` for the label of one picture, `ceiling` for the mean over seeds that is learnt).

    Raises:
        ValueError: a row is both trained and held, either set is too small, or the dropout is not below 1.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"a dropout of {dropout}, expected 0 or more, and less than 1")
    if set(train_rows) & set(held_rows):
        raise ValueError("a row is both in train_rows and held_rows")
    fit_rows, stop_rows = _split_by_concept(labels, train_rows, seed)
    if min(len(fit_rows), len(stop_rows), len(held_rows)) < 2:
        raise ValueError(
            f"{len(fit_rows)} rows to fit, {len(stop_rows)} to stop by and {len(held_rows)} held, need at least 2 of "
            "each: more prompts, or more concepts"
        )
    mean, deviation = _standardisation(labels.embeddings[fit_rows])
    z = ((labels.embeddings - mean) / deviation).to(device)
    targets = labels.targets.to(device)
    with _seeded(seed):
        t2q = T2Q(z.shape[1], hidden)
        _centre(t2q, float(labels.targets[fit_rows].mean()))
        best_step = _fit(t2q.to(device), z, targets, fit_rows, stop_rows, steps, lr, weight_decay, dropout)
    t2q = fold_standardisation(t2q.cpu(), mean, deviation).eval()
    settings = {"hidden": hidden, "steps": steps, "lr": lr, "weight_decay": weight_decay}
    rows = {"fit": fit_rows, "stopping": stop_rows, "held": list(held_rows)}
    facts = {
        "settings": {**settings, "dropout": dropout, "seed": seed},
        "best_step": best_step,
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


def _split_by_concept(labels: Labels, rows: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Rows to fit and rows to stop by; captions of one concept are too alike to stand on both sides."""
    concept = labels.tags.get("concept", labels.prompts)
    concepts = sorted({concept[row] for row in rows})
    random.Random(seed).shuffle(concepts)
    stopping = set(concepts[: round(len(concepts) * _STOPPING_SHARE)])
    fit = [row for row in rows if concept[row] not in stopping]
    return fit, [row for row in rows if concept[row] in stopping]


def _standardisation(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = embeddings.mean(0), embeddings.std(0)
    # An entry that never varies says nothing: it is left at its scale.
    return mean, torch.where(deviation > 0, deviation, torch.ones_like(deviation))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU's generator, started from `seed`; others' draws go on afterwards as if nothing was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _centre(t2q: T2Q, target: float) -> None:
    """Start from the mean label, so that the first steps learn what differs between prompts."""
    last: Any = t2q.layers[-1]
    nn.init.constant_(last.bias, target)


def _fit(
    t2q: T2Q,
    z: Tensor,
    targets: Tensor,
    fit_rows: list[int],
    stop_rows: list[int],
    steps: int,
    lr: float,
    weight_decay: float,
    dropout: float,
) -> int:
    """Train in place, and leave the parameters of the step with the least error on `stop_rows`; that step."""
    optimiser = torch.optim.AdamW(t2q.parameters(), lr=lr, weight_decay=weight_decay)
    best, best_step, parameters = float("inf"), 0, copy.deepcopy(t2q.state_dict())
    rows = torch.tensor(fit_rows)
    for step in progress(range(steps + 1), "training T2Q"):
        if step % _STEPS_BETWEEN_LOOKS == 0 or step == steps:
            with torch.no_grad():
                error = float(F.mse_loss(t2q(z[stop_rows]), targets[stop_rows]))
            if error < best:
                best, best_step, parameters = error, step, copy.deepcopy(t2q.state_dict())
        picked = rows[torch.randint(len(rows), (min(_T2Q_BATCH, len(rows)),))].to(z.device)
        loss = F.mse_loss(_with_dropout(t2q, z[picked], dropout), targets[picked])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    t2q.load_state_dict(parameters)
    return best_step


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
        **{name: _agreement(predicted, labels.targets, picked) for name, picked in rows.items()},
        "trivial": {name: _agreement(guess, labels.targets, held) for name, guess in trivial.items()},
        "rho": labels.reliability(),
        "held_rho": rho,
        "sqrt_rho": None if rho is None else max(rho, 0.0) ** 0.5,
        "ceiling": None if rho is None else _ceiling(max(rho, 0.0), labels.scores.shape[1]),
    }


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


@dataclass(frozen=True)
class Q2BTraining:
    """How Q2B is trained.

    Args:
        bit_weight: lambda, the relative squared error of a prediction that one bit of mean width is worth.
        trajectories: whole samplings to train on, an optimiser step after each.
        batch: prompts of each.
        lr: learning rate of Adam; no parameter moves by much more in one step.
    """

    bit_weight: float
    trajectories: int = 100
    batch: int = 8
    lr: float = 0.05

    def __post_init__(self) -> None:
        if self.bit_weight < 0 or min(self.trajectories, self.batch) < 1 or self.lr <= 0:
            raise ValueError(f"need bit_weight >= 0, counts >= 1 and lr > 0, found {self}")


@dataclass(frozen=True)
class Q2BRecord:
    """What one trajectory of the training showed.

    Args:
        trajectory: its number.
        mse: squared error over the teacher's energy, mean over calls and prompts.
        fab: FAB of its prompts' plans as they were before it.
        loss: mean over calls.
    """

    trajectory: int
    mse: float
    fab: float
    loss: float


def train_controller(
    pipe: Any,
    recipe: Recipe,
    t2q: T2Q,
    prompts: EncodedPrompts,
    settings: Settings,
    training: Q2BTraining,
    origin: str,
    group: int = 1,
    early: int = 0,
    initial_slope: float = 4.0,
) -> tuple[TextToBits, list[Q2BRecord]]:
    """Make a controller for a recipe's base: take T2Q as it is, train Q2B.

    Q2B starts at p_m = p_h = 1/2, medium everywhere, with zero offsets. Its slope does not start at 0,
    where no prompt would differ from another and the slope's own gradient would come from chance alone.

    Args:
        pipe: a float Stable Diffusion pipeline without a recipe; it is moved to the device and type of
            `settings`, and is otherwise as it was afterwards. A copy of its UNet is the teacher.
        recipe: its base, backend, widths, ranges and attention are taken, its controller is not.
        t2q: trained, for the embeddings of `prompts`.
        prompts: to train on.
        settings: how the controller's pictures will be sampled; the seed is that of all random draws.
        training: how to train.
        origin: how the controller came to be, in words, stored with it.
        group: M, steps that share one set of parameters.
        early: m, first steps with p_q = 1.
        initial_slope: where every slope starts; more makes prompts differ more.

    Returns:
        The controller, to be saved with `save_pretrained`, and a record for each trajectory.

    Raises:
        ArtefactError: a file that the recipe names is missing or damaged.
        IncompatibleModelError: base, ranges, T2Q, prompts and pipeline do not belong together.
    """
    pipe = placed(pipe, settings)
    state = load_base(recipe, pipe.unet)
    layers = controlled(state.activations, attention=recipe.attention == "controlled")
    check_something_to_control(layers, state)
    first: Any = t2q.layers[0]
    config = TextToBitsConfig(
        embedding_dim=first.in_features,
        pooling=prompts.pooling,
        hidden=first.out_features,
        menu=recipe.activation_bits,
        layers=layers,
        timesteps=schedule(pipe.scheduler, settings.steps),
        group=group,
        early=early,
        base_fingerprint=state.fingerprint,
        origin=origin,
    )
    with _seeded(settings.seed):
        text_to_bits = TextToBits(config)
    text_to_bits.t2q.load_state_dict(t2q.state_dict())
    nn.init.constant_(text_to_bits.q2b.slope, initial_slope)
    ranges = load_ranges(recipe.ranges, state)
    check_ranges(ranges, recipe, state, PromptPlanner(text_to_bits, MeanOfStates()))
    teacher = copy.deepcopy(pipe.unet)
    quantizers = load_backend(recipe.backend).install(pipe.unet, state, ranges)
    try:
        log = train_q2b(pipe, teacher, quantizers, text_to_bits, prompts, settings, training)
    finally:
        quantizers.remove()
    return text_to_bits.eval(), log


def schedule(scheduler: Any, steps: int) -> tuple[float, ...]:
    """The distinct timesteps that a diffusers scheduler visits, in the order of the first visit."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return tuple(dict.fromkeys(float(t) for t in scheduler.timesteps.tolist()))


def train_q2b(
    pipe: Any,
    teacher: nn.Module,
    quantizers: Mapping[str, ActQuantizer],
    text_to_bits: TextToBits,
    prompts: EncodedPrompts,
    settings: Settings,
    training: Q2BTraining,
) -> list[Q2BRecord]:
    """Train the Q2B of a controller in place, from where it stands; nothing else changes.

    For each batch of prompts two samplings start from the same noise: the teacher's, and the quantized
    model's at the widths that Q2B chooses, each following its own predictions. At every call of the
    denoiser the loss is

        |eps - eps_hat|^2 / |eps|^2 + bit_weight * mean_k (b_high p_high + b_medium p_medium),

    mean over prompts, of the prediction that the scheduler is given, after guidance. Widths are chosen
    hard, gradients pass through the probabilities; none passes from one call to the next. After the last
    call Adam takes one step along the mean gradient.

    Args:
        pipe: its UNet carries `quantizers`, and its scheduler is followed.
        teacher: the float UNet, on the same device.
        quantizers: what `Backend.install` returned; they are at their base widths afterwards.
        text_to_bits: T2Q trained, Q2B at its start; on the CPU, before and afterwards.
        prompts: to train on.
        settings: `steps`, `guidance_scale` and `seed` are used; the same seed gives the same result where
            the device computes the same twice, as the CPU does.
        training: how to train.

    Raises:
        IncompatibleModelError: controller, quantizers, prompts and pipeline do not belong together.
    """
    _check_trainable(pipe, quantizers, text_to_bits, prompts, settings)
    trainer = _Q2BTrainer(pipe, teacher, quantizers, text_to_bits, prompts, settings, training)
    try:
        with _frozen(pipe.unet):
            return [
                trainer.trajectory(number)
                for number in progress(range(training.trajectories), "training Q2B")
            ]
    finally:
        for name in text_to_bits.config.layers:
            quantizers[name].set_bits(quantizers[name].base_bits)
        text_to_bits.cpu()


def _check_trainable(
    pipe: Any,
    quantizers: Mapping[str, ActQuantizer],
    text_to_bits: TextToBits,
    prompts: EncodedPrompts,
    settings: Settings,
) -> None:
    config = text_to_bits.config
    absent = [name for name in config.layers if name not in quantizers]
    if absent:
        raise IncompatibleModelError(f"the model has no quantizer {absent[0]!r}, which the controller steers")
    if config.timesteps != schedule(pipe.scheduler, settings.steps):
        raise IncompatibleModelError(
            f"the controller is made for {len(config.timesteps)} timesteps from {config.timesteps[0]:g}, others than "
            f"{type(pipe.scheduler).__name__} visits in {settings.steps} steps"
        )
    if (config.embedding_dim, config.pooling) != (prompts.embeddings.shape[1], prompts.pooling):
        raise IncompatibleModelError(
            f"the controller reads embeddings of length {config.embedding_dim}, pooling {config.pooling!r}; the "
            f"prompts have {prompts.embeddings.shape[1]}, {prompts.pooling!r}"
        )
    if pipe.unet.dtype == torch.float16:
        raise IncompatibleModelError("gradients underflow in float16: train in float32 or bfloat16")
    unet = pipe.unet.config
    if unet.addition_embed_type is not None or unet.time_cond_proj_dim is not None:
        raise IncompatibleModelError(
            f"this {type(pipe.unet).__name__} wants more than text states and a timestep, which training does not give"
        )


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class _Branch:
    """One denoiser on its own trajectory."""

    def __init__(self, pipe: Any, denoiser: Any, settings: Settings, noise: Tensor, seed: int) -> None:
        self._denoiser = denoiser
        self._guidance = settings.guidance_scale
        self.scheduler: Any = copy.deepcopy(pipe.scheduler)
        self.scheduler.set_timesteps(settings.steps, device=noise.device)
        # Samplers that draw noise at every step draw the same one for the teacher and its student.
        generator = torch.Generator("cpu").manual_seed(seed)
        self._options: dict[str, Any] = pipe.prepare_extra_step_kwargs(generator, 0.0)
        self._latents = noise * self.scheduler.init_noise_sigma

    def predict(self, timestep: Tensor, states: Tensor) -> Tensor:
        """The prediction that the scheduler is given, `(N, C, h, w)`; `states` holds [empty, prompt] halves."""
        copies = len(states) // len(self._latents)
        sample = self.scheduler.scale_model_input(torch.cat([self._latents] * copies), timestep)
        predicted: Tensor = self._denoiser(sample, timestep, encoder_hidden_states=states, return_dict=False)[
            0
        ]
        if copies == 1:
            return predicted
        empty, prompt = predicted.chunk(2)
        return empty + self._guidance * (prompt - empty)

    def step(self, prediction: Tensor, timestep: Tensor) -> None:
        """Move on by one call, without gradients."""
        stepped = self.scheduler.step(prediction.detach(), timestep, self._latents, **self._options)
        self._latents = stepped.prev_sample.to(self._latents.dtype)


class _Q2BTrainer:
    def __init__(
        self,
        pipe: Any,
        teacher: nn.Module,
        quantizers: Mapping[str, ActQuantizer],
        text_to_bits: TextToBits,
        prompts: EncodedPrompts,
        settings: Settings,
        training: Q2BTraining,
    ) -> None:
        self.pipe, self.teacher, self.settings, self.training = pipe, teacher, settings, training
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self.config = text_to_bits.config
        self.quantizers = [quantizers[name] for name in self.config.layers]
        self.prompts = prompts
        with torch.no_grad():
            self.quality = text_to_bits.t2q(prompts.embeddings.float()).to(self.device)
        self.q2b = text_to_bits.q2b.to(self.device)
        self.widths = torch.tensor(self.config.menu.widths, device=self.device)
        self.optimiser = torch.optim.Adam(self.q2b.parameters(), lr=training.lr)
        self.generator = torch.Generator("cpu").manual_seed(settings.seed)
        self.batches = _batches(len(prompts.prompts), training.batch, self.generator)

    def trajectory(self, number: int) -> Q2BRecord:
        """Sample one batch with both models and learn along the way."""
        rows = next(self.batches)
        quality, states = self.quality[rows], self._states(rows)
        with torch.no_grad():
            fab = self.widths[choose(self.q2b(quality, self.config.timesteps))].float().mean()
        teacher, student = self._branches(len(rows))
        timesteps = student.scheduler.timesteps
        found = []
        for timestep in timesteps:
            with torch.no_grad():
                target = teacher.predict(timestep, states)
            probabilities = self._choose_widths(quality, float(timestep), len(states) // len(rows))
            predicted = student.predict(timestep, states)
            error = _relative_error(predicted, target)
            loss = error + self.training.bit_weight * self._mean_bits(probabilities)
            (loss / len(timesteps)).backward()
            found.append(torch.stack([error.detach(), loss.detach()]))
            teacher.step(target, timestep)
            student.step(predicted, timestep)
        # Not sooner: Adam would go on moving a group of steps while the others' calls are made.
        self.optimiser.step()
        self.optimiser.zero_grad()
        mse, mean_loss = torch.stack(found).mean(0).tolist()
        return Q2BRecord(number, mse, float(fab), mean_loss)

    def _states(self, rows: list[int]) -> Tensor:
        states = self.prompts.states[rows]
        if self.settings.guidance_scale > 1:
            states = torch.cat([self.prompts.empty.expand_as(states), states])
        return states.to(self.device, self.dtype)

    def _branches(self, count: int) -> tuple[_Branch, _Branch]:
        config = self.pipe.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        noise = torch.randn((count, config.in_channels, height, width), generator=self.generator)
        noise = noise.to(self.device, self.dtype)
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        teacher = _Branch(self.pipe, self.teacher, self.settings, noise, seed)
        return teacher, _Branch(self.pipe, self.pipe.unet, self.settings, noise, seed)

    def _choose_widths(self, quality: Tensor, timestep: float, copies: int) -> Tensor:
        """Set every quantizer for one call, guidance halves alike; the probabilities `(N, K, 3)`."""
        probabilities: Tensor = self.q2b(quality, (timestep,))[:, 0]
        columns = probabilities.repeat(copies, 1, 1).unbind(1)
        for quantizer, column in zip(self.quantizers, columns, strict=True):
            quantizer.set_mixture(self.config.menu.widths, column)
        return probabilities

    def _mean_bits(self, probabilities: Tensor) -> Tensor:
        """Mean over prompts and K of b_high p_high + b_medium p_medium; the low width costs nothing."""
        return (probabilities[..., 1:] * self.widths[1:]).sum(-1).mean()


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of rows; each of `count` rows comes once before any comes again."""
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]


def _relative_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error over the target's energy, for each row, then the mean."""
    error = (predicted.float() - target.float()).square().flatten(1).sum(1)
    return (error / target.float().square().flatten(1).sum(1)).mean()
