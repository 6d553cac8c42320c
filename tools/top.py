"""`kvstore top`: a live view of running servers, from their journal, or of a store's directories."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType

from kvstore.errors import ConfigError
from kvstore.journal import is_journal
from kvstore.journal_entries import TierSample
from kvstore.journal_view import JournalView
from tools import journal_stats
from tools.journal_stats import TierUse, tier_uses
from tools.output import age, lines, no_progress, printable, size, table
from tools.stat import stat

MOST_REQUESTS: Final = 10
_WINDOW_S: Final = 600.0
_RATES: Final = ("read_nbytes", "written_nbytes", "evicted_blocks", "late_chunks", "corrupt_chunks", "dropped_blocks")
_RATE_COLUMNS: Final = ("read/s", "written/s", "evicted/s", "late/s", "corrupt/s", "dropped/s")
_REQUEST_COLUMNS: Final = ("request", "tenant", "ago", "tokens", "found", "hit", "waited")


@dataclass(frozen=True, slots=True)
class View:
    """What is shown at one moment.

    Attributes:
        rates: (process, tier) -> per second, between its last two samples.
    """

    uses: list[TierUse]
    rates: dict[tuple[int, str], dict[str, float]]
    view: JournalView

    def to_dict(self) -> dict[str, Any]:
        return {
            "tiers": [{**use.to_dict(), "per_s": self.rates.get((use.pid, use.tier), {})} for use in self.uses],
            "requests": [
                {"request": r.request_id, "tenant": r.tenant, "time_ns": r.t_ns, "num_tokens": r.num_tokens,
                 "num_blocks": r.num_blocks, "hits": r.hits, "waited_s": r.waited_s, "is_late": r.is_late}
                for r in self.view.requests[: -MOST_REQUESTS - 1 : -1]
            ],
            "problems": self.view.problems,
        }  # fmt: skip

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        now = time.time_ns()
        columns = (*journal_stats.COLUMNS, *_RATE_COLUMNS)
        rows = ((*use.cells(), *_rate_cells(self.rates.get((use.pid, use.tier), {}))) for use in self.uses)
        yield table("tiers", columns, rows, left=4)
        yield table(f"the last of {len(self.view.requests)} requests", _REQUEST_COLUMNS, self._requests(now), left=2)
        yield from lines(*(f"problem in the journal: {text}" for text in self.view.problems))

    def _requests(self, now_ns: int) -> Iterator[tuple[object, ...]]:
        for request in self.view.requests[: -MOST_REQUESTS - 1 : -1]:
            found = ", ".join(f"{tier} {n}" for tier, n in request.hits.items()) or "-"
            share = f"{request.num_hits / request.num_blocks:.0%}" if request.num_blocks else "-"
            waited = f"{request.waited_s * 1e3:.0f} ms" + (" late" if request.is_late else "")
            yield (request.request_id[:40] or "-", request.tenant or "-", age((now_ns - request.t_ns) / 1e9),
                   request.num_tokens, found, share, waited)  # fmt: skip


def look(path: Path, *, at_its_end: bool = False) -> tuple[dict[str, Any], list[RenderableType]]:
    """What there is to show now, as data and for people.

    Args:
        path: a journal, of which the last ten minutes count; or a store's directory.
        at_its_end: see `JournalView.of`.
    Raises:
        ConfigError: it is neither.
    """
    if not is_journal(path):
        found = stat(path)
        return found.to_dict(), list(found.parts())
    view = JournalView.of(path, time.time_ns() - int(_WINDOW_S * 1e9), at_its_end=at_its_end)
    if not view.opened:
        view = JournalView.of(path, at_its_end=at_its_end)  # nobody has written lately: what was last
    shown = View(tier_uses(view), _rates(view.samples), view)
    return shown.to_dict(), list(shown.parts())


def watch(path: Path, interval_s: float, *, at_its_end: bool = False) -> None:
    """Show it in the terminal, again and again, until interrupted.

    Raises:
        ConfigError: see `look`; or there is no terminal.
    """
    from rich.live import Live

    from tools.output import results

    console = results()
    if not console.is_terminal:
        raise ConfigError("top: stdout is no terminal; give --once, or --json")
    _, parts = look(path, at_its_end=at_its_end)
    with no_progress(), Live(Group(*parts), console=console, screen=True, auto_refresh=False) as live:
        while True:
            head = lines(f"{printable(str(path))}   {time.strftime('%H:%M:%S')}   every {interval_s:g} s, Ctrl-C ends")
            live.update(Group(*head, *parts), refresh=True)
            time.sleep(interval_s)
            _, parts = look(path, at_its_end=at_its_end)


def _rates(samples: list[TierSample]) -> dict[tuple[int, str], dict[str, float]]:
    """Per second, between the last two samples of each tier of each process."""
    last: dict[tuple[int, str], TierSample] = {}
    before: dict[tuple[int, str], TierSample] = {}
    for sample in samples:
        at = sample.pid, sample.tier
        if at in last:
            before[at] = last[at]
        last[at] = sample
    rates = {}
    for at, now in last.items():
        old = before.get(at)
        if old is not None and now.t_ns > old.t_ns:
            seconds = (now.t_ns - old.t_ns) / 1e9
            grown = {name: now.numbers.get(name, 0.0) - old.numbers.get(name, 0.0) for name in _RATES}
            rates[at] = {name: max(0.0, value) / seconds for name, value in grown.items()}
    return rates


def _rate_cells(rates: Mapping[str, float]) -> tuple[str, ...]:
    if not rates:
        return ("-",) * len(_RATES)
    return tuple(size(rates[name]) if name.endswith("nbytes") else f"{rates[name]:.3g}" for name in _RATES)
