"""`kvstore ls`: what is stored, a row for each namespace in each directory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from kvstore.tiers.catalog import Catalog, Space
from tools.output import age, lines, size, table
from tools.places import find_catalogs

COLUMNS = ("model", "tier", "path", "namespace", "blocks", "bytes", "oldest", "newest", "state")


@dataclass(slots=True, kw_only=True)
class Row:
    """The chunks of one namespace in one directory.

    Attributes:
        model, revision, dtype, block_size: None where the directory's description is damaged.
        state: "served"; "old epoch": only stores that wrote it since their reset find it.
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
    chunks: int = 0
    blocks: int = 0
    nbytes: int = 0
    oldest_s: float = 0.0
    newest_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Listing:
    """What is stored below a path, and what is wrong there: directory -> problems."""

    rows: list[Row]
    problems: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        return {"namespaces": [asdict(row) for row in self.rows], "problems": self.problems}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        if self.rows:
            yield table("", COLUMNS, (_cells(row) for row in self.rows), left=4)
        else:
            yield from lines("nothing is stored")
        yield from problem_lines(self.problems)


def list_stored(path: Path) -> Listing:
    """Everything stored in a directory, or in those right below it.

    Raises:
        ConfigError: there is nothing of a tier there.
    """
    catalogs, rows, now_ns = find_catalogs(path), [], time.time_ns()
    for catalog in catalogs:
        rows += _rows(catalog, now_ns)
    return Listing(sorted(rows, key=lambda row: (row.path, row.tier, -row.blocks)), problems_of(catalogs))


def problems_of(catalogs: Sequence[Catalog]) -> dict[str, list[str]]:
    """What was found to be wrong with directories; empty ones are left out."""
    return {f"{c.tier}: {c.path}": c.problems for c in catalogs if c.problems}


def problem_lines(problems: dict[str, list[str]]) -> Iterator[RenderableType]:
    """For people."""
    for where, texts in problems.items():
        yield from lines(*(f"problem in {where}: {text}" for text in texts))


def _rows(catalog: Catalog, now_ns: int) -> list[Row]:
    rows: dict[int, Row] = {}
    for chunk in catalog.chunks():
        row = rows.get(id(chunk.space))
        if row is None:
            row = rows[id(chunk.space)] = _row(chunk.space)
        row.chunks += 1
        row.blocks += chunk.space.fmt.slot.blocks_per_chunk if chunk.space.fmt else len(chunk.keys)
        row.nbytes += chunk.nbytes
        seconds = max(0.0, (now_ns - chunk.time_ns) / 1e9)
        row.oldest_s, row.newest_s = max(row.oldest_s, seconds), min(row.newest_s, seconds)
    return list(rows.values())


def _row(space: Space) -> Row:
    fmt = space.fmt
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
    )


def _cells(row: Row) -> tuple[object, ...]:
    model = f"{row.model}@{str(row.revision)[:12]}" if row.model is not None else "?"
    ages = (age(row.oldest_s), age(row.newest_s))
    return (model, row.tier, row.path, row.namespace[:12], row.blocks, size(row.nbytes), *ages, row.state)
