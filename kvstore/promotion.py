"""Brings blocks up from the lower tiers: into host slots, verified, and on into a tensor.

Reads of a few windows are under way while the calling thread verifies and copies out, in
order, what has come. A read that outlives its deadline keeps its host slot until it returns.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.io_service import IoService, Located
from kvstore.jobs import Indices, ReadJob
from kvstore.keys import KEY_NBYTES, BlockKey, keys_to_array
from kvstore.manager import TierManager
from kvstore.slot import Rows, SlotFormat, Slots

_COPY_NBYTES: Final = 4 << 20
_WINDOW_NBYTES: Final = 16 << 20
_WINDOWS: Final = 3  # under way; more calls than an `IoPool` queues would make the caller wait


class Sink(Protocol):
    """Where verified blocks are copied on to: `kvstore.copier.Copier`, or what an engine has instead."""

    def load(self, slots: Slots, positions: NDArray[np.int64], out: torch.Tensor, places: NDArray[np.int64]) -> None:
        """Copy block ``positions[i]`` of host slot ``slots[i]`` to where ``out[places[i]]`` is, or says."""


class Promotion:
    """One prefix's way up from the lower tiers.

    Args:
        epoch: of the manager, read before anything is looked up: what comes in another is not published.
        sink: copies on; None where host memory is all that is wanted.
    """

    def __init__(
        self, manager: TierManager, io: IoService, rows: Rows, fmt: SlotFormat, epoch: int, sink: Sink | None = None
    ) -> None:
        self._manager, self._io, self._rows, self._fmt, self._sink = manager, io, rows, fmt, sink
        self._epoch = epoch
        self._window = max(1, _WINDOW_NBYTES // fmt.slot_nbytes)

    def run(self, keys: Sequence[BlockKey], out: torch.Tensor | None, deadline: float) -> int:
        """Load the leading blocks from the first tier that has the head of them.

        Returns:
            How many leading blocks have come, and are in out now. 0 where no lower tier has the
            first block, or none of it could be had by the deadline.
        """
        return self.load(self.find(keys), keys, out, deadline)

    def find(self, keys: Sequence[BlockKey]) -> Located:
        """What the lower tiers have of a prefix; see `IoService.find_prefix`."""
        return self._io.find_prefix(keys)

    def load(self, found: Located, keys: Sequence[BlockKey], out: torch.Tensor | None, deadline: float) -> int:
        """As `run`, of what was found already."""
        left = found
        under_way: deque[_Window] = deque()
        done = started = 0
        try:
            while len(left) or under_way:
                if len(left) and len(under_way) < _WINDOWS:
                    room_by = time.monotonic() if under_way else deadline
                    rest = out[started:] if out is not None else None
                    window = self._start(left, keys[started:], rest, room_by, deadline)
                    if window is not None:
                        under_way.append(window)
                        started += window.num_blocks
                        left = left[len(window.slots) :]
                        continue
                if not under_way:
                    break
                window = under_way.popleft()
                loaded = self._collect(window)
                done += loaded
                if loaded < window.num_blocks:
                    break
        finally:
            for window in under_way:
                self._give_up(window)
        return done

    def _start(
        self, left: Located, keys: Sequence[BlockKey], out: torch.Tensor | None, room_by: float, deadline: float
    ) -> _Window | None:
        """Begin to read the next chunks; None where no host slot came free by ``room_by``."""
        slots = self._manager.reserve(min(len(left), self._window), room_by)
        if not len(slots):
            return None
        part = left[: len(slots)]
        array = keys_to_array(keys[: part.chunks.total_keys])
        try:
            job = self._io.read(part, slots, deadline)
        except BaseException:
            self._manager.give_back(slots)
            raise
        return _Window(job, slots, part.chunks.num_keys, array, out)

    def _collect(self, window: _Window) -> int:
        """Verify and copy out a window's chunks as they come; how many leading blocks are good."""
        batch: Indices = []
        full = max(1, _COPY_NBYTES // self._fmt.slot_nbytes)
        try:
            for i, ok in window.job:
                window.came[i] = True
                if ok:
                    batch.append(i)
                    if len(batch) == full:
                        self._copy_out(window, batch)
                        batch = []
            self._copy_out(window, batch)
        finally:
            self._give_up(window)
        return window.num_leading() if self._epoch == self._manager.epoch else 0

    def _give_up(self, window: _Window) -> None:
        """Publish what is good; every other slot is free again, at once or when its read returns."""
        slots = window.slots
        window.job.abandon(lambda indices: self._manager.give_back(slots[indices]))
        good = slots[window.good]
        self._manager.publish(good, self._chunk_keys(good), self._epoch, pins=0)
        self._manager.give_back(slots[window.came & ~window.good])

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
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        slots, first = np.repeat(window.slots[at], counts), np.repeat(positions, counts)
        if self._sink is not None and window.out is not None:
            self._sink.load(slots, first + within, window.out, np.repeat(window.starts[at], counts) + within)
        window.good[at] = counts == window.counts[at]

    def _chunk_keys(self, slots: Slots) -> NDArray[np.uint8]:
        """The keys in the trailers of slots that were verified."""
        body, per_chunk = self._fmt.body_nbytes, self._fmt.blocks_per_chunk
        return self._rows[slots, body : body + per_chunk * KEY_NBYTES].reshape(len(slots), per_chunk, KEY_NBYTES)


class _Window:
    """Chunks that are read together: [starts[i], starts[i] + counts[i]) are chunk i's blocks in out."""

    def __init__(
        self, job: ReadJob, slots: Slots, counts: NDArray[np.int64], keys: NDArray[np.uint8], out: torch.Tensor | None
    ) -> None:
        self.job, self.slots, self.counts, self.keys, self.out = job, slots, counts, keys, out
        self.num_blocks = int(counts.sum())
        self.starts = np.cumsum(counts) - counts
        self.came = np.zeros(len(slots), dtype=np.bool_)
        self.good = np.zeros(len(slots), dtype=np.bool_)

    def num_leading(self) -> int:
        """Blocks before the first chunk that is not good."""
        bad = np.flatnonzero(~self.good)
        return int(self.starts[bad[0]]) if len(bad) else self.num_blocks
