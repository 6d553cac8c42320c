"""A table that fits its terminal: numbers, keys and headings stay whole, and what matters least is left out.

Which columns matter is one list for all tables, so that a column is not left out in one and kept in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

# Of texts that may be long, several lines; of so many letters at least.
FOLDED: Final = ("model", "path", "value", "request", "found", "device", "host", "disk", "shared", "what")
_LEAST_FOLDED: Final = 16
# What is left out first, where there is no room.
LEAST: Final = (
    *("namespace", "chunks", "oldest", "on disk", "pinned", "reuse age", "dropped/s", "corrupt/s", "late/s"),
    *("subnormal", "exponents", "of max", "saturated", "evicted", "tenants", "newest", "server", "tokens", "tenant"),
    *("mean", "evicted/s", "capacity", "requests", "waited", "written/s", "read/s", "then", "used", "state"),
    "first key",
)
LAST: Final = "bytes"  # goes where long texts in many lines do not make room enough
_BESIDE: Final = 3  # letters that a column takes beside its text: a line, and a blank on both sides


class Fitted:
    """Args:
    left: the first so many columns are texts, the others numbers, aligned right.
    """

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
        self._title, self._columns, self._rows, self._left = title, columns, rows, left
        self._widths = [
            max((cell_len(name), *(cell_len(row[i]) for row in rows if i < len(row)))) for i, name in enumerate(columns)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, least = self._shown(options.max_width)
        fits = self._needed(shown, least) <= options.max_width
        made = Table(title=Text(self._title) if self._title else None, title_justify="left")
        for i in shown:
            name = self._columns[i]
            made.add_column(name, justify="left" if i < self._left else "right", overflow="fold",
                            no_wrap=fits and name not in FOLDED,
                            min_width=self._least(i, least) if fits else None)  # fmt: skip
        for row in self._rows:
            made.add_row(*(Text(row[i]) for i in shown if i < len(row)))
        yield made
        if len(shown) < len(self._columns):
            names = ", ".join(name for i, name in enumerate(self._columns) if i not in shown)
            yield Text(f"not shown, for want of room: {names}; --json has all")

    def _shown(self, width: int) -> tuple[list[int], int]:
        """Columns, and how many letters those with long texts get at least."""
        shown = list(range(len(self._columns)))
        for name in LEAST:
            if self._needed(shown, _LEAST_FOLDED) <= width:
                return shown, _LEAST_FOLDED
            if name in self._columns:
                shown.remove(self._columns.index(name))
        if self._needed(shown, _LEAST_FOLDED) <= width:
            return shown, _LEAST_FOLDED
        if self._needed(shown, 1) > width and LAST in self._columns:
            shown.remove(self._columns.index(LAST))
        return shown, 1

    def _needed(self, shown: Sequence[int], least: int) -> int:
        return sum(self._least(i, least) + _BESIDE for i in shown) + 1

    def _least(self, i: int, least: int) -> int:
        """Letters that a column needs."""
        name = self._columns[i]
        if name not in FOLDED:
            return self._widths[i]
        return max(cell_len(name), min(self._widths[i], least))
