"""What an adapter is, and how it is found.

A *base quantizer* reads an upstream checkpoint into a `CalibratedState`; a *backend* installs such a
state on a denoiser and hands back one `ActQuantizer` for each activation quantizer; a *correction*
changes the sampler so that it allows for the error that remains; a *quality metric* judges pictures. All
are found by entry point, so an adapter outside this repository needs nothing here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from .errors import AdapterNotFoundError
from .schema import StrictModel, nearest

if TYPE_CHECKING:
    import torch

    from .controller import BitController
    from .generation import Settings
    from .grids import Ranges
    from .prompts import PromptSet
    from .quality import Quality
    from .recipe import Recipe
    from .state import CalibratedState

BASE_QUANTIZERS = "qlip_plugins.base_quantizers"
BACKENDS = "qlip_plugins.backends"
CORRECTIONS = "qlip_plugins.corrections"
QUALITY_METRICS = "qlip_plugins.quality_metrics"
IMAGE_FEATURES = "qlip_plugins.image_features"
GROUPS = (BASE_QUANTIZERS, BACKENDS, CORRECTIONS, QUALITY_METRICS, IMAGE_FEATURES)


class AdapterConfig(StrictModel):
    """The `base:` section of a recipe; each base quantizer extends it with its own options."""

    adapter: str


class CorrectionConfig(StrictModel):
    """The `correction:` section of a recipe; each correction extends it with its own options."""

    adapter: str


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says of itself, and the recipe lines that would load it.

    `weight_bits` is what the tensors reveal, None where they leave it open. `base` is the `base:`
    section of a recipe, without the options that `unknown` names: those the user must supply.
    """

    format: str
    weight_bits: int | None
    activation_bits: int | None
    has_activations: bool
    quantized_layers: int
    split_layers: int
    base: Mapping[str, Any]
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class BaseQuantizer(Protocol):
    """A calibrated post-training quantizer that QLIP runs on top of."""

    config_class: ClassVar[type[AdapterConfig]]

    def load(self, config: Any) -> CalibratedState:
        """Read the checkpoint that `config` (a `config_class`) names.

        Raises:
            ArtefactError: the file is missing, damaged, of another format, or contradicts `config`.
        """
        ...

    def inspect(self, path: Path) -> Inspection:
        """Say what the file at `path` is.

        Raises:
            ForeignFormatError: it is of another format; the message says which, where that shows.
            ArtefactError: it is of this format, but damaged.
        """
        ...


@runtime_checkable
class ModelReader(Protocol):
    """What a base quantizer may do besides: read a denoiser that its own framework has quantized in place."""

    def read(self, config: Any, denoiser: torch.nn.Module) -> CalibratedState | None:
        """The state of a denoiser in a pipeline; it is left as it is.

        Args:
            config: a `config_class`.
            denoiser: of the pipeline that the recipe is applied to.

        Returns:
            None where `config` names a checkpoint, which `load` then reads.

        Raises:
            IncompatibleModelError: the framework has not quantized it, or in a way that has no integer widths
                to choose from; the message says what.
        """
        ...


@runtime_checkable
class NeedsHost(Protocol):
    """What an adapter may say besides: whether the framework it is for can be used here."""

    def check_host(self) -> None:
        """Check that the framework is installed, and recent enough.

        Raises:
            HostError: it is not; the message says how to install it.
        """
        ...


@runtime_checkable
class CheckpointWriter(Protocol):
    """What a base quantizer may do besides: write a state in its own framework's format."""

    def check_writable(self, denoiser: torch.nn.Module, folder: Path) -> None:
        """Check, before long work, that a state of `denoiser` can be written, and into `folder`.

        Raises:
            IncompatibleModelError: the format cannot express such a model; names what.
            ArtefactError: the folder holds something that was not written by `write`.
        """
        ...

    def write(self, state: CalibratedState, folder: Path) -> Path:
        """Write a state so that `load` reads it back with the same fingerprint.

        Args:
            state: with every float parameter, the layers' unquantized weights included.
            folder: to write into.

        Returns:
            The checkpoint file.

        Raises:
            IncompatibleModelError: the format cannot express the state; names what.
            ArtefactError: the folder holds something else, or cannot be written.
        """
        ...


@runtime_checkable
class ActQuantizer(Protocol):
    """Handle on one activation quantizer of an installed model."""

    name: str
    base_bits: int

    def set_bits(self, bits: int | torch.Tensor) -> None:
        """Choose the width: one for all rows, or `(N,)` integers, one for each row of the batch.

        2..31 quantize, 32 leaves the values as they are, `base_bits` is the checkpoint's own quantizer.

        Raises:
            BitsError: a width outside 2..32, or none of its grids is known for this quantizer.
        """
        ...

    def set_mixture(
        self, widths: tuple[int, ...], probabilities: torch.Tensor, chosen: int | torch.Tensor
    ) -> None:
        """Run the chosen widths, and send gradients to every one.

        The value is that of `set_bits(chosen)`, the gradient that of the sum of p_b times what width b makes
        of the input.

        Args:
            widths: the choices, W of them.
            probabilities: `(W,)`, or `(N, W)` for the rows of a batch; non-negative.
            chosen: what runs: one of `widths` for all rows, or `(N,)` integers.

        Raises:
            BitsError: a width outside 2..32, one that is chosen and no choice, or sizes that do not fit.
        """
        ...

    def observe(self, callback: Callable[[torch.Tensor], None] | None) -> None:
        """Show every input, before it is quantized, to `callback`; None ends that."""
        ...

    def losses(self) -> Mapping[int, tuple[int, int, int]]:
        """`{width: (values seen, clipped, zeroed)}` since `install`, where the calibrated range was kept."""
        ...


class Installed(Mapping[str, ActQuantizer], ABC):
    """The activation quantizers of a model, keyed by module path, operand names appended; removable.

    `not_expressed` has those that the backend's framework cannot express, with the reason: plain torch runs
    them, to the same definition.
    """

    def __init__(self, quantizers: Mapping[str, ActQuantizer]) -> None:
        self._quantizers = dict(quantizers)
        self.not_expressed: dict[str, str] = {}

    def __getitem__(self, name: str) -> ActQuantizer:
        return self._quantizers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._quantizers)

    def __len__(self) -> int:
        return len(self._quantizers)

    @abstractmethod
    def remove(self) -> None:
        """Give the model back as it was before `install`; a second call does nothing."""

    @abstractmethod
    def verify(self) -> None:
        """Check, at little cost, that every quantizer still sits in the model.

        Raises:
            IncompatibleModelError: something has taken one out.
        """


@runtime_checkable
class Backend(Protocol):
    """Runs a calibrated state on a denoiser's layers.

    `exact` says whether it rounds as `ActGrid` is defined, to the last bit; otherwise, within one step, as its
    framework does.
    """

    exact: ClassVar[bool]

    def install(
        self, denoiser: torch.nn.Module, state: CalibratedState, ranges: Ranges | None = None
    ) -> Installed:
        """Put `state` on `denoiser`, in place, every activation quantizer active at its base width.

        Args:
            denoiser: a diffusers UNet or transformer.
            state: what a base quantizer read.
            ranges: grids of the other widths; None allows only those inside the calibrated range that
                keep the signal.

        Raises:
            IncompatibleModelError: names or shapes disagree; the denoiser is then untouched.
        """
        ...


@dataclass(frozen=True)
class CorrectionFit:
    """What statistics of a correction are to be collected.

    Args:
        recipe: the model, and the widths at which its error is met.
        prompts: to sample.
        settings: how to sample; statistics hold for its steps and guidance alone.
        own_plan: follow the plans of the recipe's own controller, in place of each width on its own.
        batch: prompts at a time.
        work: folder for what is finished.
        out: file to write.
    """

    recipe: Recipe
    prompts: Sequence[str]
    settings: Settings
    own_plan: bool
    batch: int
    work: Path
    out: Path


@runtime_checkable
class Correction(Protocol):
    """Makes a sampler that allows for the error of a quantized model."""

    config_class: ClassVar[type[CorrectionConfig]]

    def scheduler(self, config: Any, recipe: Recipe, controller: BitController) -> Any:
        """A diffusers scheduler to take the place of the pipeline's own while the recipe is applied.

        Args:
            config: a `config_class`.
            recipe: what is applied.
            controller: to ask for the plan at each step.

        Raises:
            ArtefactError: a file it needs is missing, damaged, or not what it claims.
            IncompatibleModelError: it does not hold for this model, these widths or this scheduler.
        """
        ...

    def fit(self, what: CorrectionFit, say: Callable[[str], None]) -> Mapping[str, Any]:
        """Collect the statistics that `scheduler` needs and write them; can be resumed.

        Args:
            what: to collect, and where to write it.
            say: called with remarks.

        Returns:
            Facts for people; a mapping among them is a table, row by row name -> number by column.

        Raises:
            QlipError: any; what can be known beforehand is checked before the work.
        """
        ...


Scope = Literal["across_prompts", "within_prompt"]


@runtime_checkable
class QualityMetric(Protocol):
    """A quality metric of pictures.

    `scope` says which scores can be compared: those of all pictures, or only those of pictures of one
    prompt, as with scores of how well a picture fits its text. `higher_is_better` is its direction.
    `config_class` holds its options.
    """

    config_class: ClassVar[type[StrictModel]]
    scope: ClassVar[Scope]
    higher_is_better: ClassVar[bool]

    def open(self, config: Any, pipe: Any, prompts: PromptSet, device: str) -> Quality:
        """Make it ready.

        Args:
            config: a `config_class`.
            pipe: the pipeline that draws the pictures.
            prompts: every prompt that will be judged, with its tags.
            device: where it computes.

        Raises:
            QlipError: a file it needs is missing or damaged, a tag is missing, or it does not fit the pipeline.
        """
        ...


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of one group by name; nothing is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda e: e.name)}


def load_base_quantizer(name: str) -> BaseQuantizer:
    """Import the base quantizer registered as `name`.

    Raises:
        AdapterNotFoundError: none is; the message names those that are.
    """
    adapter: BaseQuantizer = _load(BASE_QUANTIZERS, "base quantizer", name)
    return adapter


def load_backend(name: str) -> Backend:
    """Import the backend registered as `name`.

    Raises:
        AdapterNotFoundError: none is; the message names those that are.
    """
    backend: Backend = _load(BACKENDS, "backend", name)
    return backend


def load_correction(name: str) -> Correction:
    """Import the correction registered as `name`.

    Raises:
        AdapterNotFoundError: none is; the message names those that are.
    """
    correction: Correction = _load(CORRECTIONS, "correction", name)
    return correction


def load_quality_metric(name: str) -> QualityMetric:
    """Import the quality metric registered as `name`.

    Raises:
        AdapterNotFoundError: none is; the message names those that are.
    """
    metric: QualityMetric = _load(QUALITY_METRICS, "quality metric", name)
    return metric


def check_installed(group: str, kind: str, name: str) -> EntryPoint:
    """The entry point called `name`, or an error that names the nearest one."""
    found = installed(group)
    if name not in found:
        known = ", ".join(found) or "none"
        raise AdapterNotFoundError(f"no {kind} {name!r}{nearest(name, found)} (installed: {known})")
    return found[name]


def _load(group: str, kind: str, name: str) -> Any:
    # An adapter's own import error is not ours to hide: it passes through.
    return check_installed(group, kind, name).load()
