from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip_plugins import BitPlan
from qlip_plugins.errors import ArtefactError, BitsError

LAYERS = ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1", "up_blocks.1.resnets.0.conv1")


def plan() -> BitPlan:
    bits = torch.tensor([[[8, 16, 32], [8, 8, 16]], [[32, 32, 32], [16, 16, 16]]], dtype=torch.uint8)
    return BitPlan(bits, (901.0, 1.5), LAYERS, (0.1, 0.9))


def test_look_up_by_timestep() -> None:
    assert plan().at(1.5).tolist() == [[8, 8, 16], [16, 16, 16]]
    with pytest.raises(BitsError, match=r"timestep 2 is not in the plan \(2 timesteps: 901, 1\.5"):
        plan().at(2.0)
    assert plan().fab() == [(8 + 16 + 32 + 8 + 8 + 16) / 6, 24.0]


def test_saved_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    plan().save(path)
    again = BitPlan.load(path)
    assert torch.equal(again.bits, plan().bits)
    assert (again.timesteps, again.layers, again.quality) == (plan().timesteps, plan().layers, plan().quality)
    assert again.digest() == plan().digest()
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_the_digest_is_of_the_decisions() -> None:
    other = plan()
    assert BitPlan(other.bits, other.timesteps, LAYERS).digest() == other.digest()
    changed = other.bits.clone()
    changed[0, 0, 0] = 16
    assert BitPlan(changed, other.timesteps, LAYERS).digest() != other.digest()
    assert BitPlan(other.bits, (901.0, 2.0), LAYERS).digest() != other.digest()


@pytest.mark.parametrize(
    ("bits", "timesteps", "layers", "message"),
    [
        (torch.full((1, 2, 2), 8, dtype=torch.uint8), (1.0, 2.0), LAYERS, "a plan of shape"),
        (torch.full((2, 3), 8, dtype=torch.uint8), (1.0, 2.0), LAYERS, "a plan of shape"),
        (torch.full((1, 2, 3), 1, dtype=torch.uint8), (1.0, 2.0), LAYERS, "widths 1 to 1"),
        (torch.full((1, 2, 3), 64, dtype=torch.uint8), (1.0, 2.0), LAYERS, "widths 64 to 64"),
        (torch.full((1, 2, 3), 8, dtype=torch.uint8), (1.0, 1.0), LAYERS, "each timestep once"),
    ],
)
def test_impossible_plans(
    bits: torch.Tensor, timesteps: tuple[float, ...], layers: tuple[str, ...], message: str
) -> None:
    with pytest.raises(BitsError, match=message):
        BitPlan(bits, timesteps, layers)


def test_damaged_plans(tmp_path: Path) -> None:
    from qlip_plugins.grids import Ranges

    Ranges(fingerprint="x").save(tmp_path / "r.safetensors")
    with pytest.raises(
        ArtefactError, match="expected a file of 'qlip-plugins plan', found 'qlip-plugins ranges'"
    ):
        BitPlan.load(tmp_path / "r.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="damaged or not safetensors"):
        BitPlan.load(tmp_path / "x.safetensors")


def test_the_picture_shows_steps_across_and_layers_down() -> None:
    image = np.asarray(plan().draw(0, "a title"))
    colours = {tuple(c) for c in image.reshape(-1, 3)}
    assert len(colours) >= 3
    second = np.asarray(plan().draw(1))
    assert not np.array_equal(image[60:70, 150:], second[60:70, 150 : image.shape[1]])
    assert isinstance(plan().draw(), Image.Image)


def test_equal_plans_are_equal_files_with_the_usual_permissions(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plan().save(first)
    plan().save(second)
    (tmp_path / "usual").touch()
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_one_prompt_of_a_plan() -> None:
    one = plan().only(1)
    assert (one.prompts, one.quality) == (1, (0.9,))
    assert torch.equal(one.bits[0], plan().bits[1])
    with pytest.raises(BitsError, match="asked for prompt 1"):
        one.draw(1)
