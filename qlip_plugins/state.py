"""The neutral record between checkpoint readers and backends.

With M readers and N backends it makes M + N adapters of M x N: a reader writes a `CalibratedState`, a
backend installs one. Names are those of the diffusers denoiser.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from .errors import IncompatibleModelError
from .grids import ActGrid

SPLIT_SUFFIX = ".skip"
"""Appended to a layer's name for the quantizer of the second part of a split input."""

OPERANDS = ("q", "k", "v", "softmax")
"""Appended, after a dot, to an attention's name for the quantizers of its matrix products."""


SAME_WAY = 0.8
"""Least cosine between a weight and its quantized one (our choice): weights of another training lie far below."""

SAMPLED = 32
"""Values of a float weight that are kept where the weight itself is not."""


@dataclass(frozen=True)
class WeightPart:
    """Integer weight codes of a layer, or of one part of its input channels.

    `codes` has the shape of the weight, whole numbers 0 .. 2^bits - 1; `scale` and `zero_point`
    broadcast to it, `(O, 1)` or `(O, 1, 1, 1)` for one grid an output channel.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    def dequantized(self) -> Tensor:
        """`(codes - zero_point) * scale`, float32."""
        return (self.codes.float() - self.zero_point) * self.scale


@dataclass(frozen=True)
class CalibratedLayer:
    """One convolution or linear layer.

    Args:
        weight: one part, or two where the input channels are split.
        inputs: one grid for each part, or none where activations stay in floating point.
        smoothing: `(I,)`, multiplies the input, channel by channel, before it is quantized (SmoothQuant, AWQ);
            the weight has been divided by it.
        low_rank: `(r, I)` and `(O, r)`: what their product makes of the smoothed input, unquantized, is added to
            the output (SVDQuant).
    """

    weight: tuple[WeightPart, ...]
    inputs: tuple[ActGrid, ...] = ()
    smoothing: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None

    def dequantized(self) -> Tensor:
        """The weight that the layer computes with, float32, in the float weight's shape."""
        return torch.cat([part.dequantized() for part in self.weight], dim=1)

    def points_along(self, weight: Tensor) -> bool:
        """Whether a float weight, before smoothing, points about where this layer's does (`SAME_WAY`)."""
        ours = self.dequantized()
        if self.low_rank is not None:
            down, up = self.low_rank
            ours = ours + up @ down
        if self.smoothing is not None:
            ours = ours * self.smoothing.reshape(1, -1, *[1] * (ours.ndim - 2))
        theirs = weight.detach().float().cpu()
        cosine = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        return bool(cosine > SAME_WAY) or not bool(theirs.any())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        first = self.weight[0].codes.shape
        return (first[0], sum(part.codes.shape[1] for part in self.weight), *first[2:])

    @property
    def split(self) -> int | None:
        """Where the input channels are split; None where they are not."""
        return self.weight[0].codes.shape[1] if len(self.weight) > 1 else None


def through_low_rank(x: Tensor, low_rank: tuple[Tensor, Tensor]) -> Tensor:
    """What a `CalibratedLayer.low_rank` makes of a smoothed input `(..., I)`: `(..., O)`."""
    down, up = (matrix.to(x.device, x.dtype) for matrix in low_rank)
    out: Tensor = x @ down.T @ up.T
    return out


@dataclass(frozen=True)
class CalibratedState:
    """A calibrated model, as a backend needs it.

    Args:
        format: name of the base quantizer that read it.
        layers: module path of a convolution or linear -> its quantizers.
        operands: `<attention path>.{q,k,v,softmax}` -> grid of an attention product's operand.
        float_parameters: every floating parameter of the calibrated model by diffusers name; of the
            layers' unquantized weights all, or none where `weight_samples` stand for them.
        weight_samples: `weight_sample` of each layer's unquantized weight, by layer.
        source: where it was read from, for messages.
        to_complete: gives the activation grids where only a run of the model can tell them, by
            `activations` name; None where nothing is missing.
        moved: of the float parameters, those that the calibration itself may have changed, so that the pipeline's
            may differ.
        left: quantizers that the calibrated model has besides and that stay as they are, with what they do.
    """

    format: str
    layers: Mapping[str, CalibratedLayer]
    operands: Mapping[str, ActGrid] = field(default_factory=dict)
    float_parameters: Mapping[str, Tensor] = field(default_factory=dict)
    weight_samples: Mapping[str, Tensor] = field(default_factory=dict)
    source: str = ""
    to_complete: Callable[[nn.Module], Mapping[str, ActGrid]] | None = None
    moved: frozenset[str] = frozenset()
    left: Mapping[str, str] = field(default_factory=dict)

    def completed(self, denoiser: nn.Module) -> CalibratedState:
        """This state, or, where its activation grids need a run of the model, the one that has them.

        Args:
            denoiser: of the calibrated architecture; it is run where needed, and is as it was afterwards.

        Raises:
            IncompatibleModelError: it cannot be run, or not with what was calibrated on.
            ArtefactError: what the run shows contradicts the checkpoint.
        """
        if self.to_complete is None:
            return self
        return self.with_activations(self.to_complete(denoiser))

    @cached_property
    def activations(self) -> dict[str, ActGrid]:
        """Every activation quantizer by its handle's name.

        Raises:
            IncompatibleModelError: they need a run of the model first (`completed`).
        """
        if self.to_complete is not None:
            raise IncompatibleModelError(
                f"{self.source}: the zero points of its activations come from a run of the model: apply the recipe to "
                "the pipeline, or call `state.completed(denoiser)`"
            )
        grids: dict[str, ActGrid] = {}
        for name, layer in self.layers.items():
            grids |= dict(zip((name, name + SPLIT_SUFFIX), layer.inputs, strict=False))
        return grids | dict(self.operands)

    def with_activations(self, grids: Mapping[str, ActGrid]) -> CalibratedState:
        """The same weights under other activation quantizers, named as in `activations`; none: weights only."""
        layers = {
            name: replace(
                layer,
                inputs=tuple(grids[part] for part in (name, name + SPLIT_SUFFIX) if part in grids),
            )
            for name, layer in self.layers.items()
        }
        operands = {name: grid for name, grid in grids.items() if name.rpartition(".")[2] in OPERANDS}
        return replace(self, layers=layers, operands=operands, to_complete=None)

    def with_float_weights(self, denoiser: nn.Module) -> CalibratedState:
        """The same state with the layers' unquantized weights filled in, as native formats store them.

        Args:
            denoiser: what was calibrated, in floating point.

        Raises:
            IncompatibleModelError: its names, shapes or weights are not those that were calibrated.
        """
        self.check_fits(denoiser)
        self.check_same_weights(denoiser)
        weights = {f"{name}.weight": denoiser.get_parameter(f"{name}.weight") for name in self.layers}
        missing = {
            name: weight.detach().cpu()
            for name, weight in weights.items()
            if name not in self.float_parameters
        }
        return replace(self, float_parameters={**self.float_parameters, **missing})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that the installed model computes with: codes, steps, zero points, biases, norms.

        Neither where the state was read from nor the types that hold its numbers count.
        """
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            for part in self.layers[name].weight:
                digest.update(f"{name} {part.bits} {tuple(part.codes.shape)}".encode())
                digest.update(_bytes(part.codes.to(torch.uint8 if part.bits <= 8 else torch.int32)))
                digest.update(_bytes(part.scale.float()))
                digest.update(_bytes(part.zero_point.to(torch.int32)))
            for tensor in (self.layers[name].smoothing, *(self.layers[name].low_rank or ())):
                if tensor is not None:
                    digest.update(_bytes(tensor.float()))
        for name, tensor in sorted(self.float_parameters.items()):
            if name.removesuffix(".weight") not in self.layers:
                digest.update(name.encode() + _bytes(tensor.float()))
        for name, grid in sorted(self.activations.items()):
            kept = "" if grid.kept == "ends" else grid.kept
            digest.update(f"{name}{grid}{kept}".encode())
        for name, what in sorted(self.left.items()):
            digest.update(f"{name} left: {what}".encode())
        return digest.hexdigest()

    def weight_bits(self) -> dict[str, int]:
        """Weight width of each quantized layer."""
        return {name: layer.weight[0].bits for name, layer in self.layers.items()}

    def check_fits(self, denoiser: nn.Module) -> None:
        """Compare every name and shape with a denoiser's.

        Raises:
            IncompatibleModelError: they disagree; the message lists the first of each kind.
        """
        problems = []
        theirs = {name: tuple(p.shape) for name, p in denoiser.named_parameters()}
        for name, tensor in self.float_parameters.items():
            if name not in theirs:
                problems.append(f"{name} {tuple(tensor.shape)} is in the checkpoint, not in the model")
            elif theirs[name] != tuple(tensor.shape):
                problems.append(
                    f"{name} is {tuple(tensor.shape)} in the checkpoint, {theirs[name]} in the model"
                )
        if self.float_parameters:
            known = {*self.float_parameters, *(f"{name}.weight" for name in self.layers)}
            # What another framework keeps inside a layer is its own.
            missing = [name for name in theirs if name not in known and not self._is_inside(name)]
            problems += [f"{name} {theirs[name]} is in the model, not in the checkpoint" for name in missing]
        modules = dict(denoiser.named_modules())
        for name, layer in self.layers.items():
            module = modules.get(name)
            if not isinstance(module, nn.Conv2d | nn.Linear):
                problems.append(f"{name} is {type(module).__name__} in the model, not a conv or linear layer")
            elif tuple(module.weight.shape) != layer.shape:
                problems.append(
                    f"{name} weighs {layer.shape} in the checkpoint, {tuple(module.weight.shape)} here"
                )
        problems += [
            f"{name}: the model has no such attention"
            for name in self.operands
            if name.rpartition(".")[0] not in modules
        ]
        if problems:
            shown = "\n  ".join(problems[:8])
            more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise IncompatibleModelError(
                f"{self.source or self.format}: the checkpoint belongs to another architecture than this "
                f"{type(denoiser).__name__} ({len(problems)} differences):\n  {shown}{more}"
            )

    def check_whole(self) -> None:
        """Check that the record holds all of the calibrated model.

        Raises:
            IncompatibleModelError: quantizers are `left`, which only the framework that has them can run.
        """
        if self.left:
            name, what = next(iter(self.left.items()))
            raise IncompatibleModelError(
                f"{self.source}: {len(self.left)} quantizers that only its own framework can run ({name}: {what}). Put "
                f"its model into the pipeline, leave the checkpoint out and give `backend: {self.format}`, or switch "
                "them off before it is saved"
            )

    def check_plain(self, denoiser: nn.Module) -> None:
        """Check that a denoiser's layers are in full precision: no framework has put quantizers inside.

        Raises:
            IncompatibleModelError: one has; names the layer and the framework.
        """
        for name, module in denoiser.named_modules():
            inside = next(module.children(), None) if name in self.layers else None
            if inside is not None:
                framework = type(inside).__module__.partition(".")[0]
                raise IncompatibleModelError(
                    f"{name}: it is a {type(module).__name__} with a {type(inside).__name__} of {framework} inside, "
                    "and a denoiser in full precision is needed. Give the float pipeline (and the quantized one as a "
                    "file, `base.checkpoint`), or `backend: {framework}` to a recipe that is applied to this model"
                )

    def _is_inside(self, name: str) -> bool:
        """Whether a parameter lies deeper than a quantized layer's own."""
        path = name.rpartition(".")[0]
        while path:
            path = path.rpartition(".")[0]
            if path in self.layers:
                return True
        return False

    def check_same_weights(self, denoiser: nn.Module) -> None:
        """Check that a denoiser holds the weights the checkpoint was calibrated on, up to half-precision rounding.

        Weights that the calibration may have `moved` are only held to point the same way (`SAME_WAY`).

        Raises:
            IncompatibleModelError: it holds others, a fine-tune's say; installing would replace them.
        """
        differing, compared = [], 0
        for name, parameter in denoiser.named_parameters():
            theirs, ours = parameter.detach(), self.float_parameters.get(name)
            layer = name.removesuffix(".weight")
            if ours is None and layer in self.weight_samples:
                theirs, ours = weight_sample(theirs), self.weight_samples[layer]
            if name in self.moved and layer in self.layers and not parameter.is_meta:
                compared += 1
                if not self.layers[layer].points_along(theirs):
                    differing.append(name)
                continue
            if ours is None or parameter.is_meta or name in self.moved:
                continue
            compared += 1
            # Weights stored as bfloat16, the coarsest type in use, are off by up to 2^-9 of their value.
            if not torch.allclose(theirs.float(), ours.to(theirs.device).float(), rtol=2**-8, atol=1e-6):
                differing.append(name)
        if differing:
            raise IncompatibleModelError(
                f"{self.source or self.format}: {len(differing)} of {compared} tensors of "
                f"the pipeline's {type(denoiser).__name__} are not those the checkpoint was calibrated on "
                f"({', '.join(differing[:3])}, ...). Load the pipeline that was calibrated"
            )


def weight_sample(weight: Tensor) -> Tensor:
    """Up to `SAMPLED` evenly strided values of a weight, `(n,)`: enough to tell a merged LoRA by."""
    flat = weight.flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]


def _bytes(tensor: Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().numpy().tobytes()
    return raw
