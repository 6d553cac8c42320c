"""Figures, for every command that draws: made without a display, written as a PNG or into a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI: Final = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtraError("matplotlib", "plot") from e
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    return data.getvalue()


def save(figure: Figure, option: str, out: Path) -> None:
    """Write a PNG; raises ConfigError, which names the option, where the file cannot be written."""
    data = png(figure)
    try:
        out.write_bytes(data)
    except OSError as e:
        raise ConfigError(f"{option}: {str(out)!r} cannot be written ({e.strerror})") from e
