"""What a peer may ask of a lookup buffer here, and what it is answered.

    control thread   handle: checks a request; answers at once what needs no waiting
    a pipe's thread  makes its end, joins, sends, receives; see `lanes`
    sealing thread   hashes what was selected, ahead of the sending; see `selections`
    waiting threads  reserve room, where there is none yet
    reaping thread   ends what peers have let lie, and pipes whose peer is gone

What a peer does not take stays until the buffer's own lease ends. Answers those who may ask; who may is the
control channel's affair.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from connectors.control import ControlRefusedError, Peer
from connectors.lookup_messages import (
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
    differences,
    identity_fields,
    keys_of,
)
from connectors.lookup_service.lanes import Lane, Lanes
from connectors.lookup_service.selections import Selections, Taken
from connectors.lookup_service.tickets import Tickets
from connectors.pipe import Pipe, PipeEnd
from connectors.push import Pushes
from kvstore.keys import BlockKey
from kvstore.lookup_buffer import LocalLookupBuffer
from kvstore.planes import Planes

logger = logging.getLogger(__name__)

MakeEnd = Callable[[bool], PipeEnd]
"""Makes an end over the planes' rows; told whether it is the server's."""

_WAITERS: Final = 16
_REAP_S: Final = 0.5
_CLOSE_S: Final = 10.0


class LookupService:
    """Args:
    make_ends: by the transport's name.
    transfer_s: deadline of one transfer, and of what is held for a peer between two requests.
    pushes: of the same buffer; who asks for what is being pushed waits for that.
    gives: peers may take what is in the buffer.
    takes: peers may insert.
    """

    def __init__(
        self,
        buffer: LocalLookupBuffer,
        planes: Planes,
        make_ends: Mapping[str, MakeEnd],
        *,
        transfer_s: float = 30.0,
        pushes: Pushes | None = None,
        gives: bool = True,
        takes: bool = True,
    ) -> None:
        self._buffer, self._planes, self._make_ends, self._transfer_s = buffer, planes, dict(make_ends), transfer_s
        self._pushes, self._gives, self._takes = pushes, gives, takes
        self._fields = identity_fields(planes.identity)
        numbers = itertools.count(1)
        self._selections = Selections(buffer, planes, numbers, transfer_s)
        self._tickets = Tickets(buffer, planes, numbers, transfer_s)
        self._lanes = Lanes(numbers)
        self._waiters = ThreadPoolExecutor(_WAITERS, thread_name_prefix="kvstore-hand-over-room")
        self._stop = threading.Event()
        self._reaper = threading.Thread(target=self._reap, name="kvstore-hand-over-reaper", daemon=True)
        self._reaper.start()

    def handle(self, peer: Peer, request: Request) -> Answer | Future[Answer]:
        """Answer a peer that was let in; see `connectors.control.ControlServer`. Never waits.

        Raises:
            ControlRefusedError: what it asks for is not done.
        """
        match request:
            case Join():
                return self._join(peer.id, request)
            case Select() | Fetch() | Release() | Forget() if self._gives:
                return self._give(peer.id, request)
            case Reserve() if self._takes:
                return self._reserve(peer.id, request)
            case Insert() if self._takes:
                return self._insert(peer.id, request)
        raise ControlRefusedError("that is not done here")

    def usage(self) -> tuple[int, int, int]:
        """(selections, tickets, pipes) that peers hold."""
        return len(self._selections), len(self._tickets), len(self._lanes)

    def drop_peer(self, peer: str) -> None:
        """A peer is gone: give back what it holds."""
        for held in (self._selections, self._tickets, self._lanes):
            held.end_all_of(peer)

    def close(self) -> None:
        self._stop.set()
        self._reaper.join(_CLOSE_S)
        self._tickets.close()
        self._lanes.close()  # wakes up what sends and receives
        self._waiters.shutdown(wait=True, cancel_futures=True)
        self._selections.close()

    # -- take

    def _give(self, peer: str, request: Select | Fetch | Release | Forget) -> Answer | Future[Answer]:
        match request:
            case Select():
                return self._select(peer, request)
            case Fetch():
                return self._fetch(peer, request)
            case Release():
                self._selections.end(peer, request.selection)
            case Forget():
                self._buffer.forget(request.hand_over)
        return Done()

    def _select(self, peer: str, request: Select) -> Selected | Future[Answer]:
        keys = _keys(request.keys)
        push = None if self._pushes is None else self._pushes.under_way(request.hand_over)
        if push is None:
            return self._selections.take(peer, keys, request)
        answer: Future[Answer] = Future()

        def pushed(_: Future[None]) -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(self._selections.take(peer, keys, request))
                except Exception as e:
                    answer.set_exception(e)

        push.add_done_callback(pushed)
        return answer

    def _fetch(self, peer: str, request: Fetch) -> Answer:
        end = request.first + request.num_blocks
        taken = self._selections.find_blocks(peer, request.selection, end)
        if taken is None:
            raise ControlRefusedError("no such blocks are selected")
        number, first = request.selection, request.first
        self._lanes.of(peer, request.pipe).run(lambda pipe: self._send(pipe, taken, number, first, end))
        return Done()

    def _send(self, pipe: Pipe, taken: Taken, number: int, first: int, end: int) -> None:
        """In the pipe's thread; where it fails the peer sees the pipe close, and the selection is over."""
        deadline = time.monotonic() + self._transfer_s
        try:
            with taken.use() as is_mine:
                slots = self._selections.sealed(taken, first, end, deadline) if is_mine else None
                if slots is None:
                    raise ControlRefusedError("the selection has run out")
                pipe.send_slots(slots, max(0.0, deadline - time.monotonic()))
        except Exception as e:
            logger.warning("%d blocks could not be sent to a peer: %s", end - first, e)
            self._selections.end(taken.peer, number)
            raise

    # -- insert

    def _reserve(self, peer: str, request: Reserve) -> Reserved | Future[Answer]:
        keys = _keys(request.keys)
        at_once = self._tickets.reserve(peer, keys, request, 0.0)
        timeout_s = min(request.timeout_s, self._transfer_s)
        if at_once.ticket or timeout_s <= 0:
            return at_once
        return self._waiters.submit(self._tickets.reserve, peer, keys, request, timeout_s)

    def _insert(self, peer: str, request: Insert) -> Future[Answer]:
        if self._tickets.find(peer, request.ticket) is None:
            raise ControlRefusedError("no such ticket")

        def fill(pipe: Pipe) -> Answer:
            self._tickets.fill(request.ticket, pipe)
            return Done()

        return self._lanes.of(peer, request.pipe).run(fill)

    # -- pipes

    def _join(self, peer: str, request: Join) -> Future[Answer]:
        if request.version != VERSION:
            raise ControlRefusedError(f"version {VERSION} here, {request.version} there")
        if differs := differences(self._fields, request.identity):
            raise ControlRefusedError(f"KV of another identity: {'; '.join(differs)}")
        make_end = self._make_ends.get(request.transport)
        if make_end is None:
            raise ControlRefusedError(f"transport {request.transport!r}; allowed: {', '.join(self._make_ends)}")
        lane = self._lanes.add(peer)
        answer: Future[Answer] = Future()
        answer.set_running_or_notify_cancel()
        lane.open(lambda: make_end(True), request.hello).add_done_callback(lambda hello: _joined(lane, hello, answer))
        return answer

    def _reap(self) -> None:
        """Runs in a thread of its own: peers may never ask again."""
        while not self._stop.wait(_REAP_S):
            try:
                self._selections.end_expired()
                self._tickets.end_expired()
                self._lanes.end_dead()
            except Exception:
                logger.exception("what peers have let lie could not be given back; it is tried again")


def _joined(lane: Lane, hello: Future[bytes], answer: Future[Answer]) -> None:
    error = hello.exception()
    if error is None:
        answer.set_result(Joined(lane.number, hello.result()))
    else:
        answer.set_exception(error)


def _keys(data: bytes) -> list[BlockKey]:
    try:
        return keys_of(data)
    except ValueError as e:
        raise ControlRefusedError(str(e)) from e
