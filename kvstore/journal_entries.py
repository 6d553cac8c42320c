"""What a journal tells, entry by entry: requests and their ends, moves of blocks, samples of tiers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.journal import MOVE_ID_NBYTES, move_ids

NO_NODE: Final = -1


@dataclass(frozen=True, slots=True)
class Request:
    """One request's lookup; see `kvstore.journal.Asked`.

    Attributes:
        last: node of the prompt's last full block; `NO_NODE`: it has none that is known.
        num_blocks: full blocks of the prompt.
    """

    t_ns: int
    pid: int
    request_id: str
    tenant: str
    adapter: str
    namespace: bytes
    num_tokens: int
    num_blocks: int
    last: int
    hits: dict[str, int]
    waited_s: float
    is_late: bool

    @property
    def num_hits(self) -> int:
        """Leading blocks that were found."""
        return min(self.num_blocks, sum(self.hits.values()))


@dataclass(frozen=True, slots=True)
class End:
    """A request that is over; ``last``: node of the last block that it stored, of its prompt or generated."""

    request_id: str
    tenant: str
    namespace: bytes
    last: int


@dataclass(frozen=True, slots=True)
class Move:
    """The last that happened to a block in a tier, as one process tells it; ``why`` is empty where it came in."""

    t_ns: int
    why: str
    pid: int


@dataclass(frozen=True, slots=True)
class TierSample:
    """One tier's numbers, as `kvstore.journal.Sample` has them."""

    t_ns: int
    pid: int
    tier: str
    numbers: dict[str, float]


class Moves:
    """What came and went in one tier: numbers of keys in order, and which move each belongs to."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.uint64]] = []
        self._moves: list[Move] = []
        self._sorted: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def add(self, ids: bytes, move: Move) -> int:
        part = np.frombuffer(ids[: len(ids) // MOVE_ID_NBYTES * MOVE_ID_NBYTES], dtype="<u8")
        self._parts.append(part)
        self._moves.append(move)
        return len(part)

    def last(self, key: bytes, until_ns: int | None = None) -> Move | None:
        if self._sorted is None:
            ids = np.concatenate(self._parts)
            which = np.repeat(np.arange(len(self._parts)), [len(part) for part in self._parts])
            order = np.lexsort((which, ids))
            self._sorted = ids[order], which[order]
            self._parts = []
        ids, which = self._sorted
        (number,) = move_ids(key)
        at = int(np.searchsorted(ids, number, side="right")) - 1
        while at >= 0 and ids[at] == number:
            move = self._moves[int(which[at])]
            if until_ns is None or move.t_ns <= until_ns:
                return move
            at -= 1
        return None
