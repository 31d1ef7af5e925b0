"""Training: T2Q on synthetic labels, Q2B on the golden pipeline."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins import Recipe, apply, load_backend
from qlip_plugins.controller import load_ranges
from qlip_plugins.embeddings import EncodedPrompts, PromptEmbeddings
from qlip_plugins.errors import IncompatibleModelError
from qlip_plugins.generation import Settings, sample
from qlip_plugins.labels import Labels
from qlip_plugins.recipe import QlipController, StaticController
from qlip_plugins.state import CalibratedState
from qlip_plugins.t2q import T2Q
from qlip_plugins.text_to_bits import TextToBits
from qlip_plugins.training import (
    Q2BRecord,
    Q2BTraining,
    T2QTraining,
    fold_standardisation,
    schedule,
    train_controller,
    train_q2b,
    train_t2q,
)
from qlip_plugins.training.q2b import _Batches, _Branch
from qlip_plugins.training.t2q import _split_to_stop

SETTINGS = Settings(steps=4, guidance_scale=3.0)
PROMPTS = [f"row {row}" for row in range(8)]


def test_folding_the_standardisation_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    t2q = T2Q(7, hidden=5).double()
    z = torch.randn(20, 7, generator=generator, dtype=torch.float64) * 30 + 100
    mean, deviation = z.mean(0), z.std(0)
    folded = fold_standardisation(t2q, mean, deviation)
    assert torch.allclose(folded(z), t2q((z - mean) / deviation), rtol=0, atol=1e-12)
    assert not torch.allclose(t2q(z), folded(z), rtol=0, atol=1e-4)


def synthetic(noise: float, concepts: int = 40, captions: int = 5) -> tuple[Labels, list[int], list[int]]:
    """Labels that rise with one direction of z; the last quarter of the concepts is held out."""
    generator = torch.Generator().manual_seed(0)
    n = concepts * captions
    z = torch.randn(concepts, 16, generator=generator).repeat_interleave(captions, 0)
    z = z + 0.3 * torch.randn(n, 16, generator=generator)
    signal = (z @ torch.randn(16, generator=generator) / 4).exp()
    scores = torch.stack([signal + noise * torch.randn(n, generator=generator) for _ in range(2)], 1)
    labels = Labels(
        prompts=tuple(f"{'long ' * (row % captions)}prompt of-{row}" for row in range(n)),
        embeddings=z * 5 + 100,
        scores=scores,
        tags={
            "concept": tuple(str(row // captions) for row in range(n)),
            "level": tuple(str(row % captions) for row in range(n)),
        },
    )
    return labels, list(range(n * 3 // 4)), list(range(n * 3 // 4, n))


def test_t2q_learns_a_monotone_function_of_z() -> None:
    labels, train, held = synthetic(noise=0.0)
    rng = torch.get_rng_state()
    t2q, facts = train_t2q(labels, train, held, T2QTraining(hidden=32, steps=400, lr=3e-3, dropout=0.0))
    assert torch.equal(torch.get_rng_state(), rng), "training draws from generators of its own"
    assert facts["held"]["srocc"] > 0.85
    assert facts["held"]["plcc"] > 0.85
    assert facts["ceiling"] == pytest.approx(1.0)
    assert facts["rows"] == {"fit": 120, "stopping": 30, "held": 50}
    assert abs(facts["trivial"]["words"]["srocc"]) < 0.5
    assert abs(facts["trivial"]["mean by level"]["srocc"]) < 0.5
    assert facts["trivial"]["mean by concept"]["srocc"] is None, "no held concept was seen"
    with torch.no_grad():
        predicted = t2q(labels.embeddings[held])
    assert float((predicted - labels.targets[held]).abs().mean()) < 0.15


def test_t2q_stops_before_it_learns_noise_by_heart() -> None:
    labels, train, held = synthetic(noise=1.0)
    _, facts = train_t2q(labels, train, held, T2QTraining(hidden=64, steps=600, lr=3e-3, dropout=0.0))
    assert 0 < facts["best_step"] < 300
    assert facts["fit"]["plcc"] < 0.9
    rho = labels.reliability(held)
    assert rho is not None
    assert facts["sqrt_rho"] == pytest.approx(max(rho, 0) ** 0.5)
    assert facts["ceiling"] == pytest.approx((2 * max(rho, 0) / (1 + max(rho, 0))) ** 0.5)


def test_no_concept_stands_on_both_sides_of_the_split() -> None:
    labels, train, _ = synthetic(noise=0.5)
    fit, stopping = _split_to_stop(labels, train, "concept", seed=0)
    concept = labels.tags["concept"]
    assert sorted(fit + stopping) == train
    assert not {concept[row] for row in fit} & {concept[row] for row in stopping}
    assert stopping != _split_to_stop(labels, train, "concept", seed=1)[1]


def test_the_same_seed_trains_the_same_t2q() -> None:
    labels, train, held = synthetic(noise=0.5)
    first, again, other = (
        train_t2q(labels, train, held, T2QTraining(hidden=8, steps=40, seed=seed))[0].state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_rows_that_cannot_be_trained_on_are_refused() -> None:
    labels, train, held = synthetic(noise=0.5)
    with pytest.raises(ValueError, match="both in train_rows and held_rows"):
        train_t2q(labels, train, [*held, train[0]], T2QTraining())
    with pytest.raises(ValueError, match="more concepts"):
        train_t2q(labels, train[:5], held, T2QTraining())


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load("golden-w4a8")


@pytest.fixture(scope="module")
def prompts(recipe: Recipe) -> EncodedPrompts:
    assert recipe.model.prompt_embeddings is not None
    return EncodedPrompts.from_table(PromptEmbeddings.load(recipe.model.prompt_embeddings), PROMPTS)


@pytest.fixture(scope="module")
def t2q(prompts: EncodedPrompts) -> T2Q:
    """A random direction of z whose qualities spread over 0..1."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        t2q = T2Q(prompts.embeddings.shape[1], hidden=16)
        raw = t2q(prompts.embeddings)
        last: Any = t2q.layers[-1]
        last.weight.div_(raw.max() - raw.min())
        last.bias.sub_(raw.min()).div_(raw.max() - raw.min())
    return t2q


def trained(
    model: GoldenModel,
    recipe: Recipe,
    t2q: T2Q,
    prompts: EncodedPrompts,
    pipe: Any = None,
    bit_weight: float = 0.0,
    early: int = 0,
    **options: Any,
) -> tuple[TextToBits, list[Q2BRecord]]:
    training = Q2BTraining(bit_weight, **({"batch": 4, "lr": 0.3} | options))
    pipe = pipe or model.pipe()
    return train_controller(
        pipe, recipe, t2q, prompts, SETTINGS, training, "a test", group=2, early=early, initial_slope=4.0
    )


@torch.no_grad()
def predictions(pipe: Any, prompts: EncodedPrompts, noise: Tensor, seed: int = 0) -> list[Tensor]:
    """The guided prediction of every call while the pipeline itself samples."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        empty, prompt = output[0].chunk(2)
        found.append(empty + SETTINGS.guidance_scale * (prompt - empty))

    handle = pipe.unet.register_forward_hook(keep)
    pipe(
        prompt_embeds=prompts.states,
        negative_prompt_embeds=prompts.empty.expand_as(prompts.states),
        latents=noise,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=SETTINGS.steps,
        guidance_scale=SETTINGS.guidance_scale,
        output_type="latent",
    )
    handle.remove()
    return found


def test_the_loss_is_its_definition(
    model: GoldenModel, recipe: Recipe, t2q: T2Q, prompts: EncodedPrompts
) -> None:
    """At the neutral start, against what the pipeline predicts in float and at the medium width."""
    _, (record,) = trained(model, recipe, t2q, prompts, bit_weight=0.01, trajectories=1, batch=2)
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    rows = torch.randperm(len(PROMPTS), generator=generator)[:2].tolist()
    noise = torch.randn(2, model.config["in_channels"], 8, 8, generator=generator)
    pipe, batch = model.pipe(), prompts.only(rows)
    teacher = predictions(pipe, batch, noise)
    medium = StaticController(kind="static", bits=16)
    with apply(pipe, recipe.model_copy(update={"controller": medium})):
        student = predictions(pipe, batch, noise)
    errors = [
        float((a - b).square().sum() / a.square().sum())
        for call in zip(teacher, student, strict=True)
        for a, b in zip(*call, strict=True)
    ]
    assert len(errors) == 2 * 5  # PNDM visits its second timestep twice
    assert record.mse == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    with torch.no_grad():
        qualities = t2q(batch.embeddings).tolist()
    p_q = [1 / (1 + math.exp(-4 * (quality - 0.5))) for quality in qualities]
    bits = sum(32 * p / 2 + 16 / 2 for p in p_q) / 2
    assert record.loss - record.mse == pytest.approx(0.01 * bits, rel=1e-3)
    assert record.fab == 16.0


@torch.no_grad()
def test_a_trajectory_is_the_pipeline_s(model: GoldenModel, prompts: EncodedPrompts) -> None:
    """Also where the sampler scales its input and draws noise at every step."""
    pipe, batch = model.pipe(), prompts.only([1, 2])
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(2, model.config["in_channels"], 8, 8, generator=torch.Generator().manual_seed(3))
    expected = predictions(pipe, batch, noise, seed=7)
    branch = _Branch(pipe, pipe.unet, SETTINGS, noise, seed=7)
    states = torch.cat([batch.empty.expand_as(batch.states), batch.states])
    for timestep, prediction in zip(branch.scheduler.timesteps, expected, strict=True):
        found = branch.predict(timestep, states)
        assert torch.allclose(found, prediction, atol=1e-5)
        branch.step(found, timestep)


@pytest.mark.parametrize("row", [0, 5])
def test_every_parameter_learns_from_any_prompt(
    model: GoldenModel, recipe: Recipe, t2q: T2Q, prompts: EncodedPrompts, row: int
) -> None:
    controller, _ = trained(model, recipe, t2q, prompts.only([row]), trajectories=1, batch=1)
    q2b = controller.q2b
    assert bool((q2b.slope != 4.0).all())
    for parameter in (q2b.offset, q2b.medium_logit, q2b.high_logit):
        assert bool((parameter != 0.0).all())


def test_bits_cost_and_only_q2b_pays(
    model: GoldenModel, recipe: Recipe, t2q: T2Q, prompts: EncodedPrompts
) -> None:
    pipe = model.pipe()
    weights = copy.deepcopy(pipe.unet.state_dict())
    free, log = trained(model, recipe, t2q, prompts, pipe, bit_weight=0.0, trajectories=4)
    dear, _ = trained(model, recipe, t2q, prompts, pipe, bit_weight=0.1, trajectories=4)
    fabs = [c.plan(prompts.embeddings, c.config.timesteps).fab() for c in (free, dear)]
    assert sum(fabs[1]) / 8 < 10
    assert sum(fabs[0]) / 8 > 15
    assert [record.trajectory for record in log] == [0, 1, 2, 3]
    for name, tensor in t2q.state_dict().items():
        assert torch.equal(tensor, free.t2q.state_dict()[name])
    assert all(torch.equal(weights[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.unet.parameters())
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_a_trained_controller_runs(
    model: GoldenModel, recipe: Recipe, t2q: T2Q, prompts: EncodedPrompts, tmp_path: Path
) -> None:
    pipe = model.pipe()
    controller, _ = trained(model, recipe, t2q, prompts, pipe, bit_weight=1e-3, early=1, trajectories=6)
    controller.save_pretrained(tmp_path / "c")
    asked = recipe.model_copy(update={"controller": QlipController(kind="qlip", path=tmp_path / "c")})
    with apply(pipe, asked) as running:
        latents = sample(pipe, asked, PROMPTS, SETTINGS)
        plan = running.plan
    assert bool(latents.isfinite().all())
    assert plan is not None
    assert plan.digest() == controller.plan(prompts.embeddings, controller.config.timesteps).digest()
    assert len({plan.bits[row].numpy().tobytes() for row in range(8)}) > 1, "prompts differ in their bits"
    assert int(plan.bits[:, 0].min()) >= 16, "the first step has p_q = 1"


def test_the_same_seed_trains_the_same_q2b(
    model: GoldenModel, recipe: Recipe, t2q: T2Q, prompts: EncodedPrompts
) -> None:
    (first, log), (again, log_again) = (
        trained(model, recipe, t2q, prompts, trajectories=2, batch=2) for _ in range(2)
    )
    assert log == log_again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_unguided_training_runs(
    model: GoldenModel, recipe: Recipe, t2q: T2Q, prompts: EncodedPrompts
) -> None:
    training = Q2BTraining(1.0, trajectories=1, batch=2, lr=0.1)
    controller, (record,) = train_controller(
        model.pipe(), recipe, t2q, prompts, Settings(steps=4, guidance_scale=1.0), training, "a test"
    )
    assert controller.q2b.medium_logit.shape == (4, 65)
    assert 0 < record.mse < record.loss
    # Adam's first step is the learning rate, down the gradient: fewer bits.
    assert controller.q2b.high_logit.flatten().tolist() == pytest.approx([-0.1] * 260, rel=1e-2)


def test_what_does_not_belong_together_is_refused(
    model: GoldenModel, recipe: Recipe, t2q: T2Q, prompts: EncodedPrompts, states: dict[str, CalibratedState]
) -> None:
    pipe = model.pipe()
    training = Q2BTraining(0.0, trajectories=1, batch=1, lr=0.1)
    teacher = copy.deepcopy(pipe.unet)
    controller, _ = trained(model, recipe, t2q, prompts, trajectories=1, batch=1)
    quantizers = load_backend("torch").install(
        pipe.unet, states["w4a8"], load_ranges(recipe.ranges, states["w4a8"])
    )

    def train(settings: Settings = SETTINGS, **changes: Any) -> None:
        given: dict[str, Any] = {"quantizers": quantizers, "prompts": prompts} | changes
        train_q2b(pipe, teacher, given["quantizers"], controller, given["prompts"], settings, training)

    with pytest.raises(IncompatibleModelError, match="others than PNDMScheduler visits in 5 steps"):
        train(Settings(steps=5))
    with pytest.raises(IncompatibleModelError, match="the model has no quantizer"):
        train(quantizers={})
    eos = EncodedPrompts(prompts.prompts, prompts.states, prompts.empty, prompts.embeddings, "eos")
    with pytest.raises(IncompatibleModelError, match="pooling 'mean'"):
        train(prompts=eos)
    pipe.unet.to(torch.float16)
    with pytest.raises(IncompatibleModelError, match="float16"):
        train()
    with pytest.raises(ValueError, match="bit_weight >= 0"):
        Q2BTraining(-1.0)


def test_every_prompt_comes_before_any_comes_again() -> None:
    batches = _Batches(5, 2, torch.Generator().manual_seed(0))
    rows = [row for _ in range(5) for row in batches.take()]
    assert sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4]


def test_the_schedule_lists_each_timestep_once(model: GoldenModel) -> None:
    assert schedule(model.pipe(), 4) == (751.0, 501.0, 251.0, 1.0)
