"""`kvstore ls`: what is stored, a row for each namespace in each directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import RenderableType

from kvstore.journal_view import JournalView
from kvstore.tiers.catalog import Catalog, Summary
from tools.blocks import Place
from tools.foreign.base import ForeignStore
from tools.names import check_namespace, check_there, models_like
from tools.output import age, lines, progress, size, table
from tools.places import find_stored
from tools.usage import Usage, usage_of, usage_parts

COLUMNS = ("model", "tier", "path", "namespace", "blocks", "bytes", "oldest", "newest", "state")


@dataclass(slots=True, kw_only=True)
class Row:
    """The chunks of one namespace in one directory.

    Attributes:
        model, revision, dtype, block_size: None where the directory's description is damaged.
        state: "served"; "old epoch": only stores that wrote it since their reset find it; "another system's".
        oldest_s, newest_s: since chunks were stored (disk) or last used, to the hour (shared).
    """

    tier: str
    path: str
    namespace: str
    model: str | None
    revision: str | None
    dtype: str | None
    block_size: int | None
    state: str
    chunks: int
    blocks: int
    nbytes: int
    oldest_s: float
    newest_s: float

    @property
    def name(self) -> str:
        """Of the model, for people."""
        revision = "" if self.revision is None else f"@{self.revision[:12]}"
        return ("?" if self.model is None else self.model) + revision

    def cells(self) -> tuple[object, ...]:
        """For people; see `COLUMNS`."""
        return (
            self.name, self.tier, self.path, self.namespace[:12], self.blocks, size(self.nbytes), age(self.oldest_s),
            age(self.newest_s), self.state,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Listing:
    """What is stored below a path, and what is wrong there: directory -> problems.

    Attributes:
        usage: namespace -> what a journal knows of it, of those that have a row; None without a journal.
    """

    rows: list[Row]
    problems: dict[str, list[str]]
    usage: dict[str, Usage] | None = None

    def to_dict(self) -> dict[str, Any]:
        asked = None if self.usage is None else [usage.to_dict() for usage in self.usage.values()]
        return {"namespaces": [asdict(row) for row in self.rows], "asked": asked, "problems": self.problems}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        if self.rows:
            yield table("", COLUMNS, (row.cells() for row in self.rows), left=4)
        else:
            yield from lines("nothing is stored")
        if self.usage:
            yield from usage_parts(list(self.usage.values()), {row.namespace: row.name for row in self.rows})
        yield from problem_lines(self.problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which rows are wanted, and in which order.

    Attributes:
        sort: one of `SORTS`.
        model, namespace: a part of the model's name; the namespace's first digits.
        older_than_s: nothing in it is newer.
        limit: rows, of those that come first.
    """

    sort: str = "path"
    reverse: bool = False
    model: str = ""
    tier: str = ""
    namespace: str = ""
    older_than_s: float = 0.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.namespace:
            check_namespace(self.namespace)

    def takes(self, place: Place) -> bool:
        """Whether a block is of a row that is wanted, by all but its age."""
        fmt = place.fmt
        return (
            self.model.lower() in str(fmt.content.get("model") if fmt is not None else "").lower()
            and self.tier in ("", place.catalog.tier)
            and place.chunk.space.namespace.hex().startswith(self.namespace.lower())
        )

    def rows(self, rows: Sequence[Row], usage: Mapping[str, Usage]) -> list[Row]:
        """Those that are wanted; ``usage`` by namespace.

        Raises:
            NotStoredError: none is of such a model, or of such a namespace.
        """
        if self.model:
            models_like(self.model, {row.model for row in rows} - {None})
        if self.namespace:
            check_there(self.namespace, [row.namespace for row in rows])
        wanted = [
            row
            for row in rows
            if self.model.lower() in (row.model or "").lower()
            and self.tier in ("", row.tier)
            and row.namespace.startswith(self.namespace.lower())
            and row.newest_s >= self.older_than_s
        ]
        nobody, key = Usage(namespace=""), SORTS[self.sort]
        wanted.sort(key=lambda row: key(row, usage.get(row.namespace, nobody)), reverse=self.reverse)
        return wanted[: self.limit]


SORTS: Final[dict[str, Callable[[Row, Usage], Any]]] = {
    "path": lambda row, _: (row.path, row.tier, -row.blocks),
    "model": lambda row, _: (row.model or "", row.path),
    "blocks": lambda row, _: row.blocks,
    "bytes": lambda row, _: row.nbytes,
    "oldest": lambda row, _: row.oldest_s,
    "newest": lambda row, _: row.newest_s,
    "requests": lambda _, usage: usage.requests,
    "hits": lambda _, usage: usage.hit_blocks,
}


def list_stored(path: Path, chosen: Chosen | None = None, journal: Path | None = None) -> Listing:
    """What is stored in a directory, or in those right below it.

    Raises:
        ConfigError: there is nothing of a tier there, or no journal.
        NotStoredError: see `Chosen.rows`.
    """
    (catalogs, stores), rows = find_stored(path), list[Row]()
    for catalog in catalogs:
        with progress(f"{catalog.tier} {catalog.path}", None) as advance:
            found = catalog.summary(advance)
        rows += [_row(summary, time.time_ns()) for summary in found]
    rows += [_foreign_row(store, time.time_ns()) for store in stores]
    problems = problems_of(catalogs, stores)
    usage: dict[str, Usage] | None = None
    if journal is not None:
        view = JournalView.of(journal)
        usage = usage_of(view.requests)
        problems |= {f"journal: {journal}": view.problems} if view.problems else {}
    shown = (chosen or Chosen()).rows(rows, usage or {})
    if usage is not None:
        usage = {row.namespace: usage[row.namespace] for row in shown if row.namespace in usage}
    return Listing(shown, problems, usage)


def problems_of(catalogs: Sequence[Catalog], stores: Sequence[ForeignStore] = ()) -> dict[str, list[str]]:
    """What was found to be wrong with directories; empty ones are left out."""
    found = {f"{c.tier}: {c.path}": c.problems for c in catalogs}
    found |= {f"{store.kind}: {store.path}": store.problems for store in stores}
    return {where: problems for where, problems in found.items() if problems}


def problem_lines(problems: dict[str, list[str]]) -> Iterator[RenderableType]:
    """For people."""
    for where, texts in problems.items():
        yield from lines(*(f"problem in {where}: {text}" for text in texts))


def _row(summary: Summary, now_ns: int) -> Row:
    space, fmt = summary.space, summary.space.fmt
    is_initial = fmt is None or space.namespace == fmt.initial_namespace
    return Row(
        tier=space.tier,
        path=str(space.path),
        namespace=space.namespace.hex(),
        model=str(fmt.content.get("model")) if fmt else None,
        revision=str(fmt.content.get("revision")) if fmt else None,
        dtype=str(fmt.content.get("dtype")) if fmt else None,
        block_size=fmt.layout.block_size if fmt else None,
        state="served" if is_initial else "old epoch",
        chunks=summary.chunks,
        blocks=summary.blocks,
        nbytes=summary.nbytes,
        oldest_s=max(0.0, (now_ns - summary.oldest_ns) / 1e9),
        newest_s=max(0.0, (now_ns - summary.newest_ns) / 1e9),
    )


def _foreign_row(store: ForeignStore, now_ns: int) -> Row:
    """Another system's: its entries are counted as chunks and as blocks."""
    n, nbytes, times = 0, 0, [now_ns]
    for entry in store.entries():
        n, nbytes = n + 1, nbytes + entry.nbytes
        times = [min(times[0], entry.time_ns), max(times[-1] if n > 1 else 0, entry.time_ns)]
    return Row(
        tier=store.kind,
        path=str(store.path),
        namespace="",
        model=store.model(),
        revision=None,
        dtype=None,
        block_size=None,
        state="another system's",
        chunks=n,
        blocks=n,
        nbytes=nbytes,
        oldest_s=max(0.0, (now_ns - times[0]) / 1e9),
        newest_s=max(0.0, (now_ns - times[-1]) / 1e9),
    )
