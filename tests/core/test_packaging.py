from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest

import qlip_plugins
from qlip_plugins.errors import HostError
from qlip_plugins.host import Host
from qlip_plugins.recipe import Recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("qlip_plugins", "qlip_efficientnet", "qlip_inception", "qlip_packed", "qlip_ptqd", "qlip_qdiffusion"),
    *("qlip_torch", "qlip_brevitas", "qlip_modelopt", "qlip_demo", "qlip_recipes"),
)


def test_version_and_typing_marker() -> None:
    assert metadata.version("qlip-plugins") == qlip_plugins.__version__
    for package in PACKAGES:
        assert resources.files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize("package", ["qlip_demo", "qlip_recipes"])
def test_data_is_installed_whole(package: str) -> None:
    """Every file of the tree is in the installed package, byte for byte."""
    tree, installed = ROOT / "recipes" / package, Path(str(resources.files(package)))
    files = [path for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 10
    for path in files:
        assert (installed / path.relative_to(tree)).read_bytes() == path.read_bytes(), path


def test_nothing_else_is_installed() -> None:
    """Neither the training data nor the scripts nor the tests."""
    recorded = metadata.files("qlip-plugins") or []
    assert recorded
    roots = {file.parts[0] for file in recorded if file.parts[0] != ".."}
    strange = [root for root in roots if root not in PACKAGES and not root.startswith(("qlip_plugins-", "_"))]
    assert strange == []


def test_entry_points() -> None:
    groups = {
        "qlip_plugins.base_quantizers": {"brevitas", "modelopt", "packed", "ptqd", "qdiffusion"},
        "qlip_plugins.backends": {"brevitas", "modelopt", "torch"},
        "qlip_plugins.corrections": {"ptqd"},
        "qlip_plugins.image_features": {"demo", "efficientnet-lite0", "inception"},
        "qlip_plugins.quality_metrics": {"clip-score", "demo-clip-score", "gmm-giqa", "knn-giqa"},
        "console_scripts": {"qlip-plugins"},
    }
    for group, names in groups.items():
        assert names <= metadata.entry_points(group=group).names


def test_public_names_are_those_listed() -> None:
    assert list(qlip_plugins.__all__) == sorted(qlip_plugins.__all__)
    late = set(qlip_plugins._LATE)
    assert late < set(qlip_plugins.__all__)
    for name in set(qlip_plugins.__all__) - late:
        assert hasattr(qlip_plugins, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qlip_plugins.nonsense


def test_import_needs_no_torch() -> None:
    names = ", ".join(
        [*(set(PACKAGES) - {"qlip_recipes"}), "qlip_demo.metric", "qlip_plugins.quality_metrics"]
    )
    code = f"import sys, {names}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_recipes_readme_lists_every_shipped_recipe() -> None:
    rows = dict(re.findall(r"^\| `(.+?)` \| (.+?) \|$", (ROOT / "recipes" / "README.md").read_text(), re.M))
    assert rows == {name: Recipe.with_needs(path)[0].description for name, path in shipped_recipes().items()}


def test_ci_runs_the_readme_s_test_command() -> None:
    text = (ROOT / "README.md").read_text()
    for mark in ("demo", "test"):
        block = re.search(rf"<!-- {mark} -->\n```bash\n(.+)\n```", text)
        assert block is not None, f"the {mark} command is one line in a fenced block"
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text()


def test_a_missing_or_old_framework_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.43.1")
    Host("nvidia-modelopt", "0.43", "modelopt").check()
    with pytest.raises(
        HostError,
        match=r"nvidia-modelopt 0\.43\.1 is older than 0\.44: pip install 'qlip-plugins\[modelopt\]'",
    ):
        Host("nvidia-modelopt", "0.44", "modelopt").check()

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(HostError, match="brevitas is not installed: pip install"):
        Host("brevitas", "0.13.1", "brevitas").check()
