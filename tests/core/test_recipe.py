"""The recipe, without torch: shipped ones, their spelling, and everything that can be wrong with one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from qlip_plugins import load_base_quantizer
from qlip_plugins.cli import main
from qlip_plugins.errors import RecipeError
from qlip_plugins.recipe import ActivationBits, Recipe, find_recipe, json_schema, shipped_recipes

GOOD = """\
schema_version: 1
model:
  pipeline: some/pipeline
base:
  adapter: qdiffusion
  checkpoint: ckpt.pth
  weight_bits: 4
  activation_bits: 8
  softmax_bits: 16
backend: torch
activation_bits: {low: 8, medium: 16, high: 32}
ranges: {keep_calibrated: true}
attention: base
controller:
  kind: static
  bits: 8
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(write(tmp_path, GOOD))
    assert recipe.activation_bits.widths == (8, 16, 32)
    assert recipe.model.pipeline == "some/pipeline"
    assert recipe.base.model_dump()["checkpoint"] == tmp_path / "ckpt.pth"
    with pytest.raises(ValidationError, match="frozen"):
        recipe.attention = "controlled"  # type: ignore[misc]


def test_an_explicit_null_differs_from_an_option_left_out(tmp_path: Path) -> None:
    null = Recipe.from_yaml(write(tmp_path, GOOD.replace("activation_bits: 8", "activation_bits: null")))
    out = Recipe.from_yaml(write(tmp_path, GOOD.replace("  activation_bits: 8\n", "")))
    assert "activation_bits" in null.base.model_fields_set
    assert "activation_bits" not in out.base.model_fields_set


def test_paths(tmp_path: Path) -> None:
    """Relative to the recipe's file; absolute; inside a package."""
    (tmp_path / "pipe").mkdir()
    text = GOOD.replace("some/pipeline", "pipe").replace("ckpt.pth", "/data/ckpt.pth")
    recipe = Recipe.from_yaml(write(tmp_path, text))
    assert recipe.model.pipeline == tmp_path / "pipe"
    assert recipe.base.model_dump()["checkpoint"] == Path("/data/ckpt.pth")
    shipped = Recipe.load("golden-w4a8")
    assert shipped.base.model_dump()["checkpoint"].is_file()
    assert Path(str(shipped.model.pipeline)).is_dir()


def test_options_in_python() -> None:
    config_class = load_base_quantizer("qdiffusion").config_class
    config = config_class(checkpoint="a/ckpt.pth", weight_bits=4)  # type: ignore[call-arg]
    assert config.model_dump()["checkpoint"] == Path("a/ckpt.pth")


PUBLISHED = [name for name in shipped_recipes() if name.startswith(("bk-sdm-", "sd-v1.4-"))]


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - set(PUBLISHED)))
def test_shipped_recipes_load_and_have_all_their_files(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.description
    assert recipe.missing_files() == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_say_what_they_need_and_take_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"needs base\.checkpoint, .*: give each with --set KEY=VALUE"):
        Recipe.load(name)
    assert main(["generate", name, "--prompt", "x", "--out", str(tmp_path / "out")]) == 2
    assert "needs base.checkpoint" in capsys.readouterr().err
    assert main(["recipe", "check", name, "--json"]) == 0
    needs = json.loads(capsys.readouterr().out)["needs"][name]
    assert {"base.checkpoint", "ranges.table", "controller.path"} <= set(needs)
    for key in needs:
        (tmp_path / key).write_text("")
    monkeypatch.chdir(tmp_path)
    given = [part for key in needs if key != "controller.path" for part in ("--set", f"{key}={key}")]
    assert main(["recipe", "check", name, *given, "--set", "controller=controller.path", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"ok": True, "missing_files": {name: []}, "needs": {name: []}}
    recipe = Recipe.load(name, {key: key for key in needs})
    assert recipe.base.model_dump()["checkpoint"] == tmp_path / "base.checkpoint", "from where the user is"
    # What makes ranges and controllers needs none of them.
    base = {key: key for key in needs if key.startswith("base.")}
    made = Recipe.load(name, base, ("ranges", "controller", "correction"))
    assert (made.ranges, made.correction, made.controller.kind) == (None, None, "static")


def test_set_gives_any_value_and_refuses_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"activation_bits.high": 24, "controller.budget": {"relative": 0.9}, "time_layers": "controlled"}
    recipe = Recipe.load("golden-w4a8", given)
    assert recipe.activation_bits.high == 24
    assert recipe.controls == {"attention": False, "time": True}
    assert main(["recipe", "check", "golden-w4a8", "--set", "base.weight_bit=4"]) == 2
    assert "did you mean 'weight_bits'" in capsys.readouterr().err
    assert main(["recipe", "check", "golden-w4a8", "--set", "backend.name=torch"]) == 2
    assert "'backend' is no section" in capsys.readouterr().err
    for wrong, message in (
        (["base"], "expected KEY=VALUE"),
        (["controller="], "no value"),
        (["bse.checkpoint=3"], "no value of a recipe"),
        (["base.weight_bits=[4"], "--set base.weight_bits=[4"),
        (["base.weight_bits=4", "base.weight_bits=8"], "set twice"),
        (["base.checkpoint=" + "x" * 300], "no such file"),
    ):
        pairs = [part for text in wrong for part in ("--set", text)]
        assert main(["recipe", "check", "golden-w4a8", *pairs]) in (2, 3)
        assert message in capsys.readouterr().err
    mapped = Recipe.load("demo-qlip-468", {"controller": {"kind": "static", "bits": "base"}})
    assert mapped.controller.kind == "static"
    kept = Recipe.load(
        "demo-qlip-468", {"controller.budget": {"fab": 5.5, "per": "batch"}, "controller": "elsewhere"}
    )
    assert kept.controller.kind == "qlip"
    assert kept.controller.budget is not None
    assert kept.controller.path == Path("elsewhere").absolute(), "a path starts where the user is"


def test_the_schema_knows_every_section_and_the_adapter_s_options() -> None:
    schema, broken = json_schema()
    assert not broken
    assert set(schema["required"]) == {
        "schema_version", "model", "base", "backend", "activation_bits", "controller",
    }  # fmt: skip
    assert "softmax_bits" in schema["$defs"]["base-qdiffusion"]["properties"]
    assert schema["additionalProperties"] is False


def test_menus() -> None:
    assert ActivationBits(low=2, medium=3, high=4).widths == (2, 3, 4)
    for low, medium, high in ((8, 8, 16), (16, 8, 32), (1, 2, 3), (8, 16, 33)):
        with pytest.raises(ValidationError):
            ActivationBits(low=low, medium=medium, high=high)


def test_hub_ids_and_paths(tmp_path: Path) -> None:
    for text, kind in (("CompVis/stable-diffusion-v1-4", str), ("a/b/c", Path), ("./a", Path), ("~/a", Path)):
        pipeline = Recipe.from_yaml(write(tmp_path, GOOD.replace("some/pipeline", text))).model.pipeline
        assert type(pipeline) is (str if kind is str else type(tmp_path))
        assert "~" not in str(pipeline)


def replace(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


DEEP = "a: " + "[" * 100 + "]" * 100 + "\n"

# name -> (text, what each line of the report matches)
BAD: dict[str, tuple[str, list[str]]] = {
    "empty": ("", [r":1: a recipe is a mapping of sections, found an empty file"]),
    "a list": ("- a\n- b\n", [r":1: a recipe is a mapping of sections, found a list"]),
    "a word": ("hello\n", [r":1: a recipe is a mapping of sections, found a single value"]),
    "not YAML": ("a: [1, 2\nb: 3\n", [r":2: not YAML: "]),
    "tab": ("a:\n\tb: 1\n", [r":2: not YAML: "]),
    "two documents": (GOOD + "---\n" + GOOD, [r":\d+: not YAML: "]),
    "anchor": (replace("low: 8", "low: &x 8"), [r":11: anchors and aliases are not part of a recipe"]),
    "alias bomb": ("a: &a [1]\nb: [*a, *a]\n", [r":1: anchors and aliases"]),
    "tag": (
        replace("adapter: qdiffusion", "adapter: !!python/name:os.system"),
        [r":5: the tag .* is not part"],
    ),
    "deep": (DEEP, [r":1: nested more than 32 deep"]),
    "large": ("# " + "x" * (1 << 20), [r":1: a recipe has at most 1048576 bytes"]),
    "unknown key": (
        replace("  checkpoint:", "  chekpoint:"),
        [
            r":4: base: the key 'checkpoint' is missing",
            r":6: base\.chekpoint: unknown key; did you mean 'checkpoint'\?",
        ],
    ),
    "unknown section": (
        GOOD + "controler: x\n",
        [r":17: controler: unknown key; did you mean 'controller'\?"],
    ),
    "unknown and unlike": (GOOD + "zzz: 1\n", [r":17: zzz: unknown key \(known: schema_version, "]),
    "missing model": (
        replace("model:\n  pipeline: some/pipeline\n", ""),
        [r":1: the key 'model' is missing"],
    ),
    "missing base": (re.sub(r"base:\n(  .*\n)+", "", GOOD), [r":1: the key 'base' is missing"]),
    "missing controller": (
        re.sub(r"controller:\n(  .*\n)+", "", GOOD),
        [r":1: the key 'controller' is missing"],
    ),
    "missing menu": (
        replace("activation_bits: {low: 8, medium: 16, high: 32}\n", ""),
        [r":1: the key 'activation_bits' is"],
    ),
    "no adapter": (replace("  adapter: qdiffusion\n", ""), [r":4: base: the key `adapter` is missing"]),
    "base is a word": (
        re.sub(r"base:\n(  .*\n)+", "base: qdiffusion\n", GOOD),
        [r":4: base: a section with the key `adapter`"],
    ),
    "unknown adapter": (
        replace("adapter: qdiffusion", "adapter: qdifusion"),
        [r":4: base: no base quantizer 'qdifusion'; did you mean 'qdiffusion'\? \(installed: .*qdiffusion"],
    ),
    "unknown backend": (
        replace("backend: torch", "backend: trch"),
        [r":10: backend: no backend 'trch'; did you mean 'torch'\?"],
    ),
    "duplicate section": (
        GOOD + "backend: torch\n",
        [r":17: backend: duplicate key, first given in line 10"],
    ),
    "duplicate option": (
        replace("  weight_bits: 4\n", "  weight_bits: 4\n  weight_bits: 8\n"),
        [r":8: base\.weight_bits: duplicate key, first given in line 7"],
    ),
    "version": (
        replace("schema_version: 1", "schema_version: 2"),
        [r":1: schema_version: Input should be 1, found 2"],
    ),
    "menu order": (
        replace("{low: 8, medium: 16, high: 32}", "{low: 16, medium: 8, high: 32}"),
        [r":11: activation_bits: need low < medium < high, found 16, 8, 32"],
    ),
    "menu width": (
        replace("high: 32", "high: 64"),
        [r":11: activation_bits\.high: .*less than or equal to 32, found 64"],
    ),
    "menu of words": (
        replace("low: 8", "low: eight"),
        [r":11: activation_bits\.low: .*valid integer, found 'eight'"],
    ),
    "quoted number": (
        replace("weight_bits: 4", "weight_bits: '4'"),
        [r":7: base\.weight_bits: .*valid integer, found '4'"],
    ),
    "fraction": (replace("weight_bits: 4", "weight_bits: 4.5"), [r":7: base\.weight_bits: .*found 4.5"]),
    "yes is no boolean": (
        replace("keep_calibrated: true", "keep_calibrated: yes"),
        [r":12: ranges\.keep_calibrated: .*boolean, found 'yes'"],
    ),
    "weights of one bit": (
        replace("weight_bits: 4", "weight_bits: 1"),
        [r":7: base\.weight_bits: .*greater than or equal to 2"],
    ),
    "both ranges": (
        replace("{keep_calibrated: true}", "{keep_calibrated: true, table: r.safetensors}"),
        [r":12: ranges: give exactly one"],
    ),
    "no range": (replace("{keep_calibrated: true}", "{}"), [r":12: ranges: give exactly one"]),
    "attention": (
        replace("attention: base", "attention: all"),
        [r":13: attention: .*'base' or 'controlled', found 'all'"],
    ),
    "controller kind": (replace("kind: static", "kind: statc"), [r":14: controller: .*'statc'.*'static'"]),
    "controller without kind": (replace("  kind: static\n", ""), [r":14: controller: "]),
    "another kind's option": (
        replace("  bits: 8", "  path: x"),
        [r":14: controller: the key 'bits'", r":16: controller\.path: unknown key"],
    ),
    "empty path": (
        replace("checkpoint: ckpt.pth", "checkpoint: ''"),
        [r":6: base\.checkpoint: a path is needed"],
    ),
    "no such package": (
        replace("checkpoint: ckpt.pth", "checkpoint: package://nowhere/c.pth"),
        [r":6: base\.checkpoint: no installed package 'nowhere'"],
    ),
    "out of a package": (
        replace("checkpoint: ckpt.pth", "checkpoint: package://qlip_recipes/../x.pth"),
        [r":6: .*must stay inside its package"],
    ),
    "long number": (
        replace("weight_bits: 4", "weight_bits: " + "9" * 5000),
        [r":7: a number of 5000 digits"],
    ),
    "everything at once": (
        "schema_version: 3\nmodle: {}\nbase: {adapter: qdiffusion, weight_bit: 4}\nbackend: x\n"
        "activation_bits: {low: 9, medium: 8, high: 7}\ncontroller: {kind: static, bits: 99}\ncontroller: {}\n",
        [
            r":1: the key 'model' is missing",
            r":1: schema_version: ",
            r":2: modle: unknown key; did you mean 'model'\?",
            r":3: base: the key 'checkpoint' is missing",
            r":3: base\.weight_bit: unknown key; did you mean 'weight_bits'\?",
            r":4: backend: no backend 'x'",
            r":5: activation_bits: need low < medium < high",
            r":6: controller\.bits: ",
            r":7: controller: duplicate key",
        ],
    ),
}


@pytest.mark.parametrize(("text", "lines"), BAD.values(), ids=list(BAD))
def test_bad_recipe(text: str, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, text)
    started = time.perf_counter()
    assert main(["recipe", "check", str(path)]) == 2
    assert time.perf_counter() - started < 1
    captured = capsys.readouterr()
    assert captured.out == ""
    report = captured.err.removeprefix("error: ").splitlines()
    for line in lines:
        assert any(re.match(re.escape(str(path)) + line, found) for found in report), (line, captured.err)
    assert all(found.startswith(f"{path}:") for found in report), captured.err


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 25


def test_binary_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        Recipe.from_yaml(path)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="no such recipe file, and no shipped recipe"):
        find_recipe("golden-w4a9-typo")


def test_checking_imports_no_torch_and_takes_less_than_a_second(tmp_path: Path) -> None:
    path = write(tmp_path, BAD["everything at once"][0])
    code = (
        "import sys, qlip_plugins.cli\n"
        f"code = qlip_plugins.cli.main(['recipe', 'check', {str(path)!r}])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(code, sorted(heavy))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    elapsed = time.perf_counter() - started
    assert done.stdout.strip() == "2 []"
    assert elapsed < 2, "the whole process, Python's own start included"


def test_list_and_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipe", "list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(shipped_recipes())
    assert main(["recipe", "show", "golden-w4a8"]) == 0
    shown = capsys.readouterr().out
    copied = write(tmp_path, shown)
    assert Recipe.from_yaml(copied) == Recipe.load("golden-w4a8"), "a copy elsewhere still finds its files"
    assert main(["recipe", "show", "golden-w4a8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "torch"
    assert main(["recipe", "show", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"
    assert main(["recipe", "check", "--shipped"]) == 0
    assert main(["recipe", "check", "golden-w4a8"]) == 0


def test_missing_files_are_bad_artefacts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD)
    assert main(["recipe", "check", str(path)]) == 3
    assert f"base.checkpoint: {tmp_path / 'ckpt.pth'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["recipe"], ["generate", "x"], ["nonsense"], ["recipe", "check"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
