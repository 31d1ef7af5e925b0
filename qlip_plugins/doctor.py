"""Which hosts and adapters are usable here, and why the others are not."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

from .adapter import GROUPS, NeedsHost, installed
from .errors import EVALUATION_HINT, INSTALL_HINT, HostError
from .host import Host, OnHost, install_hint, release

# Distribution -> the oldest release the package supports (pyproject.toml's floors).
_PACKAGES = {
    "torch": "2.10",
    "diffusers": "0.33.1",
    "transformers": "4.57",
    "accelerate": "1.0",
    "safetensors": "0.5",
}

# The same for what `label`, `train`, `evaluate` and `compare` need beyond.
_EVALUATION = {
    "matplotlib": "3.8",
    "scikit-learn": "1.4",
    "scipy": "1.11",
    "torchmetrics": "1.4",
    "efficientnet-lite-pytorch": "0.1",
}


def diagnose() -> dict[str, Any]:
    """Versions, adapters and the device, as plain data; `ok` is false when something cannot be used.

    The packages under `evaluation` and `frameworks` may be missing, with the adapters that need them: only some
    verbs and recipes do.
    """
    packages = {name: _package(name, floor, INSTALL_HINT) for name, floor in _PACKAGES.items()}
    runnable = packages["torch"]["usable"] and packages["diffusers"]["usable"]
    loaded = {group: {name: _Loaded(entry) for name, entry in installed(group).items()} for group in GROUPS}
    adapters = {
        group: {name: one.state(runnable) for name, one in found.items()} for group, found in loaded.items()
    }
    hosts = {one.host for found in loaded.values() for one in found.values() if one.host is not None}
    found = [*packages.values(), *(state for group in adapters.values() for state in group.values())]
    return {
        "ok": all(item["usable"] or item.get("optional", False) for item in found),
        "qlip-plugins": metadata.version("qlip-plugins"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "evaluation": {name: _package(name, floor, EVALUATION_HINT) for name, floor in _EVALUATION.items()},
        "frameworks": {
            host.distribution: _package(host.distribution, host.floor, install_hint(host.extra))
            for host in sorted(hosts, key=lambda host: host.distribution)
        },
        "adapters": adapters,
        "device": _device() if packages["torch"]["usable"] else "none: torch is not usable",
    }


def _package(name: str, floor: str, hint: str) -> dict[str, Any]:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return {
            "usable": False,
            "version": None,
            "why": f"not installed: {hint}",
        }
    if release(version) < release(floor):
        return {"usable": False, "version": version, "why": f"older than {floor}: pip install -U {name}"}
    return {"usable": True, "version": version, "why": ""}


class _Loaded:
    """An adapter, or why it cannot be imported."""

    def __init__(self, entry: metadata.EntryPoint) -> None:
        self._entry = entry
        self._adapter: Any = None
        self._broken = ""
        try:
            self._adapter = entry.load()
        except Exception as error:  # an outsider's adapter may fail in any way, and that is the answer
            self._broken = f"{type(error).__name__}: {error}"

    @property
    def host(self) -> Host | None:
        """The framework that it is for."""
        return self._adapter.host if isinstance(self._adapter, OnHost) else None

    def state(self, runnable: bool) -> dict[str, Any]:
        """Whether it can be used; `runnable` says that a model can be run at all."""
        source = self._entry.value
        if self._broken:
            return {"usable": False, "from": source, "why": self._broken}
        try:
            if isinstance(self._adapter, NeedsHost):
                self._adapter.check_host()
        except HostError as error:
            return {"usable": False, "optional": True, "from": source, "why": str(error)}
        why = "" if runnable else "checks recipes, but runs only with torch and diffusers"
        return {"usable": runnable, "from": source, "why": why}


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu, {torch.get_num_threads()} threads"


def as_text(found: dict[str, Any]) -> str:
    """The diagnosis for people."""
    lines = [
        f"qlip-plugins {found['qlip-plugins']}, python {found['python']} ({sys.executable}), {found['platform']}",
        f"device: {found['device']}",
    ]
    for name, state in found["packages"].items():
        lines.append(f"  {_mark(state)} {name} {state['version'] or ''} {state['why']}".rstrip())
    lines.append("label, train, evaluate, compare: extra `evaluation`")
    for name, state in found["evaluation"].items():
        lines.append(f"  {_mark(state)} {name} {state['version'] or ''} {state['why']}".rstrip())
    lines.append("models and backends of other frameworks")
    for name, state in found["frameworks"].items():
        lines.append(f"  {_mark(state)} {name} {state['version'] or ''} {state['why']}".rstrip())
    for group, adapters in found["adapters"].items():
        lines.append(f"{group}: {'' if adapters else 'none installed'}".rstrip())
        lines += [
            f"  {_mark(state)} {name} ({state['from']}) {state['why']}".rstrip()
            for name, state in adapters.items()
        ]
    return "\n".join(lines)


def _mark(state: dict[str, Any]) -> str:
    return "ok " if state["usable"] else "NOT"
