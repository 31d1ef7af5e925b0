"""Whether brevitas can be used here."""

from __future__ import annotations

from qlip_plugins.host import check_release

FLOOR = "0.13.1"
"""Earlier ones do not work with a torch that this package supports."""


def check() -> None:
    """See `qlip_plugins.adapter.NeedsHost.check_host`."""
    check_release("brevitas", FLOOR, "brevitas")
