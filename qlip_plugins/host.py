"""Whether an optional framework is installed, and recent enough."""

from __future__ import annotations

from importlib import metadata

from .errors import HostError


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, to compare."""
    numbers = version.split("+", maxsplit=1)[0].split(".")
    return tuple(int(part) for part in numbers[:3] if part.isdigit())


def install_hint(extra: str) -> str:
    """How to install what an extra of this package names."""
    return f"pip install 'qlip-plugins[{extra}]' (in a clone: pip install -c constraints.txt '.[{extra}]')"


def check_release(name: str, floor: str, extra: str) -> None:
    """Check that a distribution is there.

    Args:
        name: of the distribution.
        floor: its oldest usable release.
        extra: of this package, that installs it.

    Raises:
        HostError: it is missing or too old.
    """
    hint = install_hint(extra)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise HostError(f"{name} is not installed: {hint}") from None
    if release(version) < release(floor):
        raise HostError(f"{name} {version} is older than {floor}: {hint}")
