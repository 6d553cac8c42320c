"""Brings blocks up from the lower tiers: into host slots, verified, and on into a tensor.

Reads of a window are all under way while the calling thread verifies and copies out what
has come. A read that outlives its deadline keeps its host slot until it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.copier import Copier
from kvstore.io_service import IoService, Located
from kvstore.jobs import Indices
from kvstore.keys import KEY_NBYTES, BlockKey, keys_to_array
from kvstore.manager import TierManager
from kvstore.slot import Rows, SlotFormat, Slots

_COPY_NBYTES: Final = 1 << 20
_WINDOW_NBYTES: Final = 256 << 20


class Promotion:
    """One `get`'s way through the lower tiers."""

    def __init__(self, manager: TierManager, io: IoService, copier: Copier, rows: Rows, fmt: SlotFormat) -> None:
        self._manager, self._io, self._copier, self._rows, self._fmt = manager, io, copier, rows, fmt
        self._window = max(1, _WINDOW_NBYTES // fmt.slot_nbytes)

    def run(self, keys: Sequence[BlockKey], out: torch.Tensor, deadline: float) -> int:
        """Load the leading blocks from the first tier that has the head of them.

        Returns:
            How many leading blocks are in out now. 0 where no lower tier has the first block,
            or none of it could be had by the deadline.
        """
        epoch = self._manager.epoch
        chunks = self._io.find_prefix(keys)
        done = 0
        while chunks:
            slots = self._manager.reserve(min(len(chunks), self._window), deadline)
            if not len(slots):
                break
            window, chunks = chunks[: len(slots)], chunks[len(slots) :]
            expected = sum(chunk.num_keys for _, chunk in window)
            loaded = self._load(window, slots, keys[done : done + expected], out[done:], epoch, deadline)
            done += loaded
            if loaded < expected:
                break
        return done

    def _load(
        self,
        chunks: Sequence[Located],
        slots: Slots,
        keys: Sequence[BlockKey],
        out: torch.Tensor,
        epoch: int,
        deadline: float,
    ) -> int:
        window = _Window(chunks, slots, keys_to_array(keys), out)
        job = self._io.read(chunks, slots, deadline)
        batch: Indices = []
        try:
            for i, ok in job:
                window.came[i] = True
                if ok:
                    batch.append(i)
                if len(batch) * self._fmt.slot_nbytes >= _COPY_NBYTES:
                    self._copy_out(window, batch)
                    batch = []
            self._copy_out(window, batch)
        finally:
            job.abandon(lambda indices: self._manager.give_back(slots[indices]))
            good = np.flatnonzero(window.good)
            self._manager.publish(slots[good], self._chunk_keys(slots[good]), epoch, pins=0)
            self._manager.give_back(slots[window.came & ~window.good])
        if epoch != self._manager.epoch:
            return 0
        return window.num_leading()

    def _copy_out(self, window: _Window, batch: Indices) -> None:
        """Copy verified chunks' blocks to their places; a chunk without the asked-for key is not good."""
        if not batch:
            return
        at = np.sort(np.asarray(batch, dtype=np.int64))
        heads = window.keys[window.starts[at]]
        match = (self._chunk_keys(window.slots[at]) == heads[:, None, :]).all(axis=2)
        found = match.any(axis=1)
        at, positions = at[found], match.argmax(axis=1)[found]
        room = self._fmt.blocks_per_chunk - positions
        counts = np.minimum(window.counts[at], room)
        for low, high in _neighbours(window.starts[at], counts):
            part = slice(low, high)
            first, n = int(window.starts[at[low]]), int(counts[part].sum())
            within = np.arange(n) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
            slots = np.repeat(window.slots[at[part]], counts[part])
            self._copier.load(slots, np.repeat(positions[part], counts[part]) + within, window.out[first : first + n])
        window.good[at] = counts == window.counts[at]

    def _chunk_keys(self, slots: Slots) -> NDArray[np.uint8]:
        """The keys in the trailers of slots that were verified."""
        body, per_chunk = self._fmt.body_nbytes, self._fmt.blocks_per_chunk
        return self._rows[slots, body : body + per_chunk * KEY_NBYTES].reshape(len(slots), per_chunk, KEY_NBYTES)


class _Window:
    """Chunks that are read together: [starts[i], starts[i] + counts[i]) are chunk i's blocks."""

    def __init__(self, chunks: Sequence[Located], slots: Slots, keys: NDArray[np.uint8], out: torch.Tensor) -> None:
        self.slots, self.keys, self.out = slots, keys, out
        self.counts = np.array([chunk.num_keys for _, chunk in chunks], dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.came = np.zeros(len(slots), dtype=np.bool_)
        self.good = np.zeros(len(slots), dtype=np.bool_)

    def num_leading(self) -> int:
        """Blocks before the first chunk that is not good."""
        bad = np.flatnonzero(~self.good)
        return int(self.starts[bad[0]]) if len(bad) else int(self.counts.sum())


def _neighbours(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Half-open ranges of entries whose blocks follow one another without a gap."""
    if not len(starts):
        return []
    breaks = np.flatnonzero(starts[1:] != starts[:-1] + counts[:-1]) + 1
    edges = [0, *breaks.tolist(), len(starts)]
    return list(zip(edges[:-1], edges[1:], strict=True))
