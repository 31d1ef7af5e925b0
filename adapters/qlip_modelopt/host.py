"""Whether ModelOpt can be used here."""

from __future__ import annotations

from qlip_plugins.host import check_release

FLOOR = "0.44"
"""`register_quant_backend` is older; lists in `quant_cfg`, which our pages show, are not."""


def check() -> None:
    """See `qlip_plugins.adapter.NeedsHost.check_host`."""
    check_release("nvidia-modelopt", FLOOR, "modelopt")
