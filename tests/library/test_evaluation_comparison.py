"""`qlip-plugins compare`: pairs, intervals, gates and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from qlip_plugins.artefacts import write_tensors
from qlip_plugins.cli import main
from qlip_plugins.errors import RecipeError
from qlip_plugins.evaluation.bootstrap import mean_interval
from qlip_plugins.evaluation.comparison import compare, parse_gate
from qlip_plugins.evaluation.protocol import differences, fingerprint_of
from qlip_plugins.evaluation.run import RUN_FORMAT, RUN_VERSION

PROMPTS = ("a red fox", "an old fox", "a cat")
CLUSTERS = ("fox", "fox", "cat")


def write_run(
    folder: Path, shift: Tensor, steps: int = 3, prompts: tuple[str, ...] = PROMPTS, seeds: int = 2
) -> None:
    """A run as `evaluate` writes it: `recipe` has the errors of `base` and `shift`, `(n, 1)` or `(n, S)`, more."""
    protocol = {"steps": steps, "noises": {"seed": 0, "per_prompt": seeds}}
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(len(prompts), seeds, 4, generator=generator, dtype=torch.float64) + 1
    tensors = {
        "noises": torch.tensor([[100 * row + seed for seed in range(seeds)] for row in range(len(prompts))])
    }
    for name, error, bits in (("base", base, 8.0), ("recipe", base + shift[..., None], 6.0)):
        tensors[f"{name}/error_led"] = error
        tensors[f"{name}/fab"] = torch.full((len(prompts),), bits, dtype=torch.float64)
    sets = {"fid.demo": {"label": "FID-lite (demo)", "value": 5.0, "low": 4.0, "high": 6.0}}
    facts: dict[str, Any] = {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        "fingerprint": fingerprint_of(protocol),
        "protocol": protocol,
        "prompts": list(prompts),
        "clusters": list(CLUSTERS[: len(prompts)]),
        "allocations": {"base": {"sets": sets}, "recipe": {"sets": sets}},
    }
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(facts))
    write_tensors(
        folder / "results.safetensors", RUN_FORMAT, RUN_VERSION, tensors, fingerprint=facts["fingerprint"]
    )


SHIFT = torch.tensor([[0.5, 0.7], [-0.2, -0.2], [0.1, 0.1]], dtype=torch.float64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", SHIFT)
    for name in ("base", "recipe"):
        (tmp_path / "run" / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "run" / "pictures" / name / "0000-01.png")
    return tmp_path / "run"


def test_differences_are_paired_and_clustered(run: Path) -> None:
    found = compare(f"{run}:base", str(run))
    assert (found.names, found.pairs) == (("run:base", "run:recipe"), 6)
    error = found.figures["error_led"]
    assert error["difference"] == pytest.approx(mean_interval(SHIFT.mean(1), CLUSTERS).to_dict())
    assert error["difference"]["clusters"] == 2
    assert error["b"] - error["a"] == pytest.approx(float(SHIFT.mean()))
    assert error["ratio"] == pytest.approx(error["b"] / error["a"])
    assert found.figures["fab"]["ratio"] == pytest.approx(0.75)
    assert next(iter(found.figures)) == "error_led"
    assert found.sets["fid.demo"]["difference"] == 0


def test_the_worst_cases_come_first_and_only_rises_are_cases(run: Path) -> None:
    worst = compare(f"{run}:base", str(run)).worst
    assert [(case.prompt, case.noise) for case in worst[:2]] == [("a red fox", 1), ("a red fox", 0)]
    assert {case.prompt for case in worst[2:]} == {"a cat"}
    assert len(worst) == 4
    assert worst[0].second["error_led"] - worst[0].first["error_led"] == pytest.approx(0.7)
    assert worst[0].pictures[0] == run / "pictures" / "base" / "0000-01.png"
    assert worst[1].pictures == (None, None)


def test_the_page_needs_no_other_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "comparison"
    assert main(["compare", f"{run}:base", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "error_led" in printed.out
    assert f"open {out / 'index.html'}" in printed.err
    page = (out / "index.html").read_text()
    assert page.count("src='data:image/png;base64,") == 2
    assert "picture not kept by the run" in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert json.loads((out / "comparison.json").read_text())["pairs"] == 6
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "index.html"]


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        ("error_led.difference<=0.2", 0),
        ("error_led.difference<=0", 5),
        ("error_led.difference.high<=0.19", 5),
        ("error_led.difference.low > -9", 0),
        ("fab.ratio<=0.8", 0),
        ("fab.ratio<0.75", 5),
        ("fid.demo.difference<=0", 0),
        ("fid.demo.b>=5.5", 5),
    ],
)
def test_a_failed_gate_is_exit_5_after_all_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gate: str, code: int
) -> None:
    out = tmp_path / "comparison"
    arguments = ["compare", f"{run}:base", str(run), "--gate", gate, "--gate", "fab.b<=6", "--out", str(out)]
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert (out / "comparison.json").is_file()
    assert f"gate {gate}: {'met' if code == 0 else 'FAILED'}" in printed.out
    assert ("1 of 2 gates failed" in printed.err) == (code == 5)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("error_led.diference<=0", "no figure 'error_led.diference'.*'error_led.difference'"),
        ("error<=0", "known: METRIC.difference.*error_led, fab, fid.demo"),
        ("error_led.difference", "expected FIGURE<=NUMBER"),
        ("error_led.difference<=low", "expected FIGURE<=NUMBER"),
    ],
)
def test_a_gate_that_means_nothing_is_exit_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gate: str, message: str
) -> None:
    out = tmp_path / "comparison"
    assert main(["compare", f"{run}:base", str(run), "--gate", gate, "--out", str(out)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


def test_a_figure_that_is_not_known_meets_no_gate(tmp_path: Path) -> None:
    """With one cluster there is no interval, and so no upper end to stay below anything."""
    write_run(tmp_path / "one", SHIFT[:2], prompts=PROMPTS[:2])
    gate = parse_gate("error_led.difference.high<=9")
    ((_, _, met),) = compare(f"{tmp_path / 'one'}:base", str(tmp_path / "one"), gates=[gate]).gates
    assert not met
    with pytest.raises(RecipeError):
        parse_gate("<=1")


def test_other_protocols_are_not_compared_without_being_told_to(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "other", SHIFT, steps=4)
    other = str(tmp_path / "other")
    assert main(["compare", str(run), other]) == 4
    assert "They differ in\n  steps: 3, 4" in capsys.readouterr().err
    assert main(["compare", str(run), other, "--force"]) == 0
    assert (
        "warning: the protocols differ in 1 fields, compared as told to:\n  steps: 3, 4"
        in capsys.readouterr().out
    )
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 0}) == ["a.b: 1, 2", "c: 'absent', 0"]


def test_only_pictures_in_both_runs_are_paired(run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "fewer", SHIFT[1:, :1], prompts=PROMPTS[1:], seeds=1)
    with pytest.raises(Exception, match="no picture of the same prompt and noise"):
        compare(str(run), str(tmp_path / "fewer"), force=True)
    write_run(tmp_path / "first", SHIFT[:2], prompts=PROMPTS[:2])
    found = compare(str(run), str(tmp_path / "first"), force=True)
    assert found.pairs == 4
    assert found.figures["error_led"]["difference"]["n"] == 2


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda run: (run / "evaluation.json").unlink(), 3, "no readable run"),
        (lambda run: (run / "evaluation.json").write_text("{}"), 3, "found another format"),
        (lambda run: (run / "results.safetensors").write_bytes(b"x"), 3, "damaged or not safetensors"),
        (
            lambda run: write_tensors(
                run / "results.safetensors", RUN_FORMAT, RUN_VERSION, {"a": torch.zeros(1)}, fingerprint="x"
            ),
            3,
            "are of different runs",
        ),
    ],
)
def test_broken_runs_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], spoil: Any, code: int, message: str
) -> None:
    spoil(run)
    assert main(["compare", str(run), str(run)]) == code
    assert message in capsys.readouterr().err


def test_an_unknown_allocation_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{run}:bass", str(run)]) == 2
    assert "no allocation 'bass'" in capsys.readouterr().err
