"""`kvstore ls --blocks`: a row for each block, written as blocks go by."""

from __future__ import annotations

import heapq
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError
from kvstore.journal_entries import NO_NODE
from kvstore.journal_view import JournalView
from kvstore.keys import BLOCK_HASH_NBYTES
from kvstore.tiers.catalog import Catalog
from tools.blocks import Place, formats_of, places
from tools.ls import Chosen, problem_lines, problems_of
from tools.names import check_there, models_like
from tools.output import age, printable, results, size
from tools.places import find_catalogs

MAX_SORTED: Final = 100_000
_LINE: Final = "{:<66}  {:>10}  {:>6}  {:>6}  {:<6}  {}"


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One block in one place.

    Attributes:
        place: its slot, or its file below the path.
        nbytes: its share of its chunk.
        age_s: see `tools.ls.Row`.
        hits: how often a request found it, as far as a journal goes back; None without one.
    """

    key: str
    tier: str
    path: str
    place: int | str
    namespace: str
    model: str | None
    nbytes: int
    age_s: float
    hits: int | None

    def line(self) -> str:
        """For people."""
        where = f"slot {self.place}" if isinstance(self.place, int) else self.place
        hits = "-" if self.hits is None else str(self.hits)
        return _LINE.format(
            self.key, size(self.nbytes), age(self.age_s), hits, self.tier, printable(f"{self.path} {where}")
        )


_SORTS: Final[dict[str, Callable[[BlockRow], Any]]] = {
    "model": lambda row: row.model or "",
    "bytes": lambda row: row.nbytes,
    "oldest": lambda row: row.age_s,
    "newest": lambda row: row.age_s,
    "hits": lambda row: row.hits or 0,
}


def list_blocks(path: Path, chosen: Chosen, journal: Path | None, *, as_json: bool) -> None:
    """Write a row for each block below a path to stdout.

    Raises:
        ConfigError: there is nothing of a tier there, no journal, or it cannot be sorted so.
        NotStoredError: nothing is of such a model, or of such a namespace.
    """
    catalogs = find_catalogs(path)
    if chosen.model:
        models_like(chosen.model, (fmt.content.get("model") for fmt in formats_of(catalogs)))
    ordered = _begun(_ordered(_rows(_taken(catalogs, chosen), journal), chosen))
    if as_json:
        _write_json(ordered)
        sys.stdout.write('"problems": ' + json.dumps(problems_of(catalogs)) + "}\n")
        return
    sys.stdout.write(_LINE.format("key", "bytes", "age", "hits", "tier", "where").rstrip() + "\n")
    for row in ordered:
        sys.stdout.write(row.line() + "\n")
    for part in problem_lines(problems_of(catalogs)):
        results().print(part)


def _taken(catalogs: Sequence[Catalog], chosen: Chosen) -> Iterator[Place]:
    """Those that are wanted; raises NotStoredError where all have gone by and none was of the namespace."""
    seen: set[bytes] = set()
    for place in places(catalogs):
        seen.add(place.chunk.space.namespace)
        if chosen.takes(place):
            yield place
    if chosen.namespace:
        check_there(chosen.namespace, seen)


def _begun(rows: Iterable[BlockRow]) -> Iterator[BlockRow]:
    """The same, of which the first has come: what is wrong is said before anything is written."""
    whole = iter(rows)
    first = list(islice(whole, 1))
    return chain(first, whole)


def _ordered(rows: Iterator[BlockRow], chosen: Chosen) -> Iterable[BlockRow]:
    old = (row for row in rows if row.age_s >= chosen.older_than_s)
    if chosen.sort == "path" and not chosen.reverse:
        return islice(old, chosen.limit)
    if chosen.sort not in _SORTS:
        raise ConfigError(f"--sort: {chosen.sort!r} does not go with --blocks; give one of {', '.join(_SORTS)}")
    if chosen.limit is None or chosen.limit > MAX_SORTED:
        raise ConfigError(f"--sort: with --blocks it needs --limit, of at most {MAX_SORTED}")
    pick = heapq.nlargest if chosen.reverse else heapq.nsmallest
    return pick(chosen.limit, old, key=_SORTS[chosen.sort])


def _rows(found: Iterator[Place], journal: Path | None) -> Iterator[BlockRow]:
    view = None if journal is None else JournalView.of(journal)
    counts, now_ns = [] if view is None else view.hits_by_node(), time.time_ns()
    for place in found:
        chunk, node = place.chunk, NO_NODE if view is None else view.node_of(place.key[:BLOCK_HASH_NBYTES])
        fmt, where = place.fmt, chunk.place
        yield BlockRow(
            key=str(place.key),
            tier=place.catalog.tier,
            path=str(place.catalog.path),
            place=where if isinstance(where, int) else str(where.relative_to(place.catalog.path)),
            namespace=chunk.space.namespace.hex(),
            model=str(fmt.content.get("model")) if fmt is not None else None,
            nbytes=chunk.nbytes // max(1, len(chunk.keys)),
            age_s=max(0.0, (now_ns - chunk.time_ns) / 1e9),
            hits=None if view is None else 0 if node == NO_NODE else counts[node],
        )


def _write_json(rows: Iterable[BlockRow]) -> None:
    """All but the end of the document; it is whole also where it is broken off."""
    sys.stdout.write('{"blocks": [')
    between = "\n"
    try:
        for row in rows:
            sys.stdout.write(between + json.dumps(asdict(row)))
            between = ",\n"
    finally:
        sys.stdout.write("\n], ")
