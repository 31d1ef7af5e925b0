from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins import fit_ranges, load_backend
from qlip_plugins.embeddings import PromptEmbeddings
from qlip_plugins.errors import ArtefactError, BitsError, RecipeError
from qlip_plugins.quantizer import fake_quantize
from qlip_plugins.recipe import Recipe
from qlip_plugins.state import CalibratedState


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).square().mean() / expected.square().mean())


def run_all(model: GoldenModel, unet: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([unet(**model.call(index), return_dict=False)[0] for index in range(6)])


@pytest.mark.parametrize("case", ["w4a8", "w8a8", "w4a16"])
def test_fitted_ranges_beat_kept_ones(
    model: GoldenModel, states: dict[str, CalibratedState], case: str
) -> None:
    """At few bits, where the range matters, on the whole UNet and at nearly every quantizer."""
    state, backend, unet = states[case], load_backend("torch"), model.unet()
    quantizers = backend.install(unet, state)
    seen: dict[str, Tensor] = {}
    for name, quantizer in quantizers.items():
        quantizer.observe(lambda x, name=name: seen.__setitem__(name, x.clone()))  # type: ignore[misc]
    run_all(model, unet)
    for quantizer in quantizers.values():
        quantizer.set_bits(32)
    exact = run_all(model, unet)
    ranges = fit_ranges(quantizers, state, (4, 8, 32), lambda: run_all(model, unet))
    quantizers.remove()
    quantizers = backend.install(unet, state, ranges)
    for quantizer in quantizers.values():
        quantizer.set_bits(4)
    fitted = relative_error(run_all(model, unet), exact)
    quantizers.remove()
    assert fitted < 0.6
    better = 0
    for name, x in seen.items():
        errors = []
        for grid in (ranges.fitted[name][4], state.activations[name].at_width(4)):
            values = (grid.scale, grid.zero_point, grid.low_code, grid.high_code)
            errors.append(relative_error(fake_quantize(x, *(torch.tensor(float(v)) for v in values)), x))
        better += errors[0] <= errors[1] * 1.05
    assert better / len(seen) > 0.9


def test_the_base_width_is_never_fitted(model: GoldenModel, states: dict[str, CalibratedState]) -> None:
    unet = model.unet()
    quantizers = load_backend("torch").install(unet, states["w4a8"])
    ranges = fit_ranges(quantizers, states["w4a8"], (8, 16, 32), lambda: run_all(model, unet))
    assert set(ranges.fitted["conv_in"]) == {16}
    softmax = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.softmax"
    assert set(ranges.fitted[softmax]) == {8}
    assert ranges.fingerprint == states["w4a8"].fingerprint
    again = fit_ranges(quantizers, states["w4a8"], (8, 16, 32), lambda: run_all(model, unet))
    assert again == ranges, "the same seed and inputs give the same ranges"


def test_a_quantizer_that_saw_nothing_is_named(
    model: GoldenModel, states: dict[str, CalibratedState]
) -> None:
    quantizers = load_backend("torch").install(model.unet(), states["w4a8"])
    with pytest.raises(BitsError, match="saw no two different values"):
        fit_ranges(quantizers, states["w4a8"], (4,), lambda: None)


def test_prompt_embeddings(tmp_path: Path) -> None:
    table = PromptEmbeddings(("cat", "dog", ""), torch.arange(12.0).reshape(3, 2, 2))
    table.save(tmp_path / "e.safetensors")
    again = PromptEmbeddings.load(tmp_path / "e.safetensors")
    assert torch.equal(again.of(["dog", "cat"]), table.states[[1, 0]])
    with pytest.raises(RecipeError, match="'catt' is not among the 3 precomputed ones; did you mean 'cat'"):
        again.of(["catt"])
    PromptEmbeddings(("a",), torch.zeros(2, 2, 2)).save(tmp_path / "bad.safetensors")
    with pytest.raises(ArtefactError, match="1 prompts with states of shape"):
        PromptEmbeddings.load(tmp_path / "bad.safetensors")


def test_the_shipped_ranges_belong_to_the_shipped_base(states: dict[str, CalibratedState]) -> None:
    from qlip_plugins.grids import Ranges

    section = Recipe.load("golden-w4a8").ranges
    assert section is not None
    assert section.table is not None
    assert Ranges.load(section.table).fingerprint == states["w4a8"].fingerprint
