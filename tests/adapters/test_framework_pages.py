"""The pages for owners of a framework's model run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hosts import HOSTS, with_hosts
from qlip_plugins.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("host", with_hosts(HOSTS))
def test_the_page(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (DOCS / f"{host}.md").read_text()
    recipe = re.search(r"<!-- recipe -->\n```yaml\n(.+?)```", page, re.S)
    example = re.search(r"<!-- example -->\n```python\n(.+?)```", page, re.S)
    assert recipe is not None
    assert example is not None
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(recipe[1])
    assert Recipe.load("my.yaml").backend == host
    exec(compile(example[1], f"{host}.md", "exec"), {})
    assert Path("rocket.png").is_file()
    printed = capsys.readouterr().out
    assert "K = 108 controlled quantizers" in printed
    assert re.search(r"^ +0 +- +6\.00 ", printed, re.M)
