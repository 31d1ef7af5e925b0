"""What the README shows runs, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qlip_plugins.cli import main
from qlip_plugins.recipe import Recipe

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(r"<!-- example -->\n```python\n(.+?)```", README, re.S)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(block[1], "README.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {"rocket.png", "rocket-bits.png", "plan.safetensors"}
    assert "K = 108 controlled quantizers" in capsys.readouterr().out


def test_the_demo_command(tmp_path: Path) -> None:
    block = re.search(r"<!-- demo -->\n```bash\n(.+)\n```", README)
    assert block is not None
    arguments = shlex.split(block[1].rpartition("&&")[2])[1:]
    out = tmp_path / arguments[-1]
    assert main([*arguments[:-1], str(out), "--prompt", "rocket", "--steps", "2"]) == 0
    assert (out / "index.html").is_file()


def test_the_recipe_is_a_recipe(tmp_path: Path) -> None:
    block = re.search(r"```yaml\n(.+?)```", README, re.S)
    assert block is not None
    path = tmp_path / "my.yaml"
    path.write_text(block[1])
    assert Recipe.from_yaml(path).activation_bits.widths == (8, 16, 32)
