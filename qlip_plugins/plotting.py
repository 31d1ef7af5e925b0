"""A matplotlib figure that needs no display; matplotlib is of the extra `evaluation`."""

from __future__ import annotations

from typing import Any

from .errors import EVALUATION_HINT, HostError


def new_figure(what: str, width: float, height: float) -> Any:
    """An empty figure that draws PNGs, whatever backend matplotlib is set to.

    Args:
        what: will be drawn, for the message.
        width: in inches.
        height: in inches.

    Raises:
        HostError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HostError(f"{what} needs matplotlib ({error}): {EVALUATION_HINT}") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
