"""A producer on another host, as its consumer sees it: what it holds, brought into our slots and verified.

    select    a request: the peer takes a prefix out of its buffer for us
    read      requests and a pipe: slots of the peer -> slots of ours, one thread, in order
    insert    the other way round

A peer that does not answer, or whose bytes do not verify, is a miss.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from connectors.control import MAX_TIMEOUT_S, ControlRefusedError
from connectors.lookup_messages import (
    MAX_BLOCKS,
    VERSION,
    Answer,
    Done,
    Fetch,
    Forget,
    Insert,
    Join,
    Joined,
    Release,
    Request,
    Reserve,
    Reserved,
    Select,
    Selected,
    identity_fields,
)
from connectors.pipe import Pipe, PipeClosedError, PipeEnd
from connectors.receive import receive_verified
from connectors.restripe import Landing
from connectors.wire.stream import seconds_left
from kvstore.errors import KVStoreError
from kvstore.jobs import Indices, IoPool, PooledReadJob, ReadJob, ReadOperation
from kvstore.keys import BlockKey
from kvstore.planes import Planes
from kvstore.slot import Rows, Slots
from kvstore.tiers.base import TierStats
from kvstore.tiers.health import TierHealth

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Answer)
Ask = Callable[[Request, float], Answer]
"""Ask the peer, with a deadline in seconds; raises KVStoreError where it does not answer."""

_JOIN_S: Final = 5.0
_CLOSE_S: Final = 5.0


class PeerError(KVStoreError):
    """A peer does not do what it was asked for."""


@dataclass(slots=True)
class RemoteSelection:
    """Leading blocks that the peer holds for us; of none there is no number.

    Attributes:
        is_open: more of the same hand-over may come.
    """

    number: int
    keys: list[BlockKey]
    namespace: bytes
    left: int  # to be read
    is_open: bool = False


class RemotePeer:
    """Thread-safe.

    Args:
        planes: whose slots blocks come to.
        make_end: a pipe's client end over rows, those of ``planes`` or of ``landing``.
        landing: where blocks come to first, of a peer of another tensor parallelism.
    """

    def __init__(
        self,
        name: str,
        ask: Ask,
        planes: Planes,
        transport: str,
        make_end: Callable[[Rows], PipeEnd],
        landing: Landing | None = None,
    ) -> None:
        self.name, self._landing = name, landing
        self._ask, self._planes, self._transport, self._make_end = ask, planes, transport, make_end
        self._health = TierHealth(f"peer {name}")
        self._pool = IoPool(f"kvstore-peer-{name}", 1)  # its thread alone uses the pipe
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="kvstore-peer-ask")
        self._pipe: Pipe | None = None
        self._pipe_number = 0
        self._closed = False
        self._lock = threading.Lock()
        self._stats = TierStats(name="peer")

    def select(self, keys: Sequence[BlockKey], deadline: float, hand_over: int = 0) -> RemoteSelection:
        """Have the peer hold the longest prefix that it has; none where it does not answer.

        Args:
            hand_over: number of the claim that is ours; 0: whatever is there.
        """
        namespace, left_s = self._planes.current()[1], min(MAX_TIMEOUT_S, deadline - time.monotonic())
        nothing, wanted = RemoteSelection(0, [], namespace, 0), list(keys[:MAX_BLOCKS])
        if left_s <= 0 or not self._health.allow():
            return nothing
        try:
            answer = self._asked(Select(namespace, b"".join(wanted), left_s, hand_over), left_s, Selected)
            self._health.recover()
        except ControlRefusedError as e:
            logger.warning("peer %s gives nothing: %s", self.name, e)
            return nothing
        except KVStoreError as e:
            self._health.fail(e)
            return nothing
        n = answer.num_blocks if answer.num_blocks <= len(wanted) else 0
        self._count(miss_blocks=0 if n else len(wanted))
        return RemoteSelection(answer.selection, wanted[:n], namespace, n, answer.is_open)

    def read(self, selection: RemoteSelection, first: int, host_slots: Slots, deadline: float) -> ReadJob:
        """Blocks ``first`` on into slots; see `kvstore.jobs.ReadJob`. They are verified as they come."""
        keys = selection.keys[first : first + len(host_slots)]
        landed = np.zeros(len(keys), dtype=np.bool_)

        def run() -> None:
            step = len(keys) if self._landing is None else len(self._landing.rows)
            for i in range(0, len(keys), step):
                part = slice(i, min(i + step, len(keys)))
                landed[part] = self._fetch(selection, first + i, keys[part], host_slots[part], deadline)

        def verify(indices: Indices) -> list[bool]:
            good: list[bool] = landed[indices].tolist()
            num_good = sum(good)
            self._count(hit_blocks=num_good, corrupt_chunks=len(indices) - num_good)
            return good

        def failed(error: BaseException, indices: Indices) -> None:
            self._count(failed_chunks=len(indices))
            logger.warning("%d blocks did not come from peer %s: %s", len(indices), self.name, error)

        operation = ReadOperation(list(range(len(host_slots))), run)
        return PooledReadJob(self._pool, [operation], verify, failed, deadline)

    def insert(
        self,
        keys: Sequence[BlockKey],
        seal: Callable[[list[int]], Slots],
        deadline: float,
        *,
        room_s: float = float("inf"),
        hand_over: int = 0,
    ) -> bool:
        """Put a prefix into the peer's buffer; False where it has no room, or does not answer.

        Args:
            seal: given which of the keys are wanted, has their slots ready to be sent.
            room_s: how long the peer may wait for room, within the deadline.
            hand_over: number of what is pushed; 0: it is of none.
        """
        if len(keys) > MAX_BLOCKS or not self._health.allow():
            return False
        try:
            namespace, left_s = self._planes.current()[1], min(MAX_TIMEOUT_S, max(0.0, deadline - time.monotonic()))
            room_s = min(left_s, room_s)
            reserve = Reserve(namespace, b"".join(keys), room_s, hand_over)
            reserved = self._asked(reserve, room_s + _JOIN_S, Reserved)
            self._health.recover()
            if not reserved.ticket or any(i >= len(keys) for i in reserved.wanted):
                return False
            slots = seal(reserved.wanted)
            sent = self._pool.submit(lambda: self._send(reserved.ticket, slots, deadline), deadline)
            sent.result()  # slots are the caller's again when they are not read any more; each step has a deadline
        except ControlRefusedError as e:
            logger.warning("peer %s takes nothing: %s", self.name, e)
            return False
        except Exception as e:
            self._health.fail(e)
            logger.warning("%d blocks were not inserted at peer %s: %s", len(keys), self.name, e)
            return False
        return True

    def forget(self, hand_over: int) -> None:
        """Nothing more of it is wanted; does not wait. A peer that is down has its lease."""
        if self._health.on:
            with contextlib.suppress(RuntimeError):  # it was closed
                self._asker.submit(self._told, Forget(hand_over))

    @property
    def is_up(self) -> bool:
        """Whether it answered, when it was last asked."""
        return self._health.on

    def stats(self) -> TierStats:
        with self._lock:
            self._stats.state = "on" if self._health.on else "off"
            self._stats.problem = "" if self._health.on else str(self._health.last_error)
            return self._stats

    def close(self) -> None:
        """Wake up what waits for the peer, and join the threads."""
        self._closed = True
        if self._pipe is not None:
            self._pipe.close()
        self._pool.close(_CLOSE_S)
        self._asker.shutdown(wait=True, cancel_futures=True)
        if self._landing is not None:
            self._landing.close()

    # -- in the pool's thread

    def _fetch(
        self, selection: RemoteSelection, first: int, keys: Sequence[BlockKey], host_slots: Slots, deadline: float
    ) -> NDArray[np.bool_]:
        """Bring blocks into host slots; shape (n,): False where one is not what it should be."""
        start, planes, landing, n = time.monotonic(), self._planes, self._landing, len(keys)
        pipe = self._joined(deadline)
        left_s = seconds_left(deadline)  # before anything is asked for: the pipe stays whole
        codec, rows, slots = planes.codec, planes.arena.rows, host_slots
        if landing is not None:
            codec, rows, slots = landing.codec, landing.rows, np.arange(n)
        with self._closed_by_errors(pipe):  # of the answer, too: what was asked for may be on its way all the same
            self._asked(Fetch(selection.number, first, n, self._pipe_number), left_s, Done)
            good = receive_verified(pipe, codec, rows, slots, keys, selection.namespace, deadline)
        if landing is not None:
            landing.bring(np.flatnonzero(good), keys, host_slots, selection.namespace)
        self._count(read_nbytes=n * codec.fmt.slot_nbytes, read_s=time.monotonic() - start)
        selection.left -= n
        if selection.left <= 0:
            self._told(Release(selection.number))
        return good

    def _send(self, ticket: int, slots: Slots, deadline: float) -> None:
        pipe = self._joined(deadline)
        left_s = seconds_left(deadline)
        answer = self._asker.submit(self._asked, Insert(ticket, self._pipe_number), left_s, Done)
        answer.add_done_callback(lambda done: pipe.close() if done.exception() is not None else None)
        with self._closed_by_errors(pipe):
            pipe.send_slots(slots, left_s)
            answer.result(max(0.0, deadline - time.monotonic()))
        self._count(written_nbytes=len(slots) * self._planes.fmt.slot_nbytes)

    def _told(self, request: Request) -> None:
        with contextlib.suppress(KVStoreError):  # its lease does it
            self._asked(request, _JOIN_S, Done)

    @contextlib.contextmanager
    def _closed_by_errors(self, pipe: Pipe) -> Iterator[None]:
        try:
            yield
        except BaseException:
            pipe.close()
            self._pipe = None
            raise

    def _joined(self, deadline: float) -> Pipe:
        """The pipe, made with the first request, and anew after one that failed."""
        if self._pipe is not None and not self._pipe.is_closed:
            return self._pipe
        if self._pipe is not None:  # the peer has closed it, as it was not used
            self._pipe.close()
            self._pipe = None
        rows, peer = self._planes.arena.rows, self._planes.identity
        if self._landing is not None:
            rows, peer = self._landing.rows, self._landing.peer
        end, timeout_s = self._make_end(rows), max(0.0, min(_JOIN_S, deadline - time.monotonic()))
        try:
            join = Join(VERSION, identity_fields(peer), self._transport, end.hello())
            joined = self._asked(join, timeout_s, Joined)
            self._pipe, self._pipe_number = end.join(joined.hello, timeout_s), joined.pipe
        except BaseException:
            end.close()
            raise
        if self._closed:  # meanwhile: nobody else closes it
            self._pipe.close()
            raise PipeClosedError("the pipe was closed")
        return self._pipe

    def _asked(self, request: Request, timeout_s: float, kind: type[T]) -> T:
        answer = self._ask(request, min(timeout_s, MAX_TIMEOUT_S))
        if not isinstance(answer, kind):
            raise PeerError(f"peer {self.name} answers {type(request).__name__} with {type(answer).__name__}")
        return answer

    def _count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)
