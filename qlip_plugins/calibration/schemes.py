"""What a public framework quantizes in a UNet, and on which grids.

The learning itself is the same for all of them (docs/method.md, Calibrate).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

from ..errors import IncompatibleModelError

SchemeName = Literal["qdiffusion", "ptqd"]

Start = Literal["running", "mse"]
"""First activation grids: over running extremes of all samples, or with the least error on a few of them."""

KEPT_BITS: Final = 8
"""Weights and inputs of the layers that a scheme keeps out of the asked widths."""

_IN_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


@dataclass(frozen=True)
class LayerSpec:
    """How one convolution or linear layer is quantized.

    Args:
        name: its module path.
        bits: of its weight.
        split: input channels in the first of two parts, which have grids of their own; None: one part.
        per_tensor: whether the weight has one grid, in place of one for each output channel.
        learned: whether its rounding is learned; otherwise it is rounded to nearest.
        input_bits: of its input, whatever width is asked for; None: the asked one.
    """

    name: str
    bits: int
    split: int | None = None
    per_tensor: bool = False
    learned: bool = True
    input_bits: int | None = None

    def activation_bits(self, asked: int) -> int:
        """Width of its input where `asked` is the model's."""
        return asked if self.input_bits is None else self.input_bits


@dataclass(frozen=True)
class Scheme:
    """The manner of one framework, in names of diffusers' UNets.

    Args:
        name: also that of the base quantizer for the framework's own files.
        softmax_bits: of attention weights where none are asked for; None leaves the operands of
            attention's products in floating point.
        starts: the first activation grids that there are, the default one first.
        splits: whether the two parts of a decoder shortcut's input have grids of their own.
        per_tensor: whether a weight has one grid, in place of one for each output channel.
        floating: patterns of layers that stay in floating point, weights and inputs.
        outside: every layer outside of blocks that a UNet must have, and may have; none: any.
        kept: those among them with 8-bit weights, rounded to nearest, and 8-bit inputs.
        no_native: why the framework's own file cannot be written; empty: it can.
    """

    name: SchemeName
    softmax_bits: int | None
    starts: tuple[Start, ...]
    splits: bool = False
    per_tensor: bool = False
    floating: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    no_native: str = ""

    def layer(self, name: str, bits: int, split: int | None) -> LayerSpec | None:
        """How a layer is quantized; None: it stays in floating point.

        Args:
            name: its module path.
            bits: the asked width of weights.
            split: where its input could be split.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.floating):
            return None
        if name in self.kept:
            return LayerSpec(name, KEPT_BITS, per_tensor=self.per_tensor, learned=False, input_bits=KEPT_BITS)
        return LayerSpec(name, bits, split if self.splits else None, self.per_tensor)

    def check_layers(self, names: Collection[str]) -> None:
        """Check that the scheme is defined on a UNet.

        PTQD's public code finds its 8-bit layers by position: the first, the third and the last of those
        that it quantizes. Another linear before `conv_in` (a class or time embedding's, say) would
        move the third to itself, so that such UNets are refused. A class table is no linear: it may be there.

        Args:
            names: module paths of every convolution and linear.

        Raises:
            IncompatibleModelError: it is not; names the layer.
        """
        if not self.outside:
            return
        found = [name for name in names if not name.startswith(_IN_BLOCKS)]
        strange = [name for name in found if name not in self.outside]
        lacking = [name for name in self.outside if name not in found]
        if strange or lacking:
            what = f"has {strange[0]}" if strange else f"lacks {lacking[0]}"
            raise IncompatibleModelError(
                f"the UNet {what}: {self.name} keeps its first, third and last layer at {KEPT_BITS} bits, by position, "
                f"which means what it should only with {', '.join(self.outside)} outside of the blocks. Use another "
                "scheme"
            )


SCHEMES: Final[Mapping[SchemeName, Scheme]] = {
    scheme.name: scheme
    for scheme in (
        # Li et al., ICCV 2023, arXiv 2302.04304
        Scheme(name="qdiffusion", softmax_bits=16, starts=("running", "mse"), splits=True),
        # He et al., NeurIPS 2023, arXiv 2305.10657
        Scheme(
            name="ptqd",
            softmax_bits=None,
            starts=("mse",),
            per_tensor=True,
            floating=("*.conv_shortcut", "*.downsamplers.*.conv"),
            outside=("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_out"),
            kept=("time_embedding.linear_1", "conv_in", "conv_out"),
            no_native="PTQD's files hold neither steps of weights nor zero points, each of its scripts derives them "
            "anew; the packed folder holds them all",
        ),
    )
}
