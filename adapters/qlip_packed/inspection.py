"""What a packed folder says of itself, for `qlip-plugins inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlip_plugins.adapter import Inspection
from qlip_plugins.packed import NAME, PackedConfig, read_config, read_packed
from qlip_plugins.state import CalibratedState


def inspect(path: Path) -> Inspection:
    """See `BaseQuantizer.inspect`; the smallest of the folder's activation widths is proposed."""
    config = read_config(path)
    bits = min(config.widths, default=None)
    state = read_packed(path, bits)
    others = [width for width in config.widths if width != bits]
    return Inspection(
        format=NAME,
        weight_bits=config.weight_bits,
        activation_bits=bits,
        has_activations=bits is not None,
        quantized_layers=len(state.layers),
        split_layers=sum(layer.split is not None for layer in state.layers.values()),
        base={"adapter": NAME, "folder": str(path.resolve()), "activation_bits": bits},
        notes=tuple(f"activation_bits: {width} is there, too" for width in others),
        details={
            "attention_operands": len(state.operands),
            **_widths_apart(config, state, bits),
            "pipeline": config.pipeline,
            "origin": config.origin,
            "layers": list(state.layers),
        },
    )


def _widths_apart(config: PackedConfig, state: CalibratedState, bits: int | None) -> dict[str, Any]:
    """What has a width of its own, each kind where there is one."""
    table = None if bits is None else config.table(bits)
    softmax = None if table is None else table.softmax_bits
    inputs = {name: layer.inputs[0].bits for name, layer in state.layers.items() if layer.inputs}
    found = {
        "softmax_bits": softmax,
        "other_weight_bits": {n: w for n, w in state.weight_bits().items() if w != config.weight_bits},
        "other_activation_bits": {n: w for n, w in inputs.items() if w != bits},
    }
    return {kind: widths for kind, widths in found.items() if widths}
