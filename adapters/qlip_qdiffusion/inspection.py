"""What a file says of itself, for `qlip-plugins inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlip_plugins.adapter import Inspection
from qlip_plugins.errors import ArtefactError
from qlip_plugins.ldm_names import names_in_file

from .config import QDiffusionConfig
from .contents import Contents, read_contents
from .options import RECORD, possible_weight_bits, read_record, resolve
from .reader import FORMAT


def inspect(path: Path) -> Inspection:
    """See `BaseQuantizer.inspect`."""
    contents = read_contents(path)
    names = names_in_file(contents.path, contents.floats)
    record = read_record(path.parent / RECORD)
    possible = possible_weight_bits(contents)
    weight_bits = possible[0] if possible is not None and len(possible) == 1 else None
    told = _told(contents, record, weight_bits)
    unknown = tuple(option for option, value in told.items() if value is None)
    base: dict[str, Any] = {"adapter": FORMAT, "checkpoint": str(path.resolve())}
    base |= {option: value for option, value in told.items() if value is not None}
    if not contents.has_activations:
        base["activation_bits"] = None
    return Inspection(
        format=FORMAT,
        weight_bits=weight_bits,
        activation_bits=told.get("activation_bits"),
        has_activations=contents.has_activations,
        quantized_layers=len(contents.weights),
        split_layers=len(contents.split_layers),
        base=base,
        unknown=unknown,
        notes=_notes(record, possible, contents, base if not unknown else None),
        details={
            "attention_operands": len(contents.operands),
            "negative_steps": sum(
                float(act.delta) < 0
                for act in [
                    *contents.operands.values(),
                    *(a for acts in contents.inputs.values() for a in acts),
                ]
            ),
            "record": RECORD if record else None,
            "layers": [names[module] for module in contents.weights],
        },
    )


def _told(contents: Contents, record: dict[str, Any], weight_bits: int | None) -> dict[str, Any]:
    """The options that matter for a file, as far as its record and its tensors tell; None where not."""
    told: dict[str, Any] = {"weight_bits": record.get("weight_bit", weight_bits)}
    if contents.has_activations:
        all_zero = all(float(act.zero_point) == 0 for acts in contents.inputs.values() for act in acts)
        told["activation_bits"] = record.get("act_bit")
        told["softmax_bits"] = record.get("sm_abit")
        told["symmetric"] = record.get("a_sym", None if all_zero else False)
    return told


def _notes(
    record: dict[str, Any], possible: list[int] | None, contents: Contents, base: dict[str, Any] | None
) -> tuple[str, ...]:
    """What a reader should know; with a complete `base:` also what the loader would hold against it."""
    notes = []
    if not record:
        notes.append(f"no {RECORD} beside it: the widths of activations and softmax are not in the file")
    if possible is not None and len(possible) != 1:
        shown = " or ".join(map(str, possible)) or "no width from 2 to 16"
        notes.append(f"the weights and their steps fit {shown}")
    try:
        if base is not None:
            resolve(QDiffusionConfig(**base), contents)
    except ArtefactError as error:
        notes.append(f"does not load with {RECORD} as it is: {error}")
    return tuple(notes)
