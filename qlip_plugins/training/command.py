"""What `qlip-plugins train t2q` and `train q2b` do."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..artefacts import versions
from ..budget import LinearCost, resolved
from ..controller import apply_base, load_base, load_ranges
from ..embeddings import EncodedPrompts, Pooling, encode
from ..errors import IncompatibleModelError, RecipeError
from ..evaluation.run import PRIMARY, Run
from ..families import denoiser_of
from ..files import check_replaceable, file_digest
from ..generation import Settings, load_pipeline, placed, sample_encoded
from ..labels import Labels
from ..layers import controlled
from ..plotting import new_figure
from ..prompts import read_prompts
from ..recipe import Budget, Recipe, StaticController
from ..schema import nearest
from ..sensitivity import Sensitivity, start_q2b
from ..state import CalibratedState
from ..t2q import T2Q
from ..text_to_bits import CONFIG_NAME, CURVES_NAME, TRAINING_NAME, TextToBits, judged
from ..text_to_bits import FORMAT as CONTROLLER_FORMAT
from ..text_to_bits import OWNED as CONTROLLER_OWNED
from ..work import WorkFolder, identity_of
from .q2b import Q2BRecord, Q2BTraining, new_controller, schedule, train_on_base
from .t2q import T2QTraining, train_t2q
from .trained_t2q import FORMAT as T2Q_FORMAT
from .trained_t2q import OWNED as T2Q_OWNED
from .trained_t2q import (
    HeldShare,
    HeldValue,
    RankNormaliser,
    Split,
    TrainedT2Q,
    TrainedT2QConfig,
    prompt_digest,
    rows_of,
    without_held,
)

_T2Q_WORK = "T2Q training"
_Q2B_WORK = "Q2B training"
_VERSION = 1
_CHECKED_PROMPTS = 3
_FEWEST_QUALITIES = 3
_LEAST_COSINE = 0.999
_POPULATION = 512
_CURVES = "curves.png of a training"

T = TypeVar("T")


@dataclass(frozen=True)
class T2QRequest:
    """What T2Q is to be trained on.

    Args:
        recipe: names the pipeline whose text embeddings it will read.
        labels: a label set's file, or a run folder of `qlip-plugins evaluate`.
        allocation: of the run, whose smallness of error is to be predicted; None for a label set.
        split: which prompts are held out.
        stop_by: the tag whose values stand on one side of the stopping split.
        training: how to train.
        out: folder to write.
        work: folder for the state of an interrupted training.
        device: where to train.
    """

    recipe: Recipe
    labels: Path
    allocation: str | None
    split: Split
    stop_by: str
    training: T2QTraining
    out: Path
    work: Path
    device: str = "cpu"


def split_for(held: str | None, by: str | None, share: float, seed: int) -> Split:
    """The split that a user names.

    Args:
        held: TAG=VALUE, or None.
        by: a tag, or None for concepts.
        share: of its values.
        seed: of the draw.

    Raises:
        RecipeError: it is none.
    """
    if held is not None:
        tag, equals, value = held.partition("=")
        if not equals or not tag or not value:
            raise RecipeError(f"--held {held}: expected TAG=VALUE")
        return HeldValue(tag=tag, value=value)
    if not 0 < share < 1:
        raise RecipeError(f"--held-share {share:g}: expected more than 0, and less than 1")
    return HeldShare(by=by or "concept", share=share, seed=seed)


def train_t2q_for(what: T2QRequest) -> dict[str, Any]:
    """Train T2Q and write its folder; can be interrupted and resumed.

    Returns:
        What `report.json` holds.

    Raises:
        QlipError: any; what can be known beforehand is checked before the work.
    """
    check_replaceable(what.out.resolve(), T2Q_FORMAT, CONFIG_NAME, *T2Q_OWNED)
    pipe = placed(load_pipeline(what.recipe), Settings(device=what.device))
    if what.allocation is None:
        labels, digest = Labels.load(what.labels), file_digest(what.labels)
    else:
        labels = labels_of_run(Run.load(what.labels), what.allocation, pipe, what.recipe)
        digest = file_digest(what.labels / "results.safetensors")
    if len(labels.prompts) < 2:
        raise RecipeError(f"{what.labels}: {len(labels.prompts)} prompts, too few to learn from")
    if not labels.tags and what.split.tag != "concept":
        raise RecipeError(
            f"{what.labels}: the label set has no tags, so nothing can be held out by {what.split.tag!r}: leave "
            "--held and --split-by out, and a share of its prompts is"
        )
    if labels.tags and what.stop_by not in labels.tags:
        raise RecipeError(
            f"--stop-by or --split-by: the label set has no tag {what.stop_by!r}{nearest(what.stop_by, labels.tags)} "
            f"(it has: {', '.join(sorted(labels.tags))})"
        )
    _check_embeddings(labels, pipe, what.recipe)
    train, held = rows_of(what.split, labels)
    identity = {
        "labels": digest,
        "content": _content(labels),
        "allocation": what.allocation,
        "split": what.split.model_dump(mode="json"),
        "stop_by": what.stop_by,
        "training": asdict(what.training),
        "device": torch.device(what.device).type,
        "versions": versions(),
    }
    work = WorkFolder(what.work, _T2Q_WORK, _VERSION, identity)
    try:
        t2q, report = train_t2q(labels, train, held, what.training, what.stop_by, what.device, work)
    except ValueError as error:
        work.remove()  # nothing was begun, and other labels may follow
        raise RecipeError(f"{what.labels}: {error}") from None
    first: Any = t2q.layers[0]
    config = TrainedT2QConfig(
        embedding_dim=first.in_features,
        pooling=_pooling(labels),
        hidden=first.out_features,
        labels=dict(labels.facts),
        labels_digest=digest,
        split=what.split,
        held=tuple(sorted(what.split.held_values(labels))) if labels.tags else (),
        held_prompts=tuple(prompt_digest(labels.prompts[row]) for row in held),
        training=asdict(what.training),
    )
    TrainedT2Q(config, t2q, RankNormaliser.of(labels)).save_pretrained(what.out, report)
    work.remove()
    return report


def labels_of_run(run: Run, allocation: str, pipe: Any, recipe: Recipe) -> Labels:
    """Labels of how little an allocation errs: minus the logarithm of a prediction's mean squared error.

    Args:
        run: of `qlip-plugins evaluate`.
        allocation: its name there.
        pipe: gives the embeddings.
        recipe: names a table of embeddings, if there is one.

    Raises:
        RecipeError: the run has no such allocation, or it makes no error.
        IncompatibleModelError: it is of another pipeline.
    """
    run.check_has(allocation)
    ours = identity_of(pipe, recipe.model, run.prompts)
    theirs = run.facts["protocol"]
    if (theirs["pipeline"], theirs["prompts"]["precomputed_embeddings"]) != (
        ours["pipeline"],
        ours["prompt_embeddings"],
    ):
        raise IncompatibleModelError(
            f"{run.folder}: evaluated with another pipeline or other embeddings than {recipe.model.pipeline}: evaluate "
            "this one"
        )
    errors = run.of(allocation)[PRIMARY]
    if not bool((errors > 0).all()):
        raise RecipeError(f"{run.folder}: {allocation!r} makes no error, so there is nothing to predict")
    prompts = encode(pipe, recipe.model.prompt_embeddings, run.prompts)
    facts = {
        "metric": f"-ln {PRIMARY}",
        "allocation": allocation,
        "protocol": run.fingerprint,
        "pooling": prompts.pooling,
        "pictures": run.facts["settings"],
    }
    tags = {"concept": tuple(map(str, run.facts["clusters"]))}
    return Labels(tuple(run.prompts), prompts.embeddings, -errors.log().float(), facts, tags)


def _pooling(labels: Labels) -> Pooling:
    found = labels.facts.get("pooling")
    known: dict[Any, Pooling] = {"eos": "eos", "pooled": "pooled", "mean": "mean"}
    if found not in known:
        raise IncompatibleModelError(
            f"the labels' pooling is {found!r}, a controller reads {', '.join(known)}"
        )
    return known[found]


def _check_embeddings(labels: Labels, pipe: Any, recipe: Recipe) -> None:
    """A label set of another text encoder would train well, and then judge other vectors."""
    rows = sorted(
        random.Random(0).sample(range(len(labels.prompts)), min(_CHECKED_PROMPTS, len(labels.prompts)))
    )
    asked = [labels.prompts[row] for row in rows]
    ours = encode(pipe, recipe.model.prompt_embeddings, asked, _pooling(labels)).embeddings
    theirs = labels.embeddings[rows]
    if ours.shape != theirs.shape or float(torch.cosine_similarity(ours, theirs).min()) < _LEAST_COSINE:
        raise IncompatibleModelError(
            f"the labels' embeddings are not those that {recipe.model.pipeline} gives for the same prompts (length "
            f"{theirs.shape[1]}, here {ours.shape[1]}): make the labels with this pipeline"
        )


def _content(labels: Labels) -> str:
    """SHA-256 of what is learnt from, wherever it came from."""
    found = hashlib.sha256(json.dumps([labels.prompts, dict(labels.tags)], sort_keys=True).encode())
    for tensor in (labels.embeddings, labels.scores):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Q2BRequest:
    """What Q2B is to be trained for.

    Args:
        recipe: its base, backend, widths, ranges and attention are taken; its controller is not.
        t2q: folder of a trained T2Q.
        prompts_file: prompts to train on, or a label set: of that one, what T2Q was trained on.
        settings: how the controller's pictures will be sampled; the seed is that of all random draws.
        training: how to train.
        out: folder of the controller to write.
        work: folder for the state of an interrupted training.
        start: `medium`, `sensitivity`, or the folder of a controller of the same base, widths and schedule.
        sensitivity: the file of `qlip-plugins sensitivity`, for that start.
        budget: what the prompts' plans cost on average at that start.
        group: M; of another controller where training starts from one.
        early: m, likewise.
        initial_slope: where every slope starts, for the start `medium`.
        limit: prompts at most, drawn from all.
    """

    recipe: Recipe
    t2q: Path
    prompts_file: Path
    settings: Settings
    training: Q2BTraining
    out: Path
    work: Path
    start: str = "medium"
    sensitivity: Path | None = None
    budget: Budget | None = None
    group: int = 1
    early: int = 0
    initial_slope: float = 4.0
    limit: int = 256


def train_q2b_for(what: Q2BRequest) -> dict[str, Any]:
    """Make a controller and write its folder; can be interrupted and resumed.

    Returns:
        What `training.json` holds.

    Raises:
        QlipError: any; what can be known beforehand is checked before the work.
    """
    _check_request(what)
    trained = TrainedT2Q.from_pretrained(what.t2q)
    texts, population, notes = _texts(what, trained)
    pipe = placed(load_pipeline(what.recipe), what.settings)
    prompts = encode(pipe, what.recipe.model.prompt_embeddings, texts, trained.config.pooling)
    state = load_base(what.recipe, denoiser_of(pipe))
    costs = _costs(what, pipe, state, prompts)
    controller = _started(what, pipe, trained, state, prompts, population, costs)
    identity = {
        **identity_of(pipe, what.recipe.model, texts),
        "base": state.fingerprint,
        "backend": what.recipe.backend,
        "ranges": load_ranges(what.recipe.ranges, state).digest(),
        "start": controller.digest(),
        "training": asdict(what.training),
        "settings": asdict(what.settings.unnumbered()),
    }
    work = WorkFolder(what.work, _Q2B_WORK, _VERSION, identity)
    try:
        log = train_on_base(pipe, what.recipe, state, controller, prompts, what.settings, what.training, work)
    except ValueError as error:
        work.remove()  # nothing was begun
        raise RecipeError(f"training Q2B: {error}") from None
    notes += _measured_on_held(what, trained)
    facts = {
        **_facts(what, trained, controller, texts, log),
        "plans": _plans(controller, prompts, costs),
        "notes": notes,
    }
    record = {TRAINING_NAME: (json.dumps(facts, indent=1) + "\n").encode()}
    if log:
        record[CURVES_NAME] = curves(log)
    controller.eval().save_pretrained(what.out, record)
    work.remove()
    return facts


def _check_request(what: Q2BRequest) -> None:
    check_replaceable(what.out.resolve(), CONTROLLER_FORMAT, CONFIG_NAME, *CONTROLLER_OWNED)
    solved = what.start == "sensitivity"
    if solved != (what.sensitivity is not None) or solved != (what.budget is not None):
        raise RecipeError(
            "--start sensitivity, --sensitivity FILE and --budget belong together: give all, or none"
        )
    if what.budget is not None and what.budget.per != "population":
        raise RecipeError(
            f"--budget ...,per={what.budget.per}: what is solved is the mean over the training prompts"
        )
    if what.limit < 1:
        raise RecipeError(f"--limit {what.limit}: expected at least one prompt")
    steps = what.settings.steps
    if not 1 <= what.group <= steps or not 0 <= what.early <= steps:
        raise RecipeError(
            f"--group {what.group}, --early {what.early}: expected 1 to {steps} and 0 to {steps}, the number of steps"
        )
    if what.start not in ("medium", "sensitivity"):
        if not (Path(what.start) / CONFIG_NAME).is_file():
            raise RecipeError(f"--start {what.start}: expected medium, sensitivity, or a controller's folder")
        if (what.group, what.early) != (1, 0):
            raise RecipeError(
                "--group and --early are those of the controller that --start names: leave them out"
            )
    if what.training.trajectories:
        new_figure(_CURVES, 1, 1)  # before the work, in case it cannot be drawn


def _texts(what: Q2BRequest, trained: TrainedT2Q) -> tuple[list[str], list[float], list[str]]:
    """The prompts to train on; predicted qualities that stand for all; and remarks."""
    if what.prompts_file.suffix == ".safetensors":
        labels = Labels.load(what.prompts_file)
        if file_digest(what.prompts_file) != trained.config.labels_digest:
            raise IncompatibleModelError(
                f"{what.prompts_file}: not the label set that {what.t2q} was trained on, so which of its prompts were "
                "held out is unknown: give that one, or a file of prompts"
            )
        rows, _ = rows_of(trained.config.split, labels)
        embeddings = labels.embeddings[_some(rows, _POPULATION)]
        texts = [labels.prompts[row] for row in _some(rows, what.limit)]
        return texts, _qualities(trained.t2q, embeddings), []
    prompts, remarks = without_held(trained.config, read_prompts(what.prompts_file), what.prompts_file)
    return _some(prompts.prompts, what.limit), [], remarks


def _measured_on_held(what: Q2BRequest, trained: TrainedT2Q) -> list[str]:
    """A remark where sensitivities come from prompts that T2Q is to be judged on."""
    if what.sensitivity is None:
        return []
    held = set(trained.config.held_prompts)
    shared = sum(prompt_digest(prompt) in held for prompt in Sensitivity.load(what.sensitivity).prompts)
    return [f"{shared} prompts of {what.sensitivity} are among those that T2Q held out"] if shared else []


def _some(items: Sequence[T], count: int) -> list[T]:
    return random.Random(0).sample(list(items), min(count, len(items)))


@torch.no_grad()
def _qualities(t2q: T2Q, embeddings: Tensor) -> list[float]:
    found = judged(t2q, embeddings)
    return [float(value) for value in found]


def _started(
    what: Q2BRequest,
    pipe: Any,
    trained: TrainedT2Q,
    state: CalibratedState,
    prompts: EncodedPrompts,
    population: list[float],
    costs: _Costs,
) -> TextToBits:
    qualities = population or _qualities(trained.t2q, prompts.embeddings)
    if what.start not in ("medium", "sensitivity"):
        return _continued(Path(what.start), what, pipe, state, trained)
    controller = new_controller(
        pipe,
        what.recipe,
        state,
        trained.t2q,
        trained.config.pooling,
        what.settings,
        _origin(what, trained),
        what.group,
        what.early,
        what.initial_slope,
        qualities,
    )
    if what.start == "sensitivity":
        _solve(what, pipe, state, trained, controller, costs)
    return controller


def _origin(what: Q2BRequest, trained: TrainedT2Q) -> str:
    facts = trained.config.labels
    learnt = f"{facts.get('metric')}" + (f" of {facts['allocation']}" if "allocation" in facts else "")
    begun = {"medium": "medium everywhere", "sensitivity": f"sensitivities at {_budget_text(what.budget)}"}
    return (
        f"`qlip-plugins train`: T2Q on {learnt}; Q2B from {begun.get(what.start, 'another controller')}, "
        f"{what.training}, {what.settings.steps} steps, guidance {what.settings.guidance_scale:g}"
    )


def _budget_text(budget: Budget | None) -> str:
    return "" if budget is None else str(budget.model_dump(exclude_none=True))


def _continued(
    folder: Path, what: Q2BRequest, pipe: Any, state: CalibratedState, trained: TrainedT2Q
) -> TextToBits:
    controller = TextToBits.from_pretrained(folder)
    layers = controlled(state.activations, **what.recipe.controls)
    controller.check_made_for(state.fingerprint, what.recipe.activation_bits, layers)
    controller.check_order(layers)
    ours = controller.t2q.state_dict()
    theirs = trained.t2q.state_dict()
    if any(not torch.equal(ours[name], theirs[name]) for name in ours if name in theirs):
        raise IncompatibleModelError(f"{folder}: its T2Q is not that of {what.t2q}")
    if controller.config.timesteps != schedule(pipe, what.settings.steps):
        raise IncompatibleModelError(
            f"{folder}: made for another schedule than {what.settings.steps} steps here"
        )
    config = controller.config.model_copy(update={"origin": _origin(what, trained)})
    continued = TextToBits(config)
    continued.load_state_dict(controller.state_dict())
    return continued


@dataclass(frozen=True)
class _Costs:
    """What plans of the recipe's quantizers cost, counted in one generation (`budget.Costs`)."""

    of_bits: LinearCost
    of_base: float
    timesteps: tuple[float, ...]

    def bitops(self) -> LinearCost:
        return self.of_bits

    def base_bitops(self) -> float:
        return self.of_base

    @property
    def calls(self) -> Sequence[float]:
        return self.timesteps


def _costs(what: Q2BRequest, pipe: Any, state: CalibratedState, prompts: EncodedPrompts) -> _Costs:
    static = StaticController(kind="static", bits="base")
    base = what.recipe.model_copy(update={"controller": static, "correction": None})
    with apply_base(pipe, base, state) as running:
        sample_encoded(pipe, prompts.only([0]), what.settings, [0], "latent")
        costs = running.costs()
        return _Costs(costs.bitops(), costs.base_bitops(), tuple(costs.calls))


def _plans(controller: TextToBits, prompts: EncodedPrompts, costs: _Costs) -> dict[str, float]:
    """What the finished controller's plans of its own prompts cost, simulated; and which way quality moves them."""
    known = controller.config.population
    quality = torch.tensor(known, dtype=torch.float64) if known else controller.quality(prompts.embeddings)
    bits = controller.plan_of(quality, controller.config.timesteps).bits
    bitops = float(costs.of_bits.of(bits).mean())
    slope = controller.q2b.slope.detach().double()
    return {
        "prompts": len(quality),
        "fab": float(bits.double().mean()),
        "bitops_paper": bitops,
        "relative": bitops / costs.of_base,
        "mean_slope": float(slope.mean()),
        "negative_slopes": float((slope < 0).double().mean()),
    }


def _solve(
    what: Q2BRequest,
    pipe: Any,
    state: CalibratedState,
    trained: TrainedT2Q,
    controller: TextToBits,
    costs: _Costs,
) -> None:
    """Set Q2B to the plans that a sensitivity table says are best at the budget."""
    assert what.sensitivity is not None
    assert what.budget is not None
    table, menu = Sensitivity.load(what.sensitivity), controller.config.menu.widths
    ranges = load_ranges(what.recipe.ranges, state)
    table.check_made_for(what.sensitivity, state, ranges, controller.config.layers)
    table.check_measured_on(what.sensitivity, pipe, what.settings, controller.config.timesteps)
    measured = encode(pipe, what.recipe.model.prompt_embeddings, table.prompts, trained.config.pooling)
    quality = torch.tensor(_qualities(trained.t2q, measured.embeddings), dtype=torch.float64)
    if len(quality.unique()) < _FEWEST_QUALITIES:
        raise IncompatibleModelError(
            f"{what.sensitivity}: measured on {len(quality)} prompts of {len(quality.unique())} different predicted "
            f"qualities: how errors move with quality needs at least {_FEWEST_QUALITIES}, and some dozens"
        )
    cost, target = resolved(what.budget, costs, len(table.timesteps), len(controller.config.layers))
    population = torch.tensor(controller.config.population, dtype=torch.float64)
    start_q2b(controller.q2b, table, quality, population, menu, cost, target)


def _facts(
    what: Q2BRequest,
    trained: TrainedT2Q,
    controller: TextToBits,
    texts: Sequence[str],
    log: Sequence[Q2BRecord],
) -> dict[str, Any]:
    return {
        "t2q": trained.digest(),
        "start": what.start if what.start in ("medium", "sensitivity") else "controller",
        "budget": None if what.budget is None else what.budget.model_dump(exclude_none=True),
        "sensitivity": None if what.sensitivity is None else file_digest(what.sensitivity),
        "base": controller.config.base_fingerprint,
        "training": asdict(what.training),
        "settings": asdict(what.settings),
        "group": controller.config.group,
        "early": controller.config.early,
        "prompts": list(texts),
        "records": [asdict(record) for record in log],
    }


def curves(log: Sequence[Q2BRecord]) -> bytes:
    """Error, FAB and loss against the trajectory, drawn, as PNG."""
    figure = new_figure(_CURVES, 9, 3)
    titles = {"mse": "relative error", "fab": "FAB", "loss": "loss"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        axes.plot([record.trajectory for record in log], [getattr(record, name) for record in log], lw=1)
        axes.set_title(title)
        axes.set_xlabel("trajectory")
    found = io.BytesIO()
    # Without a date and a version: equal trainings, equal bytes.
    figure.savefig(found, format="png", dpi=100, metadata={"Software": None})
    return found.getvalue()
