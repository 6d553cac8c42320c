"""What a tier's directory holds, for people: read only, beside a running store or without one.

A directory is described by whoever wrote it, who may be anyone: descriptions are bounded and
checked before memory is allocated by them, and what cannot be read is a problem to be told,
never an exception. What is common to both tiers is here; see `disk_catalog` and
`shared_catalog`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import BlockKey, array_to_keys
from kvstore.slot import SlotCodec
from kvstore.stored_format import StoredFormat

LARGE_CHUNK_NBYTES: Final = 32 << 20
TRAILER_IS_DAMAGED: Final = "trailer is damaged, or signed with another integrity key"
_MOST_PROBLEMS: Final = 1000


@dataclass(frozen=True, slots=True)
class Space:
    """The chunks of one namespace and placement in one directory.

    Attributes:
        fmt: None where the directory's description is missing or damaged.
    """

    tier: str
    path: Path
    namespace: bytes
    fmt: StoredFormat | None


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """One chunk. ``place`` is its slot on disk, its file on a shared path.

    Attributes:
        key_bytes: the block keys that it is found by, one after the other.
        time_ns: when it was stored (disk), or last used, to the hour (shared).
        generation: what the index says of it; 0 where there is no index.
        is_whole: ``key_bytes`` are those of all of its blocks, as an index has them; else it may hold others too.
    """

    space: Space
    place: int | Path
    key_bytes: bytes
    nbytes: int
    time_ns: int
    generation: int = 0
    is_whole: bool = False

    @property
    def keys(self) -> list[BlockKey]:
        return array_to_keys(np.frombuffer(self.key_bytes, dtype=np.uint8))

    @property
    def slot(self) -> int:
        assert isinstance(self.place, int)
        return self.place

    @property
    def name(self) -> str:
        return f"slot {self.place}" if isinstance(self.place, int) else str(self.place)


@dataclass(slots=True)
class Summary:
    """All chunks of a space together.

    Attributes:
        oldest_ns, newest_ns: least and greatest `StoredChunk.time_ns`.
    """

    space: Space
    chunks: int = 0
    blocks: int = 0
    nbytes: int = 0
    oldest_ns: int = (1 << 63) - 1
    newest_ns: int = 0

    def add(self, chunks: int, blocks: int, nbytes: int, oldest_ns: int, newest_ns: int) -> None:
        self.chunks += chunks
        self.blocks += blocks
        self.nbytes += nbytes
        self.oldest_ns, self.newest_ns = min(self.oldest_ns, oldest_ns), max(self.newest_ns, newest_ns)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of checking a chunk: ``reason`` is empty where it is sound.

    Attributes:
        is_gone: evicted since it was listed; neither good nor bad.
        row: its bytes as a slot, until something else is read; None where they could not be read.
    """

    chunk: StoredChunk
    reason: str = ""
    is_gone: bool = False
    row: NDArray[np.uint8] | None = None

    @property
    def is_bad(self) -> bool:
        return bool(self.reason) and not self.is_gone


class Catalog(ABC):
    """One tier's directory. Never writes. For one thread.

    Args:
        integrity_key: needed to verify what was signed with it.

    Attributes:
        problems: what is wrong with the directory itself; complete once it has been read.
    """

    tier: str

    def __init__(self, path: Path, integrity_key: bytes | None = None) -> None:
        self.path = path
        self.problems: list[str] = []
        self._integrity_key = integrity_key

    @abstractmethod
    def formats(self) -> list[StoredFormat]:
        """Every identity and placement that is described here."""

    @abstractmethod
    def chunks(self) -> Iterator[StoredChunk]:
        """Everything that a store could find here, payload unread."""

    def summary(self, progress: Callable[[int], None] = lambda _: None) -> list[Summary]:
        """What `chunks` would yield, added up by space.

        Args:
            progress: called with how many chunks have come since the last call.
        """
        found: dict[int, Summary] = {}
        for chunk in self.chunks():
            progress(1)
            summary = found.setdefault(id(chunk.space), Summary(chunk.space))
            blocks = chunk.space.fmt.slot.blocks_per_chunk if chunk.space.fmt else len(chunk.keys)
            summary.add(1, blocks, chunk.nbytes, chunk.time_ns, chunk.time_ns)
        return list(found.values())

    @abstractmethod
    def check(self) -> Iterator[Verdict]:
        """Read and verify everything; verdicts come without rows."""

    @abstractmethod
    def read(self, chunk: StoredChunk) -> Verdict:
        """Read and verify one chunk; its row is there also where it is bad, if it can be read."""

    def _problem(self, text: str) -> None:
        if text not in self.problems and len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(text)


def why_bad(codec: SlotCodec, row: NDArray[np.uint8], chunk: StoredChunk) -> str:
    """The reason why a slot, shape (slot_nbytes,), is not what it is found as; "" where all is well."""
    rows = row.reshape(1, -1)
    trailer = codec.parse(rows[:, codec.fmt.body_nbytes :])
    namespace, keys = trailer.namespaces[0].tobytes(), array_to_keys(trailer.keys[0])
    if not trailer.valid[0]:
        return TRAILER_IS_DAMAGED
    if namespace != chunk.space.namespace:
        return f"holds namespace {namespace.hex()}"
    if chunk.keys != keys if chunk.is_whole else not set(chunk.keys) <= set(keys):
        return f"holds other keys: {keys[0]} and on"
    if chunk.generation not in (0, int(trailer.generations[0])):
        return "holds another generation"
    valid = codec.verify(rows, np.zeros(1, dtype=np.int64), namespace).valid[0]
    return "" if valid else "payload does not match its checksum"
