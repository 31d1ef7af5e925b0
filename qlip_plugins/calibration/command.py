"""What `qlip-plugins calibrate` does: from a pipeline's name to the folders that are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..adapter import CheckpointWriter, load_base_quantizer
from ..errors import AdapterNotFoundError, RecipeError
from ..families import denoiser_of, family_of
from ..generation import load_model, placed
from ..packed import NAME, check_writable, write_packed
from ..recipe import ModelSection
from .run import Calibration, calibrate
from .settings import CalibrationSettings

ORIGIN = "qlip-plugins calibrate"


@dataclass(frozen=True)
class Result:
    """What was written.

    Args:
        report: settings and errors.
        base: the `base:` section of a recipe that uses the folder.
        model: its `model:` section.
        written: the files and folders.
    """

    report: Mapping[str, Any]
    base: Mapping[str, Any]
    model: Mapping[str, Any]
    written: tuple[Path, ...]


def calibrate_pipeline(
    pipeline: str,
    prompt_embeddings: str | None,
    prompts: Sequence[str],
    settings: CalibrationSettings,
    out: Path,
    native: Path | None,
    work: Path,
    say: Callable[[str], None],
) -> Result:
    """Calibrate a pipeline's denoiser and write the result.

    Args:
        pipeline: folder or hub id.
        prompt_embeddings: file, for a pipeline without a text encoder.
        prompts: for the calibration inputs.
        settings: how.
        out: the packed folder to write.
        native: folder for the framework's own files, one folder a width in it; None writes none.
        work: folder for what is finished; removed in the end.
        say: called with remarks.

    Raises:
        QlipError: any; what can be known beforehand is checked before the work.
    """
    _check_native(native, settings)
    model = _model_section(pipeline, prompt_embeddings)
    check_writable(out)
    pipe = placed(load_model(model), settings.sampling)
    family_of(pipe)  # refused now, before anything is sampled
    writer = None if native is None else _writer(settings.scheme)
    for folder in _native_folders(native, settings).values():
        if writer is not None:
            writer.check_writable(denoiser_of(pipe), folder)
    calibration, finished = calibrate(pipe, model, prompts, settings, work, say)
    write_packed(out, calibration.weights, calibration.grids, calibration.report, ORIGIN)
    written = [out, *_write_native(writer, calibration, _native_folders(native, settings))]
    finished.remove()
    bits = settings.activation_bits[0] if settings.activation_bits else None
    base = {"adapter": NAME, "folder": str(out.resolve()), "activation_bits": bits}
    return Result(calibration.report, base, _described(model), tuple(written))


def _model_section(pipeline: str, prompt_embeddings: str | None) -> ModelSection:
    given = {"pipeline": pipeline, "prompt_embeddings": prompt_embeddings}
    try:
        return ModelSection.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise RecipeError(
            "\n".join(f"{found['loc'][0]}: {found['msg']}" for found in error.errors())
        ) from None


def _described(model: ModelSection) -> dict[str, str]:
    """As a recipe elsewhere can name it."""
    values = {key: value for key, value in model if value is not None}
    return {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in values.items()}


def _check_native(native: Path | None, settings: CalibrationSettings) -> None:
    reason = settings.rules.no_native
    if native is not None and reason:
        raise RecipeError(f"--native {native}: {reason}. Leave it out")


def _writer(name: str) -> CheckpointWriter:
    adapter = load_base_quantizer(name)
    if not isinstance(adapter, CheckpointWriter):
        raise AdapterNotFoundError(f"the base quantizer {name!r} that is installed cannot write checkpoints")
    return adapter


def _native_folders(native: Path | None, settings: CalibrationSettings) -> dict[int | None, Path]:
    """Activation width -> folder, such as `w4a8`; `w4` where activations stay in floating point."""
    if native is None:
        return {}
    weights = f"w{settings.weight_bits}"
    if not settings.activation_bits:
        return {None: native / weights}
    return {bits: native / f"{weights}a{bits}" for bits in settings.activation_bits}


def _write_native(
    writer: CheckpointWriter | None, calibration: Calibration, folders: Mapping[int | None, Path]
) -> list[Path]:
    if writer is None:
        return []
    return [writer.write(calibration.state(bits), folder) for bits, folder in folders.items()]
