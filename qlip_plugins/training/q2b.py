"""Training of Q2B on a quantized model's own trajectories."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter import ActQuantizer, load_backend
from ..controller import (
    PromptPlanner,
    check_ranges,
    check_something_to_control,
    load_base,
    load_ranges,
    with_splits,
)
from ..embeddings import EncodedPrompts, MeanOfStates, Pooling
from ..errors import IncompatibleModelError
from ..families import denoiser_of, family_of
from ..generation import Settings, placed
from ..layers import controlled
from ..metrics import count_macs
from ..progress import progress
from ..q2b import Q2B, choose
from ..recipe import Recipe
from ..state import CalibratedState
from ..t2q import T2Q
from ..text_to_bits import TextToBits, TextToBitsConfig
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


@dataclass(frozen=True)
class Q2BTraining:
    """How Q2B is trained.

    Args:
        bit_weight: lambda, the relative squared error of a prediction that one bit of mean width is worth.
        trajectories: whole samplings to train on, an optimiser step after each; none leaves Q2B as it starts.
        batch: prompts of each.
        lr: learning rate of Adam; no parameter moves by much more in one step.
        cost: what the mean width is over: `bits`, all quantizers alike, as published; `macs`, each weighted
            by its MACs over their mean.
        slope: `free`, or `positive`: the softplus of what is learnt, so that more quality never means fewer
            bits.
    """

    bit_weight: float
    trajectories: int = 100
    batch: int = 8
    lr: float = 0.05
    cost: Literal["bits", "macs"] = "bits"
    slope: Literal["free", "positive"] = "free"

    def __post_init__(self) -> None:
        if self.bit_weight < 0 or self.trajectories < 0 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"need bit_weight >= 0, trajectories >= 0, batch >= 1 and lr > 0, found {self}")


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
    """Make a controller for a recipe's base: take T2Q as it is, train Q2B from its neutral start.

    Args:
        pipe: a float Stable Diffusion pipeline without a recipe; it is moved to the device and type of
            `settings`, and is otherwise as it was afterwards. A copy of its UNet is the teacher.
        recipe: its base, backend, widths, ranges and attention are taken, its controller is not.
        t2q: trained, for the embeddings of `prompts`.
        prompts: to train on.
        settings: how the controller's pictures will be sampled; the seed is that of all random draws.
        training: how to train.
        origin: as of `new_controller`.
        group: as of `new_controller`.
        early: as of `new_controller`.
        initial_slope: as of `new_controller`.

    Returns:
        The controller, to be saved with `save_pretrained`, and a record for each trajectory.

    Raises:
        ArtefactError: a file that the recipe names is missing or damaged.
        IncompatibleModelError: base, ranges, T2Q, prompts and pipeline do not belong together.
    """
    pipe = placed(pipe, settings)
    state = load_base(recipe, denoiser_of(pipe))
    state.check_plain(denoiser_of(pipe))
    text_to_bits = new_controller(
        pipe, recipe, state, t2q, prompts.pooling, settings, origin, group, early, initial_slope
    )
    log = train_on_base(pipe, recipe, state, text_to_bits, prompts, settings, training)
    return text_to_bits.eval(), log


def new_controller(
    pipe: Any,
    recipe: Recipe,
    state: CalibratedState,
    t2q: T2Q,
    pooling: Pooling,
    settings: Settings,
    origin: str,
    group: int = 1,
    early: int = 0,
    initial_slope: float = 4.0,
    population: Sequence[float] = (),
) -> TextToBits:
    """An untrained controller for a recipe's base, with a trained T2Q.

    Q2B starts at p_m = p_h = 1/2, medium everywhere, with zero offsets. Its slope does not start at 0,
    where no prompt would differ from another and the slope's own gradient would come from chance alone.

    Args:
        pipe: its scheduler gives the schedule.
        recipe: its widths and attention are taken.
        state: its base, read.
        t2q: trained.
        pooling: of the embeddings that T2Q was trained on.
        settings: how the controller's pictures will be sampled.
        origin: how the controller came to be, in words, stored with it.
        group: M, steps that share one set of parameters.
        early: m, first steps with p_q = 1.
        initial_slope: where every slope starts; more makes prompts differ more.
        population: predicted qualities of prompts that stand for all.

    Raises:
        IncompatibleModelError: the base leaves nothing to control.
    """
    layers = controlled(state.activations, **recipe.controls)
    check_something_to_control(layers, state)
    first: Any = t2q.layers[0]
    config = TextToBitsConfig(
        embedding_dim=first.in_features,
        pooling=pooling,
        hidden=first.out_features,
        menu=recipe.activation_bits,
        layers=layers,
        timesteps=schedule(pipe, settings.steps),
        group=group,
        early=early,
        base_fingerprint=state.fingerprint,
        origin=origin,
        population=tuple(population),
    )
    with seeded(settings.seed):
        text_to_bits = TextToBits(config)
    text_to_bits.t2q.load_state_dict(t2q.state_dict())
    nn.init.constant_(text_to_bits.q2b.slope, initial_slope)
    return text_to_bits


def train_on_base(
    pipe: Any,
    recipe: Recipe,
    state: CalibratedState,
    text_to_bits: TextToBits,
    prompts: EncodedPrompts,
    settings: Settings,
    training: Q2BTraining,
    work: WorkFolder | None = None,
) -> list[Q2BRecord]:
    """Train the Q2B of a controller in place, on a recipe's base; the pipeline is as it was afterwards.

    Args:
        pipe: the float pipeline, on its device.
        recipe: its backend and ranges are taken.
        state: its base, read.
        text_to_bits: the controller.
        prompts: to train on.
        settings: as of `train_q2b`.
        training: how to train.
        work: as of `train_q2b`.

    Raises:
        ArtefactError: the ranges are missing or damaged.
        IncompatibleModelError: base, ranges, controller, prompts and pipeline do not belong together.
    """
    ranges = load_ranges(recipe.ranges, state)
    check_ranges(ranges, recipe, state, PromptPlanner(text_to_bits, MeanOfStates()))
    _check_made_for(pipe, text_to_bits, prompts, settings)
    if not training.trajectories:
        return []
    _check_trainable(pipe)
    weights = None
    if training.cost == "macs":
        weights = mac_weights(denoiser_of(pipe), state, text_to_bits.config.layers, prompts.states.shape[1:])
    teacher = copy.deepcopy(denoiser_of(pipe))
    quantizers = load_backend(recipe.backend).install(denoiser_of(pipe), state, ranges)
    try:
        return train_q2b(pipe, teacher, quantizers, text_to_bits, prompts, settings, training, weights, work)
    finally:
        quantizers.remove()


def mac_weights(
    unet: Any, state: CalibratedState, layers: Sequence[str], text_shape: Sequence[int]
) -> Tensor:
    """What a bit of each quantizer weighs: the MACs behind it over their mean, `(K,)`, float32.

    Args:
        unet: counted on a twin without data.
        state: knows where inputs are split.
        layers: K quantizers.
        text_shape: tokens and width of one prompt's text states.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = type(unet).from_config(unet.config)
        call = {
            "sample": torch.empty(1, unet.config.in_channels, *_sample_size(unet)),
            "timestep": torch.zeros(()),
            "encoder_hidden_states": torch.empty(1, *text_shape),
        }
    counts = with_splits(count_macs(twin, call), state)
    macs = torch.tensor([counts.of(name) for name in layers], dtype=torch.float64)
    return (macs / macs.mean()).float()


def _sample_size(unet: Any) -> tuple[int, int]:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def schedule(pipe: Any, steps: int) -> tuple[float, ...]:
    """The distinct timesteps that a pipeline visits, in the order of the first visit."""
    return tuple(dict.fromkeys(family_of(pipe).schedule(pipe.scheduler, steps)))


def train_q2b(
    pipe: Any,
    teacher: nn.Module,
    quantizers: Mapping[str, ActQuantizer],
    text_to_bits: TextToBits,
    prompts: EncodedPrompts,
    settings: Settings,
    training: Q2BTraining,
    weights: Tensor | None = None,
    work: WorkFolder | None = None,
) -> list[Q2BRecord]:
    """Train the Q2B of a controller in place, from where it stands; nothing else changes.

    For each batch of prompts two samplings start from the same noise: the teacher's, and the quantized
    model's at the widths that Q2B chooses, each following its own predictions. At every call of the
    denoiser the loss is

        |eps - eps_hat|^2 / |eps|^2 + bit_weight * mean_k w_k (b_high p_high + b_medium p_medium),

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
        weights: w_k, `(K,)`, as `mac_weights` gives; needed for the cost `macs`, all 1 for `bits`.
        work: keeps the state after every trajectory; a training that was interrupted goes on from there,
            and ends with the same parameters.

    Raises:
        IncompatibleModelError: controller, quantizers, prompts and pipeline do not belong together.
        ArtefactError: the state in `work` is damaged.
        ValueError: weights are given for another cost, or missing, or the slope is to be positive and is not.
    """
    absent = [name for name in text_to_bits.config.layers if name not in quantizers]
    if absent:
        raise IncompatibleModelError(f"the model has no quantizer {absent[0]!r}, which the controller steers")
    _check_made_for(pipe, text_to_bits, prompts, settings)
    _check_trainable(pipe)
    trainer = _Q2BTrainer(pipe, teacher, quantizers, text_to_bits, prompts, settings, training, weights)
    records = trainer.restore(work)
    try:
        with _frozen(denoiser_of(pipe)):
            for number in progress(range(len(records), training.trajectories), "training Q2B"):
                records.append(trainer.trajectory(number))
                if work is not None:
                    trainer.save(work, records)
    finally:
        for name in text_to_bits.config.layers:
            quantizers[name].set_bits(quantizers[name].base_bits)
        trainer.finish()
        text_to_bits.cpu()
    return records


def _check_made_for(pipe: Any, text_to_bits: TextToBits, prompts: EncodedPrompts, settings: Settings) -> None:
    config = text_to_bits.config
    if config.timesteps != schedule(pipe, settings.steps):
        raise IncompatibleModelError(
            f"the controller is made for {len(config.timesteps)} timesteps from {config.timesteps[0]:g}, others than "
            f"{type(pipe.scheduler).__name__} visits in {settings.steps} steps"
        )
    if (config.embedding_dim, config.pooling) != (prompts.embeddings.shape[1], prompts.pooling):
        raise IncompatibleModelError(
            f"the controller reads embeddings of length {config.embedding_dim}, pooling {config.pooling!r}; the "
            f"prompts have {prompts.embeddings.shape[1]}, {prompts.pooling!r}"
        )


def _check_trainable(pipe: Any) -> None:
    family = family_of(pipe)
    denoiser: Any = family.denoiser_of(pipe)
    if denoiser.dtype == torch.float16:
        raise IncompatibleModelError("gradients underflow in float16: train in float32 or bfloat16")
    if family.name != "sd" or denoiser.config.time_cond_proj_dim is not None:
        raise IncompatibleModelError(
            f"this {type(denoiser).__name__} (family {family.name}) wants more than text states and a timestep, which "
            "training along trajectories does not give: make a controller with `train q2b --start sensitivity "
            "--trajectories 0`"
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
        weights: Tensor | None,
    ) -> None:
        self.pipe, self.teacher, self.settings, self.training = pipe, teacher, settings, training
        denoiser: Any = denoiser_of(pipe)
        self.device, self.dtype = denoiser.device, denoiser.dtype
        self.config = text_to_bits.config
        self.quantizers = [quantizers[name] for name in self.config.layers]
        self.prompts = prompts
        with torch.no_grad():
            self.quality = text_to_bits.t2q(prompts.embeddings.float()).to(self.device)
        self.q2b: Q2B = text_to_bits.q2b.to(self.device)
        self.parameters = dict(self.q2b.named_parameters())
        if training.slope == "positive":
            self.parameters["slope"] = nn.Parameter(_softplus_of(self.q2b.slope.detach()))
        self.menu = torch.tensor(self.config.menu.widths)
        self.bit_prices = _bit_prices(self.config.menu.widths, len(self.quantizers), training, weights)
        self.bit_prices = self.bit_prices.to(self.device)
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=training.lr)
        self.generator = torch.Generator("cpu").manual_seed(settings.seed)
        self.batches = _Batches(len(prompts.prompts), training.batch, self.generator)

    def trajectory(self, number: int) -> Q2BRecord:
        """Sample one batch with both models and learn along the way."""
        rows = self.batches.take()
        quality, states = self.quality[rows], self._states(rows)
        with torch.no_grad():
            chosen = choose(self._probabilities(quality, self.config.timesteps)).cpu()
            fab = self.menu[chosen].float().mean()
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
        unet: Any = denoiser_of(self.pipe)
        shape = (count, unet.config.in_channels, *_sample_size(unet))
        noise = torch.randn(shape, generator=self.generator)
        noise = noise.to(self.device, self.dtype)
        seed = int(torch.randint(2**31, (1,), generator=self.generator))
        teacher = _Branch(self.pipe, self.teacher, self.settings, noise, seed)
        return teacher, _Branch(self.pipe, unet, self.settings, noise, seed)

    def _values(self) -> dict[str, Tensor]:
        """Q2B's own parameters, of those that are learnt."""
        values: dict[str, Tensor] = dict(self.parameters)
        if self.training.slope == "positive":
            values["slope"] = F.softplus(self.parameters["slope"])
        return values

    def _probabilities(self, quality: Tensor, timesteps: tuple[float, ...]) -> Tensor:
        found: Tensor = functional_call(self.q2b, self._values(), (quality, timesteps))
        return found

    def _choose_widths(self, quality: Tensor, timestep: float, copies: int) -> Tensor:
        """Set every quantizer for one call, guidance halves alike; the probabilities `(N, K, 3)`."""
        probabilities = self._probabilities(quality, (timestep,))[:, 0]
        # All at once: on a GPU every look at a value waits for it.
        chosen = self.menu[choose(probabilities.detach()).cpu()].repeat(copies, 1)
        columns = zip(
            self.quantizers, probabilities.repeat(copies, 1, 1).unbind(1), chosen.unbind(1), strict=True
        )
        for quantizer, shares, widths in columns:
            quantizer.set_mixture(self.config.menu.widths, shares, widths)
        return probabilities

    def _mean_bits(self, probabilities: Tensor) -> Tensor:
        """Mean over prompts and K of w (b_high p_high + b_medium p_medium); the low width costs nothing."""
        return (probabilities * self.bit_prices).sum(-1).mean()

    def save(self, work: WorkFolder, records: Sequence[Q2BRecord]) -> None:
        """Keep all that the next trajectories depend on."""
        tensors = {
            **named("parameter", self.parameters),
            **named("optimiser", optimiser_tensors(self.optimiser)),
            "generator": self.generator.get_state(),
        }
        save_state(work, tensors, queue=self.batches.queue, records=[asdict(record) for record in records])

    def restore(self, work: WorkFolder | None) -> list[Q2BRecord]:
        """Take up what `save` kept; the records so far."""
        found = load_state(work)
        if work is None or found is None:
            return []
        tensors, facts = found
        with restoring(work), torch.no_grad():
            kept = without("parameter", tensors)
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])
            restore_optimiser(self.optimiser, without("optimiser", tensors))
            self.generator.set_state(tensors["generator"])
            self.batches.queue = list(facts["queue"])
            return [Q2BRecord(**record) for record in facts["records"]]

    @torch.no_grad()
    def finish(self) -> None:
        """Give the learnt values to Q2B."""
        for name, value in self._values().items():
            self.q2b.get_parameter(name).copy_(value)


def _softplus_of(slope: Tensor) -> Tensor:
    """The values whose softplus is `slope`."""
    if not bool((slope > 0).all()):
        raise ValueError(f"a positive slope starts above 0, found {float(slope.min()):g}")
    return slope + torch.log(-torch.expm1(-slope))


def _bit_prices(
    menu: Sequence[int], quantizers: int, training: Q2BTraining, weights: Tensor | None
) -> Tensor:
    """What the probability of each width costs, `(K, 3)`."""
    if (weights is None) == (training.cost == "macs"):
        raise ValueError("weights of the quantizers belong to the cost `macs`, and to no other")
    _, medium, high = menu
    each = torch.ones(quantizers) if weights is None else weights
    return each[:, None] * torch.tensor([0.0, medium, high])


class _Batches:
    """Endless batches of rows; each of `count` rows comes once before any comes again."""

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self._count, self._size, self._generator = count, size, generator
        self.queue: list[int] = []

    def take(self) -> list[int]:
        """The next batch."""
        while len(self.queue) < self._size:
            self.queue += torch.randperm(self._count, generator=self._generator).tolist()
        batch, self.queue = self.queue[: self._size], self.queue[self._size :]
        return batch


def _relative_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error over the target's energy, for each row, then the mean."""
    error = (predicted.float() - target.float()).square().flatten(1).sum(1)
    return (error / target.float().square().flatten(1).sum(1)).mean()
