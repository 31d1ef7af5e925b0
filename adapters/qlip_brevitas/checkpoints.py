"""A saved `state_dict()` of a brevitas model.

It holds the float weights and what was learned of the ranges; neither the widths nor the kinds of the quantizers,
so those are options, and brevitas's own layers, built with them, read it strictly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlip_plugins.adapter import Inspection
from qlip_plugins.checkpoint import check_finite, read_state_dict
from qlip_plugins.errors import ArtefactError, ForeignFormatError
from qlip_plugins.schema import nearest
from qlip_plugins.state import CalibratedState

from .config import BrevitasConfig

NAME = "brevitas"
_INPUT = ".input_quant."
_ZERO_POINT = "zero_point_impl.value"


def load(config: BrevitasConfig, check_host: Callable[[], None]) -> CalibratedState:
    """See `qlip_plugins.adapter.BaseQuantizer.load`; brevitas is asked for once there is a file to read."""
    if config.checkpoint is None:
        raise ArtefactError(
            "base.checkpoint: none is named, so the base is the model in a pipeline that brevitas has quantized: apply "
            "the recipe to that pipeline in Python. What loads a pipeline by itself needs a file: "
            "torch.save(unet.state_dict(), FILE)"
        )
    tensors = _read(config.checkpoint)
    check_host()
    from .reading import state_of

    names = _layers(tensors)
    build = _builder(config)
    layers = {name: build(name, _below(tensors, f"{name}.")) for name in names}
    inside = tuple(
        f"{name}.{part}." for name in names for part in ("input_quant", "weight_quant", "output_quant")
    )
    floats = {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
    state = state_of(layers, floats, {}, str(config.checkpoint))
    check_fingerprint(state, config)
    return state


def check_fingerprint(state: CalibratedState, config: BrevitasConfig) -> None:
    """Compare with the one that a recipe names.

    Raises:
        ArtefactError: it is another.
    """
    if config.fingerprint is not None and not state.fingerprint.startswith(config.fingerprint):
        raise ArtefactError(
            f"{state.source}: it has the fingerprint {state.fingerprint[:12]}..., base.fingerprint is "
            f"{config.fingerprint[:12]}...: widths or quantizers are not those it was saved with, or some layers "
            "have no input's scale in the file (weights alone quantized, or never calibrated)"
        )


def inspect(path: Path) -> Inspection:
    """See `qlip_plugins.adapter.BaseQuantizer.inspect`."""
    tensors = _read(path)
    names = _layers(tensors)
    shifted = any(_ZERO_POINT in name for name in tensors)
    floats = sum(t.ndim in (2, 4) and n.removesuffix(".weight") not in names for n, t in tensors.items())
    quantizer = "ShiftedUint8ActPerTensorFloat" if shifted else "Int8ActPerTensorFloat"
    return Inspection(
        format=NAME,
        weight_bits=None,
        activation_bits=None,
        has_activations=True,
        quantized_layers=len(names),
        split_layers=0,
        base={"adapter": NAME, "checkpoint": str(path.resolve()), "input_quant": quantizer},
        unknown=("weight_bits", "activation_bits"),
        notes=(
            "weight_quant, input_quant: the file hardly tells them; Int8WeightPerChannelFloat and "
            f"{quantizer} are taken. Compare the fingerprint of the model in memory (base.fingerprint)",
            *([f"{floats} weights have no input's scale beside them: taken for float"] if floats else []),
        ),
        details={"layers": names},
    )


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        what = "" if path.exists() else "no such file; "
        raise ForeignFormatError(f"{path}: {what}expected a saved state dict of a brevitas model")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else read_state_dict(path)
    except (SafetensorError, OSError) as error:
        raise ForeignFormatError(f"{path}: not to be read: {error}") from None
    except ArtefactError as error:
        # Whether it is damaged, or another framework's, cannot be told.
        raise ForeignFormatError(str(error)) from None
    if not _layers(tensors):
        raise ForeignFormatError(f"{path}: no quantizer of brevitas among its {len(tensors)} tensors")
    check_finite(path, tensors)
    return tensors


def _layers(tensors: dict[str, Tensor]) -> list[str]:
    """Convolutions and linears whose input has a quantizer."""
    found = dict.fromkeys(name.partition(_INPUT)[0] for name in tensors if _INPUT in name)
    return [
        name for name in found if f"{name}.weight" in tensors and tensors[f"{name}.weight"].ndim in (2, 4)
    ]


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _builder(config: BrevitasConfig) -> Callable[[str, dict[str, Tensor]], Any]:
    """What makes a layer of brevitas of its part of a state dict."""
    import brevitas.nn as qnn

    quantizers = {
        "input_quant": _quantizer("input_quant", config.input_quant, config.activation_bits),
        "weight_quant": _quantizer("weight_quant", config.weight_quant, config.weight_bits),
        "bias_quant": None,
        "return_quant_tensor": False,
    }

    def build(name: str, own: dict[str, Tensor]) -> Any:
        out, into, *kernel = own["weight"].shape
        options = {"bias": "bias" in own, "dtype": own["weight"].dtype, **quantizers}
        layer = (
            qnn.QuantConv2d(into, out, tuple(kernel), **options)
            if kernel
            else qnn.QuantLinear(into, out, **options)
        )
        found = layer.load_state_dict(own, strict=False)
        if found.missing_keys or found.unexpected_keys:
            raise ArtefactError(
                f"{config.checkpoint}: {name}: the state dict is not that of input_quant={config.input_quant!r} and "
                f"weight_quant={config.weight_quant!r} (missing: {', '.join(found.missing_keys) or 'nothing'}; too "
                f"much: {', '.join(found.unexpected_keys) or 'nothing'}). Name the quantizers it was saved with"
            )
        return layer.eval()

    return build


def _quantizer(key: str, name: str, bits: int | None) -> Any:
    import brevitas.quant

    kind = getattr(brevitas.quant, name, None)
    if not isinstance(kind, type):
        raise ArtefactError(
            f"base.{key}: brevitas.quant has no {name!r}{nearest(name, vars(brevitas.quant))}"
        )
    return type(name, (kind,), {"bit_width": bits})
