"""Statistics of the quantization error by timestep: what PTQD's correction works with, and what they hold for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlip_plugins.artefacts import read_tensors, versions, write_tensors
from qlip_plugins.checkpoint import check_finite
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_plugins.recipe import FULL_PRECISION

FORMAT = "qlip-plugins correction"
VERSION = 1
LAST_TIMESTEP = 10**6

_PLAN = "plan"
_PARTS = ("slope", "deviation", "bias")
_SCALARS = (str, int, float, type(None))


def check_timestep(value: object) -> None:
    """Check that a value from a file is a timestep: an int 0..10^6.

    Raises:
        ArtefactError: it is not.
    """
    if type(value) is not int or not 0 <= value <= LAST_TIMESTEP:
        raise ArtefactError(f"{_shown(value)} is no timestep, expected an int 0 to {LAST_TIMESTEP}")


@dataclass(frozen=True)
class StepStatistics:
    """Quantization error of the guided noise prediction by timestep.

    Args:
        timesteps: S of them, ascending.
        slope: `(S,)` float64, of the error on the float model's prediction; as fitted, so it may be negative.
        deviation: `(S,)` float64, at least 0, of the error that the slope leaves.
        bias: `(S, C)` float64, the error's mean in each channel.

    Raises:
        ArtefactError: the parts contradict each other, or hold values that are no statistics.
    """

    timesteps: tuple[int, ...]
    slope: Tensor
    deviation: Tensor
    bias: Tensor

    def __post_init__(self) -> None:
        _check_timesteps(self.timesteps)
        steps = len(self.timesteps)
        for name, dims in (("slope", 1), ("deviation", 1), ("bias", 2)):
            part: Tensor = getattr(self, name)
            if part.dtype != torch.float64 or part.ndim != dims or len(part) != steps or not part.numel():
                expected = f"({steps})" if dims == 1 else f"({steps}, channels)"
                raise ArtefactError(
                    f"{name} is {part.dtype} of shape {tuple(part.shape)}, expected torch.float64 {expected}"
                )
            if not bool(part.isfinite().all()):
                raise ArtefactError(f"{name} holds NaN or infinite values")
        if bool((self.deviation < 0).any()):
            raise ArtefactError(f"deviation holds a negative value, {float(self.deviation.min()):.3g}")

    def at(self, timestep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slope `()`, deviation `()` and bias `(C,)` of one timestep.

        Raises:
            IncompatibleModelError: there are none for it.
        """
        self.check_has(timestep)
        place = self.timesteps.index(timestep)
        return self.slope[place], self.deviation[place], self.bias[place]

    def check_has(self, timestep: int) -> None:
        """Check that there are statistics of a timestep.

        Raises:
            IncompatibleModelError: there are none.
        """
        if timestep not in self.timesteps:
            known = ", ".join(map(str, self.timesteps))
            raise IncompatibleModelError(
                f"the correction has no statistics for timestep {timestep}, only for {known}. Statistics hold "
                "for one number of steps of one schedule: use that, or collect new ones"
            )


@dataclass(frozen=True)
class Validity:
    """What statistics hold for; None: not known (PTQD's own files say only timesteps and channels).

    Args:
        base_fingerprint: of the quantized model (`CalibratedState.fingerprint`).
        ranges_digest: of the ranges that the recipe names.
        attention: "base" or "controlled".
        time_layers: likewise; files of before there was a choice hold for "base".
        plan: digest of the planner whose own plans were followed; None also for fixed widths.
        guidance_scale: of the guided prediction.
        steps: inference steps.
        schedule: the scheduler's facts by name, each a text, a number, true, false or None.

    Raises:
        ArtefactError: a value is of another type, or impossible.
    """

    base_fingerprint: str | None = None
    ranges_digest: str | None = None
    attention: str | None = None
    time_layers: str = "base"
    plan: str | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    schedule: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("base_fingerprint", "ranges_digest", "plan"):
            self._check(name, "a text", lambda value: isinstance(value, str))
        for name in ("attention", "time_layers"):
            self._check(name, "'base' or 'controlled'", lambda value: value in ("base", "controlled"))
        self._check("guidance_scale", "a finite number", _is_number)
        self._check("steps", "a whole number above 0", lambda value: type(value) is int and value > 0)
        self._check("schedule", "texts, numbers, true, false or null by name", _is_schedule)

    def _check(self, name: str, expected: str, fits: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is not None and not fits(value):
            raise ArtefactError(f"{name}: expected {expected}, found {_shown(value)}")

    def differences(self, found: Validity) -> list[str]:
        """Where another setting differs, a line each; what either side does not know is no difference.

        Args:
            found: what the statistics are to be used with.
        """
        pairs: list[tuple[str, Any, Any]] = [
            (field.name, getattr(self, field.name), getattr(found, field.name))
            for field in fields(self)
            if field.name != "schedule"
        ]
        collected = [(name, ours, theirs) for name, ours, theirs in pairs if None not in (ours, theirs)]
        ours, theirs = self.schedule or {}, found.schedule or {}
        collected += [(f"schedule.{key}", ours[key], theirs[key]) for key in ours if key in theirs]
        return [
            f"{name}: collected at {_short(ours)}, used at {_short(theirs)}"
            for name, ours, theirs in collected
            if ours != theirs
        ]


@dataclass(frozen=True)
class CorrectionStatistics:
    """Statistics of one model, for each width they were collected at.

    Args:
        widths: activation width -> statistics at that width throughout. The single key None: one set, whatever
            the bits (PTQD's own files, or those of a planner's own plans).
        validity: what they hold for.
        source: where they were read from.
        prompts: how many they were collected on; None: not known.

    Raises:
        ArtefactError: the sets do not belong together.
    """

    widths: Mapping[int | None, StepStatistics]
    validity: Validity
    source: str = ""
    prompts: int | None = None

    def __post_init__(self) -> None:
        if None not in self.widths:
            for width in self.widths:
                _check_width(width)
        elif len(self.widths) > 1:
            raise ArtefactError("statistics for any width and for single ones, expected one or the other")
        if not self.widths:
            raise ArtefactError("no statistics for any width")
        if self.prompts is not None and (type(self.prompts) is not int or self.prompts < 1):
            raise ArtefactError(f"prompts: expected a whole number above 0, found {_shown(self.prompts)}")
        shapes = {
            (found.timesteps, found.bias.shape[1]): _named(width) for width, found in self.widths.items()
        }
        if len(shapes) > 1:
            raise ArtefactError(
                f"the statistics of {' and '.join(shapes.values())} differ in their timesteps or channels, "
                "expected the same for all"
            )

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timesteps that there are statistics for, ascending."""
        return next(iter(self.widths.values())).timesteps

    @property
    def channels(self) -> int:
        """C, the channels of the noise prediction."""
        return next(iter(self.widths.values())).bias.shape[1]

    def check_has(self, timestep: int) -> None:
        """See `StepStatistics.check_has`; all sets have the same."""
        next(iter(self.widths.values())).check_has(timestep)

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors, whole or not at all; equal statistics, equal bytes."""
        tensors = {
            f"{_named(width)}.{part}": getattr(found, part)
            for width, found in self.widths.items()
            for part in _PARTS
        }
        validity = {field.name: getattr(self.validity, field.name) for field in fields(Validity)}
        if self.validity.schedule is not None:
            validity["schedule"] = dict(self.validity.schedule)
        write_tensors(
            path,
            FORMAT,
            VERSION,
            tensors,
            timesteps=self.timesteps,
            validity=validity,
            prompts=self.prompts,
            versions=versions(),
        )

    @classmethod
    def load(cls, path: Path) -> CorrectionStatistics:
        """Read the file that `save` wrote, or the folder that PTQD's scripts wrote.

        Raises:
            ArtefactError: missing, damaged, of another format, newer than this package, or no statistics.
        """
        from .correct_data import FILES, read_correct_data

        if path.is_dir():
            return read_correct_data(path)
        if not path.is_file():
            raise ArtefactError(
                f"{path}: neither a file nor a folder, expected correction statistics: a file collected here, "
                "or PTQD's correct_data folder"
            )
        if path.name in FILES:
            raise ArtefactError(f"{path}: one of PTQD's {len(FILES)} files, name the folder that holds them")
        tensors, facts = read_tensors(path, FORMAT, VERSION)
        check_finite(path, tensors)
        try:
            return cls(_sets(tensors, facts), _validity(facts), str(path), facts.get("prompts"))
        except ArtefactError as error:
            raise ArtefactError(f"{path}: {error}") from None


def _check_timesteps(timesteps: tuple[int, ...]) -> None:
    for timestep in timesteps:
        check_timestep(timestep)
    if not timesteps or list(timesteps) != sorted(set(timesteps)):
        raise ArtefactError("timesteps: expected at least one, ascending, each once")


def _check_width(width: object) -> None:
    if type(width) is not int or not 2 <= width <= FULL_PRECISION:
        raise ArtefactError(f"statistics for {_shown(width)} bits, expected 2 to {FULL_PRECISION}")


def _sets(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[int | None, StepStatistics]:
    timesteps = facts.get("timesteps")
    if not isinstance(timesteps, list):
        raise ArtefactError(f"timesteps: expected a list, found {_shown(timesteps)}")
    names = {name.rpartition(".")[0] for name in tensors}
    for name in names:
        for part in _PARTS:
            if f"{name}.{part}" not in tensors:
                raise ArtefactError(f"tensor '{name}.{part}' is missing")
    strange = sorted(tensors.keys() - {f"{name}.{part}" for name in names for part in _PARTS})
    if strange:
        raise ArtefactError(f"tensor {strange[0]!r} is no part of statistics")
    found = {_width(name): _set(name, tensors, tuple(timesteps)) for name in sorted(names)}
    return {width: found[width] for width in sorted(found, key=lambda width: width or 0)}


def _set(name: str, tensors: Mapping[str, Tensor], timesteps: tuple[int, ...]) -> StepStatistics:
    _check_timesteps(timesteps)
    try:
        return StepStatistics(timesteps, *(tensors[f"{name}.{part}"] for part in _PARTS))
    except ArtefactError as error:
        raise ArtefactError(f"tensor {name}.{error}") from None


def _width(name: str) -> int | None:
    if name == _PLAN:
        return None
    width = next((width for width in range(2, FULL_PRECISION + 1) if str(width) == name), None)
    if width is None:
        raise ArtefactError(f"statistics for {_shown(name)} bits, expected 2 to {FULL_PRECISION}")
    return width


def _named(width: int | None) -> str:
    return _PLAN if width is None else str(width)


def _validity(facts: Mapping[str, Any]) -> Validity:
    known, found = {field.name for field in fields(Validity)}, facts.get("validity")
    # Files of before there was a choice lack the last.
    if not isinstance(found, dict) or not known - {"time_layers"} <= found.keys() <= known:
        raise ArtefactError(f"validity: expected {', '.join(sorted(known))}, found {_shown(found)}")
    try:
        return Validity(**found)
    except ArtefactError as error:
        raise ArtefactError(f"validity: {error}") from None


def _is_number(value: object) -> bool:
    # Compared, not tested by `isfinite`: that fails on a whole number beyond the floats.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_schedule(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str)
        and isinstance(fact, _SCALARS)
        and (not isinstance(fact, float) or math.isfinite(fact))
        for key, fact in value.items()
    )


def _shown(value: object) -> str:
    """A value from a file, in a message: short, and of plain characters."""
    return ascii(value)[:60]


def _short(value: object) -> str:
    """A value in a line of differences; of a digest its first 12 characters."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)
