"""What a file says of itself, for `qlip-plugins inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlip_plugins.adapter import Inspection
from qlip_plugins.ldm_names import names_in_file

from .contents import Contents, read_contents
from .options import possible_weight_bits, widths_in_name
from .reader import FORMAT
from .zero_points import HOW_TO


def inspect(path: Path) -> Inspection:
    """See `BaseQuantizer.inspect`."""
    contents = read_contents(path)
    names = names_in_file(contents.path, contents.floats)
    possible = possible_weight_bits(contents)
    weight_bits = possible[0] if len(possible) == 1 else None
    named = widths_in_name(path)
    activation_bits = named[1] if contents.has_activations else None
    base: dict[str, Any] = {"adapter": FORMAT, "checkpoint": str(path.resolve())}
    told = {"weight_bits": weight_bits}
    if contents.has_activations:
        told |= {"activation_bits": activation_bits, "zero_points": None}
    base |= {option: value for option, value in told.items() if value is not None}
    if not contents.has_activations:
        base["activation_bits"] = None
    floating = [
        name.removesuffix(".weight")
        for name, tensor in contents.floats.items()
        if name.endswith(".weight")
        and tensor.ndim > 1
        and name.removesuffix(".weight") not in contents.quantized
    ]
    return Inspection(
        format=FORMAT,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        has_activations=contents.has_activations,
        quantized_layers=len(contents.quantized),
        split_layers=0,
        base=base,
        unknown=tuple(option for option, value in told.items() if value is None),
        notes=_notes(contents, weight_bits, named[0], possible),
        details={
            "layers_in_floating_point": len(floating),
            "layers_at_8_bits": ", ".join(names[module] for module in contents.eight_bit),
            "negative_steps": sum(float(delta) < 0 for delta in contents.deltas.values()),
            "layers": [names[module] for module in contents.quantized],
        },
    )


def _notes(
    contents: Contents, weight_bits: int | None, named: int | None, possible: list[int]
) -> tuple[str, ...]:
    notes = []
    if contents.has_activations:
        notes.append(HOW_TO)
    else:
        notes.append("a file of the first stage: weights only")
    if len(possible) != 1:
        shown = " or ".join(map(str, possible)) or "no width from 2 to 8"
        notes.append(
            f"the rounding of the weights fits {shown}, with one step a layer as PTQD's scripts have it"
        )
    if None not in (weight_bits, named) and weight_bits != named:
        notes.append(f"does not load as it is: its name says {named} bits, its rounding {weight_bits}")
    return tuple(notes)
