"""What every adapter promises, as checks that anyone can run on their own.

    @pytest.mark.parametrize("check", BACKEND_CHECKS.values(), ids=BACKEND_CHECKS)
    def test_backend(check: BackendCheck) -> None:
        check(my_case())

A check passes silently or raises `AssertionError` with what was promised and what was found.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from .adapter import AdapterConfig, Backend, BaseQuantizer, Installed
from .errors import ArtefactError, BitsError, ForeignFormatError, IncompatibleModelError, QlipError
from .grids import ActGrid, Ranges
from .quantizer import fake_quantize
from .state import OPERANDS, SPLIT_SUFFIX, CalibratedLayer, CalibratedState, through_low_rank

LAYER_TOLERANCE = 1e-5
ATTENTION_TOLERANCE = 1e-5
"""Relative RMS; a 16-bit softmax that is left unquantized differs by more."""

ROUNDING_TOLERANCE = 5e-3
"""Relative RMS of a layer whose backend is not `exact`: few values lie so near a border that they are rounded to
the other side."""


@torch.no_grad()
def _call(denoiser: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    out: Tensor = denoiser(**inputs, return_dict=False)[0]
    return out


@dataclass(frozen=True)
class BackendCase:
    """One backend on one model.

    Args:
        backend: what is checked.
        make_denoiser: gives a fresh denoiser with the calibrated model's float weights, in eval mode.
        state: the base, with activation quantizers.
        inputs: keyword arguments of one call, at least two rows.
        ranges: grids of `widths`, fitted.
        widths: a menu that holds 32, such as (8, 16, 32).
    """

    backend: Backend
    make_denoiser: Callable[[], nn.Module]
    state: CalibratedState
    inputs: Mapping[str, Any]
    ranges: Ranges
    widths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return next(
            len(value) for value in self.inputs.values() if isinstance(value, Tensor) and value.ndim > 1
        )

    def run(self, denoiser: nn.Module) -> Tensor:
        """One call of the denoiser."""
        return _call(denoiser, self.inputs)

    @contextmanager
    def installed(self, state: CalibratedState | None = None) -> Iterator[tuple[nn.Module, Installed]]:
        """A fresh denoiser with the base on it."""
        denoiser = self.make_denoiser()
        quantizers = self.backend.install(denoiser, state or self.state, self.ranges)
        try:
            yield denoiser, quantizers
        finally:
            quantizers.remove()


BackendCheck = Callable[[BackendCase], None]


def _require(promise: bool, text: str) -> None:
    if not promise:
        raise AssertionError(text)


def _set_all(quantizers: Installed, bits: int | Tensor) -> None:
    for quantizer in quantizers.values():
        quantizer.set_bits(bits)


def one_handle_each(case: BackendCase) -> None:
    """`install` returns one handle for each activation quantizer of the state, by its name."""
    with case.installed() as (_, quantizers):
        lacking = set(case.state.activations) ^ set(quantizers)
        _require(not lacking, f"handles and activation quantizers differ: {sorted(lacking)[:5]}")
        wrong = [
            n for n, q in quantizers.items() if q.base_bits != case.state.activations[n].bits or q.name != n
        ]
        _require(not wrong, f"handles with another name or base width than the state: {wrong[:5]}")


def exact_at_base(case: BackendCase) -> None:
    """After `install` layers and attentions compute the checkpoint's arithmetic, written out here."""
    with case.installed() as (denoiser, quantizers):
        seen = _observe(case, denoiser, quantizers)
        _require_layers(case, denoiser, seen, quantized=True)
        for name in dict.fromkeys(operand.rpartition(".")[0] for operand in case.state.operands):
            found, expected = seen[f"{name}.to_out.0"], _attend(case, denoiser, name, seen)
            error = float((found - expected).norm() / expected.norm())
            _require(
                error <= ATTENTION_TOLERANCE,
                f"{name}: its products differ from their definition by {error:.2e}",
            )


@torch.no_grad()
def _attend(case: BackendCase, denoiser: nn.Module, name: str, seen: Mapping[str, Tensor]) -> Tensor:
    """What an attention gives to `to_out` by definition: quantize, then scale; softmax; quantize; product."""
    attention: Any = denoiser.get_submodule(name)
    heads = [
        seen[f"{name}.to_{part}|out"].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in "qkv"
    ]
    grids = {operand: case.state.operands[f"{name}.{operand}"] for operand in OPERANDS}
    q, k, v = (_on_grid(x, grids[part]) for x, part in zip(heads, "qkv", strict=True))
    weights = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1)
    joined: Tensor = (_on_grid(weights, grids["softmax"]) @ v).transpose(1, 2).flatten(2)
    return joined


def _require_layers(
    case: BackendCase, denoiser: nn.Module, seen: Mapping[str, Tensor], quantized: bool
) -> None:
    for name, layer in case.state.layers.items():
        expected = _reference(denoiser, name, layer, seen, quantized)
        error = seen[f"{name}|out"] - expected
        worst, allowed = float(error.abs().max()), LAYER_TOLERANCE
        if quantized and layer.inputs and not case.backend.exact:
            # Every input one step off, at most; and hardly any is.
            step = max(abs(grid.scale) for grid in layer.inputs)
            allowed += step * float(layer.dequantized().abs().flatten(1).sum(1).max())
            share = float(error.norm() / expected.norm())
            _require(share <= ROUNDING_TOLERANCE, f"{name}: differs from its definition by {share:.2e} (RMS)")
        _require(worst <= allowed, f"{name}: differs from its definition by {worst:.2e}")


def _observe(case: BackendCase, denoiser: nn.Module, quantizers: Installed) -> dict[str, Tensor]:
    """What every quantizer saw and every layer gave, in one call."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: seen.__setitem__(name, x.clone())

    def keep_output(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, out: seen.__setitem__(f"{name}|out", out.clone())

    handles = [denoiser.get_submodule(n).register_forward_hook(keep_output(n)) for n in case.state.layers]
    for name, quantizer in quantizers.items():
        quantizer.observe(keep(name))
    case.run(denoiser)
    for quantizer in quantizers.values():
        quantizer.observe(None)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def _reference(
    denoiser: nn.Module, name: str, layer: CalibratedLayer, seen: Mapping[str, Tensor], quantized: bool
) -> Tensor:
    """A layer's output by definition, from what its quantizers saw."""
    module: Any = denoiser.get_submodule(name)
    channels = 1 if layer.weight[0].codes.ndim == 4 else -1
    grids = [grid if quantized else None for grid in layer.inputs]
    parts = [_on_grid(seen[n], grid) for n, grid in zip((name, name + SPLIT_SUFFIX), grids, strict=False)]
    x, weight = torch.cat(parts, channels), layer.dequantized()
    if weight.ndim == 4:
        return F.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)
    out = F.linear(x, weight, module.bias)
    return out if layer.low_rank is None else out + through_low_rank(seen[name], layer.low_rank)


def _on_grid(x: Tensor, grid: ActGrid | None) -> Tensor:
    if grid is None:
        return x
    values = (grid.scale, grid.zero_point, grid.low_code, grid.high_code)
    return fake_quantize(x, *(torch.tensor(float(value)) for value in values))


def pinned_to_base(case: BackendCase) -> None:
    """Setting every handle to its base width changes nothing: the difference is 0."""
    with case.installed() as (denoiser, quantizers):
        before = case.run(denoiser)
        for quantizer in quantizers.values():
            quantizer.set_bits(quantizer.base_bits)
        _require(torch.equal(before, case.run(denoiser)), "handles at base width changed the output")


def widths_matter(case: BackendCase) -> None:
    """Every width of the menu gives an output of its own, so that no switch is a silent no-op."""
    with case.installed() as (denoiser, quantizers):
        outputs = []
        for width in case.widths:
            _set_all(quantizers, width)
            outputs.append(case.run(denoiser))
        for i, width in enumerate(case.widths):
            for j in range(i):
                _require(
                    not torch.equal(outputs[i], outputs[j]),
                    f"{width} and {case.widths[j]} bits give the same output",
                )


def rows_have_their_own_bits(case: BackendCase) -> None:
    """Row i under mixed widths equals, bit for bit, row i with its width set for all rows."""
    with case.installed() as (denoiser, quantizers):
        rows = [case.widths[i % len(case.widths)] for i in range(case.rows)]
        _set_all(quantizers, torch.tensor(rows))
        mixed = case.run(denoiser)
        for row, width in enumerate(rows):
            _set_all(quantizers, width)
            alone = case.run(denoiser)
            _require(
                torch.equal(mixed[row], alone[row]), f"row {row} at {width} bits depends on its neighbours"
            )


def untouched_at_32(case: BackendCase) -> None:
    """At 32 bits a layer computes with the values it was given."""
    with case.installed() as (denoiser, quantizers):
        _set_all(quantizers, 32)
        _require_layers(case, denoiser, _observe(case, denoiser, quantizers), quantized=False)


def refuses_bad_bits(case: BackendCase) -> None:
    """Widths outside 2..32, floating ones, and rows that do not match the batch are errors."""
    with case.installed() as (denoiser, quantizers):
        first = next(iter(quantizers.values()))
        bad: Any
        for bad in (1, 33, 0, 8.7, "8", None, [8], torch.tensor([8, 33]), torch.tensor([8.0])):
            _expect(BitsError, partial(first.set_bits, bad), f"set_bits({bad})")
        first.set_bits(torch.tensor([8] * (case.rows + 1)))
        _expect(BitsError, lambda: case.run(denoiser), "a call with bits for another number of rows")


def reversible(case: BackendCase) -> None:
    """Install and remove, many times, leave weights, hooks, processors and outputs as they were."""
    denoiser = case.make_denoiser()
    before, output = _trace(denoiser), case.run(denoiser)
    for _ in range(10):
        quantizers = case.backend.install(denoiser, case.state, case.ranges)
        quantizers.remove()
        quantizers.remove()  # a second call does nothing
    _require(_trace(denoiser) == before, "install and remove left a trace")
    _require(torch.equal(case.run(denoiser), output), "the output differs after install and remove")


def _trace(denoiser: nn.Module) -> str:
    """A digest of everything that an adapter could leave behind."""
    digest = hashlib.sha256()
    for name, tensor in denoiser.state_dict().items():
        digest.update(
            f"{name}{tensor.dtype}".encode()
            + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    for name, parameter in denoiser.named_parameters():
        digest.update(f"{name}{id(parameter)}{parameter.requires_grad}".encode())
    for name, module in denoiser.named_modules():
        hooks = [
            len(value)
            for key, value in sorted(vars(module).items())
            if key.endswith(("_hooks", "_with_kwargs", "_always_called")) and isinstance(value, dict)
        ]
        attributes = sorted(vars(module))
        processor = type(getattr(module, "processor", None)).__name__
        digest.update(f"{name}{type(module)}{hooks}{attributes}{processor}".encode())
    return digest.hexdigest()


def keeps_state_dict_keys(case: BackendCase) -> None:
    """The state dict has the same keys, in the same order, with the base installed."""
    keys = list(case.make_denoiser().state_dict())
    with case.installed() as (denoiser, _):
        _require(list(denoiser.state_dict()) == keys, "the state dict's keys changed")


def choices_leave_no_trace(case: BackendCase) -> None:
    """Whatever is chosen, the state dict is the same to the bit, so that a save holds the base alone."""
    with case.installed() as (denoiser, quantizers):
        before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
        _set_all(quantizers, case.widths[0])
        case.run(denoiser)
        after = denoiser.state_dict()
        changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
        _require(not changed, f"setting bits changed the state dict: {changed[:3]}")


def reloads(case: BackendCase) -> None:
    """What was saved at one width runs at the base width on a fresh denoiser with the base installed."""
    with case.installed() as (denoiser, quantizers):
        expected = case.run(denoiser)
        _set_all(quantizers, case.widths[0])
        saved = copy.deepcopy(denoiser.state_dict())
    with case.installed() as (denoiser, quantizers):
        denoiser.load_state_dict(saved)
        quantizers.verify()
        _require(
            torch.equal(case.run(denoiser), expected), "a saved and reloaded model computes something else"
        )


def tells_what_it_cannot(case: BackendCase) -> None:
    """`not_expressed` names handles, each with a reason; what is exact expresses all."""
    with case.installed() as (_, quantizers):
        strange = set(quantizers.not_expressed) - set(quantizers)
        _require(not strange, f"not_expressed names what is no quantizer: {sorted(strange)[:3]}")
        silent = [name for name, reason in quantizers.not_expressed.items() if not reason]
        _require(not silent, f"not_expressed gives no reason for {silent[:3]}")
        beside = case.backend.exact and quantizers.not_expressed
        _require(not beside, "an exact backend says that it cannot express some quantizers")


def survives_deepcopy(case: BackendCase) -> None:
    """A deepcopy computes the same, on weights and quantizers of its own, or refuses to run."""
    with case.installed() as (denoiser, quantizers):
        trained = torch.ones(len(case.widths), requires_grad=True).softmax(-1)
        for quantizer in quantizers.values():
            quantizer.set_mixture(case.widths, trained, case.widths[0])
        copy.deepcopy(denoiser)  # in the middle of training, too
        _set_all(quantizers, case.widths[0])
        expected = case.run(denoiser)
        copied = copy.deepcopy(denoiser)
        _set_all(quantizers, case.widths[-1])
        try:
            found = case.run(copied)
        except QlipError:
            return
        _require(torch.equal(found, expected), "a deepcopy computes something else")


def survives_moves(case: BackendCase) -> None:
    """Going to float64 and back changes nothing, and `remove` still restores the float model."""
    denoiser = case.make_denoiser()
    plain = case.run(denoiser)
    quantizers = case.backend.install(denoiser, case.state, case.ranges)
    expected = case.run(denoiser)
    denoiser.to(torch.float64).to(torch.float32)
    _require(torch.equal(case.run(denoiser), expected), "`.to()` changed the output")
    quantizers.remove()
    _require(torch.equal(case.run(denoiser), plain), "`remove` after `.to()` did not restore the model")


def loads_or_refuses(case: BackendCase) -> None:
    """`load_state_dict` of the same weights changes nothing; of float weights it raises."""
    with case.installed() as (denoiser, quantizers):
        expected = case.run(denoiser)
        denoiser.load_state_dict(copy.deepcopy(denoiser.state_dict()))
        quantizers.verify()
        _require(
            torch.equal(case.run(denoiser), expected),
            "load_state_dict of the same weights changed the output",
        )
        floats = case.make_denoiser().state_dict()

        def load_and_verify() -> None:
            denoiser.load_state_dict(floats)
            quantizers.verify()

        _expect(IncompatibleModelError, load_and_verify, "loading float weights over quantized ones")


def gradients_reach_every_choice(case: BackendCase) -> None:
    """Under a soft mixture the forward is a hard choice, and each width's probability has a gradient."""
    with case.installed() as (denoiser, quantizers):
        logits = {
            name: torch.linspace(0.1, 0.3, len(case.widths)).repeat(case.rows, 1).requires_grad_()
            for name in quantizers
        }
        for name, quantizer in quantizers.items():
            quantizer.set_mixture(case.widths, logits[name].softmax(-1), case.widths[-1])
        out = denoiser(**case.inputs, return_dict=False)[0]
        _set_all(quantizers, case.widths[-1])
        # In the same mode: torch may take other kernels where no gradient is wanted.
        chosen = denoiser(**case.inputs, return_dict=False)[0]
        _require(torch.equal(out, chosen), "the mixture's forward is not its chosen width")
        out.square().mean().backward()
        for name, logit in logits.items():
            _require(
                logit.grad is not None
                and bool(logit.grad.isfinite().all())
                and float(logit.grad.abs().sum()) > 0,
                f"{name}: no gradient reaches its widths",
            )


def refuses_another_architecture(case: BackendCase) -> None:
    """A state that does not fit is refused before anything changes."""
    denoiser = case.make_denoiser()
    before = _trace(denoiser)
    name, layer = next(iter(case.state.layers.items()))
    strange = replace(case.state, layers={**case.state.layers, f"{name}_elsewhere": layer})
    _expect(
        IncompatibleModelError, lambda: case.backend.install(denoiser, strange, case.ranges), "another model"
    )
    _require(_trace(denoiser) == before, "a refused install left a trace")


def refuses_a_second_install(case: BackendCase) -> None:
    """Installing twice without removing is an error, not a double quantization."""
    with case.installed() as (denoiser, _):
        expected = case.run(denoiser)
        _expect(
            IncompatibleModelError,
            lambda: case.backend.install(denoiser, case.state, case.ranges),
            "a second install",
        )
        _require(torch.equal(case.run(denoiser), expected), "a refused second install changed the model")


def _expect(kind: type[Exception], act: Callable[[], object], what: str) -> None:
    try:
        act()
    except kind:
        return
    raise AssertionError(f"{what} should raise {kind.__name__}")


BACKEND_CHECKS: dict[str, BackendCheck] = {
    check.__name__: check
    for check in (
        one_handle_each,
        exact_at_base,
        pinned_to_base,
        widths_matter,
        rows_have_their_own_bits,
        untouched_at_32,
        refuses_bad_bits,
        reversible,
        keeps_state_dict_keys,
        choices_leave_no_trace,
        reloads,
        tells_what_it_cannot,
        survives_deepcopy,
        survives_moves,
        loads_or_refuses,
        gradients_reach_every_choice,
        refuses_another_architecture,
        refuses_a_second_install,
    )
}


@dataclass(frozen=True)
class ModelReaderCase:
    """A framework that quantizes a model in place, its base quantizer and its backend.

    Args:
        adapter: a `ModelReader`.
        backend: the framework's own.
        make_denoiser: gives a fresh denoiser that the framework has quantized, in eval mode.
        make_float: gives one that it has not.
        inputs: keyword arguments of one call, at least two rows.
        widths: a menu that holds 32, and neither of the base's.
        switch: sets all activation quantizers to a width in the framework's own way.
        save: writes a quantized denoiser in the framework's own way.
        restore: gives a denoiser that the framework has restored from what `save` wrote.
        options: the `base:` section that loads what `save` wrote, without `adapter`.
    """

    adapter: Any
    backend: Backend
    make_denoiser: Callable[[], nn.Module]
    make_float: Callable[[], nn.Module]
    inputs: Mapping[str, Any]
    widths: tuple[int, ...]
    switch: Callable[[nn.Module, int], None]
    save: Callable[[nn.Module, Path], None]
    restore: Callable[[Path], nn.Module]
    options: Callable[[Path], Mapping[str, Any]]

    def read(self, denoiser: nn.Module) -> CalibratedState:
        """The state of a quantized denoiser."""
        state = self.adapter.read(self.adapter.config_class(), denoiser)
        _require(isinstance(state, CalibratedState), f"`read` gave {type(state).__name__}, not a state")
        found: CalibratedState = state
        return found

    def as_backend(self) -> BackendCase:
        """The same for the backend's checks; `loads_or_refuses` is not among those that apply."""
        state = self.read(self.make_denoiser())
        fitted = {
            name: {width: grid.at_width(width) for width in self.widths if width < 32}
            for name, grid in state.activations.items()
        }
        return BackendCase(self.backend, self.make_denoiser, state, self.inputs, Ranges(fitted), self.widths)

    def run(self, denoiser: nn.Module) -> Tensor:
        """One call of the denoiser."""
        return _call(denoiser, self.inputs)

    @contextmanager
    def installed(self) -> Iterator[tuple[nn.Module, Installed]]:
        """A fresh quantized denoiser under handles."""
        denoiser = self.make_denoiser()
        quantizers = self.backend.install(denoiser, self.read(denoiser), Ranges(keep_calibrated=True))
        try:
            yield denoiser, quantizers
        finally:
            quantizers.remove()


ModelReaderCheck = Callable[[ModelReaderCase, Path], None]


def reading_leaves_no_trace(case: ModelReaderCase, folder: Path) -> None:
    """`read` leaves the model as it is, and reads the same twice."""
    denoiser = case.make_denoiser()
    before = _trace(denoiser)
    prints = {case.read(denoiser).fingerprint for _ in range(2)}
    _require(len(prints) == 1, "two readings of one model have different fingerprints")
    _require(_trace(denoiser) == before, "reading left a trace")


def refuses_a_float_model(case: ModelReaderCase, folder: Path) -> None:
    """A model that the framework has not quantized is an error."""
    _expect(IncompatibleModelError, lambda: case.read(case.make_float()), "a float model")


def is_the_framework_s_own_at_base(case: ModelReaderCase, folder: Path) -> None:
    """At the base width a model computes what it did before, to the bit."""
    expected = case.run(case.make_denoiser())
    with case.installed() as (denoiser, _):
        _require(torch.equal(case.run(denoiser), expected), "the base width is not the framework's own")


def is_the_framework_s_own_at_others(case: ModelReaderCase, folder: Path) -> None:
    """At another width, with its range kept, a layer gives what the framework itself gives at that width."""
    for width in (width for width in case.widths if width < 32):
        switched = case.make_denoiser()
        case.switch(switched, width)
        with case.installed() as (denoiser, quantizers):
            _set_all(quantizers, width)
            _require_same_layers(case, switched, denoiser, list(quantizers), f"at {width} bits")


@torch.no_grad()
def _require_same_layers(
    case: ModelReaderCase, expected: nn.Module, found: nn.Module, names: list[str], where: str
) -> None:
    """Layers one by one, each on the input that it has in `expected`: errors of one are no other's."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: inputs.__setitem__(name, args[0].clone())

    handles = [
        expected.get_submodule(name).register_forward_pre_hook(keep(name), prepend=True) for name in names
    ]
    case.run(expected)
    for handle in handles:
        handle.remove()
    for name, x in inputs.items():
        theirs, ours = expected.get_submodule(name)(x), found.get_submodule(name)(x)
        error = float((ours - theirs).norm() / theirs.norm())
        _require(
            error <= ROUNDING_TOLERANCE,
            f"{name} {where} differs from the framework's own by {error:.2e} (RMS)",
        )


def saves_nothing_of_ours(case: ModelReaderCase, folder: Path) -> None:
    """What the framework saves while bits are chosen holds the base, and nothing of this package."""
    expected = case.run(case.make_denoiser())
    with case.installed() as (denoiser, quantizers):
        _set_all(quantizers, case.widths[0])
        case.run(denoiser)
        case.save(denoiser, folder)
    for path in folder.rglob("*"):
        _require(path.is_dir() or b"qlip" not in path.read_bytes(), f"{path.name} names this package")
    _require(torch.equal(case.run(case.restore(folder)), expected), "what was saved is not the base")


def a_file_is_the_model(case: ModelReaderCase, folder: Path) -> None:
    """What the framework saved loads as the same base, and runs on a float model by the same backend."""
    denoiser = case.make_denoiser()
    state = case.read(denoiser)
    case.save(denoiser, folder)
    config_class: Any = case.adapter.config_class
    loaded = case.adapter.load(config_class(**case.options(folder)))
    _require(loaded.fingerprint == state.fingerprint, "the file's fingerprint is not the model's")
    plain = case.make_float()
    quantizers = case.backend.install(plain, loaded)
    _require_same_layers(case, denoiser, plain, list(quantizers), "from a file")
    quantizers.remove()


def notices_other_ranges(case: ModelReaderCase, folder: Path) -> None:
    """`load_state_dict` of the same state changes nothing; of other ranges it raises, at once or at `verify`."""
    with case.installed() as (denoiser, quantizers):
        expected = case.run(denoiser)
        state = copy.deepcopy(denoiser.state_dict())
        denoiser.load_state_dict(state)
        quantizers.verify()
        _require(
            torch.equal(case.run(denoiser), expected), "load_state_dict of the same state changed the output"
        )
        ranges = [name for name, tensor in state.items() if tensor.ndim == 0]
        _require(bool(ranges), "the state dict holds no range")
        other = {name: tensor * 2 if name in ranges else tensor for name, tensor in state.items()}

        def load_and_verify() -> None:
            denoiser.load_state_dict(other)
            quantizers.verify()

        _expect(IncompatibleModelError, load_and_verify, "loading other ranges")


MODEL_READER_CHECKS: dict[str, ModelReaderCheck] = {
    check.__name__: check
    for check in (
        reading_leaves_no_trace,
        refuses_a_float_model,
        is_the_framework_s_own_at_base,
        is_the_framework_s_own_at_others,
        saves_nothing_of_ours,
        a_file_is_the_model,
        notices_other_ranges,
    )
}


@dataclass(frozen=True)
class BaseQuantizerCase:
    """One base quantizer on one checkpoint.

    Args:
        name: of its entry point.
        adapter: what is checked.
        options: the `base:` section that loads the checkpoint, without `adapter`.
        checkpoint: the file, for `inspect`.
        foreign: a file of another format.
    """

    name: str
    adapter: BaseQuantizer
    options: Mapping[str, Any]
    checkpoint: Path
    foreign: Path


BaseQuantizerCheck = Callable[[BaseQuantizerCase], None]


def options_are_strict(case: BaseQuantizerCase) -> None:
    """The options are a frozen `AdapterConfig` that refuses unknown keys."""
    config_class: Any = case.adapter.config_class
    _require(issubclass(config_class, AdapterConfig), f"{config_class.__name__} is no AdapterConfig")
    _expect(ValidationError, lambda: config_class(**case.options, no_such_option=1), "an unknown option")


def loads_a_whole_state(case: BaseQuantizerCase) -> None:
    """`load` gives layers, float parameters and a fingerprint that a second load repeats."""
    config_class: Any = case.adapter.config_class
    config = config_class(**case.options)
    state, again = case.adapter.load(config), case.adapter.load(config)
    _require(
        state.format == case.name, f"the state says format {state.format!r}, its adapter is {case.name!r}"
    )
    _require(bool(state.layers), "the state has no layers")
    _require(state.fingerprint == again.fingerprint, "two loads of one file have different fingerprints")


def recognises_its_files(case: BaseQuantizerCase) -> None:
    """`inspect` knows its own format, and says of another's that it is foreign."""
    _require(
        case.adapter.inspect(case.checkpoint).format == case.name, "its own checkpoint is not recognised"
    )
    _expect(ForeignFormatError, lambda: case.adapter.inspect(case.foreign), "a file of another format")


def inspection_loads(case: BaseQuantizerCase) -> None:
    """The `base:` section that `inspect` proposes loads the file, unless it says what is unknown."""
    found = case.adapter.inspect(case.checkpoint)
    if not found.unknown:
        config_class: Any = case.adapter.config_class
        case.adapter.load(config_class(**found.base))


def missing_file_is_named(case: BaseQuantizerCase) -> None:
    """A checkpoint that is not there is an `ArtefactError` that names it."""
    missing = case.checkpoint.with_name("no-such-file.pth")
    options = {key: missing if value == case.checkpoint else value for key, value in case.options.items()}
    config_class: Any = case.adapter.config_class
    try:
        case.adapter.load(config_class(**options))
    except ArtefactError as error:
        _require(str(missing) in str(error), f"the message does not name {missing}: {error}")
        return
    raise AssertionError("a missing checkpoint should raise ArtefactError")


BASE_QUANTIZER_CHECKS: dict[str, BaseQuantizerCheck] = {
    check.__name__: check
    for check in (
        options_are_strict,
        loads_a_whole_state,
        recognises_its_files,
        inspection_loads,
        missing_file_is_named,
    )
}
