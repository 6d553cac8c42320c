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
from typing import Final

from kvstore.errors import StoreClosedError

logger = logging.getLogger(__name__)

QUEUE_PER_THREAD: Final = 4
VERIFIED_AT_ONCE: Final = 2  # operations
Indices = list[int]


class IoPool:
    """A fixed number of threads over one bounded queue.

    Threads only make system calls: whatever needs the interpreter for long belongs to the
    thread that collects the result.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self.num_threads = num_threads
        self._queue: queue.Queue[tuple[Future[None], Callable[[], None]] | None] = queue.Queue(
            maxsize=num_threads * QUEUE_PER_THREAD
        )
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, operation: Callable[[], None], deadline: float) -> Future[None]:
        """Queue an operation; the future carries what it raised.

        Args:
            deadline: `time.monotonic` until which to wait for a place in the queue.
        Raises:
            queue.Full: none came free; the operation will not run.
            StoreClosedError: the pool was closed.
        """
        if self._closed:
            raise StoreClosedError("the I/O pool was closed")
        future: Future[None] = Future()
        self._queue.put((future, operation), timeout=max(0.0, deadline - time.monotonic()))
        if self._closed and not any(t.is_alive() for t in self._threads):
            self._refuse_queued()  # it was closed while this waited for a place
        return future

    def run_all(self, operations: Sequence[Callable[[], None]], deadline: float) -> list[BaseException | None]:
        """Run operations side by side and wait until all have returned; one outcome each."""
        futures: list[Future[None] | None] = []
        outcomes: list[BaseException | None] = []
        for operation in operations:
            try:
                futures.append(self.submit(operation, deadline))
            except (queue.Full, StoreClosedError):
                futures.append(None)
        for future in futures:
            outcomes.append(TimeoutError("no I/O thread came free") if future is None else future.exception())
        return outcomes

    def close(self, timeout_s: float) -> bool:
        """Let queued operations finish and join the threads; False if some are stuck."""
        self._closed = True
        deadline = time.monotonic() + timeout_s
        for _ in self._threads:
            try:
                self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
            except queue.Full:
                return False
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(t.is_alive() for t in self._threads):
            return False
        self._refuse_queued()
        return True

    def _refuse_queued(self) -> None:
        """Operations that came in behind the last thread never run; their futures say so."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    item[0].set_exception(StoreClosedError("the I/O pool was closed"))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            future, operation = item
            try:
                operation()
            except BaseException as e:
                future.set_exception(e)
            else:
                future.set_result(None)
            del future, operation, item


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
    run: Callable[[], None]


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
        self._returned: queue.SimpleQueue[ReadOperation] = queue.SimpleQueue()
        self._in_flight: dict[int, tuple[ReadOperation, Future[None]]] = {}
        self._results: deque[tuple[int, bool]] = deque()  # known, not yielded yet
        self._fill()

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        while self._in_flight or self._waiting or self._results:
            while self._results:
                yield self._results.popleft()
            if not self._in_flight and not self._waiting:
                return
            self._fill()
            returned = self._take_returned()
            if not returned:
                return
            self._fill()
            self._collect(returned)

    def abandon(self, release: Callable[[Indices], None]) -> None:
        results, self._results = self._results, deque()
        if results:
            release([i for i, _ in results])
        waiting, self._waiting = self._waiting, deque()
        for operation in waiting:
            release(operation.indices)
        in_flight, self._in_flight = self._in_flight, {}
        for operation, future in in_flight.values():
            future.add_done_callback(lambda _, operation=operation: release(operation.indices))  # type: ignore[misc]

    def _take_returned(self) -> list[tuple[ReadOperation, Future[None]]]:
        """Wait for an operation to return, and take those that have returned beside it."""
        returned = []
        try:
            operation = self._returned.get(timeout=max(0.0, self._deadline - time.monotonic()))
            while True:
                returned.append(self._in_flight.pop(id(operation)))
                if len(returned) == VERIFIED_AT_ONCE:
                    break
                operation = self._returned.get_nowait()
        except queue.Empty:
            pass
        return returned

    def _collect(self, returned: Sequence[tuple[ReadOperation, Future[None]]]) -> None:
        read: Indices = []
        for operation, future in returned:
            error = future.exception()
            if error is None:
                read += operation.indices
            else:
                self._on_error(error, operation.indices)
                self._results.extend((i, False) for i in operation.indices)
        if read:
            self._results.extend(zip(read, map(bool, self._verify(read)), strict=True))

    def _fill(self) -> None:
        while self._waiting and len(self._in_flight) < 2 * self._pool.num_threads:
            operation = self._waiting[0]
            try:
                future = self._pool.submit(operation.run, self._deadline if not self._in_flight else 0.0)
            except queue.Full:
                return
            except StoreClosedError as e:
                future = Future()
                future.set_exception(e)
            self._waiting.popleft()
            self._in_flight[id(operation)] = (operation, future)
            future.add_done_callback(lambda _, operation=operation: self._returned.put(operation))  # type: ignore[misc]


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
