"""Figures, for every command that draws: made without a display, written as a PNG or into a page.

What is drawn was written by anyone: `label` makes it a text, and not the markup that matplotlib would read.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstore.errors import MissingExtraError
from tools.new_file import check_free, new_file
from tools.output import UNITS, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI: Final = 120
_ROUND: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500)


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks, with the letters in it
        figure.savefig(data, format="png", dpi=_DPI)
    return data.getvalue()


def label(text: str) -> str:
    """A text as it is, without formulas between dollars."""
    return printable(text).replace("$", r"\$")


def byte_ticks(low: float, high: float) -> list[float]:
    """Round numbers of bytes in a range that is drawn on a log scale: 1 GiB, 10 GiB, 100 GiB."""
    every = [float(n * 1024**unit) for unit in range(len(UNITS)) for n in _ROUND]
    inside = [n for n in every if low <= n <= high]
    tens = [n for n in inside if np.log10(n / 1024 ** int(np.log2(n) // 10)) % 1 == 0]
    return tens if len(tens) > 2 else inside


def round_size(nbytes: float) -> str:
    """``10737418240`` -> ``10 GiB``."""
    unit = min(len(UNITS) - 1, int(np.log2(nbytes) // 10)) if nbytes >= 1 else 0
    return f"{nbytes / 1024**unit:.4g} {UNITS[unit]}"


def legend_beside(axes: Any, **settings: Any) -> None:
    """A legend to the right of the axes, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, **settings)


def save(figure: Figure, option: str, out: Path, *, force: bool) -> None:
    """Write a PNG; raises ConfigError, which names the option, where the file is there, or cannot be written."""
    data = png(figure)
    check_free(out, option, force=force)
    with new_file(out, option) as file:
        file.write(data)
