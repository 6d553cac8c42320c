"""`kvstore stat`: one line a directory: how full it is, and how old what lies there is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from kvstore.journal_view import JournalView
from kvstore.tiers.catalog import Catalog
from kvstore.tiers.disk_dir import is_in_use
from kvstore.tiers.disk_header import read_header
from tools import journal_stats
from tools.journal_stats import TierUse, tier_uses
from tools.ls import problem_lines, problems_of
from tools.output import age, progress, size, table
from tools.places import find_catalogs

COLUMNS = ("tier", "path", "state", "used", "capacity", "full", "on disk", "chunks", "blocks", "oldest", "newest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Of one directory.

    Attributes:
        state: "in use" by a store now (disk); "idle"; "damaged"; "-" where it cannot be known (shared).
        used_nbytes: of chunks that a store could find.
        capacity_nbytes: room for chunks; None where only the stores know it (shared).
        on_disk_nbytes: what the file system has given.
    """

    tier: str
    path: str
    state: str
    used_nbytes: int
    capacity_nbytes: int | None
    on_disk_nbytes: int
    chunks: int
    blocks: int
    namespaces: int
    oldest_s: float | None
    newest_s: float | None

    def cells(self) -> tuple[object, ...]:
        """For people; see `COLUMNS`."""
        capacity = self.capacity_nbytes
        full = f"{self.used_nbytes / capacity:.0%}" if capacity else "-"
        ages = ("-" if seconds is None else age(seconds) for seconds in (self.oldest_s, self.newest_s))
        return (
            self.tier, self.path, self.state, size(self.used_nbytes), "-" if capacity is None else size(capacity), full,
            size(self.on_disk_nbytes), self.chunks, self.blocks, *ages,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stat:
    """Of every directory and, with a journal, of every server's tiers."""

    lines: list[Line]
    servers: list[TierUse] | None
    problems: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"tiers": [asdict(line) for line in self.lines], "problems": self.problems}
        return data if self.servers is None else {**data, "servers": [use.to_dict() for use in self.servers]}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        yield table("", COLUMNS, (line.cells() for line in self.lines), left=3)
        if self.servers is not None:
            cells = (use.cells() for use in self.servers)
            yield table("servers, as the journal knows them", journal_stats.COLUMNS, cells, left=4)
        yield from problem_lines(self.problems)


def stat(path: Path, journal: Path | None = None, *, at_its_end: bool = False) -> Stat:
    """Look at them.

    Raises:
        ConfigError: there is nothing of a tier there, or no journal.
    """
    catalogs = find_catalogs(path)
    found, problems, servers = [_line(catalog) for catalog in catalogs], problems_of(catalogs), None
    if journal is not None:
        view = JournalView.of(journal, at_its_end=at_its_end)
        servers = tier_uses(view)
        problems |= {f"journal: {journal}": view.problems} if view.problems else {}
    return Stat(found, servers, problems)


def _line(catalog: Catalog) -> Line:
    with progress(f"{catalog.tier} {catalog.path}", None) as advance:
        summaries = catalog.summary(advance)
    now, state, capacity = time.time_ns(), "-", None
    if catalog.tier == "disk":
        try:
            header = read_header(catalog.path)
        except OSError:
            header = None
        state = "damaged" if header is None else "in use" if is_in_use(catalog.path) else "idle"
        capacity = None if header is None else header.num_slots * header.slot_nbytes
    return Line(
        tier=catalog.tier,
        path=str(catalog.path),
        state=state,
        used_nbytes=sum(summary.nbytes for summary in summaries),
        capacity_nbytes=capacity,
        on_disk_nbytes=_on_disk(catalog) if catalog.tier == "disk" else sum(summary.nbytes for summary in summaries),
        chunks=sum(summary.chunks for summary in summaries),
        blocks=sum(summary.blocks for summary in summaries),
        namespaces=len(summaries),
        oldest_s=max(((now - summary.oldest_ns) / 1e9 for summary in summaries), default=None),
        newest_s=min(((now - summary.newest_ns) / 1e9 for summary in summaries), default=None),
    )


def _on_disk(catalog: Catalog) -> int:
    total = 0
    for name in ("data", "index/data.mdb", "store.json"):
        try:
            total += os.lstat(catalog.path / name).st_blocks * 512
        except OSError:
            continue
    return total
