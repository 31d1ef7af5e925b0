"""Damaged, foreign and contradictory PTQD files: each its own message, with the file and the point named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden_model import GoldenModel
from qlip_plugins import load_base_quantizer
from qlip_plugins.adapter import BASE_QUANTIZERS, Inspection, installed
from qlip_plugins.calibration.grid_search import search_grid
from qlip_plugins.cli import main
from qlip_plugins.errors import ArtefactError, ForeignFormatError, IncompatibleModelError, RecipeError
from qlip_plugins.recipe import Recipe
from qlip_plugins.state import CalibratedState

Tensors = dict[str, Tensor]
FINAL = "quantw4a8_ldm_brecq.pth"
FIRST_STAGE = "quantw4_ldm_brecq.pth"
NAMELESS = "renamed.pth"
BATCH = "act_init_batch.safetensors"
SIDE = "quantizers.json"

CONV = "model.input_blocks.1.0.in_layers.2"
ALPHA = f"{CONV}.weight_quantizer.alpha"
DELTA = f"{CONV}.act_quantizer.delta"
STEP = f"{CONV}.act_quantizer"
FIRST = "model.time_embed.0"


def drop(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def put(name: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: value}


def poked(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[0] = value
        return tensors

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def learned_on_the_first(tensors: Tensors) -> Tensors:
    return {**tensors, f"{FIRST}.weight_quantizer.alpha": torch.ones_like(tensors[f"{FIRST}.weight"])}


def channel_wise(tensors: Tensors) -> Tensors:
    """Roundings as a run with one step a channel would start from."""
    for name in [name for name in tensors if name.endswith("weight_quantizer.alpha")]:
        weight = tensors[name.replace("weight_quantizer.alpha", "weight")]
        rows = weight.flatten(1)
        scale, _ = search_grid(rows, rows.amin(1), rows.amax(1), 4)
        ratio = rows / scale[:, None]
        tensors[name] = (ratio - ratio.floor() - 0.5).reshape(weight.shape)
    return tensors


def some(tensors: Tensors) -> Tensors:
    """Three layers, with all that belongs to them."""
    kept = (FIRST, "model.time_embed.2", CONV)
    return {name: tensor for name, tensor in tensors.items() if name.startswith(kept)}


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def entry(name: str, **change: Any) -> Callable[[Any], Any]:
    """Change an entry of the side file; None takes a key away."""

    def edit(data: Any) -> Any:
        facts = {**data["quantizers"][name], **change}
        data["quantizers"][name] = {key: value for key, value in facts.items() if value is not ...}
        return data

    return edit


def without_facts(*keys: str) -> Callable[[Any], Any]:
    def edit(data: Any) -> Any:
        for facts in data["quantizers"].values():
            for key in keys:
                facts.pop(key, None)
        return data

    return edit


def far_out(data: Any) -> Any:
    """Every zero point beyond 8 bits."""
    for name, facts in data["quantizers"].items():
        if name.endswith(".act_quantizer"):
            facts["zero_point"] += 256
    return data


def only(*names: str) -> Callable[[Any], Any]:
    return lambda data: {"quantizers": {name: data["quantizers"][name] for name in names}}


def without_entry(data: Any) -> Any:
    del data["quantizers"][STEP]
    return data


def with_entry(data: Any) -> Any:
    data["quantizers"]["model.elsewhere.act_quantizer"] = {"zero_point": 1}
    return data


def elsewhere(data: Any) -> Any:
    """As of another model: all modules have other names."""
    return {"quantizers": {name.replace("blocks", "parts"): f for name, f in data["quantizers"].items()}}


@dataclass
class Bad:
    """A golden file after an edit, the options it is read with, and what is said of it."""

    says: str
    tensors: Callable[[Tensors], Any] | None = None
    bytes_: Callable[[bytes], bytes] | None = None
    source: str = f"w4a8/{FINAL}"
    name: str = FINAL
    points: bool = True
    side: Callable[[Any], Any] | None = None
    side_bytes: bytes | None = None
    options: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] = ArtefactError
    at: str | None = None
    """The file that must be named; None: the checkpoint."""


FOREIGN = ForeignFormatError
BAD: dict[str, Bad] = {
    # widths
    "recipe says W8": Bad(
        "weight_bits: the recipe says 8, the file's name says 4", options={"weight_bits": 8}
    ),
    "recipe says W8, no name": Bad(
        "weight_bits is given as 8, the rounding of the weights fits 4",
        name=NAMELESS,
        options={"weight_bits": 8, "activation_bits": 8},
    ),
    "recipe says W3, no name": Bad(
        "weight_bits is given as 3, .* fits 4", name=NAMELESS, options={"weight_bits": 3}
    ),
    "name says W8": Bad("weight_bits is given as 8, .* fits 4", name="quantw8a8_ldm_brecq.pth"),
    "name of W8 says W4": Bad(
        "weight_bits is given as 4, .* fits 8", source="w8a8/quantw8a8_ldm_brecq.pth", points=False
    ),
    "one step a channel": Bad(
        "weight_bits is given as 4, .* fits no width from 2 to 8, with one step a layer", tensors=channel_wise
    ),
    "one step a channel, no name": Bad(
        r"weight_bits is unknown: .*\(their rounding fits no width.*Set base.weight_bits",
        tensors=channel_wise,
        name=NAMELESS,
    ),
    "recipe says A6": Bad(
        "activation_bits: the recipe says 6, the file's name says 8, the zero points are of 8",
        options={"activation_bits": 6},
    ),
    "recipe says A16, no name": Bad(
        "activation_bits: the recipe says 16, the zero points are of 8",
        name=NAMELESS,
        options={"activation_bits": 16},
    ),
    "name says A6": Bad(
        "activation_bits: the file's name says 6, the zero points are of 8", name="quantw4a6_ldm_brecq.pth"
    ),
    "no width of the activations": Bad(
        "activation_bits is unknown: .*Set base.activation_bits", name=NAMELESS, side=without_facts("n_bits")
    ),
    "A6, and nothing but the codes tells": Bad(
        r"at 6 bits the zero point \d+ of .* lies beyond the last code",
        name=NAMELESS,
        side=without_facts("n_bits"),
        options={"activation_bits": 6},
        at=SIDE,
    ),
    "A8 of a first stage": Bad(
        "activation_bits is given as 8, the file is of the first stage",
        source=f"w4a8/{FIRST_STAGE}",
        name=FIRST_STAGE,
        points=False,
        options={"activation_bits": 8},
    ),
    "zero points of a first stage": Bad(
        "first stage holds weights only, so zero points have no use",
        source=f"w4a8/{FIRST_STAGE}",
        name=FIRST_STAGE,
    ),
    "batch of a first stage": Bad(
        "first stage holds weights only, so zero points have no use",
        source=f"w4a8/{FIRST_STAGE}",
        name=FIRST_STAGE,
        points=False,
        options={"calibration_inputs": BATCH},
    ),
    "no zero points": Bad(
        "does not hold the zero points .*base.calibration_inputs, the batch .*base.zero_points, a JSON file"
        ".*activation_bits: null",
        points=False,
    ),
    # the file
    "empty file": Bad("the file is empty", bytes_=lambda data: b""),
    "truncated": Bad("truncated or not a torch checkpoint", bytes_=lambda data: data[: len(data) // 2]),
    "truncated by a byte": Bad("truncated or not a torch checkpoint", bytes_=lambda data: data[:-1]),
    "code inside": Bad("refused, the file holds more than tensors", tensors=lambda t: {"a": Payload()}),
    # another format
    "empty dict": Bad("the state dict is empty", tensors=lambda t: {}),
    "a list": Bad("expected a state dict, found a list", tensors=lambda t: list(t.values())),
    "Q-Diffusion": Bad(
        "a Q-Diffusion checkpoint, not one of PTQD: it holds",
        source="../qdiffusion/w4a8/ckpt.pth",
        error=FOREIGN,
    ),
    "Q-Diffusion, weights only": Bad(
        "a Q-Diffusion checkpoint", source="../qdiffusion/w4/ckpt.pth", error=FOREIGN
    ),
    "Q-Diffusion, in mid-run": Bad(
        "'model.input_blocks.3.0.op' has a quantizer, but PTQD quantizes no such layer",
        tensors=lambda t: {**t, "model.input_blocks.3.0.op.weight_quantizer.alpha": torch.ones(1)},
        error=FOREIGN,
    ),
    "CompVis level": Bad("stand under the key 'state_dict'", tensors=lambda t: {"state_dict": t}),
    "CompVis names": Bad(
        "a CompVis float model", tensors=renamed("model.", "model.diffusion_model."), error=FOREIGN
    ),
    "diffusers": Bad(
        "'conv_in.weight' does not start with 'model.'",
        tensors=lambda t: {"conv_in.weight": t["model.input_blocks.0.0.weight"]},
        error=FOREIGN,
    ),
    "float model": Bad("no 'weight_quantizer.alpha'", tensors=drop("quantizer"), error=FOREIGN),
    # the tensors
    "NaN": Bad(f"tensor '{CONV}.weight' holds 1 NaN", tensors=poked(f"{CONV}.weight", float("nan"))),
    "infinite step": Bad(f"tensor '{DELTA}' holds 1 NaN or inf", tensors=poked(DELTA, float("inf"))),
    "integers": Bad(
        f"tensor '{CONV}.weight' is torch.int8, expected a floating type",
        tensors=put(f"{CONV}.weight", torch.ones(12, 12, 3, 3, dtype=torch.int8)),
    ),
    "no rounding": Bad(f"'{ALPHA}' is missing .1 such layers.", tensors=drop(ALPHA)),
    "rounding of another shape": Bad(
        rf"'{CONV}.weight' is \(12, 12, 3, 3\), its rounding is \(12, 12\)",
        tensors=put(ALPHA, torch.ones(12, 12)),
    ),
    "rounding at 8 bits": Bad(
        f"'{FIRST}' has a learned rounding, .*first, third and last", tensors=learned_on_the_first
    ),
    "other order": Bad(
        "weight_quantizer.alpha' is missing .*or its tensors were re-ordered",
        tensors=lambda t: dict(reversed(list(t.items()))),
    ),
    "sorted by name": Bad("or its tensors were re-ordered", tensors=lambda t: dict(sorted(t.items()))),
    "no step": Bad(rf"'{DELTA}' is missing while other layers have one \(1 missing\)", tensors=drop(DELTA)),
    "step of 0": Bad(f"'{DELTA}' is a step of 0", tensors=put(DELTA, torch.zeros(()))),
    "two steps": Bad(
        rf"'{DELTA}' has shape \(2,\), expected a single value", tensors=put(DELTA, torch.ones(2))
    ),
    "part of a model": Bad("only 3 layers", tensors=some),
    "a strange module": Bad(
        "module 'time_embed.4' is not part of LDM's UNetModel",
        tensors=renamed("model.time_embed.2", "model.time_embed.4"),
    ),
    # the side file
    "side file missing": Bad("cannot be read as JSON", options={"zero_points": "none.json"}, at="none.json"),
    "side file no JSON": Bad("cannot be read as JSON", side_bytes=b"{'a': 1}", at=SIDE),
    "side file no text": Bad("cannot be read as JSON", side_bytes=b"\xff\xfe\x00", at=SIDE),
    "side file too deep": Bad("cannot be read as JSON", side_bytes=b"[" * 100_000, at=SIDE),
    "side file without quantizers": Bad('expected {"quantizers"', side_bytes=b'{"layers": {}}', at=SIDE),
    "side file a list": Bad('expected {"quantizers"', side_bytes=b"[]", at=SIDE),
    "side file of weights": Bad(
        "no entry ends in '.act_quantizer'", side=only(f"{CONV}.weight_quantizer"), at=SIDE
    ),
    "entry missing": Bad(
        rf"lacks 1 of the checkpoint's quantizers \({STEP}\): it belongs to another checkpoint than",
        side=without_entry,
        at=SIDE,
    ),
    "entry too many": Bad(r"knows others \(model.elsewhere.act_quantizer\)", side=with_entry, at=SIDE),
    "side file of another model": Bad(r"lacks \d+ of the checkpoint's quantizers", side=elsewhere, at=SIDE),
    "step of another run": Bad(
        rf"the step of {STEP} is 0.5 there, .*they are of different runs",
        side=entry(STEP, delta=0.5),
        at=SIDE,
    ),
    "step that is no number": Bad(
        f"{STEP}: delta is '0.5', expected a number", side=entry(STEP, delta="0.5"), at=SIDE
    ),
    "step that is NaN": Bad(
        f"{STEP}: delta is nan, expected a number", side=entry(STEP, delta=float("nan")), at=SIDE
    ),
    "half a zero point": Bad(
        f"{STEP}: zero_point is 12.5, expected a whole number", side=entry(STEP, zero_point=12.5), at=SIDE
    ),
    "NaN as zero point": Bad(
        f"{STEP}: zero_point is nan, expected a whole number",
        side=entry(STEP, zero_point=float("nan")),
        at=SIDE,
    ),
    "infinite zero point": Bad(
        f"{STEP}: zero_point is inf, expected a whole number",
        side=entry(STEP, zero_point=float("inf")),
        at=SIDE,
    ),
    "text as zero point": Bad(
        f"{STEP}: zero_point is '12', expected a whole number", side=entry(STEP, zero_point="12"), at=SIDE
    ),
    "true as zero point": Bad(
        f"{STEP}: zero_point is True, expected a whole number", side=entry(STEP, zero_point=True), at=SIDE
    ),
    "no zero point": Bad(
        f"{STEP}: zero_point is None, expected a whole number", side=entry(STEP, zero_point=...), at=SIDE
    ),
    "null for an entry": Bad(
        f"{STEP}: zero_point is None, expected a whole number",
        side=lambda data: {"quantizers": {**data["quantizers"], STEP: None}},
        at=SIDE,
    ),
    "one layer at 6 bits": Bad(
        r"activation quantizers of several widths: \[6, 8\]", side=entry(STEP, n_bits=6), at=SIDE
    ),
    "first layer at 6 bits": Bad(
        "time_embed.0 has 6 bits there, 8 in PTQD's scheme",
        side=entry(f"{FIRST}.act_quantizer", n_bits=6),
        at=SIDE,
    ),
    "zero points beyond the codes": Bad(
        r"at 8 bits the zero point \d+ of .* lies beyond the last code \(\d+ such quantizers\)",
        side=far_out,
        at=SIDE,
    ),
}


def make(bad: Bad, golden: Path, folder: Path) -> dict[str, Any]:
    """Write the files of a case; returns the options to read them with."""
    source, path = golden / "ptqd" / bad.source, folder / bad.name
    if bad.bytes_ is not None:
        path.write_bytes(bad.bytes_(source.read_bytes()))
    elif bad.tensors is not None:
        torch.save(bad.tensors(torch.load(source, weights_only=True)), path)
    else:
        shutil.copyfile(source, path)
    theirs = golden / "ptqd" / "w4a8"
    shutil.copyfile(theirs / BATCH, folder / BATCH)
    data = json.loads((theirs / SIDE).read_text())
    text = json.dumps(data if bad.side is None else bad.side(data)).encode()
    (folder / SIDE).write_bytes(text if bad.side_bytes is None else bad.side_bytes)
    options = {"zero_points": SIDE} if bad.points else {}
    return {"checkpoint": bad.name, **options, **bad.options}


def load(folder: Path, **options: Any) -> CalibratedState:
    adapter = load_base_quantizer("ptqd")
    config: Any = adapter.config_class
    return adapter.load(config.model_validate(options, context={"base_dir": folder}))


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_bad_file(bad: Bad, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = make(bad, golden, tmp_path)
    with pytest.raises(bad.error) as caught:
        load(tmp_path, **options)
    message = str(caught.value)
    assert type(caught.value) is bad.error, message
    assert re.search(bad.says, message), message
    assert str(tmp_path / (bad.at or bad.name)) in message, "the message does not name the file"
    assert "executed" not in capsys.readouterr().out


def test_the_golden_files_pass_as_they_are(golden: Path, tmp_path: Path) -> None:
    """So that what the table says is due to its edits alone."""
    state = load(tmp_path, **make(Bad(""), golden, tmp_path))
    assert len(state.activations) == 77


def test_a_rare_zero_point_beyond_the_codes_passes(golden: Path, tmp_path: Path) -> None:
    """The search itself makes one where an input has only one sign."""
    state = load(tmp_path, **make(Bad("", side=entry(STEP, zero_point=300)), golden, tmp_path))
    assert [grid.zero_point for grid in state.activations.values()].count(300) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"zero_points": SIDE, "calibration_inputs": BATCH}, "give one of `calibration_inputs` and `zero_"),
        ({"zero_points": SIDE, "activation_bits": None}, "so `zero_points` has no use"),
        ({"calibration_inputs": BATCH, "activation_bits": None}, "so `calibration_inputs` has no use"),
        ({"weight_bits": 9}, "less than or equal to 8"),
        ({"activation_bits": 1}, "greater than or equal to 2"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        load(tmp_path, checkpoint=FINAL, **options)
    recipe = tmp_path / "r.yaml"
    lines = "".join(f"  {key}: {'null' if value is None else value}\n" for key, value in options.items())
    recipe.write_text(
        "schema_version: 1\nmodel: {pipeline: somewhere/else}\n"
        f"base:\n  adapter: ptqd\n  checkpoint: {FINAL}\n{lines}"
        "backend: torch\nactivation_bits: {low: 8, medium: 16, high: 32}\n"
        "controller: {kind: static, bits: base}\n"
    )
    with pytest.raises(RecipeError, match=rf"r.yaml:\d+: base.*{says}"):
        Recipe.from_yaml(recipe)


# the batch


BATCHES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "no context": (r"holds \{'t': .*expected x \(N, C, h, w\), t \(N,\) and context", drop("context")),
    "something besides": ("expected x", put("y", torch.zeros(32))),
    "other lengths": ("expected x", lambda t: {**t, "t": t["t"][:31]}),
    "wrong rank": ("expected x", lambda t: {**t, "x": t["x"].flatten(1)}),
    "no rows": ("expected x", lambda t: {name: tensor[:0] for name, tensor in t.items()}),
    "NaN": ("tensor 'x' holds 1 NaN", poked("x", float("nan"))),
}


@pytest.mark.parametrize(("says", "change"), BATCHES.values(), ids=list(BATCHES))
def test_bad_batch(says: str, change: Callable[[Tensors], Tensors], golden: Path, tmp_path: Path) -> None:
    options = make(Bad("", points=False, options={"calibration_inputs": "other"}), golden, tmp_path)
    save_file({n: t.contiguous() for n, t in change(load_file(tmp_path / BATCH)).items()}, tmp_path / "other")
    with pytest.raises(ArtefactError, match=says) as caught:
        load(tmp_path, **options)
    assert str(tmp_path / "other") in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [(None, "no such file"), (b"", "damaged or not safetensors"), (b"text", "damaged or not safetensors")],
)
def test_a_batch_that_is_no_file_of_tensors(
    data: bytes | None, says: str, golden: Path, tmp_path: Path
) -> None:
    options = make(Bad("", points=False, options={"calibration_inputs": "other"}), golden, tmp_path)
    if data is not None:
        (tmp_path / "other").write_bytes(data)
    with pytest.raises(ArtefactError, match=f"other: {says}"):
        load(tmp_path, **options)


@pytest.mark.parametrize("bits", [6, 7, 9, 16])
def test_the_batch_shows_a_wrong_width(bits: int, golden: Path, model: GoldenModel, tmp_path: Path) -> None:
    """Where nothing else says how wide the activations are, the steps that the batch asks for do."""
    options = {"calibration_inputs": BATCH, "activation_bits": bits}
    state = load(tmp_path, **make(Bad("", name=NAMELESS, points=False, options=options), golden, tmp_path))
    says = rf"at {bits} bits this batch asks for steps that are [\d.e-]+ times those in the checkpoint"
    with pytest.raises(ArtefactError, match=says) as caught:
        state.completed(model.unet())
    assert str(tmp_path / BATCH) in str(caught.value)


def untouched(unet: Any, before: Tensor, processors: dict[str, Any], call: dict[str, Tensor]) -> None:
    with torch.no_grad():
        assert torch.equal(unet(**call).sample, before)
    assert unet.attn_processors == processors
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())
    assert not any(parameter.is_meta for parameter in unet.parameters())


FOREIGN_BATCHES: dict[str, Callable[[Tensors], Tensors]] = {
    "other channels": lambda t: {**t, "x": t["x"][:, :3].contiguous()},
    "other text states": lambda t: {**t, "context": t["context"][..., :16].contiguous()},
}


@pytest.mark.parametrize("change", FOREIGN_BATCHES.values(), ids=list(FOREIGN_BATCHES))
def test_a_batch_of_another_model(
    change: Callable[[Tensors], Tensors], golden: Path, model: GoldenModel, tmp_path: Path
) -> None:
    """Found out once the model is at hand, which then is as it was."""
    options = make(Bad("", points=False, options={"calibration_inputs": "other"}), golden, tmp_path)
    save_file(change(load_file(tmp_path / BATCH)), tmp_path / "other")
    state, unet = load(tmp_path, **options), model.unet()
    with pytest.raises(IncompatibleModelError, match=r"zero points .* come from a run of the model"):
        _ = state.activations
    processors = dict(unet.attn_processors)
    with torch.no_grad():
        before = unet(**model.call(0)).sample
    with pytest.raises(IncompatibleModelError, match=r"the calibration inputs .* do not fit UNet2DCondition"):
        state.completed(unet)
    untouched(unet, before, processors, model.call(0))


def test_the_denoiser_is_as_it_was_after_a_good_batch(
    golden: Path, model: GoldenModel, tmp_path: Path
) -> None:
    options = make(Bad("", points=False, options={"calibration_inputs": BATCH}), golden, tmp_path)
    state, unet = load(tmp_path, **options), model.unet()
    processors = dict(unet.attn_processors)
    with torch.no_grad():
        before = unet(**model.call(0)).sample
    state.completed(unet)
    untouched(unet, before, processors, model.call(0))


def test_a_denoiser_without_data(golden: Path, model: GoldenModel, tmp_path: Path) -> None:
    options = make(Bad("", points=False, options={"calibration_inputs": BATCH}), golden, tmp_path)
    unet: nn.Module = model.unet().to("meta")
    with pytest.raises(IncompatibleModelError, match="this one is on the meta device"):
        load(tmp_path, **options).completed(unet)


@pytest.mark.parametrize(
    ("option", "change", "code", "says"),
    [
        ("", None, 3, "base.calibration_inputs, the batch"),
        (f"  zero_points: {SIDE}\n", None, 3, "cannot be read as JSON"),
        ("  calibration_inputs: other\n", FOREIGN_BATCHES["other channels"], 4, "do not fit UNet2DCondition"),
    ],
)
def test_the_program_says_so_and_writes_nothing(
    option: str,
    change: Callable[[Tensors], Tensors] | None,
    code: int,
    says: str,
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(Bad("", side_bytes=b"{"), golden, tmp_path)
    if change is not None:
        save_file(change(load_file(tmp_path / BATCH)), tmp_path / "other")
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(on_the_golden_pipeline(inspected(tmp_path / FINAL, capsys), option))
    assert main(["generate", str(recipe), "--prompt", "row 1", "--steps", "1", "--out", str(out)]) == code
    assert says in capsys.readouterr().err
    assert not out.exists()


# inspect


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert main(["inspect", str(path), *more]) == 0
    return capsys.readouterr().out


def on_the_golden_pipeline(text: str, more: str = "") -> str:
    folder = "package://qlip_recipes/golden_w4a8"
    model = f"{folder}/pipeline\n  prompt_embeddings: {folder}/prompt_embeddings.safetensors"
    return text.replace("path/to/the/calibrated/pipeline", model).replace("backend:", f"{more}backend:")


def test_inspect_of_a_final_file(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = golden / "ptqd" / "w4a8" / FINAL
    found = json.loads(inspected(path, capsys, "--json"))
    assert found["format"] == "ptqd"
    assert (found["weight_bits"], found["activation_bits"]) == (4, 8)
    assert (found["quantized_layers"], found["split_layers"]) == (77, 0)
    assert found["unknown"] == ["zero_points"]
    assert found["details"]["layers_in_floating_point"] == 6
    text = inspected(path, capsys)
    for line in (
        "# format: ptqd",
        "# weight_bits: 4",
        "# layers_at_8_bits: time_embedding.linear_1, conv_in, conv_out",
        "# note: zero_points is in neither the file nor a record beside it: set it",
    ):
        assert line in text.splitlines()
    assert re.search("# note: .*base.calibration_inputs, the batch .* or base.zero_points, a JSON file", text)
    assert "activation_bits: null" not in text, "null would mean weights only"
    (tmp_path / "r.yaml").write_text(text)
    recipe = Recipe.from_yaml(tmp_path / "r.yaml")
    with pytest.raises(ArtefactError, match=r"base\.zero_points"):
        load_base_quantizer("ptqd").load(recipe.base)


def test_what_inspect_prints_loads_with_a_line_more(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = golden / "ptqd" / "w4a8"
    text = inspected(theirs / FINAL, capsys)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(on_the_golden_pipeline(text, f"  zero_points: {theirs / SIDE}\n"))
    state = load_base_quantizer("ptqd").load(Recipe.from_yaml(recipe).base)
    assert len(state.activations) == 77
    assert main(["recipe", "check", str(recipe)]) == 0
    out = tmp_path / "out"
    assert main(["generate", str(recipe), "--prompt", "row 1", "--steps", "1", "--out", str(out)]) == 0


def test_inspect_of_a_first_stage(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspected(golden / "ptqd" / "w4a8" / FIRST_STAGE, capsys)
    assert "# note: a file of the first stage: weights only" in text.splitlines()
    assert "  activation_bits: null" in text.splitlines()
    assert "zero_points" not in text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(on_the_golden_pipeline(text))
    state = load_base_quantizer("ptqd").load(Recipe.from_yaml(recipe).base)
    assert (len(state.layers), len(state.activations)) == (77, 0)


def test_inspect_of_a_renamed_file(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(golden / "ptqd" / "w4a8" / FINAL, tmp_path / NAMELESS)
    found = json.loads(inspected(tmp_path / NAMELESS, capsys, "--json"))
    assert found["base"]["weight_bits"] == 4
    assert found["unknown"] == ["activation_bits", "zero_points"]
    assert "# note: activation_bits is in neither" in inspected(tmp_path / NAMELESS, capsys)


def test_inspect_sees_a_wrong_name(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "quantw8a8_ldm_brecq.pth"
    shutil.copyfile(golden / "ptqd" / "w4a8" / FINAL, wrong)
    text = inspected(wrong, capsys)
    assert "# note: does not load as it is: its name says 8 bits, its rounding 4" in text.splitlines()


@pytest.mark.parametrize("backwards", [False, True])
def test_neither_format_is_taken_for_the_other(
    backwards: bool, golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the adapters is asked first."""
    entries = dict(sorted(installed(BASE_QUANTIZERS).items(), reverse=backwards))
    monkeypatch.setattr("qlip_plugins.cli.installed", lambda group: entries)
    files = {
        "ptqd": [golden / "ptqd" / "w4a8" / FINAL, golden / "ptqd" / "w4a8" / FIRST_STAGE],
        "qdiffusion": [golden / "qdiffusion" / case / "ckpt.pth" for case in ("w4a8", "w4")],
    }
    for name, paths in files.items():
        for path in paths:
            assert json.loads(inspected(path, capsys, "--json"))["format"] == name


def test_inspection_of_negative_steps(golden: Path, tmp_path: Path) -> None:
    """Training can turn a step's sign; such files are sound."""
    bad = Bad("", tensors=lambda t: {**t, DELTA: -t[DELTA]}, side=without_facts("delta"))
    options = make(bad, golden, tmp_path)
    found: Inspection = load_base_quantizer("ptqd").inspect(tmp_path / FINAL)
    assert found.details["negative_steps"] == 1
    assert sum(grid.scale < 0 for grid in load(tmp_path, **options).activations.values()) == 1
