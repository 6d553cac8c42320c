"""Offloading for any engine: what its scheduler decides, and what its workers copy.

    lookup  -> [promotion, in the background] -> a promise: pinned, verified -> load job
    store   -> slots reserved -> store job
    workers copy; a job counts when each of them has reported it: unpinned, or published
    and written behind

The scheduler half never waits for I/O: what lies in lower tiers is looked for and brought
up by threads, and until it is there the answer is "ask again". A promise holds until the end
of the engine's step; what was not taken by then is unpinned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch

from connectors.base import ArenaHandle, CopyJob, Step
from connectors.pages import PageCopier
from kvstore.arena import HostArena
from kvstore.config import StoreConfig
from kvstore.keys import BlockKey, keys_to_array
from kvstore.manager import LoadLease
from kvstore.planes import Planes
from kvstore.promotion import Promotion
from kvstore.tiers.base import TierStats

logger = logging.getLogger(__name__)

_LOOKUP_THREADS: Final = 4
_MOST_LOOKUPS: Final = 256  # under way; who comes later takes what host memory has
_FIRST_ANSWER_S: Final = 0.002  # a lower tier's index lies in memory: most lookups have ended by then


@dataclass(slots=True)
class _OpenJob:
    reports_left: int
    done: Callable[[], None]


class _Lookup:
    """One prefix that host memory does not have, on its way up."""

    def __init__(self, keys: Sequence[BlockKey], deadline: float) -> None:
        self.keys, self.deadline = list(keys), deadline
        self.ended = threading.Event()

    def covers(self, keys: Sequence[BlockKey]) -> bool:
        """Whether these keys, the rest of some prefix, were all looked for."""
        return keys[-1] in self.keys

    def is_settled(self) -> bool:
        return self.ended.is_set() or time.monotonic() >= self.deadline


class OffloadingScheduler:
    """The scheduler half. Called by one thread.

    Args:
        config: host memory is that of one engine, for all its workers.
        num_workers: reports that make a job count.
    Raises:
        ConfigError: as `kvstore.TieredStore`.
    """

    def __init__(self, config: StoreConfig, num_workers: int) -> None:
        self.config, self._num_workers = config, num_workers
        self._planes = Planes(config, shared_arena=True)
        self._manager, self._per_chunk = self._planes.manager, config.blocks_per_chunk
        self._arena = ArenaHandle.of(self._planes.arena)
        self._pool = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="kvstore-lookup")
        self._lookups: dict[str, _Lookup] = {}  # by request
        self._under_way: dict[BlockKey, _Lookup] = {}  # by first key: requests that share a prefix wait for one
        self._promises: dict[str, LoadLease] = {}
        self._jobs: dict[int, _OpenJob] = {}
        self._num_jobs = 0
        self._loads: list[CopyJob] = []
        self._stores: list[CopyJob] = []
        self._host = TierStats(name="host")

    # -- what an engine asks

    def begin(self, request_id: str, keys: Sequence[BlockKey]) -> None:
        """Start to look for a new request's prefix, before it is asked for."""
        self._look_below(request_id, keys[self._manager.prefix_hit(keys) :])

    def lookup(self, request_id: str, keys: Sequence[BlockKey]) -> int | None:
        """Leading blocks that can be loaded now; they stay until `end_step`. None: ask again.

        May be asked any number of times, and its answer be ignored.
        """
        self._break_promise(request_id)
        missing = keys[self._manager.prefix_hit(keys) :]
        if missing and not self._is_settled(request_id, missing):
            return None
        lease = self._manager.prepare_load(keys)
        self._promises[request_id] = lease
        return len(lease)

    def load(self, request_id: str, blocks: Sequence[int]) -> None:
        """Take the leading ``len(blocks)`` of what was promised into these blocks of the engine's cache."""
        lease, n = self._promises.pop(request_id), len(blocks)
        if n > len(lease):
            self._manager.release(lease)
            raise ValueError(f"{n} blocks are to be loaded, {len(lease)} were promised")
        number = self._open(lambda: self._manager.release(lease))
        self._loads.append(CopyJob(number, lease.slots[:n].tolist(), lease.positions[:n].tolist(), list(blocks)))
        self._host.hit_blocks += n
        self._host.read_nbytes += n * self.config.identity.layout.block_nbytes

    def store(self, keys: Sequence[BlockKey], blocks: Sequence[int]) -> None:
        """Store whole chunks that are absent, prefix first; where there is no room the tail is dropped.

        Args:
            keys: begin where a chunk begins.
            blocks: that will hold their KV when the engine has computed this step.
        """
        per_chunk = self._per_chunk
        total = len(keys) // per_chunk
        if not total:
            return
        present = self._manager.contains(keys[: total * per_chunk]).reshape(total, per_chunk).all(axis=1)
        absent = np.flatnonzero(~present)
        current = self._planes.current()
        slots = self._manager.reserve(len(absent), time.monotonic()) if len(absent) else absent
        chosen = absent[: len(slots)]
        self._host.dropped_blocks += (len(absent) - len(chosen)) * per_chunk
        if not len(chosen):
            return
        at = (chosen[:, None] * per_chunk + np.arange(per_chunk)).reshape(-1)
        chunk_keys = keys_to_array([keys[i] for i in at.tolist()]).reshape(len(chosen), per_chunk, -1)
        number = self._open(lambda: self._planes.publish(slots, chunk_keys, current))
        positions = np.tile(np.arange(per_chunk), len(chosen)).tolist()
        ids = [blocks[i] for i in at.tolist()]
        self._stores.append(CopyJob(number, np.repeat(slots, per_chunk).tolist(), positions, ids))
        self._host.written_nbytes += len(ids) * self.config.identity.layout.block_nbytes

    def end_step(self) -> Step:
        """What the workers are to do; promises that were not taken are over."""
        for request_id in list(self._promises):
            self._break_promise(request_id)
        step = Step(self._arena, self._loads, self._stores)
        self._loads, self._stores = [], []
        return step

    def reported(self, reports: Mapping[int, int]) -> None:
        """How many workers have done each of these jobs, since the last call."""
        for number, n in reports.items():
            job = self._jobs.get(number)
            if job is None:
                continue
            job.reports_left -= n
            if job.reports_left <= 0:
                del self._jobs[number]
                job.done()

    def has_open_jobs(self) -> bool:
        """Whether the engine must go on for reports to come in."""
        return bool(self._jobs)

    def forget(self, request_id: str) -> None:
        """The request is over: finished, aborted, or refused."""
        self._lookups.pop(request_id, None)
        self._break_promise(request_id)

    # -- control

    def reset(self) -> None:
        """Never again hit anything stored before; see `kvstore.TieredStore.reset`."""
        self._lookups.clear()
        self._under_way.clear()
        self._planes.reset()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was stored is durable; for tests and orderly ends."""
        io = self._planes.io
        return io.flush(time.monotonic() + timeout_s) if io is not None else True

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters and sizes by tier, from the top."""
        ready, pinned, evicted = self._manager.usage()
        host, per_chunk, nbytes = self._host, self._per_chunk, self._planes.fmt.slot_nbytes
        host.capacity_blocks, host.capacity_nbytes = self._manager.num_slots * per_chunk, self._planes.host_nbytes
        host.used_blocks, host.used_nbytes = ready * per_chunk, ready * nbytes
        host.pinned_blocks, host.evicted_blocks = pinned * per_chunk, evicted * per_chunk
        lower = [] if self._planes.io is None else self._planes.io.stats()
        return {stats.name: asdict(stats) for stats in (host, *lower)}

    def close(self) -> None:
        """Finish write-behind, and release everything."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._planes.close()

    # -- inside

    def _open(self, done: Callable[[], None]) -> int:
        self._num_jobs += 1
        self._jobs[self._num_jobs] = _OpenJob(self._num_workers, done)
        return self._num_jobs

    def _break_promise(self, request_id: str) -> None:
        lease = self._promises.pop(request_id, None)
        if lease is not None:
            self._manager.release(lease)

    def _is_settled(self, request_id: str, missing: Sequence[BlockKey]) -> bool:
        """Whether nothing more of the request's prefix is on its way up."""
        lookup = self._lookups.get(request_id)
        if lookup is None or (lookup.ended.is_set() and not lookup.covers(missing)):  # its own, or beyond another's
            lookup = self._look_below(request_id, missing)
            if lookup is not None:
                lookup.ended.wait(_FIRST_ANSWER_S)
        return lookup is None or lookup.is_settled()

    def _look_below(self, request_id: str, missing: Sequence[BlockKey]) -> _Lookup | None:
        if not missing or self._planes.below() is None:
            return None
        lookup = self._under_way.get(missing[0])
        if lookup is None:
            if len(self._under_way) >= _MOST_LOOKUPS:
                return None
            lookup = _Lookup(missing, time.monotonic() + self.config.load_timeout_s)
            self._under_way[missing[0]] = lookup
            self._pool.submit(self._bring_up, lookup)
        self._lookups[request_id] = lookup
        return lookup

    def _bring_up(self, lookup: _Lookup) -> None:
        """Runs in a thread: promote as much of the prefix as there is."""
        try:
            done, keys = 0, lookup.keys
            while done < len(keys) and time.monotonic() < lookup.deadline and (io := self._planes.below()) is not None:
                promotion = Promotion(self._manager, io, self._planes.arena.rows, self._planes.fmt)
                came = promotion.run(keys[done:], None, lookup.deadline) or self._manager.prefix_hit(keys[done:])
                if not came:
                    break
                done += came
        except Exception:  # what was to be loaded is computed instead
            logger.exception("a prefix could not be brought up from the lower tiers")
        finally:
            self._under_way.pop(lookup.keys[0], None)
            lookup.ended.set()


class OffloadingWorker:
    """The worker half: copies its stripe of every slot. Called by one thread.

    Args:
        rank: of this worker, from 0.
        num_workers: stripes of a slot.
        layers: the cache, one or more tensors of bytes a layer, each (num_blocks, page_nbytes).
        blocks_per_chunk: as in the scheduler half.
    """

    def __init__(self, rank: int, num_workers: int, layers: Sequence[torch.Tensor], blocks_per_chunk: int) -> None:
        self._rank, self._num_workers = rank, num_workers
        self._pages = PageCopier(layers, blocks_per_chunk)
        self._arena: HostArena | None = None
        self._copied: deque[tuple[list[int], Any]] = deque()

    def load(self, step: Step) -> None:
        """Before the engine computes: host slots -> cache."""
        for job in step.loads:
            self._pages.load(self._stripe(step.arena), job)
        self._note(step.loads)

    def store(self, step: Step) -> None:
        """After the engine has computed: cache -> host slots."""
        for job in step.stores:
            self._pages.store(self._stripe(step.arena), job)
        self._note(step.stores)

    def take_reports(self) -> dict[int, int]:
        """Jobs whose bytes have arrived since the last call, for `OffloadingScheduler.reported`; waits for none."""
        reports: dict[int, int] = {}
        while self._copied and ((event := self._copied[0][1]) is None or event.query()):
            reports |= dict.fromkeys(self._copied.popleft()[0], 1)
        return reports

    def close(self) -> None:
        """Wait for what is under way, and unmap the arena."""
        for _, event in self._copied:
            if event is not None:
                event.synchronize()
        self._copied.clear()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _note(self, jobs: Sequence[CopyJob]) -> None:
        if jobs:
            self._copied.append(([job.number for job in jobs], self._pages.mark()))

    def _stripe(self, handle: ArenaHandle) -> np.ndarray:
        """This worker's part of every slot's payload, (num_slots, stripe_nbytes)."""
        if self._arena is None:
            self._arena = handle.attach()
        nbytes = self._pages.chunk_nbytes
        if nbytes * self._num_workers > handle.slot_nbytes:
            raise ValueError(f"{self._num_workers} stripes of {nbytes} bytes do not fit {handle.slot_nbytes}")
        return self._arena.rows[:, self._rank * nbytes : (self._rank + 1) * nbytes]
