"""A whole model as a folder: saved, loaded in a fresh process, the same plans and pictures; no change unseen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from family_models import make, qlip_recipe
from qlip_plugins import QlipModel, Recipe, load_base_quantizer
from qlip_plugins.cli import main
from qlip_plugins.errors import ArtefactError, RecipeError
from qlip_plugins.files import file_digest
from qlip_plugins.model_folder import CONFIG_NAME, RECIPE_NAME
from qlip_plugins.packed import read_packed

SAMPLING = ("--prompt", "row 3", "--prompt", "row 9", "--steps", "3", "--guidance", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    QlipModel.from_recipe("golden-w4a8").save_pretrained(folder)
    return folder


def test_a_fresh_process_gives_the_same_plans_and_pictures(saved: Path, tmp_path: Path) -> None:
    assert main(["generate", "golden-w4a8", *SAMPLING, "--out", str(tmp_path / "here")]) == 0
    elsewhere = tmp_path / "moved"
    saved.rename(elsewhere)
    try:
        command = [sys.executable, "-m", "qlip_plugins", "generate", str(elsewhere), *SAMPLING]
        subprocess.run([*command, "--out", str(tmp_path / "there")], check=True, env=dict(os.environ))
    finally:
        elsewhere.rename(saved)
    for name in ("000.png", "001.png", "000-bits.png", "plan.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    here, there = (json.loads((tmp_path / where / "report.json").read_text()) for where in ("here", "there"))
    assert here["base_fingerprint"] == there["base_fingerprint"]
    assert here["mean"] == there["mean"]


def test_the_folder_says_what_it_is(saved: Path) -> None:
    config = json.loads((saved / CONFIG_NAME).read_text())
    assert config["quant_method"] == "qlip"
    assert config["base_model"] == "package://qlip_recipes/golden_w4a8/pipeline"
    assert {"recipe.yaml", "base/weights.safetensors", "controller/config.json", "ranges.safetensors"} <= set(
        config["files"]
    )
    card = (saved / "README.md").read_text()
    head = YAML(typ="safe").load(card.split("---")[1])
    assert head["base_model_relation"] == "quantized"
    assert head["library_name"] == "diffusers"
    assert "package://" not in (saved / RECIPE_NAME).read_text().replace(config["base_model"], "")
    (saved / "README.md").write_text(card + "\nEdited.\n")
    assert QlipModel.from_pretrained(saved).recipe.base.adapter == "packed", "a card may be edited"


@pytest.mark.parametrize("name", ["base/weights.safetensors", "controller/model.safetensors", "recipe.yaml"])
def test_a_changed_or_missing_file_is_found_before_anything_is_loaded(
    saved: Path, name: str, tmp_path: Path
) -> None:
    path, content = saved / name, (saved / name).read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtefactError, match="not the file that was saved"):
            QlipModel.from_pretrained(saved)
        with pytest.raises(ArtefactError, match="not the file that was saved"):
            Recipe.load(saved)
        with pytest.raises(ArtefactError, match="not the file that was saved"):
            Recipe.load(saved / RECIPE_NAME)
        path.unlink()
        with pytest.raises(ArtefactError, match="missing; get the folder again"):
            QlipModel.from_pretrained(saved)
    finally:
        path.write_bytes(content)
    QlipModel.from_pretrained(saved)


def test_a_config_that_points_outside_is_refused(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / CONFIG_NAME).read_text())
    config["files"]["../elsewhere"] = "0" * 64
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    for name in saved.iterdir():
        if name.name != CONFIG_NAME:
            (tmp_path / name.name).symlink_to(name)
    with pytest.raises(ArtefactError, match="a file outside of the folder"):
        QlipModel.from_pretrained(tmp_path)


def test_a_recipe_that_points_outside_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    shutil.copytree(saved / "base", tmp_path / "base")
    text = (folder / RECIPE_NAME).read_text().replace("folder: base", "folder: ../base")
    (folder / RECIPE_NAME).write_text(text)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["files"][RECIPE_NAME] = file_digest(folder / RECIPE_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=r"base\.folder is .*, which is not part of the folder"):
        QlipModel.from_pretrained(folder)


def test_a_hub_cache_of_links_is_read(saved: Path, tmp_path: Path) -> None:
    """As the hub's cache lies: every file a link into `blobs`."""
    cache, revision = tmp_path / "models--someone--model", "0" * 40
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(path for path in saved.rglob("*") if path.is_file())):
        blob = cache / "blobs" / f"{number:040d}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, blob)
        link = cache / "snapshots" / revision / file.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    model = QlipModel.from_pretrained("someone/model", cache_dir=tmp_path, local_files_only=True)
    pipe = model.load_pipeline()
    with model.apply(pipe) as controller:
        assert controller.state.fingerprint == model.base_fingerprint


def test_what_is_no_folder_is_asked_of_the_hub_and_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtefactError, match="no such folder, and not to be had from the hub or its cache"):
        QlipModel.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_pipeline_on_this_machine_needs_a_name(tmp_path: Path) -> None:
    recipe = qlip_recipe("sd", make("sd", tmp_path), tmp_path)
    model = QlipModel.from_recipe(recipe)
    with pytest.raises(RecipeError, match="a path on this machine"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", base_model="someone/pipeline")
    assert QlipModel.from_pretrained(tmp_path / "out").recipe.model.pipeline == "someone/pipeline"
    with pytest.raises(RecipeError, match="expected the hub id"):
        model.save_pretrained(tmp_path / "elsewhere", base_model="./here/pipe")
    (tmp_path / "controller" / "notes.txt").write_text("private")
    model.save_pretrained(tmp_path / "out", base_model="someone/pipeline")
    assert not (tmp_path / "out" / "controller" / "notes.txt").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(ArtefactError, match=r"holds .thesis\.tex."):
        model.save_pretrained(tmp_path / "thesis", base_model="someone/pipeline")


@pytest.mark.parametrize("case", ["w4a8", "w8a8", "w4a16", "w4"])
def test_a_converted_file_is_the_same_base(golden: Path, tmp_path: Path, case: str) -> None:
    checkpoint = golden / "qdiffusion" / case / "ckpt.pth"
    assert main(["convert", str(checkpoint), "--out", str(tmp_path / "base")]) == 0
    adapter = load_base_quantizer("qdiffusion")
    state = adapter.load(adapter.config_class(checkpoint=checkpoint))  # type: ignore[call-arg]
    bits = next(iter({g.bits for n, g in state.activations.items() if n not in state.operands}), None)
    assert read_packed(tmp_path / "base", bits).fingerprint == state.fingerprint
    assert (tmp_path / "base" / "weights.safetensors").stat().st_size < checkpoint.stat().st_size / 2


def test_a_file_that_does_not_say_its_bits_is_not_guessed(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ckpt.pth").write_bytes((golden / "qdiffusion" / "w4a8" / "ckpt.pth").read_bytes())
    command = ["convert", str(tmp_path / "ckpt.pth"), "--out", str(tmp_path / "base")]
    assert main(command) == 2
    assert "stand in neither the file nor a record beside it" in capsys.readouterr().err
    given = ("--set", "activation_bits=8", "--set", "softmax_bits=16", "--set", "symmetric=false")
    assert main([*command, *given, "--set", "weight_bits=4"]) == 0
    shown: Any = YAML(typ="safe").load(capsys.readouterr().out)
    assert shown["base"]["activation_bits"] == 8
    assert main([*command, *given, "--set", "weight_bits=8"]) == 3, "what contradicts the tensors is refused"


def test_the_verb_saves_a_recipe(tmp_path: Path) -> None:
    assert main(["save", "golden-w4a8-static", "--out", str(tmp_path / "model")]) == 0
    recipe = Recipe.load(tmp_path / "model")
    assert recipe.controller.kind == "static"
    assert QlipModel.from_pretrained(tmp_path / "model").recipe == recipe
