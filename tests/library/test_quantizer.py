from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qlip_plugins.errors import ArtefactError, BitsError
from qlip_plugins.grids import ActGrid, GridChoice, Ranges
from qlip_plugins.quantizer import (
    choose_widths,
    fake_quantize,
    fake_quantize_with_step,
    round_straight_through,
)


def written_out(value: float, grid: ActGrid) -> float:
    """The formula of docs/method.md for one value, in float32 steps, without tensors' broadcasting."""
    step = torch.tensor(grid.scale)
    rounded = float(torch.round(torch.tensor(value) / step)) + grid.zero_point
    code = min(max(rounded, grid.low_code), grid.high_code)
    return float((torch.tensor(code) - grid.zero_point) * step)


GRIDS = [
    ActGrid.asymmetric(8, 0.02, 37),
    ActGrid.asymmetric(4, -0.3, 7),
    ActGrid.asymmetric(16, 1e-4, 31000),
    ActGrid.symmetric(8, 0.05),
    ActGrid.symmetric(4, 0.5, 3),
    ActGrid.asymmetric(3, 0.4, -2),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_fake_quantize_is_the_formula(grid: ActGrid) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 4
    values = (grid.scale, grid.zero_point, grid.low_code, grid.high_code)
    found = fake_quantize(x, *(torch.tensor(float(value)) for value in values))
    assert found.tolist() == [written_out(value, grid) for value in x.tolist()]


def test_ties_round_to_even() -> None:
    x, one, zero = torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0), torch.tensor(8.0)
    found = fake_quantize(x, one, zero, torch.tensor(0.0), torch.tensor(15.0))
    assert found.tolist() == [0.0, 2.0, 2.0, 0.0]


def test_half_precision_holds_sixteen_bit_codes() -> None:
    x = torch.tensor([1.0, 0.25], dtype=torch.float16)
    found = fake_quantize(
        x, torch.tensor(2.0**-15), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(65535.0)
    )
    assert found.dtype == torch.float16
    assert torch.equal(found, x)


def test_gradients_pass_inside_the_range_only() -> None:
    x = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
    fake_quantize(
        x, torch.tensor(0.1), torch.tensor(10.0), torch.tensor(0.0), torch.tensor(20.0)
    ).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_straight_through() -> None:
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    y = round_straight_through(x)
    assert y.tolist() == [0.0, 2.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0]


CHOICES = (ActGrid.asymmetric(4, 0.31, 7), ActGrid.asymmetric(6, 0.08, 30), None)
"""Grids of three widths; None is 32 bits."""


def by_autograd(
    x: Tensor, probabilities: Tensor, chosen: list[int], choices: Sequence[ActGrid | None]
) -> Tensor:
    """sum_b onehot_b Q_b(x), differentiated as sum_b p_b Q_b(x), operation by operation."""
    quantized = [
        x
        if grid is None
        else fake_quantize(
            x, *map(torch.tensor, (grid.scale, grid.zero_point, grid.low_code, grid.high_code))
        )
        for grid in choices
    ]
    hard = torch.stack([quantized[choice][row] for row, choice in enumerate(chosen)])
    shares = probabilities.reshape(len(probabilities), -1, *[1] * (x.ndim - 1))
    soft = torch.stack([shares[:, index] * one for index, one in enumerate(quantized)]).sum(0)
    return hard.detach() + (soft - soft.detach())


@pytest.mark.parametrize("choices", [CHOICES, CHOICES[:2], CHOICES[:1]])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_choice_of_widths_has_the_gradients_of_its_mixture(
    choices: Sequence[ActGrid | None], rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Many beyond the range, and many on its last codes.
    values = torch.randn(3, 5, 40, generator=generator) * 2
    weight = torch.randn(values.shape, generator=generator)
    start = torch.rand(rows, len(choices), generator=generator).softmax(-1)
    chosen = [row % len(choices) for row in range(3)]
    grids = [grid or ActGrid.asymmetric(2, 1.0, 0) for grid in choices]

    def column(name: str) -> Tensor:
        return torch.tensor([float(getattr(grid, name)) for grid in grids]).reshape(-1, 1, 1, 1)

    table = (column("scale"), column("zero_point"), column("low_code"), column("high_code"))
    kept = torch.tensor([grid is None for grid in choices]).reshape(-1, 1, 1, 1)
    found = []
    for ours in (True, False):
        x, p = values.clone().requires_grad_(), start.clone().requires_grad_()
        expected = by_autograd(x, p, chosen, choices)
        hard = expected.detach()
        out = choose_widths(hard, x, p, table, kept) if ours else expected
        assert torch.equal(out, hard)
        (out * weight).sum().backward()
        assert x.grad is not None
        assert p.grad is not None
        found.append((x.grad, p.grad))
    (x_ours, p_ours), (x_theirs, p_theirs) = found
    assert torch.allclose(x_ours, x_theirs, rtol=1e-6, atol=1e-6 * float(x_theirs.abs().max()))
    # A sum of many terms, whose rounding is that of their sizes.
    terms = float((weight * values).abs().sum())
    assert torch.allclose(p_ours, p_theirs, rtol=1e-6, atol=1e-7 * terms)


def test_a_choice_of_widths_keeps_one_tensor_of_activations() -> None:
    sizes: list[int] = []
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grid = tuple(torch.tensor([0.1, 0.01]).reshape(-1, 1, 1) + shift for shift in (0.0, 5.0, 0.0, 15.0))

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        choose_widths(x.detach(), x, torch.full((2, 2), 0.5, requires_grad=True), grid)  # type: ignore[arg-type]
    assert sorted(sizes) == [4, 600]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_kept_range_keeps_its_ends(grid: ActGrid) -> None:
    for bits in (4, 8, 12):
        other = grid.at_width(bits)
        assert other.bits == bits
        step = abs(other.scale)
        assert abs(other.low - grid.low) <= step
        assert abs(other.high - grid.high) <= step
        assert other.scale > 0 or bits == grid.bits


def test_widths_and_their_grids() -> None:
    base = ActGrid.asymmetric(8, 0.02, 128)
    fitted = ActGrid.asymmetric(4, 0.1, 8)
    choice = GridChoice("layer", base, Ranges({"layer": {4: fitted}}))
    assert choice.grid(8) is base
    assert choice.grid(4) is fitted
    assert choice.grid(32) is None
    assert choice.grid(16) == base.at_width(16)
    for bad in (1, 33, 0, -8):
        with pytest.raises(BitsError, match="expected 2 to 32"):
            choice.grid(bad)


def on(grid: ActGrid, x: torch.Tensor) -> torch.Tensor:
    values = (grid.scale, grid.zero_point, grid.low_code, grid.high_code)
    return fake_quantize(x, *(torch.tensor(float(value)) for value in values))


def test_a_range_that_loses_the_signal_is_refused_unless_asked_for() -> None:
    """A 16-bit range that training drove far too wide makes 8 bits inside it useless."""
    wide = ActGrid.asymmetric(16, 2e-3, 32768)
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 0.1
    quantized = on(wide.at_width(8), x)
    choice = GridChoice("down.conv1", wide, Ranges())
    with pytest.raises(
        BitsError, match=r"down\.conv1: 8 bits inside the calibrated range .* lose .* of the signal"
    ):
        choice.judge(8, x, quantized, on(wide, x))
    kept = GridChoice("down.conv1", wide, Ranges(keep_calibrated=True))
    kept.judge(8, x, quantized, on(wide, x))
    seen, clipped, zeroed = kept.losses()[8]
    assert (seen, clipped) == (4000, 0)
    assert zeroed == int(((x != 0) & (quantized == 0)).sum()) > 3000


def test_a_row_is_judged_by_itself() -> None:
    wide = ActGrid.asymmetric(16, 2e-3, 32768)
    x = torch.stack([torch.full((8,), 40.0), torch.full((8,), 0.1)])
    quantized = on(wide.at_width(8), x)
    with pytest.raises(BitsError, match="lose 100% of the signal"):
        GridChoice("layer", wide, Ranges()).judge(8, x, quantized, on(wide, x))
    GridChoice("layer", wide, Ranges()).judge(8, x[:1], quantized[:1], on(wide, x[:1]))


def test_what_the_base_width_loses_too_is_not_held_against_a_width() -> None:
    """A negative step with zero point 0 clips all positive values, at the base width already."""
    flipped = ActGrid.asymmetric(8, -0.01, 0)
    x = torch.rand(2, 100, generator=torch.Generator().manual_seed(0))
    assert bool((on(flipped, x) == 0).all())
    GridChoice("layer", flipped, Ranges()).judge(16, x, on(flipped.at_width(16), x), on(flipped, x))


def test_only_a_kept_range_needs_a_look() -> None:
    base = ActGrid.asymmetric(8, 0.02, 128)
    choice = GridChoice("layer", base, Ranges({"layer": {4: base.at_width(4)}}))
    assert [choice.is_sound(bits) for bits in (4, 8, 16, 32)] == [True, True, False, True]


def test_ranges_come_back_as_they_were_saved(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "r.safetensors"
    ranges = Ranges(
        {"a": {4: ActGrid.asymmetric(4, 0.1, 8), 16: ActGrid.asymmetric(16, 1e-5, 0)}, "b": {}},
        fingerprint="f",
    )
    ranges.save(path)
    assert Ranges.load(path) == ranges
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="damaged"):
        Ranges.load(path)
    with pytest.raises(ArtefactError, match="no such file"):
        Ranges.load(path.with_name("other.safetensors"))


@pytest.mark.parametrize("top", [15, 255, 65535])
def test_with_step_is_fake_quantize(top: int) -> None:
    """Values to the bit; the gradients of input and scale are those that autograd finds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, generator=generator)
    code = (x / (4.0 / top)).round() + top // 3
    x = x[(code != 0) & (code != top)]  # on the last codes torch halves the gradient
    weights = torch.randn(len(x), generator=generator)
    found = []
    for form in ("plain", "with step"):
        leaf, scale = x.clone().requires_grad_(), torch.tensor(4.0 / top).requires_grad_()
        zero_point = torch.tensor(float(top // 3))
        if form == "plain":
            out = fake_quantize(leaf, scale, zero_point, torch.tensor(0.0), torch.tensor(float(top)))
        else:
            out = fake_quantize_with_step(leaf, scale, zero_point, top)
        (out * weights).sum().backward()
        assert leaf.grad is not None
        assert scale.grad is not None
        found.append((out.detach(), leaf.grad, scale.grad))
    plain, with_step = found
    assert torch.equal(plain[0], with_step[0])
    assert torch.allclose(plain[1], with_step[1], rtol=1e-5, atol=0)
    assert int((plain[1] == 0).sum()) > 20
    assert float(with_step[2]) == pytest.approx(float(plain[2]), rel=1e-4)
