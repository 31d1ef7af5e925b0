"""PTQD's statistics: read, computed, kept; and hostile files, of which none may run anything."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlip_plugins.artefacts import read_tensors, write_tensors
from qlip_plugins.errors import ArtefactError, IncompatibleModelError
from qlip_ptqd.correct_data import read_correct_data
from qlip_ptqd.moments import Moments, statistics_of_errors
from qlip_ptqd.statistics import FORMAT, VERSION, CorrectionStatistics, StepStatistics, Validity

CASES = ("w4a8", "w8a8")
Files = dict[str, bytes]
Errors = list[tuple[Tensor, Tensor, Tensor]]

VALIDITY = Validity(
    base_fingerprint="a" * 64,
    ranges_digest="b" * 64,
    attention="base",
    plan="c" * 64,
    guidance_scale=3.0,
    steps=20,
    schedule={"beta_start": 0.0015, "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False},
)


def folder_of(golden: Path, case: str) -> Path:
    return golden / "ptqd" / case / "correct_data" / f"imagenet_20steps_{case}"


def recorded(golden: Path, case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "ptqd" / case / "correct_data.json").read_text())
    return found


@pytest.fixture(scope="module")
def errors(golden: Path) -> Errors:
    found: Errors = torch.load(
        golden / "ptqd" / "w4a8" / "data_error_t_w4a8_scale3.0_eta0.0_step20.pth", weights_only=True
    )
    return found


def far(found: StepStatistics, numbers: dict[str, Any]) -> tuple[float, float, float]:
    """The largest absolute differences of slope, deviation and bias from what PTQD's scripts wrote."""
    pairs = (
        (found.slope, [numbers["kt"][str(t)] for t in found.timesteps]),
        (found.deviation, [numbers["t_std"][str(t)] for t in found.timesteps]),
        (found.bias, numbers["idx_bias"]),
    )
    slope, deviation, bias = (
        float((ours - torch.tensor(theirs, dtype=torch.float64)).abs().max()) for ours, theirs in pairs
    )
    return slope, deviation, bias


# What PTQD wrote


@pytest.mark.parametrize("case", CASES)
def test_golden_folders_are_read_to_the_bit(golden: Path, case: str) -> None:
    found = CorrectionStatistics.load(folder_of(golden, case))
    assert found.timesteps == tuple(range(1, 1000, 50))
    assert found.channels == 4
    assert found.validity == Validity(steps=20)
    assert found.prompts is None
    assert str(folder_of(golden, case)) == found.source
    assert far(found.widths[None], recorded(golden, case)) == (0, 0, 0)


def test_raw_errors_give_what_ptqd_computed(golden: Path, errors: Errors) -> None:
    found = statistics_of_errors(errors)
    slope, deviation, bias = far(found, recorded(golden, "w4a8"))
    print(f"slope {slope:.1e}, deviation {deviation:.1e}, bias {bias:.1e}")
    # PTQD itself takes standard deviations and means in float32.
    assert slope < 1e-15
    assert deviation < 1e-7
    assert bias < 1e-8


def test_raw_errors_come_in_any_order_and_batch(errors: Errors) -> None:
    expected = statistics_of_errors(errors)
    shuffled = random.Random(0).sample(errors, len(errors))
    batched = [
        (torch.cat(predictions), torch.cat(found), torch.cat(timesteps))
        for predictions, found, timesteps in (
            zip(*shuffled[at : at + 7], strict=True) for at in range(0, len(shuffled), 7)
        )
    ]
    assert_close(statistics_of_errors(batched), expected)


def test_errors_without_as_many_samples_each(errors: Errors) -> None:
    with pytest.raises(ArtefactError, match="different numbers of samples"):
        statistics_of_errors(errors[:-1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, e, t: (p[0], e[0], t), r"entry 0 is .*\(4, 8, 8\)"),
        (lambda p, e, t: (p, e[:, :3], t), r"entry 0 is .*\(1, 3, 8, 8\)"),
        (lambda p, e, t: (p.long(), e, t), "entry 0 is torch.int64"),
        (lambda p, e, t: (p, e, t.float()), r"torch.float32 \(1,\), expected"),
        (lambda p, e, t: (p, e, t.repeat(2)), r"torch.int64 \(2,\), expected"),
        (lambda p, e, t: (p, e, t - 2000), "is no timestep"),
        (lambda p, e, t: (p * math.nan, e, t), "NaN or infinite"),
        (lambda p, e, t: (torch.zeros_like(p), e, t), "does not vary"),
    ],
    ids=[
        "no batch",
        "channels",
        "whole numbers",
        "float times",
        "times",
        "negative times",
        "NaN",
        "constant",
    ],
)
def test_raw_errors_of_another_kind(errors: Errors, change: Callable[..., Any], says: str) -> None:
    with pytest.raises(ArtefactError, match=says):
        statistics_of_errors([change(*errors[0])])


def test_no_raw_errors() -> None:
    with pytest.raises(ArtefactError, match="no quantization errors"):
        statistics_of_errors([])


# Moments


def sample(samples: int = 6, steps: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (samples, steps, 4, 5, 5)
    prediction = torch.randn(shape, generator=generator) + torch.randn(
        samples, steps, 1, 1, 1, generator=generator
    )
    # Slopes of both signs, and a bias that differs from channel to channel.
    slopes = torch.linspace(-0.1, 0.2, steps).reshape(1, -1, 1, 1, 1)
    offset = torch.randn(1, steps, 4, 1, 1, generator=generator) * 0.1
    return prediction, slopes * prediction + offset + 0.05 * torch.randn(shape, generator=generator)


def assert_close(found: StepStatistics, expected: StepStatistics) -> None:
    assert found.timesteps == expected.timesteps
    for part in ("slope", "deviation", "bias"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-12, atol=1e-15)


def test_moments_give_the_statistics_of_all_values() -> None:
    """Against the definitions, on the values themselves; the timesteps may come in the order of sampling."""
    prediction, error = (values.double() for values in sample())
    found = Moments.of(prediction, error).statistics([901, 451, 1])
    assert found.timesteps == (1, 451, 901)
    assert (found.slope < 0).tolist() == [False, False, True]
    for place, timestep in ((0, 901), (1, 451), (2, 1)):
        x, y = prediction[:, place], error[:, place]
        design = torch.stack([x.flatten(), torch.ones(x.numel(), dtype=torch.float64)], 1)
        slope = torch.linalg.lstsq(design, y.flatten()).solution[0]
        left = y - slope.clamp(min=0) * x
        ours = found.at(timestep)
        torch.testing.assert_close(ours[0], slope, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours[1], left.flatten(1).std(1).mean(), rtol=1e-10, atol=0.0)
        torch.testing.assert_close(ours[2], y.mean((0, 2, 3)), rtol=1e-10, atol=1e-12)


def test_parts_give_what_one_piece_gives(tmp_path: Path) -> None:
    prediction, error = sample()
    timesteps = [1, 451, 901]
    whole = Moments.of(prediction, error)
    parts = [Moments.of(prediction[rows], error[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    paths = [tmp_path / f"{place}.safetensors" for place in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        write_tensors(path, "part", 1, part.to_tensors())
    kept = [Moments.from_tensors(path, read_tensors(path, "part", 1)[0]) for path in paths]
    joined = Moments.joined(kept)
    for field in fields(Moments):
        if field.name != "count":
            assert torch.equal(getattr(joined, field.name), getattr(whole, field.name))
    assert joined.count == whole.count == 100
    assert_close(joined.statistics(timesteps), whole.statistics(timesteps))


def test_an_error_that_is_all_slope_leaves_no_deviation() -> None:
    prediction, _ = sample()
    found = Moments.of(prediction, 0.25 * prediction).statistics([1, 2, 3])
    torch.testing.assert_close(found.slope, torch.full((3,), 0.25, dtype=torch.float64))
    assert float(found.deviation.max()) < 1e-7


def test_moments_that_do_not_belong_together() -> None:
    prediction, error = sample()
    whole = Moments.of(prediction, error)
    for other in (
        Moments.of(prediction[:, :2], error[:, :2]),
        Moments.of(prediction[:, :, :3], error[:, :, :3]),
        Moments.of(prediction[..., :4], error[..., :4]),
    ):
        with pytest.raises(ArtefactError, match="of different shapes"):
            Moments.joined([whole, other])
    with pytest.raises(ArtefactError, match="expected 2 timesteps"):
        whole.statistics([1, 2])
    with pytest.raises(ArtefactError, match="ascending, each once"):
        whole.statistics([1, 2, 2])
    with pytest.raises(ValueError, match="twice"):
        Moments.of(prediction, error[:, :2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bias": None}, "expected the tensors"),
        ({"extra": torch.ones(1)}, "found .*extra"),
        ({"cross": torch.ones(6, 3)}, "'cross' is torch.float32"),
        ({"cross": torch.ones(6, 2).double()}, r"'cross' is .*\(6, 2\)"),
        ({"bias": torch.ones(6, 3).double()}, "is torch.float64 of shape"),
        ({"error_mean": torch.full((6, 3), math.nan).double()}, "'error_mean' holds 18 NaN"),
        ({"error_square": torch.full((6, 3), -1.0).double()}, "'error_square' holds negative"),
        ({"count": torch.tensor(1)}, "no whole number above 1"),
        ({"count": torch.tensor([100])}, "no whole number above 1"),
        ({"count": torch.tensor(100.0)}, "no whole number above 1"),
    ],
    ids=["missing", "extra", "type", "shape", "bias", "NaN", "negative", "count 1", "counts", "float count"],
)
def test_damaged_moments(change: dict[str, Tensor | None], says: str) -> None:
    changed = {**Moments.of(*sample()).to_tensors(), **change}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(ArtefactError, match=rf"some\.file: .*{says}"):
        Moments.from_tensors(Path("some.file"), tensors)


# This package's own file


def own(widths: tuple[int | None, ...] = (4, 8)) -> CorrectionStatistics:
    moments = Moments.of(*sample())
    sets = {width: moments.statistics([1, 451, 901]) for width in widths}
    return CorrectionStatistics(sets, VALIDITY, prompts=6)


@pytest.mark.parametrize("widths", [(4, 8), (None,), (32,)], ids=str)
@pytest.mark.parametrize("validity", [VALIDITY, Validity()], ids=["all known", "nothing known"])
def test_save_and_load(tmp_path: Path, widths: tuple[int | None, ...], validity: Validity) -> None:
    path = tmp_path / "sub" / "correction.safetensors"
    saved = replace(own(widths), validity=validity)
    saved.save(path)
    found = CorrectionStatistics.load(path)
    assert set(found.widths) == set(widths)
    for width in widths:
        assert found.widths[width].timesteps == saved.widths[width].timesteps
        for part in ("slope", "deviation", "bias"):
            assert torch.equal(getattr(found.widths[width], part), getattr(saved.widths[width], part))
    assert (found.validity, found.prompts, found.source) == (validity, 6, str(path))
    assert (found.timesteps, found.channels) == ((1, 451, 901), 4)
    first = path.read_bytes()
    found.save(path)
    assert path.read_bytes() == first
    assert "torch" in read_tensors(path, FORMAT, VERSION)[1]["versions"]


def test_golden_statistics_survive_our_format(golden: Path, tmp_path: Path) -> None:
    CorrectionStatistics.load(folder_of(golden, "w4a8")).save(tmp_path / "own")
    found = CorrectionStatistics.load(tmp_path / "own")
    assert far(found.widths[None], recorded(golden, "w4a8")) == (0, 0, 0)
    assert found.validity == Validity(steps=20)


def test_at() -> None:
    found = own().widths[8]
    slope, deviation, bias = found.at(451)
    assert (slope.shape, deviation.shape, bias.shape) == ((), (), (4,))
    assert (slope, deviation) == (found.slope[1], found.deviation[1])
    with pytest.raises(
        IncompatibleModelError, match=r"timestep 461, only for 1, 451, 901\. .* one number of steps"
    ):
        found.at(461)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"base_fingerprint": "d" * 64},
            "base_fingerprint: collected at aaaaaaaaaaaa..., used at dddddddddddd...",
        ),
        ({"ranges_digest": "d" * 64}, "ranges_digest: collected at bbbbbbbbbbbb..., used at dddddddddddd..."),
        ({"attention": "controlled"}, "attention: collected at base, used at controlled"),
        ({"time_layers": "controlled"}, "time_layers: collected at base, used at controlled"),
        ({"plan": "d" * 64}, "plan: collected at cccccccccccc..., used at dddddddddddd..."),
        ({"guidance_scale": 7.5}, "guidance_scale: collected at 3.0, used at 7.5"),
        ({"steps": 25}, "steps: collected at 20, used at 25"),
        ({"schedule": {"beta_start": 0.002}}, "schedule.beta_start: collected at 0.0015, used at 0.002"),
        ({"schedule": {"clip_sample": None}}, "schedule.clip_sample: collected at False, used at None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_difference_of_validity_is_named(change: dict[str, Any], says: str) -> None:
    assert VALIDITY.differences(replace(VALIDITY, **change)) == [says]


def test_what_is_not_known_is_no_difference() -> None:
    assert VALIDITY.differences(VALIDITY) == []
    assert VALIDITY.differences(replace(VALIDITY, guidance_scale=3)) == []
    for field in fields(Validity):
        if field.name == "time_layers":
            continue  # files that do not say hold for `base`
        unknown = replace(VALIDITY, **{field.name: None})  # type: ignore[arg-type]
        assert VALIDITY.differences(unknown) == unknown.differences(VALIDITY) == []
    assert VALIDITY.differences(replace(VALIDITY, schedule={"beta_end": 0.02})) == []
    assert len(VALIDITY.differences(replace(VALIDITY, steps=25, attention="controlled"))) == 2


def test_sets_that_do_not_belong_together() -> None:
    small, large = own((4,)).widths[4], own((8,)).widths[8]
    for other in (replace(large, timesteps=(1, 451, 902)), replace(large, bias=large.bias[:, :3])):
        with pytest.raises(ArtefactError, match="statistics of 4 and 8 differ"):
            CorrectionStatistics({4: small, 8: other}, VALIDITY)
    with pytest.raises(ArtefactError, match="one or the other"):
        CorrectionStatistics({4: small, None: large}, VALIDITY)
    with pytest.raises(ArtefactError, match="statistics for 33 bits"):
        CorrectionStatistics({33: small}, VALIDITY)


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def tensor(name: str, value: Tensor | None) -> Change:
    def change(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return change


def fact(name: str, value: Any) -> Change:
    return lambda tensors, facts: facts.update({name: value})


def validity(name: str, value: Any) -> Change:
    return lambda tensors, facts: facts["validity"].update({name: value})


def renamed(old: str, new: str) -> Change:
    def change(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        for part in ("slope", "deviation", "bias"):
            tensors[f"{new}.{part}"] = tensors.pop(f"{old}.{part}")

    return change


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


OWN: dict[str, tuple[str, Change]] = {
    "NaN in a slope": ("tensor '8.slope' holds 1 NaN", tensor("8.slope", doubles(0, math.nan, 0))),
    "infinite deviation": (
        "'4.deviation' holds 1 NaN or inf",
        tensor("4.deviation", doubles(0, math.inf, 0)),
    ),
    "NaN in a bias": (
        "tensor '8.bias' holds 12 NaN",
        tensor("8.bias", torch.full((3, 4), math.nan).double()),
    ),
    "negative deviation": (
        "tensor 8.deviation holds a negative",
        tensor("8.deviation", doubles(0.1, -0.1, 0.1)),
    ),
    "single precision": ("tensor 8.slope is torch.float32", tensor("8.slope", torch.zeros(3))),
    "a slope too few": (r"tensor 8.slope is .* \(2,\), expected .* \(3\)", tensor("8.slope", doubles(0, 0))),
    "slopes in two dimensions": (r"8.slope is .*\(3, 1\)", tensor("8.slope", doubles(0, 0, 0)[:, None])),
    "a bias without channels": ("tensor 8.bias is", tensor("8.bias", doubles(0, 0, 0))),
    "no channel": ("tensor 8.bias is", tensor("8.bias", torch.zeros(3, 0).double())),
    "other channels for a width": (
        "of 4 and 8 differ in their timesteps or channels",
        tensor("8.bias", torch.zeros(3, 5).double()),
    ),
    "a slope is missing": ("tensor '8.slope' is missing", tensor("8.slope", None)),
    "a bias is missing": ("tensor '4.bias' is missing", tensor("4.bias", None)),
    "a strange tensor": ("tensor '8.extra' is no part", tensor("8.extra", doubles(1))),
    "no tensors": ("no statistics for any width", lambda tensors, facts: tensors.clear()),
    "a width of 1": ("statistics for '1' bits, expected 2 to 32", renamed("8", "1")),
    "a width of 33": ("statistics for '33' bits", renamed("8", "33")),
    "a width in words": ("statistics for 'eight' bits", renamed("8", "eight")),
    "a width written twice": ("statistics for '08' bits", renamed("4", "08")),
    "a plan's and a width's": ("one or the other", renamed("4", "plan")),
    "no timesteps": ("timesteps: expected a list, found None", fact("timesteps", None)),
    "timesteps that descend": ("ascending, each once", fact("timesteps", [901, 451, 1])),
    "a timestep twice": ("ascending, each once", fact("timesteps", [1, 451, 451])),
    "a negative timestep": ("-1 is no timestep", fact("timesteps", [-1, 451, 901])),
    "a late timestep": ("1000001 is no timestep", fact("timesteps", [1, 451, 1000001])),
    "half a timestep": ("450.5 is no timestep", fact("timesteps", [1, 450.5, 901])),
    "a timestep that is true": ("True is no timestep", fact("timesteps", [True, 451, 901])),
    "a timestep too few": (r"is .* \(3,\), expected torch.float64 \(2\)", fact("timesteps", [1, 451])),
    "newer version": ("written as version 2, this package reads up to 1", fact("version", 2)),
    "no version": ("written as version None", fact("version", None)),
    "another format": ("expected a file of 'qlip-plugins correction'", fact("kind", "qlip-plugins ranges")),
    "no validity": ("validity: expected attention, .*, found None", fact("validity", None)),
    "a part of validity": ("validity: expected", fact("validity", {"steps": 20})),
    "strange validity": ("validity: expected", validity("colour", "red")),
    "a fingerprint of 5": ("validity: base_fingerprint: expected a text", validity("base_fingerprint", 5)),
    "ranges in a list": ("validity: ranges_digest: expected a text", validity("ranges_digest", ["b"])),
    "a plan of true": ("validity: plan: expected a text", validity("plan", True)),
    "attention to detail": ("validity: attention: expected 'base' or", validity("attention", "detail")),
    "guidance in words": ("validity: guidance_scale: expected a finite", validity("guidance_scale", "3.0")),
    "infinite guidance": (
        "validity: guidance_scale: expected a finite",
        validity("guidance_scale", math.inf),
    ),
    "guidance of true": ("validity: guidance_scale: expected a finite", validity("guidance_scale", True)),
    "no steps": ("validity: steps: expected a whole number above 0", validity("steps", 0)),
    "half a step": ("validity: steps: expected a whole number above 0", validity("steps", 20.5)),
    "a schedule in a list": ("validity: schedule: expected", validity("schedule", ["beta_start"])),
    "a nested schedule": ("validity: schedule: expected", validity("schedule", {"beta": {"start": 1}})),
    "a schedule with NaN": ("validity: schedule: expected", validity("schedule", {"beta": math.nan})),
    "prompts in words": ("prompts: expected a whole number above 0", fact("prompts", "six")),
    "no prompts": ("prompts: expected a whole number above 0", fact("prompts", 0)),
}


@pytest.mark.parametrize(("says", "change"), OWN.values(), ids=list(OWN))
def test_own_file_that_is_wrong(tmp_path: Path, says: str, change: Change) -> None:
    path = tmp_path / "correction.safetensors"
    own().save(path)
    tensors, facts = read_tensors(path, FORMAT, VERSION)
    facts = {"kind": facts.pop("format"), **facts}
    change(tensors, facts)
    write_tensors(path, tensors=tensors, **facts)
    with pytest.raises(ArtefactError, match=says) as caught:
        CorrectionStatistics.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "neither a file nor a folder"),
        (b"", "damaged or not safetensors"),
        (b"hello, these are no statistics\n", "damaged or not safetensors"),
        (pickle.dumps({"a": 1}), "damaged or not safetensors"),
    ],
    ids=["missing", "empty", "text", "pickle"],
)
def test_no_own_file(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "correction.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"correction\.safetensors: .*{says}"):
        CorrectionStatistics.load(path)


def test_truncated_own_file(tmp_path: Path) -> None:
    path = tmp_path / "correction.safetensors"
    own().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtefactError, match="damaged or not safetensors"):
        CorrectionStatistics.load(path)


def test_one_of_the_three_files_is_not_the_folder(golden: Path) -> None:
    with pytest.raises(ArtefactError, match="name the folder"):
        CorrectionStatistics.load(folder_of(golden, "w4a8") / "kt.npy")


# PTQD's files by hand, operation by operation, so that anything can stand anywhere in them

CORE = "numpy.core.multiarray"


def npy(content: bytes, descr: str = "|O", shape: str = "()", version: int = 1) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return (
        b"\x93NUMPY"
        + struct.pack("<BBH" if version == 1 else "<BBI", version, 0, len(header))
        + header
        + content
    )


def pickled(content: bytes) -> bytes:
    return b"\x80\x02" + content + b"."


def put(value: Any) -> bytes:
    """Operations that push a plain value."""
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    return pickle.dumps(value, 2)[2:-1]


def named(name: str) -> bytes:
    """Operations that push a global."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


STATES = {
    "O8": (3, "|", None, None, None, -1, -1, 63),
    "f8": (3, "<", None, None, None, -1, -1, 0),
}


def dtype(letter: str, state: Any = None) -> bytes:
    made = call("numpy.dtype", put(letter), put(False), put(True))
    return made + put(STATES[letter] if state is None else state) + b"b"


def array(content: bytes, kind: bytes | None = None, shape: Any = (), core: str = CORE) -> bytes:
    made = call(f"{core}._reconstruct", named("numpy.ndarray"), put((0,)), put(b"b"))
    state = tuple_of(
        put(1), put(shape), dtype("O8") if kind is None else kind, put(False), b"]" + content + b"a"
    )
    return made + state + b"b"


def scalar(value: float, core: str = CORE) -> bytes:
    return call(f"{core}.scalar", dtype("f8"), put(struct.pack("<d", value)))


def storage(
    value: float = 0.1, count: int = 1, kind: str = "torch.FloatStorage", identity: bytes | None = None
) -> bytes:
    """A file in torch's older format, as it stands in a pickled tensor."""
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    if identity is None:
        identity = tuple_of(put("storage"), named(kind), put("7"), put("cpu"), put(count), put(None)) + b"Q"
    layout = "<qd" if "Double" in kind else "<qf"
    plain = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join([*plain, pickled(identity), pickle.dumps(["7"], 2), struct.pack(layout, count, value)])


def loaded(data: bytes) -> bytes:
    return call("torch.storage._load_from_bytes", put(data))


HOOKS = call("collections.OrderedDict")


def torch_tensor(
    value: float = 0.1, inner: bytes | None = None, size: Any = (), hooks: bytes = HOOKS
) -> bytes:
    return call(
        "torch._utils._rebuild_tensor_v2",
        loaded(storage(value)) if inner is None else inner,
        put(0),
        put(size),
        put(()),
        put(False),
        hooks,
    )


def dict_of(items: dict[Any, bytes]) -> bytes:
    return b"}(" + b"".join(put(key) + value for key, value in items.items()) + b"u"


def dict_file(items: dict[Any, bytes]) -> bytes:
    return npy(pickled(array(dict_of(items))))


def sound() -> Files:
    """A folder of two timesteps in which nothing is wrong."""
    biases = np.arange(8, dtype=np.float64).reshape(2, 4)
    return {
        "kt.npy": dict_file({51: scalar(0.25), 1: scalar(-0.5)}),
        "t_std_dict.npy": dict_file({51: torch_tensor(0.5), 1: torch_tensor(0.125)}),
        "idx_bias.npy": npy(biases.tobytes(), "<f8", "(2, 4)"),
    }


def write(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_files_made_by_hand_are_sound(tmp_path: Path) -> None:
    """So whatever the tables below change in them is what makes the difference."""
    folder = write(tmp_path / "data", sound())
    found = read_correct_data(folder).widths[None]
    assert found.timesteps == (1, 51)
    assert found.slope.tolist() == [-0.5, 0.25]
    assert found.deviation.tolist() == [0.125, 0.5]
    assert found.bias.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")
def test_numpy_and_torch_read_the_same_from_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", sound())
    found = [np.load(folder / name, allow_pickle=True) for name in sound()]
    assert found[0].item() == {51: 0.25, 1: -0.5}
    assert {t: float(value) for t, value in found[1].item().items()} == {51: 0.5, 1: 0.125}
    assert found[2].shape == (2, 4)


SOUND_VARIANTS: dict[str, Files] = {
    "numpy 2": {
        "kt.npy": npy(
            pickled(
                array(
                    dict_of({t: scalar(0.5, "numpy._core.multiarray") for t in (1, 51)}),
                    core="numpy._core.multiarray",
                )
            )
        )
    },
    "double precision": {
        "t_std_dict.npy": dict_file(
            {t: torch_tensor(inner=loaded(storage(kind="torch.DoubleStorage"))) for t in (1, 51)}
        )
    },
    "slopes below -1": {"kt.npy": dict_file({1: scalar(-3.0), 51: scalar(-1.0)})},
    "headers of version 2": {"idx_bias.npy": npy(bytes(64), "<f8", "(2, 4)", version=2)},
    "headers of version 3": {
        "kt.npy": npy(sound()["kt.npy"][sound()["kt.npy"].index(b"\n") + 1 :], version=3)
    },
    "one channel": {"idx_bias.npy": npy(bytes(16), "<f8", "(2, 1)")},
}


@pytest.mark.parametrize("files", SOUND_VARIANTS.values(), ids=list(SOUND_VARIANTS))
def test_variants_that_are_sound(tmp_path: Path, files: Files) -> None:
    assert read_correct_data(write(tmp_path / "data", {**sound(), **files})).timesteps == (1, 51)


# Hostile pickles: each tries to make a file, the canary


@dataclass(frozen=True)
class Hostile:
    """`first` is the first global that is asked for; `runs`: plain unpickling makes the canary here."""

    first: str
    make: Callable[[Path], bytes]
    runs: bool = True


def touch(canary: Path) -> bytes:
    return put(f"touch '{canary}'")


def opening(canary: Path) -> bytes:
    return put(f"open({str(canary)!r}, 'w').close()")


def imported(name: str) -> bytes:
    return call("importlib.import_module", put(name))


def stacked(module: str, name: str) -> bytes:
    """A global from two texts, as protocol 4 has it; there a name may have dots."""
    return put(module) + put(name) + b"\x93"


def evil_file(canary: Path) -> bytes:
    """The path of a file that runs something when numpy or torch unpickle it."""
    path = canary.with_name("evil")
    path.write_bytes(npy(pickled(call("posix.system", touch(canary)))))
    return put(str(path))


HOSTILE: dict[str, Hostile] = {
    "os.system": Hostile("os.system", lambda c: call("os.system", touch(c))),
    "posix.system": Hostile("posix.system", lambda c: call("posix.system", touch(c))),
    "nt.system": Hostile("nt.system", lambda c: call("nt.system", touch(c)), runs=False),
    "Popen": Hostile(
        "subprocess.Popen", lambda c: call("subprocess.Popen", put(["touch", str(c)])), runs=False
    ),
    "check_output": Hostile(
        "subprocess.check_output", lambda c: call("subprocess.check_output", put(["touch", str(c)]))
    ),
    "eval": Hostile("builtins.eval", lambda c: call("builtins.eval", opening(c))),
    "exec": Hostile("builtins.exec", lambda c: call("builtins.exec", opening(c))),
    "eval of Python 2": Hostile("__builtin__.eval", lambda c: call("__builtin__.eval", opening(c))),
    "open": Hostile("builtins.open", lambda c: call("builtins.open", put(str(c)), put("w")), runs=False),
    "getattr": Hostile(
        "builtins.getattr",
        lambda c: call("builtins.getattr", imported("os"), put("system")) + b"(" + touch(c) + b"tR",
    ),
    "__import__": Hostile(
        "builtins.__import__",
        lambda c: call("builtins.__import__", put("os")) + b"0" + call("os.system", touch(c)),
    ),
    "import_module, kept in the memo": Hostile(
        "importlib.import_module",
        lambda c: (
            imported("os")
            + b"q\x630"
            + call("builtins.getattr", b"h\x63", put("system"))
            + b"("
            + touch(c)
            + b"tR"
        ),
    ),
    "timeit": Hostile("timeit.timeit", lambda c: call("timeit.timeit", put("pass"), opening(c))),
    "pip": Hostile(
        "pip._internal.main", lambda c: call("pip._internal.main", put(["--log", str(c), "list"])), runs=False
    ),
    "pip's older main": Hostile(
        "pip.main", lambda c: call("pip.main", put(["--log", str(c), "list"])), runs=False
    ),
    "attrgetter": Hostile(
        "operator.attrgetter",
        lambda c: (
            call("operator.attrgetter", put("system")) + tuple_of(imported("os")) + b"R(" + touch(c) + b"tR"
        ),
    ),
    "methodcaller": Hostile(
        "operator.methodcaller",
        lambda c: call("operator.methodcaller", put("system"), touch(c)) + tuple_of(imported("os")) + b"R",
    ),
    "partial": Hostile(
        "functools.partial", lambda c: call("functools.partial", named("os.system"), touch(c)) + b")R"
    ),
    "torch.load": Hostile("torch.load", lambda c: call("torch.load", evil_file(c)), runs=False),
    "torch.hub": Hostile(
        "torch.hub.load", lambda c: call("torch.hub.load", put("a/b"), put(str(c))), runs=False
    ),
    "torch.save": Hostile("torch.save", lambda c: call("torch.save", put({}), put(str(c)))),
    "numpy.load": Hostile(
        "numpy.load", lambda c: call("numpy.load", evil_file(c), put(None), put(True)), runs=False
    ),
    "numpy.fromfile": Hostile(
        "numpy.fromfile", lambda c: call("numpy.fromfile", put("/dev/zero")), runs=False
    ),
    "numpy.memmap": Hostile(
        "numpy.memmap",
        lambda c: call("numpy.memmap", put(str(c)), put("uint8"), put("w+"), put(0), put((1,))),
    ),
    "f2py": Hostile(
        "numpy.f2py.crackfortran.myeval",
        lambda c: call("numpy.f2py.crackfortran.myeval", opening(c)),
        runs=False,
    ),
    "runstring": Hostile(
        "numpy.testing._private.utils.runstring",
        lambda c: call("numpy.testing._private.utils.runstring", opening(c), put({})),
        runs=False,
    ),
    "codecs": Hostile(
        "codecs.decode",
        lambda c: call("codecs.decode", put("riny"), put("rot13")) + b"0" + call("builtins.eval", opening(c)),
    ),
    "_codecs": Hostile(
        "_codecs.encode",
        lambda c: call("_codecs.encode", put("b"), put("latin1")) + b"0" + call("os.system", touch(c)),
    ),
    "runpy": Hostile("runpy.run_path", lambda c: call("runpy.run_path", evil_file(c)), runs=False),
    "pickle.loads": Hostile(
        "pickle.loads", lambda c: call("pickle.loads", put(pickled(call("os.system", touch(c)))))
    ),
    "copyreg": Hostile(
        "copyreg.__newobj__", lambda c: call("copyreg.__newobj__", named("pathlib.Path")), runs=False
    ),
    "shutil": Hostile("shutil.copy", lambda c: call("shutil.copy", evil_file(c), put(str(c)))),
    "a name with dots": Hostile(
        "pathlib.Path.touch",
        lambda c: (
            b"\x80\x04"
            + stacked("pathlib", "Path.touch")
            + tuple_of(call("pathlib.Path", put(str(c))))
            + b"R"
        ),
    ),
    "an attribute of what is allowed": Hostile(
        "torch.storage.torch.save",
        lambda c: (
            b"\x80\x04" + stacked("torch.storage", "torch.save") + tuple_of(put({}), put(str(c))) + b"R"
        ),
    ),
    "a neighbour of what is allowed": Hostile(
        "torch._utils._rebuild_parameter",
        lambda c: call("torch._utils._rebuild_parameter", put(1)),
        runs=False,
    ),
    "an instance in the old way": Hostile("posix.system", lambda c: b"(" + touch(c) + b"iposix\nsystem\n"),
    "an object in the old way": Hostile(
        "posix.system", lambda c: b"(" + named("posix.system") + touch(c) + b"o"
    ),
    "a class's __new__": Hostile(
        "subprocess.Popen", lambda c: named("subprocess.Popen") + b")\x81", runs=False
    ),
}

PLACES: dict[str, Callable[[bytes], tuple[str, bytes]]] = {
    "alone": lambda evil: ("kt.npy", npy(pickled(evil))),
    "as a slope": lambda evil: ("kt.npy", dict_file({1: scalar(0.5), 51: evil})),
    "as a key": lambda evil: ("kt.npy", npy(pickled(array(b"}" + evil + scalar(0.5) + b"s")))),
    "as an argument": lambda evil: ("kt.npy", npy(pickled(call(f"{CORE}.scalar", dtype("f8"), evil)))),
    "as a state": lambda evil: (
        "kt.npy",
        npy(pickled(call("numpy.dtype", put("f8"), put(False), put(True)) + evil + b"b")),
    ),
    "as a deviation": lambda evil: ("t_std_dict.npy", dict_file({1: torch_tensor(), 51: evil})),
    "as hooks": lambda evil: ("t_std_dict.npy", dict_file({1: torch_tensor(hooks=evil)})),
    "in a storage": lambda evil: (
        "t_std_dict.npy",
        dict_file({1: torch_tensor(inner=loaded(storage(identity=evil)))}),
    ),
    "in a storage's identity": lambda evil: (
        "t_std_dict.npy",
        dict_file({1: torch_tensor(inner=loaded(storage(identity=evil + b"Q")))}),
    ),
    "as the biases": lambda evil: ("idx_bias.npy", npy(pickled(evil), shape="(2, 4)")),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_pickle_runs_nothing(tmp_path: Path, hostile: Hostile, place: str) -> None:
    canary = tmp_path / "canary"
    name, content = PLACES[place](hostile.make(canary))
    folder = write(tmp_path / "data", {**sound(), name: content})
    with pytest.raises(ArtefactError, match="nothing was executed") as caught:
        CorrectionStatistics.load(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ")
    if name == "idx_bias.npy":
        assert "holds pickled objects" in message
    else:
        assert f"asks for {hostile.first}, which statistics do not need" in message
    assert not canary.exists()


RUNNING = {name: hostile for name, hostile in HOSTILE.items() if hostile.runs}


@pytest.mark.parametrize("hostile", RUNNING.values(), ids=list(RUNNING))
def test_plain_unpickling_would_run_it(tmp_path: Path, hostile: Hostile) -> None:
    """What the tests above keep from happening does happen, or they would prove nothing."""
    canary = tmp_path / "canary"
    pickle.loads(pickled(hostile.make(canary)))
    assert canary.exists()


# Pickles that name no more than is allowed, and still are no statistics


def nested(depth: int) -> bytes:
    return b")" + b"\x85" * depth


ODD: dict[str, tuple[str, bytes]] = {
    "an extension": ("uses the pickle operation b'\\\\x82'", b"\x82\x01"),
    "a persistent object": ("asks for a persistent object", put("os.system") + b"Q"),
    "a persistent object, as text": ("asks for a persistent object", b"Pos.system\n"),
    "a text of protocol 0": ("uses the pickle operation b'S'", b"S'text'\n"),
    "a copy of the top": ("uses the pickle operation b'2'", b"N2"),
    "a buffer out of band": ("uses the pickle operation b'\\\\x97'", b"\x97"),
    "a huge number": ("uses the pickle operation b'\\\\x8b'", b"\x8b\xff\xff\xff\x7f"),
    "a set": ("uses the pickle operation b'\\\\x8f'", b"\x8f"),
    "a frozen set": ("uses the pickle operation b'\\\\x91'", b"(\x91"),
    "an instance of what is allowed": (
        "makes an instance of collections.OrderedDict",
        b"(icollections\nOrderedDict\n",
    ),
    "an object of what is allowed": (
        "uses the pickle operation b'\\\\x81'",
        named("numpy.ndarray") + b")\x81",
    ),
    "a call of a text": ("calls what is no function", put("print") + b")R"),
    "a call of an array": ("calls what is no function", array(put(1)) + b")R"),
    "arguments in a list": ("calls what is no function", named("collections.OrderedDict") + b"]R"),
    "a call of ndarray": (
        "calls numpy.ndarray with arguments",
        call("numpy.ndarray", put((2**30,)), put("f8")),
    ),
    "a huge shape to reconstruct": (
        f"calls {CORE}._reconstruct with arguments",
        call(f"{CORE}._reconstruct", named("numpy.ndarray"), put((2**31 - 1,)), put(b"b")),
    ),
    "reconstructed from dtype": (
        f"calls {CORE}._reconstruct with arguments",
        call(f"{CORE}._reconstruct", named("numpy.dtype"), put((0,)), put(b"b")),
    ),
    "a huge shape in the state": ("gives an object a state", array(put(1), shape=(2**31 - 1,))),
    "an array of two": ("gives an object a state", array(put(1) + b"a" + put(2))),
    "an array of floats": ("gives an object a state", array(put(1), kind=dtype("f8"))),
    "an array of no type": ("gives an object a state", array(put(1), kind=put("O8"))),
    "a type with fields": (
        "gives an object a state",
        dtype("f8", (3, "<", None, ("a",), {"a": 1}, -1, -1, 0)),
    ),
    "a subarray": ("gives an object a state", dtype("f8", (3, "<", ("f8", (2**30,)), None, None, -1, -1, 0))),
    "another byte order": ("gives an object a state", dtype("f8", (3, ">", None, None, None, -1, -1, 0))),
    "a state in a dict": ("gives an object a state", dtype("f8", {"__class__": 1})),
    "a state for a function": (
        "gives an object a state",
        named("collections.OrderedDict") + put({"call": 1}) + b"b",
    ),
    "a state for a number": ("gives an object a state", scalar(1.0) + put({"value": 2}) + b"b"),
    "a state for a dict": ("gives an object a state", b"}" + put({"a": 1}) + b"b"),
    "a type of a gigabyte": (
        "calls numpy.dtype with arguments",
        call("numpy.dtype", put("V1073741824"), put(False), put(True)),
    ),
    "a type of a type": (
        "calls numpy.dtype with arguments",
        call("numpy.dtype", dtype("f8"), put(False), put(True)),
    ),
    "a scalar of objects": (
        f"calls {CORE}.scalar with arguments",
        call(f"{CORE}.scalar", dtype("O8"), put(pickled(call("os.system", put("touch canary"))))),
    ),
    "a scalar of an unfinished type": (
        f"calls {CORE}.scalar with arguments",
        call(f"{CORE}.scalar", call("numpy.dtype", put("f8"), put(False), put(True)), put(bytes(8))),
    ),
    "a scalar of 7 bytes": (
        f"calls {CORE}.scalar with arguments",
        call(f"{CORE}.scalar", dtype("f8"), put(bytes(7))),
    ),
    "hooks with content": (
        "calls collections.OrderedDict with arguments",
        call("collections.OrderedDict", put([["a", 1]])),
    ),
    "hooks with content, added": (
        "do not fit together",
        torch_tensor(hooks=HOOKS + put("a") + put(1) + b"s"),
    ),
    "a tensor of many": ("calls torch._utils._rebuild_tensor_v2", torch_tensor(size=(2**31 - 1,))),
    "a tensor of no storage": ("calls torch._utils._rebuild_tensor_v2", torch_tensor(inner=put(b"data"))),
    "a tensor of another's hooks": ("calls torch._utils._rebuild_tensor_v2", torch_tensor(hooks=put({}))),
    "a storage of many": ("calls torch.storage._load_from_bytes", loaded(storage(count=2**31 - 1))),
    "a storage of two": ("calls torch.storage._load_from_bytes", loaded(storage(count=2) + bytes(4))),
    "a storage without its value": ("calls torch.storage._load_from_bytes", loaded(storage()[:-4])),
    "a storage with more behind": ("calls torch.storage._load_from_bytes", loaded(storage() + b"N.")),
    "a storage, truncated": ("truncated", loaded(storage()[:-40])),
    "a storage that is no torch file": ("calls torch.storage._load_from_bytes", loaded(b"hello")),
    "a storage that is an archive": (
        "calls torch.storage._load_from_bytes",
        loaded(b"PK\x03\x04" + bytes(99)),
    ),
    "a storage of a kilobyte": ("calls torch.storage._load_from_bytes", loaded(storage() + bytes(1024))),
    "a storage of whole numbers": ("asks for torch.LongStorage", loaded(storage(kind="torch.LongStorage"))),
    "a storage in a storage": (
        "asks for torch.storage._load_from_bytes",
        loaded(storage(identity=loaded(storage()))),
    ),
    "an undefined memo": ("do not fit together", b"h\x07"),
    "a memo of a mark": ("do not fit together", b"(q\x00"),
    "an empty stack": ("do not fit together", b""),
    "a tuple of a mark": ("do not fit together", b"(\x85"),
    "a tuple without a mark": ("do not fit together", b"NNt"),
    "two values": ("do not fit together", array(put(1)) + b"N"),
    "an item for a tuple": ("do not fit together", put((1,)) + b"Na"),
    "half an item": ("do not fit together", b"}(Nu"),
    "a global of numbers": ("do not fit together", put(1) + put(2) + b"\x93"),
    "a global without an end": ("truncated", b"cos"),
    "a text in no encoding": ("expected one array that holds a dict", b"X\x01\x00\x00\x00\xff"),
    "a text of 4 GB": ("truncated", b"X\xff\xff\xff\xff"),
    "bytes of 4 GB": ("truncated", b"B\xff\xff\xff\xff"),
    "a key that is a tuple": (
        "a key of the dict is no timestep",
        array(b"}" + put((1,)) + scalar(1.0) + b"s"),
    ),
    "a key that is a global": (
        "a key of the dict is no timestep",
        array(b"}" + named("numpy.ndarray") + scalar(1.0) + b"s"),
    ),
    "a key nested so deeply that its hash crashes": (
        "a key of the dict is no timestep",
        array(b"}" + nested(300_000) + scalar(1.0) + b"s"),
    ),
    "a value nested deeply": ("expected a numpy.float64", array(dict_of({1: nested(300_000)}))),
    "a list in itself": ("expected one array that holds a dict", array(b"]q\x01h\x01a")),
    "a memo of 4 billion": ("expected one array that holds a dict", b"Nr\xff\xff\xff\xff"),
    "a key twice": ("the key 1 occurs twice", array(b"}(" + (put(1) + scalar(1.0)) * 2 + b"u")),
    "a key twice, once as true": (
        "the key True occurs twice",
        array(b"}(" + put(1) + scalar(1.0) + put(True) + scalar(1.0) + b"u"),
    ),
    "a true key": ("True is no timestep", array(dict_of({True: scalar(1.0)}))),
    "a text for a key": ("'51' is no timestep", array(dict_of({"51": scalar(1.0)}))),
    "a float for a key": ("51.0 is no timestep", array(dict_of({51.0: scalar(1.0)}))),
    "a negative key": ("-1 is no timestep", array(dict_of({-1: scalar(1.0)}))),
    "a key of a billion": ("1000000000 is no timestep", array(dict_of({10**9: scalar(1.0)}))),
    "a list for the dict": ("expected one array that holds a dict", array(b"]")),
    "a bare dict": ("expected one array that holds a dict", dict_of({1: scalar(1.0)})),
    "an array without a state": (
        "expected one array that holds a dict",
        call(f"{CORE}._reconstruct", named("numpy.ndarray"), put((0,)), put(b"b")),
    ),
    "a plain float": ("timestep 1: expected a numpy.float64", array(dict_of({1: put(0.5)}))),
    "a tensor for a slope": ("timestep 1: expected a numpy.float64", array(dict_of({1: torch_tensor()}))),
    "none for a slope": ("timestep 1: expected a numpy.float64", array(dict_of({1: put(None)}))),
    "NaN": ("timestep 1: nan is not finite", array(dict_of({1: scalar(math.nan)}))),
    "infinity": ("timestep 1: -inf is not finite", array(dict_of({1: scalar(-math.inf)}))),
}


@pytest.mark.parametrize(("says", "content"), ODD.values(), ids=list(ODD))
def test_odd_pickle(tmp_path: Path, says: str, content: bytes) -> None:
    folder = write(tmp_path / "data", {**sound(), "kt.npy": npy(pickled(content))})
    with pytest.raises(ArtefactError, match=says) as caught:
        CorrectionStatistics.load(folder)
    assert str(caught.value).startswith(f"{folder / 'kt.npy'}: ")


# Files that contradict each other, or are of another kind


def doubled(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        opened.writestr("kt.npy", sound()["kt.npy"])
    return stream.getvalue()


KT, STD, BIAS = "kt.npy", "t_std_dict.npy", "idx_bias.npy"
HEADER_END = sound()[KT].index(b"\n") + 1

WRONG: dict[str, tuple[str, str, bytes | None]] = {
    "empty slopes": (KT, "the file is empty", b""),
    "empty biases": (BIAS, "the file is empty", b""),
    "text": (KT, "no .npy file", b"hello, these are no statistics\n"),
    "an archive": (KT, "no .npy file", archive()),
    "an archive of biases": (BIAS, "no .npy file", archive()),
    "a bare pickle": (KT, "no .npy file", sound()[KT][HEADER_END:]),
    "a header cut short": (KT, "truncated or no .npy file", sound()[KT][:20]),
    "a version of the future": (KT, r"version \(9, 0\)", b"\x93NUMPY\x09\x00" + sound()[KT][8:]),
    "a header of 4 GB": (KT, "truncated or no .npy file", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}"),
    "a header of 60 kB": (BIAS, "truncated or no .npy file", npy(b"", "<f8", "(" + "1," * 30_000 + ")")),
    "a header with a call": (BIAS, "truncated or no .npy file", npy(b"", "<f8", "open('canary','w')")),
    "a header of brackets": (BIAS, "truncated or no .npy file", npy(b"", "<f8", "(" * 400 + ")" * 400)),
    "a header with a long number": (BIAS, "truncated or no .npy file", npy(b"", "<f8", "9" * 900)),
    "a type that is none": (BIAS, "truncated or no .npy file", npy(b"", "<f8,,;", "(2, 4)")),
    "a pickle cut short": (KT, "truncated: the pickle ends", sound()[KT][:-30]),
    "no pickle": (KT, "truncated: the pickle ends", sound()[KT][:HEADER_END]),
    "bytes behind the pickle": (KT, "3 bytes behind the end of the pickle", sound()[KT] + b"abc"),
    "a pickle behind the pickle": (
        KT,
        "bytes behind the end",
        sound()[KT] + pickled(call("os.system", put("true"))),
    ),
    "a megabyte of slopes": (KT, "more than 1,048,576 bytes", sound()[KT] + bytes(2**20)),
    "16 megabytes of biases": (BIAS, "more than 16,777,216 bytes", sound()[BIAS] + bytes(2**24)),
    "two dicts": (KT, r"object of shape \(2,\), expected one pickled dict", npy(b"", "|O", "(2,)")),
    "slopes without a dict": (KT, "float64 of shape .*, expected one pickled dict", sound()[BIAS]),
    "objects for biases": (BIAS, "holds pickled objects", npy(sound()[KT][HEADER_END:], "|O", "(2, 4)")),
    "single precision": (
        BIAS,
        r"float32 of shape \(2, 4\), expected float64",
        npy(bytes(32), "<f4", "(2, 4)"),
    ),
    "the other byte order": (BIAS, ">f8 of shape .*, expected float64", npy(bytes(64), ">f8", "(2, 4)")),
    "biases in one dimension": (BIAS, r"of shape \(8,\), expected", npy(bytes(64), "<f8", "(8,)")),
    "negative shape": (BIAS, r"of shape \(-2, -4\), expected", npy(bytes(64), "<f8", "(-2, -4)")),
    "no channel": (BIAS, r"of shape \(2, 0\), expected", npy(b"", "<f8", "(2, 0)")),
    "a huge shape": (BIAS, "64 bytes of values, expected", npy(bytes(64), "<f8", f"(2, {2**60})")),
    "values cut short": (BIAS, "60 bytes of values, expected", sound()[BIAS][:-4]),
    "values too many": (BIAS, "72 bytes of values, expected", sound()[BIAS] + bytes(8)),
    "a row too few": (BIAS, "1 rows, expected one for each of the 2", npy(bytes(32), "<f8", "(1, 4)")),
    "a row too many": (BIAS, "3 rows, expected one for each of the 2", npy(bytes(96), "<f8", "(3, 4)")),
    "channels for rows": (BIAS, "4 rows, expected one for each of the 2", npy(bytes(64), "<f8", "(4, 2)")),
    "NaN in a bias": (BIAS, "holds 1 NaN", npy(doubled(0, 0, 0, math.nan, 0, 0, 0, 0), "<f8", "(2, 4)")),
    "an infinite bias": (BIAS, "holds 2 NaN or inf", npy(doubled(math.inf, -math.inf), "<f8", "(2, 1)")),
    "NaN in a deviation": (STD, "51: nan is not", dict_file({1: torch_tensor(), 51: torch_tensor(math.nan)})),
    "infinite deviation": (STD, "1: inf is not", dict_file({1: torch_tensor(math.inf), 51: torch_tensor()})),
    "negative deviation": (STD, "1: a negative", dict_file({1: torch_tensor(-0.5), 51: torch_tensor()})),
    "slopes for deviations": (
        STD,
        "1: expected a torch tensor",
        dict_file({1: scalar(0.5), 51: scalar(0.5)}),
    ),
    "a deviation too few": (
        STD,
        "lacks timestep 51, which kt.npy beside it has",
        dict_file({1: torch_tensor()}),
    ),
    "a deviation too many": (
        STD,
        "has timestep 101, which kt.npy beside it lacks",
        dict_file({t: torch_tensor() for t in (1, 51, 101)}),
    ),
    "a slope too few": (STD, "has timestep 51, which kt.npy beside it lacks", None),
}


@pytest.mark.parametrize(("name", "says", "content"), WRONG.values(), ids=list(WRONG))
def test_wrong_file(tmp_path: Path, name: str, says: str, content: bytes | None) -> None:
    change = {KT: dict_file({1: scalar(0.5)})} if content is None else {name: content}
    folder = write(tmp_path / "data", {**sound(), **change})
    with pytest.raises(ArtefactError, match=says) as caught:
        CorrectionStatistics.load(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")
    assert not Path("canary").exists()


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", {KT: sound()[KT]})
    (folder / BIAS).mkdir()
    says = r"data: no t_std_dict.npy and no idx_bias.npy. Expected a folder of .* kt.npy .* t_std_dict.npy"
    with pytest.raises(ArtefactError, match=says):
        CorrectionStatistics.load(folder)
    with pytest.raises(ArtefactError, match=r"nowhere: no kt.npy and no t_std_dict.npy and no idx_bias.npy"):
        read_correct_data(tmp_path / "nowhere")


def damaged(files: Files, seed: int) -> Iterator[tuple[str, bytes]]:
    """Files of the folder with some bytes changed, taken out or doubled."""
    draw = random.Random(seed)
    for name, content in files.items():
        for _ in range(100):
            data = bytearray(content)
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(data))
                size = draw.choice((1, 1, 1, 2, 9))
                replacement = (bytes(draw.randrange(256) for _ in range(size)), b"", data[at : at + size] * 2)
                data[at : at + size] = draw.choice(replacement)
            yield name, bytes(data)


def outcome(folder: Path) -> str:
    try:
        return f"{len(read_correct_data(folder).timesteps)} timesteps"
    except ArtefactError as error:
        return str(error)


@pytest.mark.parametrize("case", CASES)
def test_damage_is_an_error_or_harmless(golden: Path, tmp_path: Path, case: str) -> None:
    """Whatever is changed in PTQD's files, either an error names the file, or statistics come of it."""
    files = {path.name: path.read_bytes() for path in sorted(folder_of(golden, case).iterdir())}
    folder = write(tmp_path / "data", files)
    for name, content in damaged(files, seed=len(case)):
        (folder / name).write_bytes(content)
        found = outcome(folder)
        assert found.startswith(str(folder)) or found == "20 timesteps"
        (folder / name).write_bytes(files[name])


def test_the_tables_are_long_enough() -> None:
    assert len(HOSTILE) + len(ODD) + len(WRONG) + len(OWN) >= 30
    assert len(HOSTILE) >= 20
