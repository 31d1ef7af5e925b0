"""PTQD file -> `CalibratedState`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qlip_plugins.errors import ArtefactError
from qlip_plugins.grids import ActGrid
from qlip_plugins.ldm_names import names_in_file
from qlip_plugins.progress import progress
from qlip_plugins.state import CalibratedLayer, CalibratedState, WeightPart

from .config import PTQDConfig
from .contents import Contents, read_contents
from .options import Options, resolve, weight_grid
from .zero_points import HOW_TO, SideFile, check_zero_points, finder, read_calibration_inputs, read_side_file

FORMAT = "ptqd"
EIGHT = 8
"""The width of the first, third and last layer, whatever the others have."""


def load(config: PTQDConfig) -> CalibratedState:
    """Read a checkpoint; see `BaseQuantizer.load`."""
    contents = read_contents(config.checkpoint)
    if not contents.has_activations and (config.zero_points or config.calibration_inputs):
        raise ArtefactError(
            f"{config.checkpoint}: a file of the first stage holds weights only, so zero points have no use: "
            "remove them, or give the file of the second stage"
        )
    names = names_in_file(contents.path, contents.floats)
    side = None if config.zero_points is None else read_side_file(config.zero_points)
    if side is not None:
        side.check_belongs(contents)
    options = resolve(config, contents, None if side is None else side.common_bits(contents))
    if options.activation_bits is not None and side is None and config.calibration_inputs is None:
        raise ArtefactError(
            f"{config.checkpoint}: {HOW_TO}. Or load the weights only, `activation_bits: null`"
        )
    batch = None if config.calibration_inputs is None else read_calibration_inputs(config.calibration_inputs)
    weights = build_weights(contents, names, options)
    if options.activation_bits is None:
        return weights
    steps = _steps(contents, names, options.activation_bits)
    if side is not None:
        return weights.with_activations(_grids(side, names, steps))
    assert batch is not None
    assert config.calibration_inputs is not None
    find = finder(config.calibration_inputs, batch, weights, steps)
    return replace(weights, to_complete=find)


def build_weights(contents: Contents, names: Mapping[str, str], options: Options) -> CalibratedState:
    """Codes of every quantized layer; activations in floating point."""
    quantized = contents.quantized
    layers = {
        names[module]: CalibratedLayer((_codes(contents, module, options.weight_bits),))
        for module in progress(quantized, "weight grids")
    }
    floats = {}
    for name, tensor in contents.floats.items():
        module, _, parameter = name.rpartition(".")
        floats[f"{names[module]}.{parameter}"] = tensor
    return CalibratedState(FORMAT, layers, float_parameters=floats, source=str(contents.path))


def _codes(contents: Contents, module: str, bits: int) -> WeightPart:
    """Learned rounding, `floor(w / delta) + [alpha >= 0]`, or to nearest at 8 bits where nothing was learned."""
    weight, alpha = contents.floats[f"{module}.weight"].float(), contents.alphas.get(module)
    bits = EIGHT if alpha is None else bits
    scale, zero_point = weight_grid(weight, bits)
    ratio = weight / scale
    rounded = ratio.round() if alpha is None else ratio.floor() + (alpha >= 0).float()
    codes = (rounded + zero_point).clamp(0, 2**bits - 1)
    # One step a layer, written once for each output channel as everywhere in a state.
    per_channel = (weight.shape[0], *[1] * (weight.ndim - 1))
    return WeightPart(
        codes.byte(), scale.expand(per_channel).clone(), zero_point.expand(per_channel).clone(), bits
    )


def _steps(contents: Contents, names: Mapping[str, str], bits: int) -> dict[str, tuple[int, float]]:
    """Layer -> width and stored step."""
    eight_bit = contents.eight_bit
    return {
        names[module]: (EIGHT if module in eight_bit else bits, float(contents.deltas[module]))
        for module in contents.quantized
    }


def _grids(
    side: SideFile, names: Mapping[str, str], steps: Mapping[str, tuple[int, float]]
) -> dict[str, ActGrid]:
    points = {names[module]: point for module, point in side.points.items()}
    for module, stated in side.bits.items():
        if stated != steps[names[module]][0]:
            raise ArtefactError(
                f"{side.path}: {module} has {stated} bits there, {steps[names[module]][0]} in PTQD's scheme (8 in the "
                "first, third and last layer)"
            )
    grids = {name: ActGrid.asymmetric(bits, step, points[name]) for name, (bits, step) in steps.items()}
    check_zero_points(str(side.path), grids)
    return grids
