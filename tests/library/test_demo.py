"""`qlip-plugins demo`: what its folder holds is what the recipes give."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from qlip_plugins import BitPlan, demo
from qlip_plugins.cli import main
from qlip_plugins.controller import apply
from qlip_plugins.demo_drawing import BitMaps, Caption, PictureGrid, enlarged, wrapped
from qlip_plugins.generation import Settings, load_pipeline, sample
from qlip_plugins.plan import colours
from qlip_plugins.recipe import Recipe

ROOT = Path(__file__).parents[2]
PROMPT = '<script>alert("&")</script> hamburger' + ", a glossy 3D render of hamburger" * 12
SAMPLING = ["--steps", "2", "--guidance", "3", "--seed", "5"]
SETTINGS = Settings(steps=2, guidance_scale=3.0, seed=5)
FILES = {"grid.png", "bits.png", "index.html", "report.json", "plan.safetensors"}


@dataclass(frozen=True)
class Shown:
    out: Path
    report: Any
    err: str
    logged: list[logging.LogRecord]

    def tile(self, column: int) -> np.ndarray:
        """What the grid shows of the first prompt."""
        headers = [(name, "") for name in ("", *self.report["columns"])]
        with Image.open(self.out / "grid.png") as grid:
            return np.asarray(grid.crop(PictureGrid(headers, [], []).box(0, column)))


class _Keeping(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    out = tmp_path_factory.mktemp("demo") / "demo-out"
    logged: list[logging.LogRecord] = []
    handler = _Keeping(logged)
    logging.getLogger("diffusers").addHandler(handler)
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = main(["demo", "--prompt", PROMPT, *SAMPLING, "--out", str(out), "--json"])
    logging.getLogger("diffusers").removeHandler(handler)
    assert code == 0, stderr.getvalue()
    return Shown(out, json.loads(stdout.getvalue()), stderr.getvalue(), logged)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(Recipe.load("demo-w4a8"))


def test_the_folder(shown: Shown) -> None:
    assert {path.name for path in shown.out.iterdir()} == FILES
    assert json.loads((shown.out / "report.json").read_text()) == shown.report
    assert f"open {shown.out / 'index.html'}" in shown.err


@pytest.mark.parametrize("column", demo.COLUMNS[1:], ids=lambda column: str(column.recipe))
def test_each_column_is_its_recipe_s(shown: Shown, pipe: Any, column: demo.Column) -> None:
    recipe = Recipe.load(str(column.recipe))
    full = sample(pipe, recipe, [PROMPT], SETTINGS)[0]
    with apply(pipe, recipe) as controller:
        picture = sample(pipe, recipe, [PROMPT], SETTINGS)[0]
        report = controller.report()
    found = shown.report["prompts"][0]["columns"][column.name]
    expected = {**asdict(report.prompts[0]), "pixel_error": demo.pixel_error(picture, full)}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found["pixel_error"] > 0
    facts = shown.report["columns"][column.name]
    assert facts["recipe"] == column.recipe
    assert facts["plan_digest"] == report.plan_digest
    assert facts["base_fingerprint"] == controller.state.fingerprint
    assert np.array_equal(shown.tile(0), np.asarray(enlarged(full, 160)))
    assert np.array_equal(shown.tile(demo.COLUMNS.index(column)), np.asarray(enlarged(picture, 160)))
    if column is demo.QLIP:
        assert BitPlan.load(shown.out / "plan.safetensors").digest() == report.plan_digest


def test_the_base_column_is_what_generate_gives(shown: Shown, tmp_path: Path) -> None:
    assert main(["generate", "demo-w4a8", "--prompt", PROMPT, *SAMPLING, "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "000.png") as picture:
        assert np.array_equal(shown.tile(1), np.asarray(enlarged(picture, 160)))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prompts"][0]["noise_seed"] == shown.report["prompts"][0]["noise_seed"]


def test_shares_of_widths(shown: Shown) -> None:
    found = shown.report["prompts"][0]["columns"][demo.QLIP.name]
    shares = {int(bits): share for bits, share in found["bit_shares"].items()}
    assert shares.keys() <= {4, 6, 8}
    assert sum(bits * share for bits, share in shares.items()) == pytest.approx(found["fab"])


def test_the_page_has_nothing_from_outside(shown: Shown) -> None:
    page = (shown.out / "index.html").read_text()
    assert set(re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"' >]+)", page)) == {"grid.png", "bits.png"}
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt; hamburger" in page


def test_a_prompt_too_long_is_told_of_once(shown: Shown) -> None:
    ignored = shown.report["prompts"][0]["ignored"]
    assert PROMPT.lower().replace(" ", "").endswith(ignored.replace(" ", ""))
    assert 0 < len(ignored) < len(PROMPT)
    assert shown.err.count("note: ") == 1
    assert ignored in shown.err
    assert shown.logged == [], "diffusers would have said it in every run"
    assert ignored in (shown.out / "index.html").read_text()


def test_again_as_text_and_with_one_bar(
    shown: Shown, pipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    totals: list[int] = []

    @contextmanager
    def counted(total: int, what: str) -> Iterator[Callable[[str], None]]:
        totals.append(total)
        yield calls.append

    monkeypatch.setattr(demo, "counted", counted)
    monkeypatch.setattr(demo, "load_pipeline", lambda recipe: pipe)
    # A folder of its own is replaced; a copy, since other tests look at the first.
    out = shown.out.with_name("again")
    out.mkdir()
    for path in shown.out.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    prompts = ["--prompt", "hamburger", "--prompt", "blue whale"]
    assert main(["demo", *prompts, "--steps", "1", "--out", str(out)]) == 0
    assert totals == [len(calls)] == [4]
    assert {path.name for path in out.iterdir()} == FILES
    report = json.loads((out / "report.json").read_text())
    text = capsys.readouterr().out
    for name, mean in report["mean"].items():
        rows = [entry["columns"][name] for entry in report["prompts"]]
        assert mean["pixel_error"] == pytest.approx(sum(row["pixel_error"] for row in rows) / 2)
        assert mean["fab"] == pytest.approx(sum(row["fab"] for row in rows) / 2)
    for entry in (*(entry["columns"] for entry in report["prompts"]), report["mean"]):
        for name, row in entry.items():
            cells = [
                f"{row['fab']:.2f}",
                f"{row['fab_mac_weighted']:.2f}",
                f"{1000 * row['bitops_paper']:.2f}",
            ]
            line = [*name.split(), "-" if row["quality"] is None else f"{row['quality']:.3f}", *cells]
            assert any(found.split()[:-1] == line for found in text.splitlines()), line
    assert [entry["known"] for entry in report["prompts"]] == ["trained concept, by its name", None]
    assert (out / "index.html").read_text().count("trained concept") == 1


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grid.png").write_text("precious")
    (tmp_path / "report.json").write_text('{"format": "qlip-plugins generate"}')
    assert main(["demo", "--steps", "1", "--out", str(tmp_path)]) == 3
    assert "was not written by this command" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "report.json"}
    assert (tmp_path / "grid.png").read_text() == "precious"


def test_what_is_said_of_the_prompts_is_true() -> None:
    held_out = json.loads((ROOT / "data" / "emoji_64" / "split.json").read_text())["held_out_concepts"]
    for prompt, known in demo.KNOWN_PROMPTS.items():
        name = next(word for word in ("rocket", "hamburger", "octopus", "castle") if word in prompt)
        assert known.startswith("trained") is not (_hex(name) in held_out), prompt
        assert known.startswith("not trained") is (_hex(name) in held_out), prompt
    assert _hex("japanese castle") not in held_out


def _hex(name: str) -> str:
    return f"{ord(unicodedata.lookup({'castle': 'european castle'}.get(name, name))):x}"


def test_wrapped() -> None:
    font = ImageFont.load_default(15)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = wrapped("one two three four five six " * 4 + "x" * 200, font, 100)
    assert len(lines) > 3
    assert all(font.getlength(line) <= 100 for line in lines)
    assert wrapped("one two three four five six", font, 60, 2)[-1].endswith("…")
    assert wrapped("one two", font, 100, 2) == ["one two"]


def test_bit_maps_show_each_prompt_s_bits() -> None:
    widths = torch.tensor([4, 6, 8], dtype=torch.uint8)
    bits = widths[torch.randint(3, (5, 3, 4), generator=torch.Generator().manual_seed(0))]
    maps = BitMaps(
        BitPlan(bits, (9.0, 5.0, 1.0), ("mid_block.a", "mid_block.b", "up_blocks.0.c", "up_blocks.0.d")),
        [Caption(f"prompt {index}") for index in range(5)],
    )
    image = np.asarray(maps.image())
    for prompt in range(5):
        left, top = maps.corner(prompt)
        for step in range(3):
            for layer in range(4):
                y = top + layer * maps.cell_height + maps.cell_height // 2
                x = left + step * maps.cell_width + maps.cell_width // 2
                expected = colours(bits[prompt, step, layer].numpy().reshape(1, 1))[0, 0]
                assert np.array_equal(image[y, x], expected), (prompt, step, layer)
