"""Offloading for any engine: what its scheduler decides, and what its workers copy.

    lookup  -> [promotion, in the background] -> a promise: pinned, verified -> load job
    store   -> slots reserved -> store job
    workers copy; a job counts when each of them has reported it: unpinned, or published
    and written behind

The scheduler half never waits for I/O: what lies in lower tiers is looked for and brought
up by threads, and until it is there the answer is "ask again". A promise holds until the end
of the engine's step; what was not taken by then is unpinned.

Keys and blocks come by KV cache group, one sequence a group, all of the same length and for
the same tokens. Of a group with a sliding window only the last blocks of a prefix are read.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectors.base import ArenaHandle, Asker, Blocks, CopyJob, Keys, SchedulerHalf, Step
from connectors.prefix_lookups import PrefixLookups
from kvstore.config import StoreConfig
from kvstore.events import TierEvent
from kvstore.io_service import IoService
from kvstore.journal_writer import PromptLookup, tenant_digest
from kvstore.keys import BlockKey, array_to_keys, keys_to_array
from kvstore.manager import LoadLease
from kvstore.planes import Planes
from kvstore.slot import KeyArray, Slots
from kvstore.tiers.base import TierStats

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _OpenJob:
    """``done`` is told whether every worker has done it right."""

    reports_left: int
    done: Callable[[bool], None]
    is_right: bool = True


@dataclass(frozen=True, slots=True)
class _Promise:
    """By KV cache group: the leading blocks from ``starts[group]`` on, pinned."""

    leases: list[LoadLease]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that the journal is to hear of, when its lookup has been answered."""

    asker: Asker
    keys: Sequence[BlockKey]
    since: float
    t_ns: int


class OffloadingScheduler(SchedulerHalf):
    """The scheduler half. Called by one thread.

    Args:
        config: host memory is that of one engine, for all its workers.
        num_workers: reports that make a job count.
        windows: by KV cache group, how many last blocks of a prefix are read; None: all of it.
        io: what lies below host memory, where it is not the tiers of ``config``.
    Raises:
        ConfigError: as `kvstore.TieredStore`.
    """

    def __init__(
        self,
        config: StoreConfig,
        num_workers: int,
        windows: Sequence[int | None] = (None,),
        io: IoService | None = None,
    ) -> None:
        self.config, self._num_workers, self._windows = config, num_workers, list(windows)
        self._planes = Planes(config, shared_arena=True, io=io)
        self._manager, self._per_chunk = self._planes.manager, config.blocks_per_chunk
        self._arena = ArenaHandle.of(self._planes.arena)
        self._lookups = PrefixLookups(self._planes, config.load_timeout_s)
        self._promises: dict[str, _Promise] = {}
        self._jobs: dict[int, _OpenJob] = {}
        self._num_jobs = 0
        self._loads: list[CopyJob] = []
        self._stores: list[CopyJob] = []
        self._known_failures: list[int] = []
        self._filling = Counter[BlockKey]()  # open store jobs of each key
        self._host = TierStats(name="host")
        self._askers: dict[str, Asker] = {}  # of requests that are not over
        self._asked: dict[str, _Asked] = {}  # that the journal has not heard of yet
        try:
            self._planes.open_journal(type(self).__name__, self._tier_stats, num_groups=len(self._windows))
        except BaseException:
            OffloadingScheduler.close(self)  # of what is made on top there is nothing yet
            raise

    # -- what an engine asks

    def asked(self, asker: Asker, keys: Keys) -> None:
        if self._planes.journal is not None:
            self._askers[asker.request_id] = asker
            self._asked[asker.request_id] = _Asked(asker, keys[0], time.monotonic(), time.time_ns())

    def begin(self, request_id: str, keys: Keys) -> None:
        """Start to look for a new request's prefix, before it is asked for."""
        keys = self._that_fit(keys)
        for of_group, window in zip(keys, self._windows, strict=True):
            tail = of_group if window is None else of_group[-window:]
            self._lookups.begin(request_id, tail[self._manager.prefix_hit(tail) :])

    def lookup(self, request_id: str, keys: Keys, *, expected: int = 0) -> int | None:
        """Leading blocks that can be loaded now; they stay until `end_step`. None: ask again.

        May be asked any number of times, and its answer be ignored.

        Args:
            expected: leading blocks that another engine is about to have written; they are waited for.
        """
        self._break_promise(request_id)
        num_asked, keys = len(keys[0]), self._that_fit(keys)
        n: int | None = len(keys[0])
        expected = min(expected, len(keys[0]))
        for of_group, window in zip(keys, self._windows, strict=True):
            if window is None and n is not None:
                n = self._present(request_id, of_group[:n], expected)
        n = self._fit_windows(request_id, keys, n, expected) if n is not None else None
        if n is None:
            return None
        promised = self._promise(request_id, keys, n)
        self._note(request_id, promised, num_asked)
        return promised

    def not_needed(self, request_id: str) -> None:
        self._note(request_id, 0, 0)

    def load(self, request_id: str, blocks: Blocks) -> None:
        """Take the leading blocks of what was promised into these blocks of the engine's cache.

        Args:
            blocks: by group; None where the engine does not need one.
        Raises:
            ValueError: that was not promised; the promise is over.
        """
        promise = self._promises.pop(request_id, None)
        if promise is None:
            raise ValueError(f"request {request_id!r} was promised nothing, or has taken it")
        jobs, num_blocks = [], 0
        number = self._open(lambda _: self._release(promise))
        for group, (lease, start, ids) in enumerate(zip(promise.leases, promise.starts, blocks, strict=True)):
            wanted = [i for i, block in enumerate(ids) if block is not None]
            at = np.array(wanted, dtype=np.int64) - start
            if len(at) and (at[0] < 0 or at[-1] >= len(lease)):
                del self._jobs[number]
                self._release(promise)
                raise ValueError(
                    f"blocks {wanted[0]} to {wanted[-1]} of group {group} are to be loaded; "
                    f"promised were {start} to {start + len(lease) - 1}"
                )
            slots, positions = lease.slots[at].tolist(), lease.positions[at].tolist()
            jobs.append(CopyJob(number, slots, positions, [block for block in ids if block is not None], group))
            num_blocks += len(at)
        self._loads += jobs
        self._host.hit_blocks += num_blocks
        self._host.read_nbytes += num_blocks * self.config.identity.layout.block_nbytes

    def store(self, keys: Keys, blocks: Blocks) -> None:
        """Store whole chunks that are absent, prefix first; where there is no room the tail is dropped.

        Args:
            keys: begin where a chunk begins.
            blocks: that will hold their KV when the engine has computed this step; None where
                it has none any more.
        """
        for group, (of_group, ids) in enumerate(zip(keys, blocks, strict=True)):
            self._store(group, of_group, ids)

    def end_step(self, *, wait_s: float = 0.0) -> Step:
        """What the workers are to do; promises that were not taken are over.

        Args:
            wait_s: an engine with nothing else to do waits so long for what it was told to ask for again.
        """
        for request_id in list(self._promises):
            self._break_promise(request_id)
        self._lookups.wait(wait_s)
        step = Step(self._arena, self._loads, self._stores, self._known_failures)
        self._loads, self._stores, self._known_failures = [], [], []
        return step

    def ended(self, request_id: str, keys: Keys) -> None:
        asker = self._askers.get(request_id)
        if asker is not None and self._planes.journal is not None:
            self._planes.journal.ended(keys[0], asker.request_id, tenant_digest(asker.tenant))
        for of_group in keys:
            self._manager.arrange(of_group)

    def failed(self, numbers: Sequence[int]) -> None:
        self._known_failures += numbers
        for number in numbers:
            if (job := self._jobs.get(number)) is not None:
                job.is_right = False

    def reported(self, reports: Mapping[int, int]) -> None:
        """How many workers have done each of these jobs, since the last call."""
        for number, n in reports.items():
            job = self._jobs.get(number)
            if job is None:
                continue
            job.reports_left -= n
            if job.reports_left <= 0:
                del self._jobs[number]
                job.done(job.is_right)

    def has_open_jobs(self) -> bool:
        """Whether the engine must go on for reports to come in."""
        return bool(self._jobs)

    def forget(self, request_id: str) -> None:
        """The request is over: finished, aborted, or refused."""
        self._note(request_id, 0, None)
        self._askers.pop(request_id, None)
        self._lookups.forget(request_id)
        self._break_promise(request_id)

    # -- control

    def reset(self) -> None:
        """Never again hit anything stored before; see `kvstore.TieredStore.reset`."""
        self._lookups.reset()
        self._planes.reset()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was stored is durable; for tests and orderly ends."""
        io = self._planes.io
        return io.flush(time.monotonic() + timeout_s) if io is not None else True

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters and sizes by tier, from the top."""
        return {stats.name: asdict(stats) for stats in self._tier_stats()}

    def _tier_stats(self) -> list[TierStats]:
        ready, pinned, evicted = self._manager.usage()
        host, per_chunk, nbytes = self._host, self._per_chunk, self._planes.fmt.slot_nbytes
        host.capacity_blocks, host.capacity_nbytes = self._manager.num_slots * per_chunk, self._planes.host_nbytes
        host.used_blocks, host.used_nbytes = ready * per_chunk, ready * nbytes
        host.pinned_blocks, host.evicted_blocks = pinned * per_chunk, evicted * per_chunk
        lower = [] if self._planes.io is None else self._planes.io.stats()
        return [replace(host), *lower]

    def take_events(self) -> list[TierEvent]:
        return self._planes.take_events()

    def sources(self, request_id: str, num_blocks: int) -> dict[str, int]:
        sources, left = {}, num_blocks
        for tier, n in self._lookups.came(request_id).items():
            sources[tier] = min(n, left)
            left -= sources[tier]
        return {tier: n for tier, n in {**sources, "host": left}.items() if n}

    def close(self) -> None:
        """Finish write-behind, and release everything."""
        self._lookups.close()
        self._planes.close()

    # -- inside

    def _open(self, done: Callable[[bool], None]) -> int:
        self._num_jobs += 1
        self._jobs[self._num_jobs] = _OpenJob(self._num_workers, done)
        return self._num_jobs

    def _note(self, request_id: str, num_found: int, num_asked: int | None) -> None:
        """Write a request to the journal, once: what was found of the last ``num_asked`` blocks of its prompt; the
        engine itself had those before. None: it never asked."""
        asked = self._asked.pop(request_id, None)
        journal = self._planes.journal
        if asked is None or journal is None:
            return
        hits = {} if num_asked is None else self.sources(request_id, num_found)
        before = 0 if num_asked is None else self._num_loadable(asked) - num_asked
        if before > 0:
            hits = {"device": before, **hits}
        asker = asked.asker
        journal.asked(
            PromptLookup(
                keys=asked.keys, request_id=asker.request_id, tenant=tenant_digest(asker.tenant),
                adapter=asker.adapter.hex()[:64], num_tokens=asker.num_tokens, hits=hits,
                waited_s=time.monotonic() - asked.since, is_late=self._lookups.is_late(request_id), t_ns=asked.t_ns,
            )
        )  # fmt: skip

    def _num_loadable(self, asked: _Asked) -> int:
        """Blocks of a prompt that may be loaded: at least one token is computed."""
        block_size = self.config.identity.layout.block_size
        return min(len(asked.keys), (asked.asker.num_tokens - 1) // block_size)

    def _held(self, keys: Keys) -> tuple[int, list[BlockKey]]:
        """Leading blocks that are in host memory, or are being filled, as far as each group reads them; and which
        these are: of a group with a window not all need be there."""
        here = []
        for of_group in keys:
            are_filled = np.fromiter((key in self._filling for key in of_group), np.bool_, len(of_group))
            here.append(self._manager.contains(of_group) | are_filled)
        n = len(keys[0])
        for is_here, window in zip(here, self._windows, strict=True):
            if window is None and not is_here.all():
                n = min(n, int(is_here.argmin()))
        n = self._fitted(here, n)
        return n, [key for of_group, is_here in zip(keys, here, strict=True) for key in compress(of_group[:n], is_here)]

    def _publish(self, slots: Slots, keys: KeyArray, current: tuple[int, bytes]) -> None:
        """The workers have filled these."""
        self._planes.publish(slots, keys, current)

    def _filled(self, keys: set[BlockKey]) -> list[BlockKey]:
        """A store job is over; which of its keys no other fills."""
        self._filling.subtract(keys)
        over = [key for key in keys if not self._filling[key]]
        for key in over:
            del self._filling[key]
        return over

    def _not_filled(self, keys: Sequence[BlockKey]) -> None:
        """The workers could not fill these."""

    def _break_promise(self, request_id: str) -> None:
        promise = self._promises.pop(request_id, None)
        if promise is not None:
            self._release(promise)

    def _release(self, promise: _Promise) -> None:
        for lease in promise.leases:
            self._manager.release(lease)

    def _that_fit(self, keys: Keys) -> Keys:
        """The longest prefix for which host memory has room: the tail of a longer one would evict its head."""
        room = self._manager.num_slots * self._per_chunk

        def needed(n: int) -> int:
            return sum(n if window is None else min(n, window) for window in self._windows)

        n = len(keys[0])
        if needed(n) > room:
            n = bisect.bisect_right(range(n + 1), room, key=needed) - 1
        return [of_group[:n] for of_group in keys]

    def _present(self, request_id: str, keys: Sequence[BlockKey], expected: int) -> int | None:
        """Leading blocks of one group in host memory, once what lies below has come up; None: it has not."""
        have = self._manager.prefix_hit(keys)
        if have == len(keys):
            return have
        if not self._lookups.is_settled(request_id, keys[have:], expected - have):
            return None
        return have + self._manager.prefix_hit(keys[have:])

    def _fit_windows(self, request_id: str, keys: Keys, n: int, expected: int) -> int | None:
        """The longest prefix of up to n blocks of which every group with a window has its last blocks."""
        for of_group, window in zip(keys, self._windows, strict=True):
            if window is not None:
                start = max(0, n - window)
                if self._present(request_id, of_group[start:n], expected - start) is None:
                    return None
        return self._fitted([self._manager.contains(of_group[:n]) for of_group in keys], n)

    def _fitted(self, here: Sequence[NDArray[np.bool_]], n: int) -> int:
        """The longest prefix of up to n blocks of which every group with a window has its last ones; ``here``: which
        blocks there are, by group."""
        fitted = -1
        while n != fitted:
            fitted = n
            for of_group, window in zip(here, self._windows, strict=True):
                if window is not None:
                    n = _longest_with_window(of_group[:n], window)
        return n

    def _promise(self, request_id: str, keys: Keys, n: int) -> int:
        """Pin n blocks, and so many of them as are still there."""
        starts = [0 if window is None else max(0, n - window) for window in self._windows]
        leases = [self._manager.prepare_load(of_group[start:n]) for of_group, start in zip(keys, starts, strict=True)]
        if any(len(lease) < n - start for lease, start in zip(leases, starts, strict=True)):  # evicted meanwhile
            n = len(leases[0]) if self._windows == [None] else 0
        self._promises[request_id] = _Promise(leases, starts)
        return n

    def _store(self, group: int, keys: Sequence[BlockKey], blocks: Sequence[int | None]) -> None:
        per_chunk = self._per_chunk
        total = len(keys) // per_chunk
        if not total:
            return
        are_there = np.array([block is not None for block in blocks[: total * per_chunk]]).reshape(total, per_chunk)
        are_present = self._manager.contains(keys[: total * per_chunk]).reshape(total, per_chunk)
        absent = np.flatnonzero(are_there.all(axis=1) & ~are_present.all(axis=1))
        current = self._planes.current()
        slots = self._manager.reserve(len(absent), time.monotonic()) if len(absent) else absent
        chosen = absent[: len(slots)]
        self._host.dropped_blocks += (len(absent) - len(chosen)) * per_chunk
        if not len(chosen):
            return
        at = (chosen[:, None] * per_chunk + np.arange(per_chunk)).reshape(-1)
        chunk_keys = keys_to_array([keys[i] for i in at.tolist()]).reshape(len(chosen), per_chunk, -1)
        filling = set(array_to_keys(chunk_keys.reshape(len(at), -1)))
        self._filling.update(filling)

        def filled(is_right: bool) -> None:
            over = self._filled(filling)
            if is_right:
                self._publish(slots, chunk_keys, current)
            else:
                self._manager.give_back(slots)
                self._not_filled(over)

        number = self._open(filled)
        positions = np.tile(np.arange(per_chunk), len(chosen)).tolist()
        ids = [block for i in at.tolist() if (block := blocks[i]) is not None]
        self._stores.append(CopyJob(number, np.repeat(slots, per_chunk).tolist(), positions, ids, group))
        self._host.written_nbytes += len(ids) * self.config.identity.layout.block_nbytes


def _longest_with_window(present: NDArray[np.bool_], window: int) -> int:
    """The longest prefix whose last ``window`` blocks, or all where it has fewer, are present."""
    at = np.arange(len(present))
    run = at - np.maximum.accumulate(np.where(present, -1, at)) if len(present) else at
    fits = np.flatnonzero(run >= np.minimum(window, at + 1))
    return int(fits[-1]) + 1 if len(fits) else 0
