"""What a packed folder says of itself, for `qlip-plugins inspect`."""

from __future__ import annotations

from pathlib import Path

from qlip_plugins.adapter import Inspection
from qlip_plugins.packed import NAME, read_config, read_packed


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
            "softmax_bits": None if bits is None else config.activations[0].softmax_bits,
            "pipeline": config.pipeline,
            "origin": config.origin,
            "layers": list(state.layers),
        },
    )
