"""What `kvstore gc` and `kvstore purge` remove, as a table by model, namespace, tenant and tier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType

from kvstore.keys import BLOCK_HASH_NBYTES, BlockKey
from kvstore.tiers.catalog import Space
from kvstore.tiers.removal import Candidates
from tools.output import lines, size, table

_SHOWN: Final = 5
_MOST_KEYS: Final = 1000
Tenants = Mapping[bytes, Mapping[bytes, str]]
"""Namespace -> block hash -> tenant; see `kvstore.journal_view.JournalView.tenants_by_hash`."""


@dataclass(frozen=True, slots=True)
class Row:
    """Of one namespace in one directory and, where a journal is given, of one tenant.

    Attributes:
        model: None where the directory's description is damaged.
        tenant: its digest, empty without one; None where no journal knows it.
        blocks: all of the chunks', also ``along_blocks``: those that nobody named, which share a chunk with one.
    """

    tier: str
    path: str
    model: str | None
    namespace: str
    tenant: str | None
    chunks: int
    blocks: int
    along_blocks: int
    nbytes: int


@dataclass(slots=True)
class Removed:
    """What has gone, or would go.

    Attributes:
        along: keys of blocks that nobody named and that go as well; at most 1000.
        is_whole: False where it was interrupted.
    """

    is_dry_run: bool
    rows: list[Row] = field(default_factory=list)
    along: list[str] = field(default_factory=list)
    has_journal: bool = False
    is_whole: bool = True

    def add(self, found: Candidates, named: NDArray[np.bool_], tenants: Tenants | None) -> None:
        """Count those chunks of a directory of which a block is named; ``named`` has shape (n, blocks)."""
        self.has_journal = tenants is not None
        for number, space in sorted(enumerate(found.spaces), key=lambda item: _name(item[1])):
            chunks = np.flatnonzero(named.any(axis=1) & (found.space_of == number))
            known = None if tenants is None else tenants.get(space.namespace, {})
            for tenant, mine in _by_tenant(found, chunks, named, known):
                are_there = found.keys[mine].any(axis=2)
                along = are_there & ~named[mine]
                model = None if space.fmt is None else str(space.fmt.content.get("model"))
                counts = (len(mine), int(are_there.sum()), int(along.sum()), int(found.nbytes[mine].sum()))
                self.rows.append(Row(space.tier, str(space.path), model, space.namespace.hex(), tenant, *counts))
                some = np.argwhere(along)[: _MOST_KEYS - len(self.along)]
                self.along += [str(BlockKey(found.keys[mine[chunk], at].tobytes())) for chunk, at in some.tolist()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "dry_run": self.is_dry_run, "whole": self.is_whole, "removed": [asdict(row) for row in self.rows],
            "along": self.along,
        }  # fmt: skip

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        if self.rows:
            whose, counts = self._columns()
            title = "would go" if self.is_dry_run else "removed"
            yield table(title, (*whose, *counts), map(self._cells, self.rows), left=len(whose))
            yield from self._sums()
        else:
            yield from lines(f"nothing {'would go' if self.is_dry_run else 'went'}: no block meets all that was given")
        if not self.is_whole:
            yield from lines("interrupted: the rest is as it was")

    @property
    def _num_along(self) -> int:
        return sum(row.along_blocks for row in self.rows)

    def _columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        tenant = ("tenant",) if self.has_journal else ()
        along = ("not named",) if self._num_along else ()
        return ("model", "namespace", *tenant, "tier", "path"), ("chunks", "blocks", *along, "bytes")

    def _cells(self, row: Row) -> tuple[object, ...]:
        tenant = ("?" if row.tenant is None else row.tenant or "no tenant",) if self.has_journal else ()
        along = (row.along_blocks,) if self._num_along else ()
        whose = ("?" if row.model is None else row.model, row.namespace[:12], *tenant, row.tier, row.path)
        return (*whose, row.chunks, row.blocks, *along, size(row.nbytes))

    def _sums(self) -> Iterator[RenderableType]:
        if len(self.rows) > 1:
            blocks, nbytes = sum(row.blocks for row in self.rows), sum(row.nbytes for row in self.rows)
            yield from lines(f"in all {blocks} blocks, {size(nbytes)}")
        if self.along:
            some = ", ".join(dict.fromkeys(key[:16] for key in self.along[:_SHOWN]))
            more = ", ..." if self._num_along > _SHOWN else ""
            yield from lines(
                f"not named, but in one chunk with what is, and a chunk goes as a whole: {self._num_along} blocks "
                f"({some}{more})"
            )


def _name(space: Space) -> tuple[str, bytes]:
    return "" if space.fmt is None else str(space.fmt.content.get("model")), space.namespace


def _by_tenant(
    found: Candidates, chunks: NDArray[np.int64], named: NDArray[np.bool_], known: Mapping[bytes, str] | None
) -> Iterator[tuple[str | None, NDArray[np.int64]]]:
    """These chunks, apart by whose the first block is that was named: a chunk's blocks are of one prompt."""
    if known is None:
        if len(chunks):
            yield None, chunks
        return
    groups: dict[str | None, list[int]] = {}
    for chunk, at in zip(chunks.tolist(), named[chunks].argmax(axis=1).tolist(), strict=True):
        tenant = known.get(found.keys[chunk, at, :BLOCK_HASH_NBYTES].tobytes())
        groups.setdefault(tenant, []).append(chunk)
    for tenant in sorted(groups, key=str):
        yield tenant, np.array(groups[tenant], dtype=np.int64)
