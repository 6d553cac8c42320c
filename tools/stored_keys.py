"""Which blocks a store's directories hold, in parts by the first byte of their keys: memory does not grow with them.

Keys are hashes, so that they begin evenly. Each part takes going through an index again, or through its folders of a
shared path. Knows keys and where they lie, never bytes of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import KEY_NBYTES, BlockKey, keys_to_array
from kvstore.tiers.catalog import Catalog, StoredChunk
from kvstore.tiers.disk_catalog import DiskCatalog
from kvstore.tiers.disk_index import Records
from kvstore.tiers.shared_catalog import SharedCatalog
from tools.blocks import Place
from tools.output import progress
from tools.places import find_catalogs

ALL: Final = range(256)
_KEY: Final = np.dtype(f"S{KEY_NBYTES}")
_WHERE: Final = np.dtype([("catalog", "<u4"), ("at", "<i8"), ("generation", "<u8"), ("namespace", "V16")])
_BATCH: Final = 10_000  # names
T = TypeVar("T")
Piece = tuple[NDArray[np.uint8], NDArray[np.void]]
"""Keys, shape (n, KEY_NBYTES), and where they lie, shape (n,); of a shared path ``at`` is the number of a space."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some blocks, each key once.

    Attributes:
        keys: ascending; shape (n,), S36.
        firsts: how many others came before a key's first place; shape (n,).
    """

    keys: NDArray[np.bytes_]
    firsts: NDArray[np.int64]
    _starts: NDArray[np.int64]  # (n + 1,): places of key i are _order[_starts[i] : _starts[i + 1]]
    _order: NDArray[np.int64]
    _where: NDArray[np.void]

    @classmethod
    def of(cls, keys: NDArray[np.bytes_], where: NDArray[np.void]) -> Part:
        """Of keys in any order, and the place of each; shape (n,)."""
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        return cls(keys[starts], order[starts], np.append(starts, len(keys)), order, where)

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """The number that each of these keys, of dtype S36, has here; -1: none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at, -1)

    def is_any_of(self, keys: Iterable[BlockKey]) -> NDArray[np.bool_]:
        """Which are among these; shape (n,)."""
        at = self.find(np.frombuffer(b"".join(keys), dtype=_KEY))
        found = np.zeros(len(self.keys), dtype=np.bool_)
        found[at[at >= 0]] = True
        return found

    def key(self, i: int) -> BlockKey:
        return BlockKey(self.keys[i : i + 1].tobytes())

    def where(self, i: int) -> NDArray[np.void]:
        """All places of a key, in the order in which they came."""
        return self._where[self._order[self._starts[i] : self._starts[i + 1]]]

    def in_order(self, which: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Numbers of these keys, ``which`` of shape (n,), in the order in which they came."""
        chosen = np.flatnonzero(which)
        return chosen[np.argsort(self.firsts[chosen])]


class StoredKeys:
    """All blocks in a store's directories, or in those right below a path.

    Raises:
        ConfigError: see `tools.places.find_catalogs`.
    """

    def __init__(self, path: Path, integrity_key_file: str | None = None) -> None:
        self.path = path
        self._catalogs = find_catalogs(path, integrity_key_file)

    def counts(self) -> NDArray[np.int64]:
        """Places of blocks by the first byte of their keys; shape (256,)."""

        def count(pieces: Iterable[Piece]) -> NDArray[np.int64]:
            total = np.zeros(len(ALL), dtype=np.int64)
            for keys, _ in pieces:
                total += np.bincount(keys[:, 0], minlength=len(ALL))
            return total

        return sum(self._fold(count, ALL, "counting"), start=np.zeros(len(ALL), dtype=np.int64))

    def part(self, first_bytes: range, said: str) -> Part:
        """Those whose keys begin so; ``said``: which part that is, for people."""
        (keys, where), *others = self._fold(_packed, first_bytes, said)
        for more_keys, more_where in others:
            keys += more_keys
            where += more_where
        return Part.of(np.frombuffer(keys, dtype=_KEY), np.frombuffer(where, dtype=_WHERE))

    def places(self, part: Part, i: int) -> list[Place]:
        """Of key ``i`` of a part."""
        key = part.key(i)
        return [Place(self._catalogs[one["catalog"]], self._chunk(key, one), key) for one in part.where(i)]

    def _chunk(self, key: BlockKey, where: np.void) -> StoredChunk:
        catalog, at, generation = self._catalogs[where["catalog"]], int(where["at"]), int(where["generation"])
        if isinstance(catalog, SharedCatalog):
            return catalog.chunk_of(at, key)
        assert isinstance(catalog, DiskCatalog)
        space = catalog.space(where["namespace"].tobytes())
        assert space.fmt is not None
        return StoredChunk(space, at, bytes(key), space.fmt.slot.slot_nbytes, generation, generation)

    def _fold(self, fold: Callable[[Iterable[Piece]], T], first_bytes: range, said: str) -> list[T]:
        """What becomes of the pieces of each directory."""
        found = []
        for number, catalog in enumerate(self._catalogs):
            with progress(f"{said}: {catalog.tier} {catalog.path}", None) as advance:
                found.append(_fold(catalog, fold, first_bytes, number, advance))
        return found


def parts(counts: NDArray[np.int64], most: int) -> list[range]:
    """Ranges of first bytes, each of at most so many blocks where that can be; ``counts`` has shape (256,)."""
    found, start, n = [], 0, 0
    for byte, more in enumerate(counts.tolist()):
        if n and n + more > most:
            found.append(range(start, byte))
            start, n = byte, 0
        n += more
    return [*found, range(start, len(ALL))]


def _fold(
    catalog: Catalog, fold: Callable[[Iterable[Piece]], T], first_bytes: range, number: int,
    advance: Callable[[int], None],
) -> T:  # fmt: skip
    def told(pieces: Iterable[Piece]) -> Iterator[Piece]:
        for keys, where in pieces:
            advance(len(keys))
            where["catalog"] = number
            yield keys, where

    if isinstance(catalog, DiskCatalog):
        return catalog.fold(lambda pieces: fold(told(_of_records(records, first_bytes) for records in pieces)))
    assert isinstance(catalog, SharedCatalog)
    return fold(told(_of_names(catalog.names(first_bytes))))


def _packed(pieces: Iterable[Piece]) -> tuple[bytearray, bytearray]:
    """Pieces may be thousands: no list of arrays."""
    all_keys, all_where = bytearray(), bytearray()
    for keys, where in pieces:
        all_keys += keys.tobytes()
        all_where += where.tobytes()
    return all_keys, all_where


def _of_records(records: Records, first_bytes: range) -> Piece:
    heads = records.keys[:, :, 0]
    slots, blocks = np.nonzero((heads >= first_bytes.start) & (heads <= first_bytes[-1]))
    where = np.empty(len(slots), _WHERE)
    where["at"], where["generation"] = records.slots[slots], records.generations[slots]
    where["namespace"] = records.namespaces[slots]
    return records.keys[slots, blocks], where


def _of_names(names: Iterator[tuple[int, BlockKey]]) -> Iterator[Piece]:
    while batch := list(islice(names, _BATCH)):
        where = np.zeros(len(batch), _WHERE)
        where["at"] = [number for number, _ in batch]
        yield keys_to_array([key for _, key in batch]), where
