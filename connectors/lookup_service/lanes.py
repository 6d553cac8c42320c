"""Pipes to peers, with a thread each that alone uses it, in the order of what it is given.

A lane ends with its pipe: when that breaks, when its peer closes it or is gone, when it was never joined. What
is to be done in a lane that has ended is refused.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, TypeVar

from connectors.control import ControlRefusedError
from connectors.pipe import Pipe, PipeEnd
from kvstore.errors import StoreClosedError
from kvstore.jobs import IoPool

logger = logging.getLogger(__name__)

T = TypeVar("T")
MOST_PIPES: Final = 64
_JOIN_S: Final = 10.0
_CLOSE_S: Final = 5.0


class Lane:
    """A pipe to one peer. `run` may be called by any thread, until `end`."""

    def __init__(self, peer: str, number: int) -> None:
        self.peer, self.number = peer, number
        self._pool = IoPool(f"kvstore-pipe-{number}", 1)
        self._lock = threading.Lock()
        self._end_of_pipe: PipeEnd | None = None
        self._pipe: Pipe | None = None
        self._ended = False

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or its pipe has been closed by anyone."""
        pipe = self._pipe
        return self._ended or (pipe is not None and pipe.is_closed)

    def open(self, make_end: Callable[[], PipeEnd], peer_hello: bytes) -> Future[bytes]:
        """Make this end, which may take a while, and join it; what comes is this end's hello."""

        def make() -> bytes:
            end = make_end()
            with self._lock:
                if not self._ended:
                    self._end_of_pipe = end
                    return end.hello()
            end.close()
            raise ControlRefusedError("the pipe was closed")

        hello = self._start(make)
        self._start(lambda: self._join(peer_hello))
        return hello

    def run(self, work: Callable[[Pipe], T]) -> Future[T]:
        """Have the lane's thread do something with the pipe. Where that fails, or nobody waits for it any more when
        its turn comes, the lane ends: the two ends would not agree about what lies in the pipe.

        Raises:
            ControlRefusedError: the lane has ended, or too much waits in it.
        """

        def operation() -> T:
            if self._pipe is None:
                raise ControlRefusedError("the pipe was not joined")
            return work(self._pipe)

        return self._start(operation)

    def end(self) -> None:
        """Wakes up its thread. May be called twice, and by it."""
        with self._lock:
            self._ended = True
            end, pipe = self._end_of_pipe, self._pipe
        if pipe is not None:
            pipe.close()
        elif end is not None:
            end.close()

    def close(self, timeout_s: float) -> bool:
        """End it and join its thread; False: that has not returned yet. Not to be called by it."""
        self.end()
        return self._pool.close(timeout_s)

    def _join(self, peer_hello: bytes) -> None:
        end = self._end_of_pipe
        if end is None:
            raise ControlRefusedError("the pipe was not made")
        pipe = end.join(peer_hello, _JOIN_S)
        with self._lock:
            self._pipe = pipe
            ended = self._ended
        if ended:
            pipe.close()

    def _start(self, operation: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()

        def run() -> None:
            if self._ended or not answer.set_running_or_notify_cancel():
                self.end()
                raise ControlRefusedError("the pipe was closed")
            answer.set_result(operation())

        def done(error: BaseException | None) -> None:
            if error is None:
                return
            self.end()
            logger.warning("a pipe to a peer has ended: %s", error)
            with suppress(Exception):  # it was cancelled
                answer.set_exception(error)

        try:
            self._pool.start(run, done, time.monotonic())
        except (queue.Full, StoreClosedError) as e:
            raise ControlRefusedError(f"the pipe takes no more: {e}") from e
        return answer


class Lanes:
    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}
        self._ending: list[Lane] = []  # their threads have not returned yet

    def __len__(self) -> int:
        return len(self._lanes)

    def add(self, peer: str) -> Lane:
        """Raises ControlRefusedError: there are too many."""
        self._take_out(lambda lane: lane.is_over)
        self._join_ended(0.0)
        with self._lock:
            if len(self._lanes) + len(self._ending) >= MOST_PIPES:
                raise ControlRefusedError(f"{MOST_PIPES} pipes are open")
            lane = Lane(peer, next(self._numbers))
            self._lanes[lane.number] = lane
            return lane

    def of(self, peer: str, number: int) -> Lane:
        """Raises ControlRefusedError: that peer has no such pipe."""
        lane = self._lanes.get(number)
        if lane is None or lane.peer != peer:
            raise ControlRefusedError("no such pipe")
        return lane

    def end_dead(self) -> None:
        """Give back what belongs to lanes that are over; waits for their threads a little."""
        self._take_out(lambda lane: lane.is_over)
        self._join_ended(_CLOSE_S)

    def end_all_of(self, peer: str) -> None:
        self._take_out(lambda lane: lane.peer == peer)

    def close(self) -> None:
        self._take_out(lambda _: True)
        self._join_ended(_CLOSE_S)

    def _take_out(self, is_over: Callable[[Lane], bool]) -> None:
        with self._lock:
            ended = [lane for lane in self._lanes.values() if is_over(lane)]
            for lane in ended:
                del self._lanes[lane.number]
            self._ending += ended
        for lane in ended:
            lane.close(0.0)  # its thread ends by itself

    def _join_ended(self, timeout_s: float) -> None:
        with self._lock:
            ending = list(self._ending)
        for lane in ending:
            if lane.close(timeout_s):
                with self._lock, suppress(ValueError):  # by another thread
                    self._ending.remove(lane)
