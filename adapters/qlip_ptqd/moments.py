"""Streaming moments of predictions and their errors: all that the statistics need, without the values themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from qlip_plugins.checkpoint import check_finite
from qlip_plugins.errors import ArtefactError

from .statistics import StepStatistics

_COUNT = "count"
_ENTRY_DIMS = 4


@dataclass(frozen=True)
class Moments:
    """Moments of N samples at S timesteps, float64.

    Args:
        prediction_mean: `(N, S)`, mean of a sample's guided prediction.
        error_mean: `(N, S)`, mean of its error.
        prediction_square: `(N, S)`, sum of squares of the prediction about its mean.
        cross: `(N, S)`, sum of products of prediction and error, each about its mean.
        error_square: `(N, S)`, sum of squares of the error about its mean.
        bias: `(N, S, C)`, mean of the error in each channel.
        count: values of one sample, C * h * w.
    """

    prediction_mean: Tensor
    error_mean: Tensor
    prediction_square: Tensor
    cross: Tensor
    error_square: Tensor
    bias: Tensor
    count: int

    @classmethod
    def of(cls, prediction: Tensor, error: Tensor) -> Moments:
        """The moments of some samples.

        Args:
            prediction: `(N, S, C, h, w)`, guided prediction of the float model.
            error: the same shape, the quantized model's prediction less that.

        Raises:
            ValueError: the shapes are others.
        """
        if prediction.shape != error.shape or prediction.ndim != _ENTRY_DIMS + 1:
            raise ValueError(
                f"predictions {tuple(prediction.shape)}, errors {tuple(error.shape)}, expected (N, S, C, h, w) twice"
            )
        # On the CPU first: not every accelerator has float64.
        prediction, error = (values.detach().cpu().double() for values in (prediction, error))
        flat_prediction, flat_error = prediction.flatten(2), error.flatten(2)
        prediction_mean, error_mean = flat_prediction.mean(2), flat_error.mean(2)
        centred_prediction = flat_prediction - prediction_mean[..., None]
        centred_error = flat_error - error_mean[..., None]
        return cls(
            prediction_mean,
            error_mean,
            centred_prediction.square().sum(2),
            (centred_prediction * centred_error).sum(2),
            centred_error.square().sum(2),
            error.mean((3, 4)),
            flat_prediction.shape[2],
        )

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """The moments of all samples of some parts, in their order.

        Raises:
            ArtefactError: there is no part, or they differ in timesteps, channels or values of a sample.
        """
        return cls._concatenated(parts, dim=0)

    @classmethod
    def _concatenated(cls, parts: Sequence[Moments], dim: int) -> Moments:
        if not parts:
            raise ArtefactError("no quantization errors, expected some")
        kinds = {
            (*(size for at, size in enumerate(part.bias.shape) if at != dim), part.count) for part in parts
        }
        if len(kinds) > 1:
            raise ArtefactError(
                "quantization errors of different numbers of samples or timesteps, or of different shapes: "
                f"{sorted(kinds)}"
            )
        tensors = {name: torch.cat([getattr(part, name) for part in parts], dim) for name in _tensor_names()}
        return cls(**tensors, count=parts[0].count)

    def statistics(self, timesteps: Sequence[int]) -> StepStatistics:
        """What the moments say of each timestep, samples weighing alike.

        The slope is the least-squares one of error on prediction, with an intercept, over all values of all
        samples; the deviation, over samples, the mean of the unbiased standard deviation of
        `error - max(slope, 0) * prediction`; the bias the mean of the samples'.

        Args:
            timesteps: S of them, as the moments have them; the statistics have them ascending.

        Raises:
            ArtefactError: NaN or infinite moments, a prediction that does not vary, timesteps that do not fit.
        """
        if len(timesteps) != self.bias.shape[1] or self.count < 2:
            raise ArtefactError(
                f"moments of {self.bias.shape[1]} timesteps and {self.count} values a sample, expected "
                f"{len(timesteps)} timesteps and at least 2 values"
            )
        order = sorted(range(len(timesteps)), key=lambda place: timesteps[place])
        return StepStatistics(
            tuple(timesteps[place] for place in order), *(part[order] for part in self._by_timestep())
        )

    def _by_timestep(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slope `(S,)`, deviation `(S,)` and bias `(S, C)`."""
        # Samples have as many values each, so the mean of their means is the mean over all values.
        prediction_off = self.prediction_mean - self.prediction_mean.mean(0)
        error_off = self.error_mean - self.error_mean.mean(0)
        square = (self.prediction_square + self.count * prediction_off.square()).sum(0)
        if bool((square == 0).any()):
            raise ArtefactError("a prediction that does not vary has no slope of the error on it")
        slope = (self.cross + self.count * prediction_off * error_off).sum(0) / square
        used = slope.relu()
        left = self.error_square - 2 * used * self.cross + used.square() * self.prediction_square
        # Where nothing is left, rounding can put the difference below 0.
        deviation = (left.clamp(min=0) / (self.count - 1)).sqrt().mean(0)
        return slope, deviation, self.bias.mean(0)

    def to_tensors(self) -> dict[str, Tensor]:
        """The moments by name, as `from_tensors` takes them."""
        tensors = {name: getattr(self, name) for name in _tensor_names()}
        return {**tensors, _COUNT: torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, path: Path, tensors: Mapping[str, Tensor]) -> Moments:
        """What `to_tensors` gave.

        Args:
            path: the file they were read from, for messages.
            tensors: by name, no others.

        Raises:
            ArtefactError: a tensor is missing, strange, of another type or shape, or holds impossible values.
        """
        names = _tensor_names()
        if tensors.keys() != {*names, _COUNT}:
            found = ", ".join(sorted(tensors)) or "none"
            raise ArtefactError(
                f"{path}: expected the tensors {', '.join(names)} and {_COUNT}, found {found}"
            )
        check_finite(path, dict(tensors))
        shape = tensors["bias"].shape
        for name in names:
            expected = shape if name == "bias" else shape[:2]
            tensor = tensors[name]
            if tensor.dtype != torch.float64 or tensor.shape != expected or len(shape) != 3:
                raise ArtefactError(
                    f"{path}: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected "
                    "torch.float64 (samples, timesteps), for 'bias' also channels"
                )
            if name.endswith("square") and bool((tensor < 0).any()):
                raise ArtefactError(f"{path}: tensor {name!r} holds negative sums of squares")
        count = tensors[_COUNT]
        if count.dtype != torch.int64 or count.ndim or int(count) < 2:
            raise ArtefactError(f"{path}: tensor {_COUNT!r} is no whole number above 1")
        return cls(**{name: tensors[name] for name in names}, count=int(count))


def statistics_of_errors(errors: Iterable[tuple[Tensor, Tensor, Tensor]]) -> StepStatistics:
    """The statistics of PTQD's own list of quantization errors.

    Args:
        errors: float prediction `(n, C, h, w)`, error `(n, C, h, w)` and timesteps `(n,)` int64, in any order.

    Raises:
        ArtefactError: an entry is of another kind, or a timestep has more samples than another.
    """
    found: dict[int, list[Moments]] = {}
    for place, (prediction, error, timesteps) in enumerate(errors):
        _check_entry(place, prediction, error, timesteps)
        for timestep in timesteps.unique().tolist():
            rows = timesteps == timestep
            found.setdefault(timestep, []).append(Moments.of(prediction[rows, None], error[rows, None]))
    each = {timestep: Moments.joined(parts) for timestep, parts in found.items()}
    return Moments._concatenated(list(each.values()), dim=1).statistics(list(each))


def _check_entry(place: int, prediction: Tensor, error: Tensor, timesteps: Tensor) -> None:
    fits = (
        prediction.is_floating_point()
        and error.is_floating_point()
        and prediction.ndim == _ENTRY_DIMS
        and prediction.shape == error.shape
        and timesteps.dtype == torch.int64
        and timesteps.shape == prediction.shape[:1]
    )
    if not fits:
        found = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in (prediction, error, timesteps))
        raise ArtefactError(
            f"entry {place} is {found}, expected a prediction (n, C, h, w), its error and int64 timesteps (n)"
        )


def _tensor_names() -> list[str]:
    return [field.name for field in fields(Moments) if field.name != _COUNT]
