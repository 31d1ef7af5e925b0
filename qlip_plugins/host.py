"""Whether an optional framework is installed, and recent enough."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

from .errors import HostError


@dataclass(frozen=True)
class Host:
    """A framework that an adapter is for.

    Args:
        distribution: its name.
        floor: its oldest usable release.
        extra: of this package, that installs it.
    """

    distribution: str
    floor: str
    extra: str

    def check(self) -> None:
        """Check that it is there.

        Raises:
            HostError: it is missing or too old.
        """
        try:
            version = metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            raise HostError(f"{self.distribution} is not installed: {install_hint(self.extra)}") from None
        if release(version) < release(self.floor):
            raise HostError(
                f"{self.distribution} {version} is older than {self.floor}: {install_hint(self.extra)}"
            )


class OnHost:
    """An adapter that needs a framework; a `qlip_plugins.adapter.NeedsHost`."""

    host: ClassVar[Host]

    def check_host(self) -> None:
        """See `qlip_plugins.adapter.NeedsHost.check_host`."""
        self.host.check()


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, to compare."""
    numbers = version.split("+", maxsplit=1)[0].split(".")
    return tuple(int(part) for part in numbers[:3] if part.isdigit())


def install_hint(extra: str) -> str:
    """How to install what an extra of this package names."""
    return f"pip install 'qlip-plugins[{extra}]' (in a clone: pip install -c constraints.txt '.[{extra}]')"
