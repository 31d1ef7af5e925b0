"""Calibration of a pipeline's UNet, unit by unit."""

from __future__ import annotations

import copy
import hashlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import load_backend
from ..embeddings import PromptEmbeddings
from ..errors import RecipeError
from ..families import denoiser_of
from ..grids import ActGrid
from ..packed import NAME
from ..progress import counted
from ..recipe import ModelSection
from ..state import CalibratedLayer, CalibratedState
from ..work import identity_of
from .activations import UnitActivations, learn_steps, removed_after, start_grids
from .gathering import gather
from .inputs import DenoiserInputs, collect
from .settings import CalibrationSettings
from .units import Unit, find_units, layer_specs
from .weights import bake, find_grids, learn_rounding
from .work import CalibrationFolder, UnitErrors

BACKEND = "torch"
"""On which the errors of whole models are measured."""

_HELD_OUT = 8
"""One prompt in so many, and one sample more for each so many, measure errors and calibrate nothing."""


@dataclass(frozen=True)
class Calibration:
    """What a calibration gives.

    Args:
        weights: the calibrated weights with activations in floating point.
        grids: activation width -> quantizer -> grid.
        report: settings and errors, as JSON can hold them.
    """

    weights: CalibratedState
    grids: Mapping[int, Mapping[str, ActGrid]]
    report: Mapping[str, Any]

    def state(self, activation_bits: int | None) -> CalibratedState:
        """The weights with the activation quantizers of one width; None: weights only."""
        return (
            self.weights
            if activation_bits is None
            else self.weights.with_activations(self.grids[activation_bits])
        )


def calibrate(
    pipe: Any,
    model: ModelSection,
    prompts: Sequence[str],
    settings: CalibrationSettings,
    work: Path,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Calibration, CalibrationFolder]:
    """Calibrate the UNet of a pipeline; the pipeline itself is left as it is.

    What is finished is kept in `work`, and a second call with the same arguments goes on from there and
    gives the same result.

    Args:
        pipe: a text-to-image pipeline with a UNet, in float32, on the device of `settings`.
        model: where it came from, and its prompts' embeddings where it has no text encoder.
        prompts: at least two; the last of every eight, one at least, only measure errors.
        settings: how.
        work: folder for what is finished.
        say: called with remarks: memory needed and used.

    Returns:
        The result, and the work folder, to be removed once the result is written.

    Raises:
        RecipeError: too few prompts, or `work` holds a calibration with other settings.
        IncompatibleModelError: the denoiser is no UNet that can be taken apart, or one that the scheme is
            not defined on.
    """
    _check_prompts(model, prompts)
    denoiser = denoiser_of(pipe)
    specs = layer_specs(denoiser, settings.rules, settings.weight_bits)
    with _exact_arithmetic():
        folder = CalibrationFolder(work, _identity(pipe, model, prompts, settings))
        inputs, held_out = _inputs(pipe, model, prompts, settings, folder)
        device = next(denoiser.parameters()).device
        call = inputs.call(slice(0, 1), device)
        begun = time.perf_counter()
        units = find_units(denoiser, specs, settings.softmax is not None, call)
        say(_needed(units, inputs, denoiser, settings, time.perf_counter() - begun))
        begun = time.perf_counter()
        job = _Job(
            denoiser,
            copy.deepcopy(denoiser).requires_grad_(False),
            units,
            inputs,
            settings,
            folder,
        )
        layers, weight_errors = job.weights()
        grids: dict[int, dict[str, ActGrid]] = {}
        step_errors: dict[int, list[UnitErrors]] = {}
        for bits in settings.activation_bits:
            grids[bits], step_errors[bits] = job.activations(bits)
        state = _state(denoiser, layers, str(model.pipeline))
        grids = {bits: _in_order(state, found) for bits, found in grids.items()}
        errors = _model_errors(denoiser, state, grids, held_out, settings.batch_size)
        say(f"{_memory_used(device)}; {_minutes(time.perf_counter() - begun)}")
    report = {
        "settings": settings.described(),
        "prompts": len(prompts),
        "samples": len(inputs),
        "held_out_samples": len(held_out),
        "errors": errors,
        "units": _unit_rows(units, weight_errors, step_errors),
    }
    return Calibration(state, grids, report), folder


@dataclass
class _Job:
    """A calibration in progress: `quantized` is a copy of `denoiser` that is quantized unit by unit."""

    denoiser: nn.Module
    quantized: nn.Module
    units: Sequence[Unit]
    inputs: DenoiserInputs
    settings: CalibrationSettings
    folder: CalibrationFolder

    def weights(self) -> tuple[dict[str, CalibratedLayer], list[UnitErrors]]:
        """Round every unit's weights; the quantized copy has them all in the end."""
        layers: dict[str, CalibratedLayer] = {}
        errors = []
        with counted(len(self.units), "weights") as done:
            for number, unit in enumerate(self.units):
                found = self.folder.load_weights(number, unit.name)
                if found is None:
                    found = self._unit_weights(number, unit)
                    self.folder.save_weights(number, unit.name, *found)
                bake(self.quantized, found[0])
                layers |= found[0]
                errors.append(found[1])
                done(_told(unit, found[1]))
        return layers, errors

    def _unit_weights(self, number: int, unit: Unit) -> tuple[dict[str, CalibratedLayer], UnitErrors]:
        settings, module = self.settings, self.quantized.get_submodule(unit.name)
        samples = gather(unit.name, self.denoiser, self.quantized, self.inputs, settings.batch_size)
        grids = find_grids(unit, self.denoiser)
        nearest = {grid.spec.name: grid.layer(grid.nearest()) for grid in grids}
        bake(self.quantized, nearest)
        before = samples.error(module)
        learnable = [grid for grid in grids if grid.spec.learned]
        if not learnable:
            return nearest, UnitErrors(before, before)
        seed = _seed(settings.sampling.seed, "weights", number)
        ups = learn_rounding(unit, module, learnable, samples, before, settings.iterations, seed)
        learned = nearest | {g.spec.name: g.layer(up) for g, up in zip(learnable, ups, strict=True)}
        bake(self.quantized, learned)
        after = samples.error(module)
        if after < before:
            return learned, UnitErrors(before, after)
        return nearest, UnitErrors(before, before)

    def activations(self, bits: int) -> tuple[dict[str, ActGrid], list[UnitErrors]]:
        """Calibrate every activation quantizer at one width; the quantized copy has none in the end."""
        grids: dict[str, ActGrid] = {}
        errors = []
        placed: list[UnitActivations] = []
        with removed_after(placed), counted(len(self.units), f"activations, {bits} bits") as done:
            for number, unit in enumerate(self.units):
                found = self.folder.load_grids(bits, number, unit.name)
                if found is None:
                    found = self._unit_activations(bits, number, unit)
                    self.folder.save_grids(bits, number, unit.name, *found)
                placed.append(UnitActivations(unit, self.quantized, bits, self.settings.softmax))
                placed[-1].take(found[0], next(self.quantized.parameters()).device)
                grids |= placed[-1].grids()  # in one order, found now or read back
                errors.append(found[1])
                done(_told(unit, found[1]))
        return grids, errors

    def _unit_activations(self, bits: int, number: int, unit: Unit) -> tuple[dict[str, ActGrid], UnitErrors]:
        settings, module = self.settings, self.quantized.get_submodule(unit.name)
        samples = gather(unit.name, self.denoiser, self.quantized, self.inputs, settings.batch_size)
        activations = UnitActivations(unit, self.quantized, bits, settings.softmax)
        with removed_after([activations]):
            start_grids(activations, module, samples, settings.start)
            first, before = activations.grids(), samples.error(module)
            seed = _seed(settings.sampling.seed, f"activations-{bits}", number)
            learn_steps(activations, module, samples, before, settings.activation_iterations, seed)
            learned, after = activations.grids(), samples.error(module)
        if after < before:
            return learned, UnitErrors(before, after)
        return first, UnitErrors(before, before)


def _check_prompts(model: ModelSection, prompts: Sequence[str]) -> None:
    if len(prompts) < 2:
        raise RecipeError(
            f"{len(prompts)} prompts: at least two are needed, one of them only measures errors"
        )
    if model.prompt_embeddings is not None:
        PromptEmbeddings.load(model.prompt_embeddings).of([*prompts, ""])


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """float32 as such, without TF32, and one convolution algorithm from run to run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _seed(seed: int, phase: str, number: int) -> int:
    """A unit's own seed, so that its result does not depend on what ran before it in this process."""
    return int.from_bytes(hashlib.sha256(f"{seed} {phase} {number}".encode()).digest()[:7], "big")


def _inputs(
    pipe: Any,
    model: ModelSection,
    prompts: Sequence[str],
    settings: CalibrationSettings,
    folder: CalibrationFolder,
) -> tuple[DenoiserInputs, DenoiserInputs]:
    """Samples to calibrate on, and others, of other prompts, to measure errors on."""
    apart = max(1, len(prompts) // _HELD_OUT)
    found = []
    for name, some, rows in (
        ("inputs", prompts[:-apart], settings.samples),
        ("held-out", prompts[-apart:], max(2, settings.samples // _HELD_OUT)),
    ):
        path = folder.file(f"{name}.safetensors")
        if not path.exists():
            collect(pipe, model, some, settings.sampling, rows, settings.batch_size).save(path)
        found.append(DenoiserInputs.load(path))
    return found[0], found[1]


def _state(denoiser: nn.Module, layers: Mapping[str, CalibratedLayer], source: str) -> CalibratedState:
    floats = {name: p.detach().cpu().float().clone() for name, p in denoiser.named_parameters()}
    # In the model's order, not in that of the calls.
    ordered = {name: layers[name] for name, _ in denoiser.named_modules() if name in layers}
    return CalibratedState(NAME, ordered, float_parameters=floats, source=source)


def _in_order(state: CalibratedState, grids: Mapping[str, ActGrid]) -> dict[str, ActGrid]:
    """In the model's order, not in that of the calls."""
    return {name: grids[name] for name in state.with_activations(grids).activations}


@torch.no_grad()
def _model_errors(
    denoiser: nn.Module,
    state: CalibratedState,
    grids: Mapping[int, Mapping[str, ActGrid]],
    inputs: DenoiserInputs,
    batch: int,
) -> dict[str, float]:
    """Relative squared error of the whole model's output on held-out inputs, on the reference backend."""
    device = next(denoiser.parameters()).device
    calls = list(inputs.calls(batch, device))
    exact = [denoiser(**call)[0] for call in calls]
    states = {"weights rounded to nearest": to_nearest(state), "weights": state}
    states |= {
        f"weights, activations at {bits} bits": state.with_activations(found) for bits, found in grids.items()
    }
    errors = {}
    for name, one in states.items():
        installed = load_backend(BACKEND).install(denoiser, one)
        try:
            pairs = [(denoiser(**call)[0], target) for call, target in zip(calls, exact, strict=True)]
        finally:
            installed.remove()
        errors[name] = _relative(pairs)
    return errors


def _relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    difference = sum(float((found - target).double().square().sum()) for found, target in pairs)
    return difference / max(sum(float(target.double().square().sum()) for _, target in pairs), 1e-30)


def to_nearest(state: CalibratedState) -> CalibratedState:
    """The same grids with every weight rounded to nearest; needs the float weights in the state."""
    layers = {}
    for name, layer in state.layers.items():
        pieces = state.float_parameters[f"{name}.weight"].split([p.codes.shape[1] for p in layer.weight], 1)
        parts = []
        for piece, part in zip(pieces, layer.weight, strict=True):
            codes = ((piece / part.scale).round() + part.zero_point).clamp(0, 2**part.bits - 1)
            parts.append(replace(part, codes=codes.to(part.codes.dtype)))
        layers[name] = CalibratedLayer(tuple(parts))
    return replace(state, layers=layers)


def _unit_rows(
    units: Sequence[Unit], weights: Sequence[UnitErrors], activations: Mapping[int, Sequence[UnitErrors]]
) -> list[dict[str, Any]]:
    return [
        {
            "name": unit.name,
            "weights": asdict(weights[number]),
            "activations": {str(bits): asdict(errors[number]) for bits, errors in activations.items()},
        }
        for number, unit in enumerate(units)
    ]


def _identity(
    pipe: Any, model: ModelSection, prompts: Sequence[str], settings: CalibrationSettings
) -> dict[str, Any]:
    """All that a result depends on.

    The scheme is among the settings: what is finished under one must not be taken for another's. A folder
    begun by a version without schemes has no such key, and is refused like any other difference.
    """
    return {**identity_of(pipe, model, prompts), **settings.described()}


def _told(unit: Unit, errors: UnitErrors) -> str:
    return f"{unit.name}: {errors.before:.2e} -> {errors.after:.2e}"


def _needed(
    units: Sequence[Unit],
    inputs: DenoiserInputs,
    denoiser: nn.Module,
    settings: CalibrationSettings,
    call_seconds: float,
) -> str:
    """Memory and time that the calibration is going to take, roughly.

    Both models are kept, and of one unit at a time all samples. For each unit both run as far as it, for the
    weights and for each width; then it learns, which takes three times as long as running it.
    """
    largest = max(units, key=lambda unit: unit.values)
    kept = largest.values * len(inputs) * 4 / 2**20
    models = (
        2 * sum(parameter.numel() * parameter.element_size() for parameter in denoiser.parameters()) / 2**20
    )
    widths = len(settings.activation_bits)
    runs = len(units) * len(inputs) * (1 + widths)
    learning = 3 * settings.batch_size * (settings.iterations + widths * settings.activation_iterations)
    return (
        f"{len(units)} units, {len(inputs)} samples; the two models take {models:,.0f} MiB, and the samples of "
        f"the largest unit, {largest.name}, {kept:,.0f} MiB (on the CPU where the device has no room); roughly "
        f"{_minutes(call_seconds * (runs + learning))}"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


def _memory_used(device: torch.device) -> str:
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    if device.type != "cuda":
        return f"peak memory: {host:,.0f} MiB"
    return f"peak memory: {host:,.0f} MiB, {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB on {device}"
