"""The packed folder: round trip, size, and every way in which it can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins import load_backend, load_base_quantizer
from qlip_plugins.artefacts import read_tensors, write_tensors
from qlip_plugins.cli import main
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.packed import pack_codes, read_config, read_packed, unpack_codes, write_packed
from qlip_plugins.state import SAMPLED, CalibratedLayer, CalibratedState, WeightPart, weight_sample


@pytest.fixture
def folder(states: dict[str, CalibratedState], tmp_path: Path) -> Path:
    """A packed folder of the golden W4A8 and W4A16 files' quantizers, on the weights of W4A8."""
    return pack(states, tmp_path / "packed")


def pack(states: dict[str, CalibratedState], path: Path) -> Path:
    grids = {bits: states[case].activations for bits, case in ((8, "w4a8"), (16, "w4a16"))}
    write_packed(path, states["w4a8"].with_activations({}), grids, {"settings": {"seed": 3}}, "a test")
    return path


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (8, 4, 3, 3), (7,)])
def test_codes_are_packed_without_gaps(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    number = sum(int(code) << (bits * place) for place, code in enumerate(codes.flatten().tolist()))
    assert bytes(packed.tolist()) == number.to_bytes(-(-codes.numel() * bits // 8), "little")
    assert torch.equal(unpack_codes(packed, bits, shape), codes)


@pytest.mark.parametrize("bits", [8, 16])
def test_round_trip(folder: Path, states: dict[str, CalibratedState], bits: int) -> None:
    """Layers, grids and floats to the bit, and so the fingerprint of the same base in any other file."""
    found = read_packed(folder, bits)
    expected = states["w4a8"].with_activations(states[f"w4a{bits}"].activations)
    assert found.activations == expected.activations
    assert list(found.layers) == sorted(expected.layers)
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].dequantized(), layer.dequantized())
        assert found.layers[name].split == layer.split
    assert found.fingerprint == expected.fingerprint
    if bits == 8:
        assert found.fingerprint == states["w4a8"].fingerprint
    assert read_packed(folder, None).fingerprint == expected.with_activations({}).fingerprint


def test_a_fingerprint_does_not_depend_on_types_or_format(states: dict[str, CalibratedState]) -> None:
    state = states["w4a8"]
    layers = {}
    for name, layer in state.layers.items():
        parts = tuple(
            WeightPart(
                part.codes.to(torch.int32), part.scale.double(), part.zero_point.to(torch.int16), part.bits
            )
            for part in layer.weight
        )
        layers[name] = replace(layer, weight=parts)
    assert replace(state, format="other", layers=layers).fingerprint == state.fingerprint
    name, layer = next(iter(state.layers.items()))
    part = layer.weight[0]
    for changed in (
        replace(part, codes=part.codes ^ 1),
        replace(part, scale=part.scale * 1.000001),
        replace(part, zero_point=part.zero_point + 1),
        replace(part, bits=5),
    ):
        other = {**state.layers, name: replace(layer, weight=(changed,))}
        assert replace(state, layers=other).fingerprint != state.fingerprint
    assert state.with_activations({}).fingerprint != state.fingerprint


def test_outputs_are_those_of_the_state(
    folder: Path, states: dict[str, CalibratedState], model: GoldenModel
) -> None:
    outputs = []
    for state in (states["w4a8"], read_packed(folder, 8)):
        unet = model.unet()
        load_backend("torch").install(unet, state)
        with torch.no_grad():
            outputs.append(unet(**model.call(5)).sample)
    assert torch.equal(*outputs)


def test_it_is_small(folder: Path, states: dict[str, CalibratedState]) -> None:
    """Half a byte for each weight of 4 bits; the float weights are not there, samples of them are."""
    weights = sum(layer.dequantized().numel() for layer in states["w4a8"].layers.values())
    tensors = load_file(folder / "weights.safetensors")
    codes = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".codes"))
    assert weights / 2 <= codes < weights / 2 + len(states["w4a8"].layers) + 4
    assert max(t.numel() for n, t in tensors.items() if n.endswith(".sample")) == SAMPLED
    assert "conv_in.weight" not in tensors
    assert "conv_in.bias" in tensors


def test_another_model_s_weights_are_noticed(folder: Path, model: GoldenModel) -> None:
    """Though the float weights are not in the folder: a merged LoRA moves the samples of them."""
    state = read_packed(folder, 8)
    unet = model.unet()
    state.check_fits(unet)
    state.check_same_weights(unet.to(torch.bfloat16))
    unet = model.unet()
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    generator = torch.Generator().manual_seed(0)
    lora = torch.randn(len(weight), 1, generator=generator) @ torch.randn(
        1, weight.shape[1], generator=generator
    )
    with torch.no_grad():
        weight.add_(0.02 * lora)
    with pytest.raises(IncompatibleModelError, match=r"1 of \d+ tensors .*attn1\.to_q\.weight"):
        state.check_same_weights(unet)
    state.check_fits(unet)


def test_samples_are_strided() -> None:
    weight = torch.arange(1000.0).reshape(10, 100)
    assert weight_sample(weight).tolist() == [31.0 * place for place in range(32)]
    assert weight_sample(torch.zeros(3, 2)).shape == (6,)


def test_an_earlier_folder_is_replaced_others_are_not(
    folder: Path, states: dict[str, CalibratedState]
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pack(states, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "thesis.txt").write_text("")
    with pytest.raises(ArtefactError, match="thesis"):
        pack(states, folder)


def mixed_state(states: dict[str, CalibratedState], wide: tuple[str, ...]) -> CalibratedState:
    """The golden W4A8 with some layers' weights from the W8A8, and its shortcuts in floating point."""
    layers = {
        name: states["w8a8" if name in wide else "w4a8"].layers[name]
        for name in states["w4a8"].layers
        if not name.endswith("conv_shortcut")
    }
    return replace(states["w4a8"], layers=layers).with_activations({})


WIDE = ("conv_in", "up_blocks.1.resnets.0.conv1")


def test_mixed_widths_and_float_layers(
    states: dict[str, CalibratedState], model: GoldenModel, tmp_path: Path
) -> None:
    """A folder of version 2: each width read back, float layers among the parameters, equal outputs."""
    state = mixed_state(states, WIDE)
    grids = {
        name: g
        for name, g in states["w4a8"].activations.items()
        if name.partition(".skip")[0] in state.layers
    }
    config = write_packed(tmp_path / "out", state, {8: grids}, {}, "a test")
    assert (config.version, config.weight_bits) == (2, 4)
    found = read_packed(tmp_path / "out", 8)
    expected = state.with_activations(grids)
    assert found.fingerprint == expected.fingerprint
    assert {name for name, bits in found.weight_bits().items() if bits == 8} == set(WIDE)
    shortcut = "up_blocks.0.resnets.0.conv_shortcut.weight"
    assert torch.equal(found.float_parameters[shortcut], state.float_parameters[shortcut])
    outputs = []
    for one in (expected, found):
        unet = model.unet()
        load_backend("torch").install(unet, one)
        with torch.no_grad():
            outputs.append(unet(**model.call(0)).sample)
    assert torch.equal(*outputs)


def test_version_2_only_where_it_is_needed(
    folder: Path, states: dict[str, CalibratedState], tmp_path: Path
) -> None:
    """A uniform model is written as ever; floating-point products of attention, or two widths, are news."""
    path = folder / "weights.safetensors"
    assert read_config(folder).version == 1
    assert sorted(read_tensors(path, "qlip-plugins packed", 1)[1]) == ["format", "shapes", "version"]
    floating = states["w4"]
    assert write_packed(tmp_path / "weights", floating, {}, {}, "a test").version == 1
    inputs = {name: states["w4a8"].activations[name] for name in floating.layers}
    config = write_packed(
        tmp_path / "inputs", replace(floating, layers=unsplit(floating)), {8: inputs}, {}, "a test"
    )
    assert (config.version, config.activations[0].softmax_bits) == (2, None)
    assert not read_packed(tmp_path / "inputs", 8).operands


def unsplit(state: CalibratedState) -> dict[str, CalibratedLayer]:
    return {name: layer for name, layer in state.layers.items() if layer.split is None}


@pytest.mark.parametrize(("bits", "says"), [((4, 8), "weights of 4, 8 bits"), ((9, 9), "weights of 9 bits")])
def test_widths_that_no_folder_holds(
    bits: tuple[int, int], says: str, states: dict[str, CalibratedState], tmp_path: Path
) -> None:
    state = states["w4"]
    name, layer = next((name, layer) for name, layer in state.layers.items() if layer.split)
    parts = tuple(replace(part, bits=width) for part, width in zip(layer.weight, bits, strict=True))
    strange = replace(state, layers={**state.layers, name: CalibratedLayer(parts)})
    with pytest.raises(IncompatibleModelError, match=says):
        write_packed(tmp_path / "out", strange, {}, {}, "a test")
    with pytest.raises(IncompatibleModelError, match="no layer is quantized"):
        write_packed(tmp_path / "out", replace(state, layers={}), {}, {}, "a test")


def test_inspect_names_the_widths_apart(
    states: dict[str, CalibratedState], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_packed(tmp_path / "out", mixed_state(states, WIDE), {}, {}, "a test")
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["weight_bits"], found["quantized_layers"]) == (4, 78)
    assert found["details"]["other_weight_bits"] == dict.fromkeys(WIDE, 8)
    assert "softmax_bits" not in found["details"]


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["weight_bits"], found["activation_bits"]) == ("packed", 4, 8)
    assert (found["quantized_layers"], found["split_layers"]) == (83, 4)
    assert found["base"] == {"adapter": "packed", "folder": str(folder), "activation_bits": 8}
    assert found["notes"] == ["activation_bits: 16 is there, too"]
    assert found["details"]["softmax_bits"] == 16


# What can be wrong


@dataclass(frozen=True)
class Bad:
    """A folder made wrong by `change`, and what reading it at 8 bits should say."""

    says: str
    change: Callable[[Path], Any]


def edit_config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def edit_tensors(
    name: str, edit: Callable[[dict[str, Tensor], dict[str, Any]], Any]
) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        kind, version = "qlip-plugins packed", 1
        tensors, facts = read_tensors(folder / name, kind, version)
        edit(tensors, facts)
        others = {key: value for key, value in facts.items() if key not in ("format", "version")}
        write_tensors(folder / name, kind, version, tensors, **others)

    return change


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


W, A = "weights.safetensors", "activations-8.safetensors"
BAD = {
    "no folder": Bad("no such folder", lambda f: f.rename(f.with_name("elsewhere"))),
    "a file": Bad("is a file", lambda f: (f.rename(f.with_name("elsewhere")), f.write_text(""))),
    "no config": Bad("config.json: No such file", lambda f: (f / "config.json").unlink()),
    "config is no JSON": Bad("config.json: not JSON", lambda f: (f / "config.json").write_text("{")),
    "config is a list": Bad("expected a folder of", lambda f: (f / "config.json").write_text("[]")),
    "another format": Bad("found 'qlip-plugins controller'", edit_config(format="qlip-plugins controller")),
    "newer": Bad("written as version 4, this package reads up to 3", edit_config(version=4)),
    "older": Bad("config.json: version", edit_config(version=0)),
    "weight bits": Bad("config.json: weight_bits", edit_config(weight_bits=9)),
    "unknown key": Bad("unknown key", edit_config(colour="red")),
    "no such width": Bad("activation grids for 16. Name one", lambda f: edit_config(activations=one(f))(f)),
    "no width at all": Bad("activation grids for none", edit_config(activations=[])),
    "no weights": Bad("weights.safetensors: no such file", lambda f: (f / W).unlink()),
    "weights cut": Bad("weights.safetensors: damaged", cut(W)),
    "no activations": Bad("activations-8.safetensors: no such file", lambda f: (f / A).unlink()),
    "activations cut": Bad("activations-8.safetensors: damaged", cut(A)),
    "exchanged activations": Bad(
        "a file has been changed or exchanged",
        lambda f: (f / A).write_bytes((f / "activations-16.safetensors").read_bytes()),
    ),
    "wrong width of weights": Bad("holds no .* codes of 5 bits", edit_config(weight_bits=5)),
    "wrong width of a layer": Bad(
        "holds no .* codes of 7 bits", edit_tensors(W, lambda _, facts: facts.update(bits={"conv_in": 7}))
    ),
    "widths no map": Bad("the file is damaged", edit_tensors(W, lambda _, facts: facts.update(bits=[7]))),
    "a code": Bad("a file has been changed", edit_tensors(W, lambda t, _: t["conv_in.0.codes"].add_(1))),
    "a step": Bad("a file has been changed", edit_tensors(W, lambda t, _: t["conv_in.0.scale"].mul_(2))),
    "a bias": Bad("a file has been changed", edit_tensors(W, lambda t, _: t["conv_in.bias"].add_(1))),
    "NaN": Bad(
        "'conv_in.bias' holds 12 NaN", edit_tensors(W, lambda t, _: t["conv_in.bias"].fill_(torch.nan))
    ),
    "codes missing": Bad(
        "'conv_in.0.codes' is missing", edit_tensors(W, lambda t, _: t.pop("conv_in.0.codes"))
    ),
    "sample missing": Bad(
        "'conv_in.sample' is missing", edit_tensors(W, lambda t, _: t.pop("conv_in.sample"))
    ),
    "no shapes": Bad("'shapes' is missing", edit_tensors(W, lambda _, facts: facts.pop("shapes"))),
    "shapes no map": Bad("the file is damaged", edit_tensors(W, lambda _, facts: facts.update(shapes=[1]))),
    "too few steps": Bad(
        "the file is damaged", edit_tensors(W, lambda t, _: t.update({"conv_in.0.scale": torch.ones(3)}))
    ),
    "too few rows": Bad(
        "no table of activation grids", edit_tensors(A, lambda t, _: t.update(grids=t["grids"][1:]))
    ),
    "a zero step": Bad("has a step of 0", edit_tensors(A, lambda t, _: t["grids"][2].fill_(0))),
    "a renamed quantizer": Bad(
        "a file has been changed", edit_tensors(A, lambda _, facts: facts["quantizers"].reverse())
    ),
}


def one(folder: Path) -> list[Any]:
    tables: list[Any] = json.loads((folder / "config.json").read_text())["activations"]
    return [table for table in tables if table["bits"] == 16]


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_bad_folder(bad: Bad, folder: Path) -> None:
    bad.change(folder)
    adapter = load_base_quantizer("packed")
    config: Any = adapter.config_class
    with pytest.raises(ArtefactError, match=bad.says) as caught:
        adapter.load(config(folder=folder, activation_bits=8))
    assert str(folder) in str(caught.value)
