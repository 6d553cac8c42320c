"""Threads that wait for the kernel, and reads that are collected by whoever asked for them.

A deadline ends the wait and not the transfer: a read in flight cannot be recalled. What it
writes into stays its own until it returns; `ReadJob.abandon` says what happens then.
Nothing here knows keys or tiers.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvstore.errors import StoreClosedError

logger = logging.getLogger(__name__)

QUEUE_PER_THREAD: Final = 4
VERIFIED_AT_ONCE: Final = 2  # operations
Indices = list[int]
Operation = Callable[[], None]
Done = Callable[[BaseException | None], None]


class IoPool:
    """A fixed number of threads over one bounded queue.

    Threads only make system calls: whatever needs the interpreter for long belongs to the
    thread that collects the result.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self.num_threads = num_threads
        self._queue: queue.SimpleQueue[tuple[Operation, Done] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(num_threads * QUEUE_PER_THREAD)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, operation: Operation, done: Done, deadline: float) -> None:
        """Queue an operation.

        Args:
            done: called once, by whichever thread sees the operation end, with what it raised.
            deadline: `time.monotonic` until which to wait for a place in the queue.
        Raises:
            queue.Full: none came free; the operation will not run, and ``done`` is not called.
            StoreClosedError: the pool was closed; the same.
        """
        if self._closed:
            raise StoreClosedError("the I/O pool was closed")
        if not self._room.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise queue.Full
        self._queue.put((operation, done))
        if self._closed and not any(t.is_alive() for t in self._threads):
            self._refuse_queued()  # it was closed while this waited for a place

    def submit(self, operation: Operation, deadline: float) -> Future[None]:
        """As `start`; the future carries what the operation raised."""
        future: Future[None] = Future()

        def done(error: BaseException | None) -> None:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        self.start(operation, done, deadline)
        return future

    def start_all(self, operations: Sequence[Operation], deadline: float) -> Callable[[], list[BaseException | None]]:
        """Queue operations; what is returned, called once, waits until all have ended: one outcome each."""
        outcomes: list[BaseException | None] = [TimeoutError("no I/O thread came free")] * len(operations)
        returned: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
        num_started = 0
        for i, operation in enumerate(operations):
            with contextlib.suppress(queue.Full, StoreClosedError):
                self.start(operation, lambda error, i=i: returned.put((i, error)), deadline)  # type: ignore[misc]
                num_started += 1

        def wait() -> list[BaseException | None]:
            for _ in range(num_started):
                i, outcomes[i] = returned.get()
            return outcomes

        return wait

    def close(self, timeout_s: float) -> bool:
        """Let queued operations finish and join the threads; False if some are stuck."""
        self._closed = True
        deadline = time.monotonic() + timeout_s
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(t.is_alive() for t in self._threads):
            return False
        self._refuse_queued()
        return True

    def _refuse_queued(self) -> None:
        """Operations that came in behind the last thread never run, and are told so."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    item[1](StoreClosedError("the I/O pool was closed"))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._room.release()
            operation, done = item
            try:
                operation()
            except BaseException as e:
                done(e)
            else:
                done(None)
            del operation, done, item


class ReadJob(ABC):
    """A read of n chunks into n host slots, collected in any order.

    Iterate it once: yields ``(i, ok)`` for each chunk that was read by the deadline, ok
    if it was verified. Then call `abandon`.
    """

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, bool]]: ...

    @abstractmethod
    def abandon(self, release: Callable[[Indices], None]) -> None:
        """Give up what was not yielded: ``release(indices)`` is called once for each such
        chunk, at once or when its transfer returns, from whichever thread sees it return."""


@dataclass(frozen=True, slots=True)
class ReadOperation:
    """What one thread reads in one go: which chunks, and what reads them."""

    indices: Indices
    run: Operation


Returned = tuple[ReadOperation, BaseException | None]


class PooledReadJob(ReadJob):
    """A `ReadJob` over an `IoPool`: pool threads read, the iterating thread verifies.

    Args:
        pool: has at most ``2 * num_threads`` operations of this job at a time.
        operations: cover each chunk once.
        verify: given chunks that were read, says which are good.
        on_error: told of an operation that raised; its chunks are yielded as not ok.
        deadline: in `time.monotonic` seconds.
    """

    def __init__(
        self,
        pool: IoPool,
        operations: Sequence[ReadOperation],
        verify: Callable[[Indices], Sequence[bool]],
        on_error: Callable[[BaseException, Indices], None],
        deadline: float,
    ) -> None:
        self._pool = pool
        self._waiting = deque(operations)
        self._verify = verify
        self._on_error = on_error
        self._deadline = deadline
        self._lock = threading.Lock()  # between a thread that returns and `abandon`
        self._release: Callable[[Indices], None] | None = None
        self._returned: queue.SimpleQueue[Returned] = queue.SimpleQueue()
        self._num_in_flight = 0
        self._results: deque[tuple[int, bool]] = deque()  # known, not yielded yet
        self._fill()

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        while self._num_in_flight or self._waiting or self._results:
            while self._results:
                yield self._results.popleft()
            if not self._num_in_flight and not self._waiting:
                return
            self._fill()
            returned = self._take_returned()
            if not returned:
                return
            self._fill()
            self._collect(returned)

    def abandon(self, release: Callable[[Indices], None]) -> None:
        with self._lock:
            self._release = release
        left = [i for i, _ in self._results]
        left += [i for operation, _ in self._get_returned(self._num_in_flight) for i in operation.indices]
        left += [i for operation in self._waiting for i in operation.indices]
        self._results.clear()
        self._waiting.clear()
        if left:
            release(left)

    def _came(self, operation: ReadOperation, error: BaseException | None) -> None:
        """Runs in a pool thread."""
        with self._lock:
            release = self._release
            if release is None:
                self._returned.put((operation, error))
                return
        release(operation.indices)

    def _take_returned(self) -> list[Returned]:
        """Wait for an operation to return, and take those that have returned beside it."""
        try:
            first = self._returned.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            return []
        self._num_in_flight -= 1
        return [first, *self._get_returned(VERIFIED_AT_ONCE - 1)]

    def _get_returned(self, most: int) -> list[Returned]:
        returned: list[Returned] = []
        with contextlib.suppress(queue.Empty):
            while len(returned) < most:
                returned.append(self._returned.get_nowait())
                self._num_in_flight -= 1
        return returned

    def _collect(self, returned: Sequence[Returned]) -> None:
        read: Indices = []
        for operation, error in returned:
            if error is None:
                read += operation.indices
            else:
                self._on_error(error, operation.indices)
                self._results.extend((i, False) for i in operation.indices)
        if not read:
            return
        try:
            ok = self._verify(read)
        except BaseException:
            self._results.extend((i, False) for i in read)  # else `abandon` would not know them
            raise
        self._results.extend(zip(read, map(bool, ok), strict=True))

    def _fill(self) -> None:
        while self._waiting and self._num_in_flight < 2 * self._pool.num_threads:
            operation = self._waiting[0]
            try:
                deadline = self._deadline if not self._num_in_flight else 0.0
                self._pool.start(operation.run, partial(self._came, operation), deadline)
            except queue.Full:
                return
            except StoreClosedError as e:
                self._came(operation, e)
            self._waiting.popleft()
            self._num_in_flight += 1


class NothingRead(ReadJob):
    """A read of n chunks from what does not answer: none of them comes."""

    def __init__(self, num_chunks: int) -> None:
        self._left = list(range(num_chunks))

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        left, self._left = self._left, []
        yield from ((i, False) for i in left)

    def abandon(self, release: Callable[[Indices], None]) -> None:
        left, self._left = self._left, []
        if left:
            release(left)
