"""Damaged, foreign and contradictory checkpoints: each its own message and exit code, nothing written."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_model import GoldenModel
from qlip_plugins.cli import main

Tensors = dict[str, Tensor]
CONV = "model.input_blocks.1.0.in_layers.2"
ATTN = "model.input_blocks.1.1.transformer_blocks.0.attn1"
SKIP = "model.output_blocks.0.0.skip_connection"


@dataclass
class Bad:
    """A file made from a golden one: `bytes_` edits the file, `tensors` its content."""

    says: str
    tensors: Callable[[Tensors], Any] | None = None
    bytes_: Callable[[bytes], bytes] | None = None
    case: str = "w4a8"
    options: dict[str, Any] = field(default_factory=dict)
    record: Callable[[str], str | None] = lambda text: text
    code: int = 3


def drop(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def put(name: str, value: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value if isinstance(value, Tensor) else torch.full_like(tensors[name], value)

    return change


def poke(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[0] = value

    return change


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def shift_weights(tensors: Tensors) -> None:
    tensors["model.out.0.weight"].add_(0.5)


def unsplit(tensors: Tensors) -> Tensors:
    """Shortcuts quantized whole, as a run without --split writes them."""
    for name in [name for name in tensors if name.endswith("weight_quantizer_0.alpha")]:
        first = name.replace("quantizer_0", "quantizer")
        tensors[first] = torch.cat([tensors[first], tensors[name]], dim=1)
    return drop("quantizer_0")(tensors)


def drop_quantizers_from(*modules: str) -> Callable[[Tensors], Tensors]:
    """As Q-Diffusion's file looks in mid-run: these modules not yet reached, no steps saved."""

    def change(tensors: Tensors) -> Tensors:
        return {
            name: tensor
            for name, tensor in tensors.items()
            if "act_quantizer" not in name
            and not name.endswith((".delta", ".zero_point"))
            and not ("quantizer" in name and any(module in name for module in modules))
        }

    return change


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


BAD: dict[str, Bad] = {
    # the file
    "empty": Bad("the file is empty", bytes_=lambda data: b""),
    "truncated at half": Bad(
        "truncated or not a torch checkpoint", bytes_=lambda data: data[: len(data) // 2]
    ),
    "truncated by a byte": Bad("truncated or not a torch checkpoint", bytes_=lambda data: data[:-1]),
    "first kilobyte": Bad("truncated or not a torch checkpoint", bytes_=lambda data: data[:1024]),
    "text": Bad("not a torch checkpoint", bytes_=lambda data: b"hello, this is no checkpoint\n"),
    "plain pickle": Bad("refused|not a torch checkpoint", bytes_=lambda data: pickle.dumps({"a": 1})),
    "pickle with code": Bad("refused", bytes_=lambda data: pickle.dumps({"a": Payload()}, protocol=2)),
    "torch file with code": Bad(
        "refused, the file holds more than tensors", tensors=lambda t: {"a": Payload()}
    ),
    # another format
    "a list": Bad("expected a state dict, found a list", tensors=lambda t: list(t.values())),
    "empty dict": Bad("the state dict is empty", tensors=lambda t: {}),
    "a number inside": Bad("entry 'epoch' is a int", tensors=lambda t: {**t, "epoch": 3}),
    "CompVis level": Bad("stand under the key 'state_dict'", tensors=lambda t: {"state_dict": t}),
    "CompVis names": Bad("CompVis float model", tensors=renamed("model.", "model.diffusion_model.")),
    "diffusers UNet": Bad(
        "a diffusers UNet", tensors=lambda t: {"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}
    ),
    "no prefix": Bad("does not start with 'model.'", tensors=renamed("model.", "")),
    "float model": Bad("no quantizer among", tensors=drop("quantizer")),
    "PTQD": Bad("a PTQD checkpoint", case="ptqd/w4a8/quantw4a8_ldm_brecq.pth"),
    "PTQD, first stage": Bad("a PTQD checkpoint", case="ptqd/w4a8/quantw4_ldm_brecq.pth"),
    # unfinished
    "no weight step": Bad(
        f"'{CONV}.weight_quantizer.delta' is missing: an intermediate file",
        tensors=drop(f"{CONV}.weight_quantizer.delta"),
    ),
    "before the decoder": Bad("intermediate file", tensors=drop_quantizers_from("output_blocks.")),
    "in the decoder": Bad("intermediate file", tensors=drop_quantizers_from("output_blocks.3", "model.out.")),
    "a layer without quantizer": Bad(
        f"'{CONV}' has no 'weight_quantizer.alpha'", tensors=drop(f"{CONV}.weight_quantizer")
    ),
    "no activation zero point": Bad(
        f"'{CONV}.act_quantizer.zero_point' is missing", tensors=drop(f"{CONV}.act_quantizer.zero_point")
    ),
    "one layer without activations": Bad(
        f"'{CONV}.act_quantizer.delta' is missing", tensors=drop(f"{CONV}.act_quantizer")
    ),
    "no softmax quantizer": Bad(
        f"'{ATTN}.act_quantizer_w.delta' is missing", tensors=drop(f"{ATTN}.act_quantizer_w")
    ),
    "half a split": Bad("has 2 weight but 1 activation quantizers", tensors=drop(f"{SKIP}.act_quantizer_0")),
    # values
    "NaN in a weight": Bad(
        f"tensor '{CONV}.weight' holds 1 NaN", tensors=poke(f"{CONV}.weight", float("nan"))
    ),
    "infinite bias": Bad(
        f"tensor '{CONV}.bias' holds 1 NaN or infinite", tensors=poke(f"{CONV}.bias", float("inf"))
    ),
    "NaN in a step": Bad(
        "act_quantizer.delta' holds 1 NaN", tensors=poke(f"{CONV}.act_quantizer.delta", float("nan"))
    ),
    "NaN in a code": Bad("alpha' holds", tensors=poke(f"{CONV}.weight_quantizer.alpha", float("nan"))),
    "a step of zero": Bad("holds a step of 0", tensors=put(f"{CONV}.act_quantizer.delta", 0.0)),
    "half a zero point": Bad("no whole number", tensors=put(f"{CONV}.act_quantizer.zero_point", 12.5)),
    "integers": Bad(
        "expected a floating type", tensors=put(f"{CONV}.weight", torch.ones(12, 12, 3, 3, dtype=torch.int8))
    ),
    # shapes and architecture
    "codes of another shape": Bad(
        "the shapes contradict each other",
        tensors=put(f"{CONV}.weight_quantizer.alpha", torch.ones(12, 6, 3, 3)),
    ),
    "steps of another shape": Bad(
        "expected \\(12, 1, 1, 1\\)", tensors=put(f"{CONV}.weight_quantizer.delta", torch.ones(12))
    ),
    "a step for every row": Bad(
        "expected a single value", tensors=put(f"{CONV}.act_quantizer.delta", torch.ones(2))
    ),
    "no weight": Bad(f"tensor '{CONV}.weight' is missing", tensors=without(f"{CONV}.weight")),
    "a strange module": Bad(
        "is not part of LDM's UNetModel", tensors=renamed("model.time_embed.2", "model.time_embed.4")
    ),
    "a block missing": Bad("no parameters in block 2", tensors=drop("output_blocks.2.")),
    "wider model": Bad("another architecture", tensors=put("model.out.0.weight", torch.ones(24)), code=4),
    "another model's weights": Bad(
        "are not those the checkpoint was calibrated on", tensors=shift_weights, code=4
    ),
    # contradictions and gaps
    "recipe says W8": Bad("weight_bits: the recipe says 8, sampling_config.yaml", options={"weight_bits": 8}),
    "recipe says W8, no record": Bad(
        "weight_bits is given as 8, the weights and their steps fit 4",
        options={"weight_bits": 8, "activation_bits": 8, "softmax_bits": 16},
        record=lambda text: None,
    ),
    "recipe says W3": Bad(
        "weight_bits is given as 3",
        options={"weight_bits": 3, "activation_bits": 8, "softmax_bits": 16},
        record=lambda t: None,
    ),
    "record says W8": Bad(
        "weight_bits is given as 8", record=lambda text: text.replace("weight_bit: 4", "weight_bit: 8")
    ),
    "A16 for A8": Bad(
        "no zero point of .* exceeds",
        options={"activation_bits": 16, "softmax_bits": 16},
        record=lambda text: None,
    ),
    "A6 for A8": Bad(
        "beyond the last code 63",
        options={"activation_bits": 6, "softmax_bits": 16},
        record=lambda text: None,
    ),
    "A8 for A16": Bad(
        "beyond the last code 255",
        case="w4a16",
        options={"activation_bits": 8, "softmax_bits": 16},
        record=lambda text: None,
    ),
    "softmax 8 for 16": Bad(
        "the steps belong to more bits",
        options={"activation_bits": 8, "softmax_bits": 8},
        record=lambda text: None,
    ),
    "softmax 16 for 8": Bad(
        "the steps belong to fewer bits",
        case="w8a8",
        options={"activation_bits": 8, "softmax_bits": 16},
        record=lambda text: None,
    ),
    "symmetric, which it is not": Bad("symmetric is given as true", options={"symmetric": True}),
    "activations of a weights-only file": Bad(
        "the file holds weights only", case="w4", options={"activation_bits": 8}
    ),
    "record without activations": Bad(
        "says quant_act: False", record=lambda text: text.replace("quant_act: true", "quant_act: false")
    ),
    "record with activations": Bad(
        "says quant_act: True, the file holds weights only",
        case="w4",
        record=lambda text: text.replace("quant_act: false", "quant_act: true"),
    ),
    "record without split": Bad(
        "split: .* says False", record=lambda text: text.replace("split: true", "split: false")
    ),
    "record with split": Bad("no split shortcut", tensors=unsplit),
    "record with a key twice": Bad("act_bit: duplicate key", record=lambda text: text + "act_bit: 6\n"),
    "record with another type": Bad(
        "act_bit: expected int", record=lambda text: text.replace("act_bit: 8", "act_bit: eight")
    ),
    "no activation bits": Bad(
        "activation_bits is unknown", options={"weight_bits": 4}, record=lambda text: None
    ),
    "no softmax bits": Bad(
        "softmax_bits is unknown", options={"activation_bits": 8}, record=lambda text: None
    ),
    "record is silent on softmax": Bad(
        "softmax_bits is unknown", record=lambda text: text.replace("sm_abit: 16\n", "")
    ),
}


def make(bad: Bad, golden: Path, tmp_path: Path) -> Path:
    if bad.case.startswith("ptqd"):
        return shutil.copyfile(golden / bad.case, tmp_path / "ckpt.pth")
    source = golden / "qdiffusion" / bad.case
    path = tmp_path / "ckpt.pth"
    data = (source / "ckpt.pth").read_bytes()
    if bad.bytes_ is not None:
        path.write_bytes(bad.bytes_(data))
    else:
        tensors = torch.load(source / "ckpt.pth", weights_only=True)
        changed = bad.tensors(tensors) if bad.tensors is not None else None
        torch.save(tensors if changed is None else changed, path)
    record = bad.record((source / "sampling_config.yaml").read_text())
    if record is not None:
        (tmp_path / "sampling_config.yaml").write_text(record)
    return path


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_bad_checkpoint(
    bad: Bad, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: GoldenModel
) -> None:
    path = make(bad, golden, tmp_path)
    options = "".join(f"  {key}: {str(value).lower()}\n" for key, value in bad.options.items())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema_version: 1\n"
        "model:\n"
        "  pipeline: package://qlip_recipes/golden_w4a8/pipeline\n"
        "  prompt_embeddings: package://qlip_recipes/golden_w4a8/prompt_embeddings.safetensors\n"
        f"base:\n  adapter: qdiffusion\n  checkpoint: {path.name}\n{options}"
        "backend: torch\n"
        "activation_bits: {low: 8, medium: 16, high: 32}\n"
        "controller: {kind: static, bits: base}\n"
    )
    out = tmp_path / "out"
    code = main(["generate", str(recipe), "--prompt", "row 1", "--steps", "1", "--out", str(out)])
    captured = capsys.readouterr()
    assert code == bad.code, captured.err
    assert re.search(bad.says, captured.err), captured.err
    assert "executed" not in captured.out
    assert str(path) in captured.err or "sampling_config.yaml" in captured.err, (
        "the message does not name the file"
    )
    assert not out.exists()
    assert not list(tmp_path.glob(".out*")), "something half-written was left behind"


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 25
