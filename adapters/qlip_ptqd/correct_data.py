"""The folder of statistics that PTQD's own scripts write, read without running anything it contains.

Two of its three files are pickles, and a pickle is a program. Python's unpickler stays out of it even with a list of
allowed globals: it reserves memory by numbers in the file, and a deeply nested key overflows its stack. Here a small
machine knows the few operations that these files need, on values that cannot do anything.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from qlip_plugins.checkpoint import check_finite
from qlip_plugins.errors import ArtefactError

from .statistics import CorrectionStatistics, StepStatistics, Validity, check_timestep

SLOPES, DEVIATIONS, BIASES = FILES = ("kt.npy", "t_std_dict.npy", "idx_bias.npy")

_DICT_BYTES = 2**20
_BIAS_BYTES = 2**24
_STORAGE_BYTES = 512
_HEADER_CHARACTERS = 1000
_NOTHING_RAN = "which statistics do not need; nothing was executed"


def read_correct_data(folder: Path) -> CorrectionStatistics:
    """Read what PTQD's analyze_error.py wrote.

    Args:
        folder: with `kt.npy`, `t_std_dict.npy` and `idx_bias.npy`.

    Returns:
        One set of S timesteps, whatever the bits. The files do not say what it holds for, but S steps.

    Raises:
        ArtefactError: a file is missing, damaged, asks for more than statistics need, or contradicts another.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        inside = sorted(found.name for found in folder.glob("*/") if (found / SLOPES).is_file())
        hint = f" ({inside[0]} inside has one: name that)" if inside else ""
        raise ArtefactError(
            f"{folder}: no {' and no '.join(missing)}{hint}. Expected a folder of PTQD's statistics: "
            f"{SLOPES} (slopes by timestep), {DEVIATIONS} (standard deviations by timestep) and "
            f"{BIASES} (a row of channels a timestep)"
        )
    slopes = _read_dict(folder / SLOPES, _Scalar)
    deviations = _read_dict(folder / DEVIATIONS, _Tensor)
    biases = _read_biases(folder / BIASES)
    _check_deviations(folder / DEVIATIONS, deviations, slopes)
    timesteps = tuple(sorted(slopes))
    if len(biases) != len(timesteps):
        raise ArtefactError(
            f"{folder / BIASES}: {len(biases)} rows, expected one for each of the {len(timesteps)} timesteps "
            f"of {SLOPES}"
        )
    slope, deviation = (
        torch.tensor([values[timestep] for timestep in timesteps], dtype=torch.float64)
        for values in (slopes, deviations)
    )
    statistics = StepStatistics(timesteps, slope, deviation, biases)
    return CorrectionStatistics({None: statistics}, Validity(steps=len(timesteps)), str(folder))


def _check_deviations(path: Path, deviations: Mapping[int, float], slopes: Mapping[int, float]) -> None:
    for timestep in sorted(deviations.keys() ^ slopes.keys()):
        has = "lacks" if timestep in slopes else "has"
        but = "has" if timestep in slopes else "lacks"
        raise ArtefactError(f"{path}: {has} timestep {timestep}, which {SLOPES} beside it {but}")
    for timestep, value in deviations.items():
        if value < 0:
            raise ArtefactError(f"{path}: timestep {timestep}: a negative standard deviation, {value:.3g}")


@dataclass(frozen=True)
class _Npy:
    """An .npy file: its header, and the bytes behind it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    content: bytes


def _read_npy(path: Path, most: int) -> _Npy:
    try:
        with path.open("rb") as opened:
            data = opened.read(most + 1)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise ArtefactError(f"{path}: the file is empty")
    if len(data) > most:
        raise ArtefactError(f"{path}: more than {most:,} bytes, which no statistics need")
    stream = io.BytesIO(data)
    try:
        # A header of Python 2 makes numpy warn; such a file is as good as any other.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, fortran_order, dtype = _header(stream)
    # Every kind: numpy parses the header as Python literals, and what that raises is nowhere said.
    except Exception as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise ArtefactError(f"{path}: truncated or no .npy file ({len(data):,} bytes; {reason})") from None
    return _Npy(dtype, shape, fortran_order, stream.read())


def _header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    if version == (1, 0):
        return npy.read_array_header_1_0(stream, max_header_size=_HEADER_CHARACTERS)
    if version not in ((2, 0), (3, 0)):
        raise ValueError(f"version {version}")
    # 3 is 2 with other letters in the names of fields, which no statistics have.
    return npy.read_array_header_2_0(stream, max_header_size=_HEADER_CHARACTERS)


def _read_biases(path: Path) -> Tensor:
    """`(S, C)` float64."""
    found = _read_npy(path, _BIAS_BYTES)
    if found.dtype.hasobject:
        raise ArtefactError(f"{path}: holds pickled objects, {_NOTHING_RAN}. Expected plain float64")
    if found.dtype != np.dtype("<f8") or len(found.shape) != 2 or min(found.shape) < 1:
        raise ArtefactError(
            f"{path}: {found.dtype} of shape {found.shape}, expected float64 (timesteps, channels)"
        )
    rows, channels = found.shape
    if len(found.content) != rows * channels * found.dtype.itemsize:
        raise ArtefactError(
            f"{path}: {len(found.content):,} bytes of values, expected those of shape {found.shape}"
        )
    # From the bytes, so that nothing is allocated by the shape, and no pickle could ever be read.
    values = np.frombuffer(found.content, found.dtype)
    biases = torch.from_numpy(values.reshape(found.shape, order="F" if found.fortran_order else "C").copy())
    check_finite(path, {"bias": biases})
    return biases


def _read_dict(path: Path, kind: type[_Scalar | _Tensor]) -> dict[int, float]:
    """Values by timestep."""
    found = _read_npy(path, _DICT_BYTES)
    if found.dtype != np.dtype(object) or found.shape != ():
        raise ArtefactError(
            f"{path}: {found.dtype} of shape {found.shape}, expected one pickled dict by timestep"
        )
    machine = _Machine(found.content, _GLOBALS)
    try:
        content = machine.load()
    except ValueError as error:
        raise ArtefactError(f"{path}: {error}") from None
    if machine.rest():
        raise ArtefactError(f"{path}: {len(machine.rest()):,} bytes behind the end of the pickle")
    if not isinstance(content, _Array) or type(content.content) is not dict:
        raise ArtefactError(f"{path}: expected one array that holds a dict by timestep")
    return {_timestep(path, key): _value(path, key, value, kind) for key, value in content.content.items()}


def _timestep(path: Path, key: Any) -> int:
    try:
        check_timestep(key)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from None
    return int(key)


def _value(path: Path, timestep: int, value: Any, kind: type[_Scalar | _Tensor]) -> float:
    if not isinstance(value, kind):
        raise ArtefactError(f"{path}: timestep {timestep}: expected {kind.says}, found another value")
    if not math.isfinite(value.value):
        raise ArtefactError(f"{path}: timestep {timestep}: {value.value} is not finite")
    return value.value


@dataclass(frozen=True)
class _Scalar:
    says: ClassVar = "a numpy.float64"
    value: float


@dataclass(frozen=True)
class _Tensor:
    says: ClassVar = "a torch tensor of one value"
    value: float


@dataclass(frozen=True)
class _Storage:
    value: float


class _Hooks:
    """The empty dict of hooks that every tensor comes with."""


@dataclass(frozen=True)
class _Persistent:
    identity: Any


_DTYPE_STATES = {
    "O8": (3, "|", None, None, None, -1, -1, 63),
    "f8": (3, "<", None, None, None, -1, -1, 0),
}


@dataclass
class _Dtype:
    """A numpy type: first its letter, then the state that completes it."""

    letter: str
    complete: bool = False

    def build(self, state: Any) -> bool:
        """Take over the state; False where it is another than such a type has."""
        self.complete = type(state) is tuple and state == _DTYPE_STATES[self.letter]
        return self.complete


@dataclass
class _Array:
    """An array of one object."""

    content: Any = None

    def build(self, state: Any) -> bool:
        """Take over the object; False where the state is another than such an array has."""
        match state:
            case (1, (), _Dtype("O8", True), False, [content]):
                self.content = content
                return True
        return False


@dataclass(frozen=True)
class _Global:
    """What stands in for a global that the file names.

    `call` takes the arguments that the file gives it, and returns None where statistics have no such call.
    """

    name: str
    call: Callable[[Any], object] = lambda arguments: None


def _reconstruct(arguments: Any) -> _Array | None:
    match arguments:
        case (_Global("numpy.ndarray"), (0,), b"b"):
            return _Array()
    return None


def _dtype(arguments: Any) -> _Dtype | None:
    match arguments:
        case (str() as letter, 0, 1) if letter in _DTYPE_STATES:  # False and True, too
            return _Dtype(letter)
    return None


def _scalar(arguments: Any) -> _Scalar | None:
    match arguments:
        case (_Dtype("f8", True), bytes() as data) if len(data) == 8:
            return _Scalar(*struct.unpack("<d", data))
    return None


def _rebuild_tensor(arguments: Any) -> _Tensor | None:
    match arguments:
        case (_Storage(value), 0, (), (), bool(), _Hooks()):
            return _Tensor(value)
    return None


def _hooks(arguments: Any) -> _Hooks | None:
    return _Hooks() if arguments == () else None


_TORCH_START = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
"""How torch's older format begins, in which it pickles a storage: magic number and version."""

_ITEMS = {"torch.FloatStorage": "f", "torch.DoubleStorage": "d"}


def _load_storage(arguments: Any) -> _Storage | None:
    """The one value of a storage, from the file in torch's older format that stands in the pickle.

    Not by `torch.load`, which allocates by a number in the file.
    """
    match arguments:
        case (bytes() as data,) if data.startswith(_TORCH_START) and len(data) <= _STORAGE_BYTES:
            machine = _Machine(data[len(_TORCH_START) :], _STORAGE_GLOBALS, persistent=True)
            return _storage([machine.load() for _ in range(3)], machine.rest())
    return None


def _storage(parts: list[Any], values: bytes) -> _Storage | None:
    match parts:
        case [
            {"little_endian": True},
            _Persistent(("storage", _Global(kind), str() as key, str(), 1, None)),
            [str() as listed],
        ] if listed == key and len(values) == struct.calcsize(f"<q{_ITEMS[kind]}"):
            count, value = struct.unpack(f"<q{_ITEMS[kind]}", values)
            return _Storage(value) if count == 1 else None
    return None


_STORAGE_GLOBALS = {("torch", name.removeprefix("torch.")): _Global(name) for name in _ITEMS}
_GLOBALS = {
    ("numpy", "ndarray"): _Global("numpy.ndarray"),
    ("numpy", "dtype"): _Global("numpy.dtype", _dtype),
    ("torch._utils", "_rebuild_tensor_v2"): _Global("torch._utils._rebuild_tensor_v2", _rebuild_tensor),
    ("torch.storage", "_load_from_bytes"): _Global("torch.storage._load_from_bytes", _load_storage),
    ("collections", "OrderedDict"): _Global("collections.OrderedDict", _hooks),
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1, numpy 2
    _GLOBALS[_module, "_reconstruct"] = _Global(f"{_module}._reconstruct", _reconstruct)
    _GLOBALS[_module, "scalar"] = _Global(f"{_module}.scalar", _scalar)

_MARK = object()
_CONSTANTS: dict[bytes, Any] = {
    pickle.NONE: None,
    pickle.NEWTRUE: True,
    pickle.NEWFALSE: False,
    pickle.EMPTY_TUPLE: (),
    pickle.MARK: _MARK,
}
_NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
_BYTES = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I"}
_TEXTS = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I"}
_KEYS = (int, float, str)


class _Machine:
    """Goes through pickles, one behind the other, and refuses what is not needed for statistics.

    No operation imports or calls anything but the stand-ins of `known`, and none allocates more than the
    bytes that it takes from the data.
    """

    def __init__(
        self, data: bytes, known: Mapping[tuple[str, str], _Global], *, persistent: bool = False
    ) -> None:
        self._data = data
        self._known = known
        self._persistent = persistent
        self._at = 0
        self._stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the next pickle.

        Raises:
            ValueError: it is damaged, or needs more than statistics do; says what.
        """
        self._stack, self.memo = [], {}
        while (operation := self.take(1)) != pickle.STOP:
            self.do(operation)
        value = self.pop()
        if self._stack:
            raise _damaged()
        return value

    def rest(self) -> bytes:
        """What stands behind the pickles that were loaded."""
        return self._data[self._at :]

    def find_class(self, module: str, name: str) -> _Global:
        """What stands in for a global.

        Raises:
            ValueError: statistics do not need it; says its name.
        """
        found = self._known.get((module, name))
        if found is None:
            raise ValueError(f"asks for {ascii(f'{module}.{name}')[1:-1][:100]}, {_NOTHING_RAN}")
        return found

    def do(self, operation: bytes) -> None:
        if operation in _CONSTANTS:
            self.push(_CONSTANTS[operation])
        elif operation in _NUMBERS:
            self.push(self.number(_NUMBERS[operation]))
        elif operation in _BYTES:
            self.push(self.take(self.number(_BYTES[operation])))
        elif operation in _TEXTS:
            self.push(self.take(self.number(_TEXTS[operation])).decode(errors="replace"))
        elif operation in _OPERATIONS:
            _OPERATIONS[operation](self)
        else:
            raise ValueError(f"uses the pickle operation {operation!r}, {_NOTHING_RAN}")

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise _truncated()
        self._at += size
        return taken

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise _truncated()
        return self.take(end + 1 - self._at)[:-1].decode(errors="replace")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _damaged()
        return self._stack.pop()

    def top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _damaged()
        return self._stack[-1]

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise _damaged()
        self._stack.pop()
        return items[::-1]

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise _damaged()
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise _damaged()
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Others could be nested so deeply that hashing them overflows the stack.
            if type(key) not in (*_KEYS, bool):
                raise ValueError("a key of the dict is no timestep")
            if key in target:
                raise ValueError(f"the key {ascii(key)[:60]} occurs twice")
            target[key] = value

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise _damaged()
        self.push(self.memo[index])

    def push_global(self) -> None:
        self.push(self.find_class(self.line(), self.line()))

    def push_stacked_global(self) -> None:
        module, name = self.pop_many(2)
        if type(module) is not str or type(name) is not str:
            raise _damaged()
        self.push(self.find_class(module, name))

    def refuse_instance(self) -> None:
        found = self.find_class(self.line(), self.line())
        raise ValueError(f"makes an instance of {found.name}, {_NOTHING_RAN}")

    def call(self) -> None:
        function, arguments = self.pop_many(2)
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise ValueError(f"calls what is no function, {_NOTHING_RAN}")
        result = function.call(arguments)
        if result is None:
            raise ValueError(f"calls {function.name} with arguments of a kind {_NOTHING_RAN}")
        self.push(result)

    def build(self) -> None:
        target, state = self.pop_many(2)
        if not isinstance(target, _Dtype | _Array) or not target.build(state):
            raise ValueError(f"gives an object a state {_NOTHING_RAN}")
        self.push(target)

    def push_persistent(self) -> None:
        if not self._persistent:
            raise ValueError(f"asks for a persistent object, {_NOTHING_RAN}")
        self.push(_Persistent(self.pop()))


def _truncated() -> ValueError:
    return ValueError("truncated: the pickle ends too early")


def _damaged() -> ValueError:
    return ValueError("damaged: the pickle's operations do not fit together")


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda machine: machine.number("<B"),
    pickle.FRAME: lambda machine: machine.number("<Q"),
    pickle.EMPTY_LIST: lambda machine: machine.push([]),
    pickle.EMPTY_DICT: lambda machine: machine.push({}),
    pickle.TUPLE: lambda machine: machine.push(tuple(machine.pop_to_mark())),
    pickle.TUPLE1: lambda machine: machine.push(tuple(machine.pop_many(1))),
    pickle.TUPLE2: lambda machine: machine.push(tuple(machine.pop_many(2))),
    pickle.TUPLE3: lambda machine: machine.push(tuple(machine.pop_many(3))),
    pickle.APPEND: lambda machine: machine.extend(machine.pop_many(1)),
    pickle.APPENDS: lambda machine: machine.extend(machine.pop_to_mark()),
    pickle.SETITEM: lambda machine: machine.set_items(machine.pop_many(2)),
    pickle.SETITEMS: lambda machine: machine.set_items(machine.pop_to_mark()),
    pickle.MEMOIZE: lambda machine: machine.remember(len(machine.memo)),
    pickle.BINPUT: lambda machine: machine.remember(machine.number("<B")),
    pickle.LONG_BINPUT: lambda machine: machine.remember(machine.number("<I")),
    pickle.BINGET: lambda machine: machine.recall(machine.number("<B")),
    pickle.LONG_BINGET: lambda machine: machine.recall(machine.number("<I")),
    pickle.GLOBAL: _Machine.push_global,
    pickle.STACK_GLOBAL: _Machine.push_stacked_global,
    pickle.INST: _Machine.refuse_instance,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.build,
    pickle.PERSID: _Machine.push_persistent,
    pickle.BINPERSID: _Machine.push_persistent,
}
