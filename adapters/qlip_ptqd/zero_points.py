"""Zero points of the activation quantizers, which PTQD's files lack."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qlip_plugins.adapter import load_backend
from qlip_plugins.attention import QuantizedAttnProcessor
from qlip_plugins.calibration.grid_search import search_grid
from qlip_plugins.calibration.run import BACKEND, to_nearest
from qlip_plugins.checkpoint import check_finite
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.files import written_whole
from qlip_plugins.grids import ActGrid
from qlip_plugins.ldm_names import ldm_names
from qlip_plugins.progress import counted
from qlip_plugins.quantizer import fake_quantize
from qlip_plugins.state import CalibratedState

from .contents import PREFIX, Contents

_QUANTIZER = ".act_quantizer"
_STRAY = 0.05
_TRAINED = 1.6
"""Training moves a step by far less than the factor of 2 that one bit makes (the golden files: 1.1)."""

HOW_TO = (
    "a PTQD file does not hold the zero points of its activation quantizers, and they cannot be derived from it. Give "
    "base.calibration_inputs, the batch that your script initialised them on (safetensors with x, t and context: the "
    "first 32 samples of its loader), or base.zero_points, a JSON file written from the model in your script; "
    "docs/ptqd.md has the few lines for either"
)


@dataclass(frozen=True)
class SideFile:
    """Zero points by LDM module path, and the widths and steps that were written with them."""

    path: Path
    points: Mapping[str, int]
    bits: Mapping[str, int]
    deltas: Mapping[str, float]

    def check_belongs(self, contents: Contents) -> None:
        """Compare with a checkpoint.

        Raises:
            ArtefactError: quantizers are missing or unknown, or their steps are others.
        """
        lacking = [name for name in contents.deltas if name not in self.points]
        unknown = [name for name in self.points if name not in contents.deltas]
        if lacking or unknown:
            problem = f"lacks {len(lacking)} of the checkpoint's quantizers" if lacking else "knows others"
            first = (lacking or unknown)[0]
            raise ArtefactError(
                f"{self.path}: {problem} ({PREFIX}{first}{_QUANTIZER}): it belongs to another checkpoint than "
                f"{contents.path}"
            )
        for name, delta in self.deltas.items():
            theirs = float(contents.deltas[name])
            if abs(delta - theirs) > 1e-4 * abs(theirs):
                raise ArtefactError(
                    f"{self.path}: the step of {PREFIX}{name}{_QUANTIZER} is {delta:.6g} there, {theirs:.6g} in "
                    f"{contents.path}: they are of different runs"
                )

    def common_bits(self, contents: Contents) -> int | None:
        """The width of all quantizers but the 8-bit ones; None where the file does not say.

        Raises:
            ArtefactError: there are several.
        """
        found = {bits for name, bits in self.bits.items() if name not in contents.eight_bit}
        if len(found) > 1:
            raise ArtefactError(f"{self.path}: activation quantizers of several widths: {sorted(found)}")
        return next(iter(found), None)


def read_side_file(path: Path) -> SideFile:
    """Read `{"quantizers": {"model.<layer>.act_quantizer": {"zero_point": ..., "n_bits": ..., "delta": ...}}}`.

    `n_bits` and `delta` may be left out; entries of weight quantizers are passed over.

    Raises:
        ArtefactError: missing, no such JSON, or a value that is no zero point.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: cannot be read as JSON: {error}") from None
    entries = data.get("quantizers") if isinstance(data, dict) else None
    if not isinstance(entries, dict):
        raise ArtefactError(f'{path}: expected {{"quantizers": {{...}}}} as docs/ptqd.md shows')
    points: dict[str, int] = {}
    bits: dict[str, int] = {}
    deltas: dict[str, float] = {}
    for name, entry in entries.items():
        if not name.endswith(_QUANTIZER):
            continue
        module = name.removesuffix(_QUANTIZER).removeprefix(PREFIX)
        points[module] = int(_number(path, name, entry, "zero_point", whole=True))
        if "n_bits" in entry:
            bits[module] = int(_number(path, name, entry, "n_bits", whole=True))
        if "delta" in entry:
            deltas[module] = _number(path, name, entry, "delta", whole=False)
    if not points:
        raise ArtefactError(f"{path}: no entry ends in {_QUANTIZER!r}: no zero points of activations")
    return SideFile(path, points, bits, deltas)


def _number(path: Path, name: str, entry: Any, key: str, whole: bool) -> float:
    value = entry.get(key) if isinstance(entry, dict) else None
    # Python's JSON knows NaN, of which no comparison holds.
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 2**31:
        value = None
    if value is not None and (not whole or value == int(value)):
        return float(value)
    kind = "a whole number" if whole else "a number"
    found = entry.get(key) if isinstance(entry, dict) else entry
    raise ArtefactError(f"{path}: {name}: {key} is {ascii(found)[:60]}, expected {kind}")


def write_zero_points(path: Path, state: CalibratedState) -> None:
    """Write the zero points of a PTQD base as `read_side_file` reads them, whole or not at all.

    Those that come from a batch differ a little from machine to machine, and with them the base's
    fingerprint, which ranges and controllers are bound to: written once, they are the same everywhere.

    Args:
        path: JSON file to write.
        state: the base with its activations, such as `load_base(recipe, pipe.unet)`.
    """
    names = ldm_names(dict.fromkeys(name.rpartition(".")[0] for name in state.float_parameters))
    entries = {
        f"{PREFIX}{names[name]}{_QUANTIZER}": {
            "n_bits": grid.bits,
            "delta": grid.scale,
            "zero_point": grid.zero_point,
        }
        for name, grid in state.activations.items()
    }
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps({"quantizers": entries}, indent=1) + "\n", encoding="utf-8")


def check_zero_points(where: str, grids: Mapping[str, ActGrid]) -> None:
    """A zero point is a code, so nearly all lie below 2^bits.

    Raises:
        ArtefactError: many do not: the width is too small.
    """
    beyond = [name for name, grid in grids.items() if grid.zero_point >= 2**grid.bits]
    # The mse search can put a rare one beyond the codes, where an input has only one sign.
    if len(beyond) > _STRAY * len(grids):
        grid = grids[beyond[0]]
        raise ArtefactError(
            f"{where}: contradiction: at {grid.bits} bits the zero point {grid.zero_point} of {beyond[0]} lies beyond "
            f"the last code ({len(beyond)} such quantizers)"
        )


def read_calibration_inputs(path: Path) -> dict[str, Tensor]:
    """The batch `x` `(N, C, h, w)`, `t` `(N,)`, `context` `(N, L, D)`, as a denoiser's arguments.

    Raises:
        ArtefactError: missing, damaged, without these tensors, or of different lengths.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path}: damaged or not safetensors: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"x": 4, "t": 1, "context": 3}
    good = {name: len(shape) for name, shape in shapes.items()} == expected
    if not good or len({shape[0] for shape in shapes.values()}) != 1 or not shapes["t"][0]:
        raise ArtefactError(
            f"{path}: holds {shapes}, expected x (N, C, h, w), t (N,) and context (N, L, D): the samples that the "
            "activation quantizers were initialised on"
        )
    check_finite(path, tensors)
    return {
        "sample": tensors["x"].float(),
        "timestep": tensors["t"],
        "encoder_hidden_states": tensors["context"].float(),
    }


def finder(
    path: Path, batch: Mapping[str, Tensor], weights: CalibratedState, steps: Mapping[str, tuple[int, float]]
) -> Callable[[nn.Module], dict[str, ActGrid]]:
    """What finds the zero points once the model is at hand.

    Args:
        path: of the batch, for messages.
        batch: what `read_calibration_inputs` gave.
        weights: the state without activation quantizers, float weights included.
        steps: layer -> width and stored step.
    """

    def find(denoiser: nn.Module) -> dict[str, ActGrid]:
        found = initial_grids(denoiser, weights, batch, {name: bits for name, (bits, _) in steps.items()})
        grids = {
            name: ActGrid.asymmetric(bits, step, int(found[name][1])) for name, (bits, step) in steps.items()
        }
        _check_steps(path, {name: (float(found[name][0]), grid) for name, grid in grids.items()})
        check_zero_points(str(path), grids)
        return grids

    return find


def _check_steps(path: Path, found: Mapping[str, tuple[float, ActGrid]]) -> None:
    """The stored steps were trained from those of the first run, so they are still near them."""
    ratios = torch.tensor([abs(grid.scale) / step for step, grid in found.values()])
    middle = float(ratios.median())
    if not 1 / _TRAINED < middle < _TRAINED:
        bits = next(iter({grid.bits for _, grid in found.values()} - {8}), 8)
        raise ArtefactError(
            f"{path}: contradiction: at {bits} bits this batch asks for steps that are {1 / middle:.3g} times those in "
            "the checkpoint (the median of all): another activation width, or a batch of another model"
        )


@torch.no_grad()
def initial_grids(
    denoiser: nn.Module, weights: CalibratedState, batch: Mapping[str, Tensor], bits: Mapping[str, int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Step and zero point, `()` each, of every activation quantizer, as PTQD's first forward finds them.

    One call on the whole batch with weights rounded to nearest; every quantizer searches its grid on what
    it sees, and passes on what the grid makes of it. A value near the border of two codes goes one way on
    one processor and the other way on the next, so a few zero points differ from those of another machine.

    Args:
        denoiser: of the calibrated architecture; as it was afterwards.
        weights: the calibrated weights, the unquantized ones among their float parameters.
        batch: arguments of the call.
        bits: layer -> width.

    Raises:
        IncompatibleModelError: the model has no data, or cannot be called with the batch.
    """
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise IncompatibleModelError(
            "the zero points come from a run of the model, and this one is on the meta device"
        )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    model: Any = denoiser
    processors = model.attn_processors
    installed = load_backend(BACKEND).install(denoiser, to_nearest(weights))
    handles = []
    try:
        # Written out, as LDM computes it: the fused kernels of other processors round otherwise.
        model.set_attn_processor(QuantizedAttnProcessor(*[_unquantized] * 4))
        with counted(len(bits), "activation zero points") as done:
            for name, width in bits.items():
                hook = _Initialise(name, width, found, done)
                handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
            _call(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_processor(processors)
        installed.remove()
    return found


def _unquantized(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Initialise:
    """A layer's forward pre-hook: search the grid of the input, and quantize it with that."""

    name: str
    bits: int
    found: dict[str, tuple[Tensor, Tensor]]
    done: Callable[[str], None]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        row = args[0].float().flatten()[None]
        scale, zero_point = (value[0] for value in search_grid(row, row.amin(1), row.amax(1), self.bits))
        self.found[self.name] = (scale, zero_point)
        self.done(self.name)
        low, high = torch.zeros_like(scale), torch.full_like(scale, 2**self.bits - 1)
        return (fake_quantize(args[0], scale, zero_point, low, high), *args[1:])


def _call(denoiser: nn.Module, batch: Mapping[str, Tensor]) -> None:
    parameter = next(denoiser.parameters())
    arguments = {
        name: tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
    }
    try:
        denoiser(**arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        raise IncompatibleModelError(
            f"the calibration inputs {shapes} do not fit {type(denoiser).__name__}: {str(error).splitlines()[0]}"
        ) from None
