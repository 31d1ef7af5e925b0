"""What a file says of itself, for `qlip-plugins inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlip_plugins.adapter import Inspection

from .contents import NotQDiffusion, read_contents
from .options import RECORD, possible_weight_bits, read_record
from .reader import FORMAT, map_names


def inspect(path: Path) -> Inspection | None:
    """See `BaseQuantizer.inspect`."""
    try:
        contents = read_contents(path)
    except NotQDiffusion:
        return None
    names = map_names(contents)
    record = read_record(path.parent / RECORD)
    possible = possible_weight_bits(contents)
    weight_bits = possible[0] if possible else None
    base: dict[str, Any] = {"adapter": FORMAT, "checkpoint": str(path)}
    base["weight_bits"] = record.get("weight_bit", weight_bits)
    base["activation_bits"] = record.get("act_bit") if contents.has_activations else None
    if contents.has_activations:
        base["softmax_bits"] = record.get("sm_abit")
        all_zero = all(float(act.zero_point) == 0 for acts in contents.inputs.values() for act in acts)
        base["symmetric"] = record.get("a_sym", None if all_zero else False)
    unknown = tuple(
        key for key, value in base.items() if value is None and (key != "activation_bits" or contents.has_activations)
    )
    return Inspection(
        format=FORMAT,
        weight_bits=weight_bits,
        activation_bits=base["activation_bits"],
        has_activations=contents.has_activations,
        quantized_layers=len(contents.weights),
        split_layers=len(contents.split_layers),
        base=base,
        unknown=unknown,
        notes=_notes(record, possible),
        details={
            "attention_operands": len(contents.operands),
            "negative_steps": sum(
                float(act.delta) < 0
                for act in [*contents.operands.values(), *(a for acts in contents.inputs.values() for a in acts)]
            ),
            "record": RECORD if record else None,
            "layers": [names[module] for module in contents.weights],
        },
    )


def _notes(record: dict[str, Any], possible: list[int] | None) -> tuple[str, ...]:
    notes = []
    if not record:
        notes.append(f"no {RECORD} beside it: the widths of activations and softmax are not in the file")
    if possible is not None and len(possible) != 1:
        shown = " or ".join(map(str, possible)) or "no width from 2 to 16"
        notes.append(f"the weights and their steps fit {shown}")
    recorded = record.get("weight_bit")
    if recorded is not None and possible is not None and recorded not in possible:
        notes.append(f"{RECORD} says weight_bit: {recorded}, which contradicts the weights")
    return tuple(notes)


