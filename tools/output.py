"""How commands show what they found: a table for people, the same as JSON for programs.

Results go to stdout; progress and what went wrong go to stderr. What comes out of a
directory was written by anyone: it is made printable here and never read as markup.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvstore.errors import ConfigError
from tools.fitted import Fitted

_PIPE_WIDTH: Final = 200
UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_AGES: Final = (("d", 86400), ("h", 3600), ("min", 60))


def show(data: dict[str, Any], parts: Iterable[RenderableType], *, as_json: bool) -> None:
    """Print data as JSON, or else the parts, one below the other."""
    if as_json:
        sys.stdout.write(json.dumps(_finite(data), indent=2) + "\n")
        return
    console = results()
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text) and bool(part.no_wrap))


def results() -> Console:
    """Where tables go: stdout, wide where no terminal cuts it off."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Fitted:
    """A table; the first ``left`` columns are texts, the others numbers, aligned right. In a narrow terminal
    `tools.fitted` says what is left out."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    return Fitted(printable(title), columns, cells, left)


def lines(*texts: str) -> Iterator[Text]:
    """Texts, as they are."""
    return (Text(printable(text)) for text in texts)


def printable(text: str) -> str:
    """Text without what could move a terminal's cursor or change its state."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def size(nbytes: float) -> str:
    """``368640`` -> ``360.0 KiB``."""
    unit = 0
    while nbytes >= 1024 and unit < len(UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.1f} {UNITS[unit]}" if unit else f"{nbytes:.0f} B"


def age(seconds: float) -> str:
    """``7300`` -> ``2 h``."""
    for unit, nseconds in _AGES:
        if seconds >= nseconds:
            return f"{seconds / nseconds:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def parse_age(option: str, text: str) -> float:
    """``2h`` -> ``7200.0``; raises ConfigError, which names the option."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*(s|min|h|d)", text.strip().lower())
    if found is None:
        raise ConfigError(f"{option}: {text!r} is not allowed; give an age like 90s, 10min, 2h or 7d")
    return float(found[1]) * {"s": 1, **dict(_AGES)}[found[2]]


def parse_size(option: str, text: str) -> int:
    """``1.5GiB`` -> ``1610612736``; raises ConfigError, which names the option."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*(b|[kmgtp]ib|[kmgtp]b|)", text.strip().lower())
    if found is None:
        raise ConfigError(f"{option}: {text!r} is not allowed; give a size like 500MB, 64GiB or 1048576")
    exponent = "bkmgtp".index(found[2][:1] or "b")
    return int(float(found[1]) * (1000 if found[2].endswith("b") and "i" not in found[2] else 1024) ** exponent)


_QUIET: Final = ContextVar("quiet", default=False)


@contextmanager
def no_progress() -> Iterator[None]:
    """While a command draws the whole terminal itself."""
    before = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(before)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal, while something long runs; call what it yields with steps done."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=_QUIET.get() or not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
