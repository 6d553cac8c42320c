"""What `inspect` shows of another system's store: what it says of itself, and the numbers of one entry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Final

import torch
from rich.console import RenderableType

from kvstore.errors import DamagedFileError, NotStoredError
from tools.foreign.base import ForeignEntry, ForeignPart, ForeignStore, pieces_of
from tools.output import lines, table
from tools.statistics import Accumulator, PartStatistics, statistics_table

_SOME: Final = 3
_MAX_VALUE: Final = 1000


@dataclass(frozen=True, slots=True)
class ForeignBlock:
    """One entry. Nothing of it could be verified, for it has no checksum.

    Attributes:
        reason: why it cannot be read; empty where it can.
        shapes: of its tensors, by name.
    """

    tier: str
    path: str
    place: str
    key: str
    reason: str
    dtype: str = ""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    statistics: list[PartStatistics] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.reason}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        state = f"BAD: {self.reason}" if self.reason else "not verified, it has no checksum"
        yield from lines(f"{self.key}", f"{self.tier} {self.path}, {self.place}: {state}")
        for name, shape in islice(self.shapes.items(), _SOME):
            yield from lines(f"{name} {self.layers.get(name, '')}: {self.dtype} {tuple(shape)}")
        if self.statistics:
            yield statistics_table(self.statistics)


def describe_foreign(store: ForeignStore) -> dict[str, Any]:
    """What a directory says of itself, and some names of what it holds."""
    names = [entry.name for entry in islice(store.entries(), _SOME)]
    return {"tier": store.kind, "path": str(store.path), "description": store.description(), "keys": names}


def foreign_table(described: dict[str, Any]) -> RenderableType:
    """For people."""
    rows = [*described["description"].items(), *(("a key", name) for name in described["keys"])]
    short = ((name, str(value)[:_MAX_VALUE]) for name, value in rows)
    return table(f"{described['tier']} {described['path']}", ("what", "value"), short, left=2)


def entries_that_begin(store: ForeignStore, start: str) -> list[ForeignEntry]:
    """Entries of one name that begins so.

    Raises:
        NotStoredError: several names do.
    """
    found = [entry for entry in store.entries() if start and entry.name.startswith(start.lower())]
    names = sorted({entry.name for entry in found})
    if len(names) > 1:
        some = ", ".join(name[: len(start) + 8] for name in names[:_SOME])
        raise NotStoredError(f"KEY: {len(names)} names begin with {start!r} ({some}, ...); give more of it")
    return found


def inspect_entry(store: ForeignStore, entry: ForeignEntry, *, per_head: bool) -> ForeignBlock:
    """Look at all of its numbers."""
    where = (store.kind, str(store.path), str(entry.place), entry.name)
    try:
        parts = store.parts(entry)
        numbers = [row for part in parts if part.layer is not None for row in _statistics(part, per_head=per_head)]
    except (DamagedFileError, OSError) as e:
        return ForeignBlock(*where, str(e))
    shapes, layers = {p.name: list(p.shape) for p in parts}, {p.name: p.layer_name for p in parts}
    return ForeignBlock(*where, "", parts[0].dtype.name, shapes, layers, numbers)


def _statistics(part: ForeignPart, *, per_head: bool) -> Iterator[PartStatistics]:
    """Of a row that has K and V, each half is told apart."""
    names = ("1st half", "2nd half") if part.part == "kv" and part.shape[-1] % 2 == 0 else (part.part,)
    by_head = per_head and len(part.shape) == 3
    num_rows = part.shape[1] if by_head else 1
    numbers = [Accumulator(num_rows, part.dtype.of_torch) for _ in names]
    fd = os.open(part.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for piece in pieces_of(fd, part):
            for one, values in zip(numbers, torch.chunk(piece, len(names), dim=-1), strict=True):
                one.add(values.transpose(0, 1).flatten(1) if by_head else values.reshape(1, -1))
    finally:
        os.close(fd)
    for name, one in zip(names, numbers, strict=True):
        yield from one.rows(part.layer or 0, name, per_head=by_head)
