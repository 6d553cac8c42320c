"""Brings chunks from host memory to the lower tiers, behind the caller's back.

    submit -> [sealer thread] -> a bounded queue a tier -> [writer thread a tier] -> on_done

The sealer hashes; writers wait for their tier. A host slot stays its submitter's, pinned,
until every tier is through with it. A tier that stalls is passed over, so that it can hold
up neither the others nor host memory; what it already has stays in limbo until it returns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.slot import KeyArray, Rows, SlotCodec, Slots
from kvstore.tiers.base import LowerTier, SealedChunks

logger = logging.getLogger(__name__)

BATCH_NBYTES: Final = 16 << 20  # sealed at once: small, so that writing begins early
WRITE_NBYTES: Final = 256 << 20  # written and committed at once: whatever waits, up to this much
_SHARES: Final = 4  # of host memory; a stalled tier holds up to two: in hand, and waiting
_POLL_S: Final = 0.05


@dataclass(slots=True)
class _Batch:
    """Chunks on their way; the last tier to be through calls ``on_done``."""

    chunks: SealedChunks
    on_done: Callable[[Slots], None]
    num_tiers: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def through(self) -> None:
        with self.lock:
            self.num_tiers -= 1
            last = self.num_tiers == 0
        if last:
            self.on_done(self.chunks.host_slots)


@dataclass(frozen=True, slots=True)
class _Submitted:
    host_slots: Slots
    keys: KeyArray
    namespace: bytes
    on_done: Callable[[Slots], None]


class WriteBehind:
    """Owns one sealer thread and one writer thread a tier; `close` joins them."""

    def __init__(self, tiers: Sequence[LowerTier], rows: Rows, codec: SlotCodec, stall_s: float) -> None:
        self._rows, self._codec = rows, codec
        self._waiting: deque[_Submitted] = deque()  # bounded: each one holds host slots
        self._change = threading.Condition()
        self._num_unsealed = 0
        self._generation = 0
        self._closed = False
        self._look_s = min(1.0, stall_s / 2)  # how often to look for a tier that has stalled
        at_once = max(1, min(WRITE_NBYTES // codec.fmt.slot_nbytes, len(rows) // _SHARES))
        self._sealed_at_once = max(1, min(BATCH_NBYTES // codec.fmt.slot_nbytes, at_once))
        self._writers = [_Writer(tier, at_once, stall_s) for tier in tiers]
        self._sealer = threading.Thread(target=self._seal_all, name="kvstore-sealer", daemon=True)
        self._sealer.start()

    def submit(self, host_slots: Slots, keys: KeyArray, namespace: bytes, on_done: Callable[[Slots], None]) -> None:
        """Queue chunks, prefix first; ``on_done(slots)`` is called, possibly in parts, from a
        thread of this object when no tier needs the slots any more."""
        with self._change:
            self._waiting.append(_Submitted(host_slots, keys, namespace, on_done))
            self._num_unsealed += 1
            self._change.notify_all()

    def drain(self, deadline: float) -> bool:
        """Wait until all that was submitted has been through; False if it has not by then,
        or if a tier has not stored all of it since the last call."""
        with self._change:
            sealed = self._change.wait_for(lambda: self._num_unsealed == 0, max(0.0, deadline - time.monotonic()))
        idle = all([w.wait_idle(deadline) for w in self._writers])
        complete = all([w.forgive() == 0 for w in self._writers])
        return sealed and idle and complete

    def dropped_chunks(self) -> list[int]:
        """Chunks that each tier has not stored, in the order of the tiers."""
        return [w.num_dropped for w in self._writers]

    def stalled(self) -> list[bool]:
        """Which tiers are read-only for now: a write of theirs takes too long."""
        return [w.is_stalled() for w in self._writers]

    def close(self, deadline: float) -> bool:
        """Finish what was submitted and join the threads; False if some are stuck."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._sealer.join(max(0.0, deadline - time.monotonic()))
        stuck = self._sealer.is_alive()
        return all([w.close(deadline) for w in self._writers]) and not stuck

    def _seal_all(self) -> None:
        step = self._sealed_at_once
        while (taken := self._next()) is not None:
            generations = self._next_generations(len(taken.host_slots))
            for start in range(0, len(taken.host_slots), step):
                self._seal(taken, slice(start, start + step), generations[start : start + step])
            with self._change:
                self._num_unsealed -= 1
                self._change.notify_all()

    def _next(self) -> _Submitted | None:
        while True:
            with self._change:
                if self._change.wait_for(lambda: self._waiting or self._closed, timeout=self._look_s):
                    return self._waiting.popleft() if self._waiting else None
            for writer in self._writers:
                writer.shed()

    def _seal(self, taken: _Submitted, part: slice, generations: NDArray[np.uint64]) -> None:
        slots, keys = taken.host_slots[part], taken.keys[part]
        try:
            self._codec.seal(self._rows, slots, keys, taken.namespace, generations)
        except Exception:  # reported, and the slots go back: the chunks are later misses
            logger.exception("write-behind: %d chunks could not be sealed and are not stored", len(slots))
            taken.on_done(slots)
            for writer in self._writers:
                writer.finish([], len(slots))
            return
        batch = _Batch(SealedChunks(slots, keys, taken.namespace, generations), taken.on_done, len(self._writers))
        for writer in self._writers:
            writer.put(batch)

    def _next_generations(self, n: int) -> NDArray[np.uint64]:
        """Rising from one submission to the next, falling along a prefix: older is next to be evicted."""
        first = max(time.time_ns(), self._generation + 1)
        self._generation = first + n
        return np.arange(first + n - 1, first - 1, -1, dtype=np.uint64)


class _Writer:
    """One tier's thread, and the batches that wait behind those in hand; a bounded number of slots."""

    def __init__(self, tier: LowerTier, most_slots: int, stall_s: float) -> None:
        self.num_dropped = 0
        self._tier, self._most_slots, self._stall_s = tier, most_slots, stall_s
        self._waiting: deque[_Batch] = deque()
        self._num_waiting_slots = 0
        self._busy_since: float | None = None
        self._dropped_since_drain = 0
        self._change = threading.Condition()
        self._num_batches = 0
        self._reported = self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"kvstore-write-{tier.name}", daemon=True)
        self._thread.start()

    def put(self, batch: _Batch) -> None:
        """Queue a batch; it is dropped where the tier has stalled."""
        num_slots = len(batch.chunks.host_slots)
        with self._change:
            self._num_batches += 1
            while not self.is_stalled() and self._thread.is_alive():
                if not self._waiting or self._num_waiting_slots + num_slots <= self._most_slots:
                    self._waiting.append(batch)
                    self._num_waiting_slots += num_slots
                    self._change.notify_all()
                    return
                self._change.wait(_POLL_S)
        if not self._reported:
            logger.warning("%s tier: read-only, a write takes more than %g s", self._tier.name, self._stall_s)
            self._reported = True
        self.finish([batch], num_slots)

    def shed(self) -> None:
        """Where the tier has stalled, drop what waits behind the batches in hand."""
        if not self.is_stalled():
            return
        with self._change:
            batches, self._waiting = list(self._waiting), deque()
            self._num_waiting_slots = 0
        self.finish(batches, sum(len(b.chunks.host_slots) for b in batches))

    def is_stalled(self) -> bool:
        since = self._busy_since
        return since is not None and time.monotonic() - since > self._stall_s

    def wait_idle(self, deadline: float) -> bool:
        with self._change:
            return self._change.wait_for(lambda: self._num_batches == 0, max(0.0, deadline - time.monotonic()))

    def forgive(self) -> int:
        """Chunks dropped since the last call."""
        with self._change:
            dropped, self._dropped_since_drain = self._dropped_since_drain, 0
            return dropped

    def close(self, deadline: float) -> bool:
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while batches := self._take():
            self._busy_since = time.monotonic()
            chunks = _joined([batch.chunks for batch in batches])
            dropped = len(chunks.host_slots)
            try:
                dropped -= int(np.count_nonzero(self._tier.write(chunks)))
            except Exception:  # a tier's bug: reported, and the writer lives on
                logger.exception("%s tier: write failed", self._tier.name)
            finally:
                self._busy_since = None
                self._reported = False
                self.finish(batches, dropped)

    def _take(self) -> list[_Batch]:
        """Wait for batches: as many of one namespace as make one write; none once it is closed and idle."""
        taken: list[_Batch] = []
        num_slots = 0
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closed)
            while self._waiting:
                chunks = self._waiting[0].chunks
                more = num_slots + len(chunks.host_slots)
                if taken and (more > self._most_slots or chunks.namespace != taken[0].chunks.namespace):
                    break
                taken.append(self._waiting.popleft())
                num_slots = more
            self._num_waiting_slots -= num_slots
            self._change.notify_all()
        return taken

    def finish(self, batches: Sequence[_Batch], dropped: int) -> None:
        """Batches are through, and so many chunks of this tier were not stored."""
        for batch in batches:
            batch.through()
        with self._change:
            self.num_dropped += dropped
            self._dropped_since_drain += dropped
            self._num_batches -= len(batches)
            self._change.notify_all()


def _joined(parts: Sequence[SealedChunks]) -> SealedChunks:
    """Chunks of one namespace as one write."""
    if len(parts) == 1:
        return parts[0]
    return SealedChunks(
        np.concatenate([p.host_slots for p in parts]),
        np.concatenate([p.keys for p in parts]),
        parts[0].namespace,
        np.concatenate([p.generations for p in parts]),
    )
