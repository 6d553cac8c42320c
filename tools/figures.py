"""Figures, for every command that draws: made without a display, written as a PNG or into a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.errors import MissingExtraError
from tools.new_file import check_free, new_file

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


def save(figure: Figure, option: str, out: Path, *, force: bool) -> None:
    """Write a PNG; raises ConfigError, which names the option, where the file is there, or cannot be written."""
    data = png(figure)
    check_free(out, option, force=force)
    with new_file(out, option) as file:
        file.write(data)
