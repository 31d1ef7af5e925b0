"""T2Q and Q2B against the equations of the method, written out one number at a time."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.q2b import Q2B, choose
from qlip_plugins.recipe import ActivationBits
from qlip_plugins.t2q import T2Q
from qlip_plugins.text_to_bits import TextToBits, TextToBitsConfig

MENU = ActivationBits(low=8, medium=16, high=32)


def schedule(steps: int) -> tuple[float, ...]:
    """The timesteps that PNDM and DDIM visit in so many steps (leading spacing, offset 1)."""
    return tuple(float(i * (1000 // steps) + 1) for i in reversed(range(steps)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def equations(
    q: float, s: float, o: float, p_m: float, p_h: float, early: bool
) -> tuple[float, float, float]:
    p_q = 1.0 if early else sigmoid((q - 0.5) * s + o)
    return (1 - p_q) * (1 - p_m), (1 - p_q) * p_m + p_q * (1 - p_h), p_q * p_h


def random_q2b(layers: int = 3, steps: int = 10, group: int = 3, early: int = 2, seed: int = 0) -> Q2B:
    q2b = Q2B(layers, schedule(steps), group, early).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in q2b.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 2)
    return q2b


@torch.no_grad()
def test_probabilities_are_the_equations() -> None:
    q2b = random_q2b()
    timesteps = schedule(10)
    qualities = [0.0, 0.31, 1.0]
    found = q2b(torch.tensor(qualities, dtype=torch.float64), timesteps)
    assert found.shape == (3, 10, 3, 3)
    for n, step, k in itertools.product(range(3), range(10), range(3)):
        group = step // 3
        expected = equations(
            qualities[n],
            float(q2b.slope[k]),
            float(q2b.offset[k]),
            sigmoid(float(q2b.medium_logit[group, k])),
            sigmoid(float(q2b.high_logit[group, k])),
            early=step < 2,
        )
        assert found[n, step, k].tolist() == pytest.approx(expected, abs=1e-12)
        assert float(found[n, step, k].sum()) == pytest.approx(1)


def test_the_choice_is_two_thresholds_on_quality() -> None:
    """docs/method.md: low iff ..., high iff ..., else medium; 20,000 random cases."""
    draw = random.Random(0)
    for _ in range(20_000):
        a, b, x = draw.random(), draw.random(), draw.uniform(-6, 6)
        r = math.exp(x)
        low = a < 0.5 and r < (1 - 2 * a) / (1 - b) and r < (1 - a) / b
        high = b > 0.5 and r > a / (2 * b - 1) and r >= (1 - a) / b
        p_q = r / (1 + r)
        probabilities = [(1 - p_q) * (1 - a), (1 - p_q) * a + p_q * (1 - b), p_q * b]
        index = int(choose(torch.tensor(probabilities, dtype=torch.float64)))
        assert index == (0 if low else 2 if high else 1)


def test_neutral_start_is_medium_everywhere() -> None:
    timesteps = schedule(10)
    q2b = Q2B(4, timesteps, early=3)
    for quality in (0.0, 0.5, 1.0):
        assert bool((choose(q2b(torch.tensor([quality]), timesteps)) == 1).all())


def test_bits_rise_with_quality_where_the_slope_is_positive() -> None:
    q2b = random_q2b(layers=40)
    with torch.no_grad():
        q2b.slope.abs_()
    qualities = torch.linspace(-1, 2, 200, dtype=torch.float64)
    chosen = choose(q2b(qualities, (501.0, 1.0)))
    assert bool((chosen.diff(dim=0) >= 0).all())
    assert chosen.unique().tolist() == [0, 1, 2]


def test_the_first_steps_exclude_the_low_width() -> None:
    q2b = random_q2b(layers=50, early=4)
    timesteps = schedule(10)
    chosen = choose(q2b(torch.linspace(0, 1, 20, dtype=torch.float64), timesteps))
    assert int(chosen[:, :4].min()) >= 1
    assert int(chosen[:, 4:].min()) == 0


@pytest.mark.parametrize("steps", [1, 7, 15, 28, 30, 50])
def test_on_its_own_schedule_each_step_is_its_own(steps: int) -> None:
    q2b = Q2B(1, schedule(steps))
    assert [q2b.step_of(t) for t in schedule(steps)] == list(range(steps))


@pytest.mark.parametrize("steps", [5, 10, 25, 50])
def test_another_schedule_takes_the_nearest_step(steps: int) -> None:
    own = schedule(20)
    q2b = Q2B(1, own)
    found = [q2b.step_of(t) for t in schedule(steps)]
    assert found == sorted(found)
    assert all(abs(own[step] - t) <= 50 for step, t in zip(found, schedule(steps), strict=True))
    assert Q2B(1, (10.0, 0.0)).step_of(5.0) == 0, "of two equally near the earlier"


def test_bad_sizes_are_refused() -> None:
    for layers, steps, group, early in ((0, 10, 1, 0), (3, 0, 1, 0), (3, 10, 11, 0), (3, 10, 1, 11)):
        with pytest.raises(ValueError, match="need layers >= 1"):
            Q2B(layers, schedule(steps), group, early)


def test_t2q_shape() -> None:
    assert T2Q(7, hidden=5)(torch.zeros(3, 7)).shape == (3,)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in T2Q(7).modules()) == 3


def config(**changes: object) -> TextToBitsConfig:
    options = {
        "embedding_dim": 6,
        "pooling": "mean",
        "hidden": 8,
        "menu": MENU,
        "layers": ("a", "b"),
        "timesteps": [901.0, 601.0, 301.0, 1.0],
        "base_fingerprint": "f" * 64,
        "origin": "test",
    }
    return TextToBitsConfig.model_validate(options | changes)


def controller(seed: int = 0) -> TextToBits:
    torch.manual_seed(seed)
    model = TextToBits(config())
    with torch.no_grad():
        for parameter in model.q2b.parameters():
            parameter.normal_()  # untied thresholds
        model.q2b.slope.fill_(20)
        last: Any = model.t2q.layers[-1]
        last.weight.mul_(20)
        last.bias.fill_(0.5)
    return model


def test_decisions_do_not_depend_on_batch_or_order() -> None:
    model = controller()
    embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)) * 3
    timesteps = (901.0, 601.0, 301.0, 1.0)
    together = model.plan(embeddings, timesteps)
    assert len(together.bits.unique()) > 1
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    shuffled = model.plan(embeddings[order], timesteps)
    assert torch.equal(shuffled.bits, together.bits[order])
    for index in range(40):
        assert torch.equal(model.plan(embeddings[index : index + 1], timesteps).bits[0], together.bits[index])


def test_a_controller_is_a_folder(tmp_path: Path) -> None:
    model = controller()
    model.save_pretrained(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]
    again = TextToBits.from_pretrained(tmp_path / "c")
    assert again.config == model.config
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert again.plan(z, (501.0,)).digest() == model.plan(z, (501.0,)).digest()
    model.save_pretrained(tmp_path / "c")  # replaces its own earlier folder


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "precious"},
        {"config.json": '{"model_type": "bert"}', "pytorch_model.bin": "weights"},
        {"config.json": '{"model_type": "bert"}'},
        {"config.json": '{"format": "qlip-plugins controller"}', "notes.md": "mine"},
    ],
)
def test_other_people_s_folders_are_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ArtefactError, match="which was not written by this command"):
        controller().save_pretrained(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == files
    assert list(tmp_path.iterdir()) == [folder]


def test_loading_and_planning_draw_no_random_numbers(tmp_path: Path) -> None:
    """Pictures drawn with the global generator would differ from those of the same plan given as a table."""
    controller().save_pretrained(tmp_path / "c")
    before = torch.get_rng_state()
    TextToBits.from_pretrained(tmp_path / "c").plan(torch.zeros(2, 6), (1.0,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, f: (f / "config.json").unlink(), "No such file"),
        (lambda c, f: (f / "config.json").write_text("{"), "not JSON|not a controller"),
        (lambda c, f: (f / "config.json").write_text(json.dumps(c | {"version": 2})), "version"),
        (lambda c, f: (f / "config.json").write_text(json.dumps(c | {"stepz": 4})), "unknown key"),
        (
            lambda c, f: (f / "config.json").write_text(json.dumps(c | {"hidden": 9})),
            "does not fit config.json",
        ),
        (
            lambda c, f: (f / "config.json").write_text(json.dumps(c | {"group": 9})),
            "group and early cannot exceed",
        ),
        (lambda c, f: (f / "model.safetensors").unlink(), "missing or damaged"),
        (lambda c, f: (f / "model.safetensors").write_bytes(b"x" * 100), "missing or damaged"),
    ],
)
def test_a_damaged_controller_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    folder = tmp_path / "c"
    controller().save_pretrained(folder)
    damage(json.loads((folder / "config.json").read_text()), folder)  # type: ignore[operator]
    with pytest.raises(ArtefactError, match=message):
        TextToBits.from_pretrained(folder)


def test_a_controller_with_nan_is_refused(tmp_path: Path) -> None:
    model = controller()
    model.save_pretrained(tmp_path / "c")
    with torch.no_grad():
        model.q2b.slope[0] = float("nan")
    with pytest.raises(ArtefactError, match=r"q2b\.slope.*NaN"):
        model.save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    save_file(model.state_dict(), tmp_path / "c" / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"q2b\.slope.*NaN"):
        TextToBits.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize(
    ("fingerprint", "menu", "layers", "message"),
    [
        ("e" * 64, MENU, ("a", "b"), "was made on the base ffffffffffff"),
        ("f" * 64, ActivationBits(low=4, medium=6, high=8), ("a", "b"), "made for the widths"),
        ("f" * 64, MENU, ("a", "b", "c"), "steers 2 quantizers, the recipe 3"),
    ],
)
def test_another_base_is_refused(
    fingerprint: str, menu: ActivationBits, layers: tuple[str, ...], message: str
) -> None:
    controller().check_made_for("f" * 64, MENU, ("a", "b"))
    with pytest.raises(IncompatibleModelError, match=message):
        controller().check_made_for(fingerprint, menu, layers)


def test_the_order_of_quantizers_matters_only_where_costs_are_shared() -> None:
    controller().check_made_for("f" * 64, MENU, ("b", "a"))
    controller().check_order(("a", "b"))
    with pytest.raises(IncompatibleModelError, match="in another order than this base"):
        controller().check_order(("b", "a"))
