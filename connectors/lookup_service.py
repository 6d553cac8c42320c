"""Lets peers take what is in a local lookup buffer, and insert: the producer's end.

    control thread   handle: checks a request; answers at once what needs no waiting
    a pipe's thread  joins, sends, receives; one for each pipe, in the order of requests
    sealing thread   hashes what was selected, ahead of the sending

What a peer does not fetch or release is given back after a while; what it does not take stays
until the buffer's own lease ends. Answers to those who may ask; who may is the control
channel's affair.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
from connectors.pipe import Pipe, PipeEnd
from connectors.push import Pushes
from kvstore.errors import KVStoreError
from kvstore.keys import BlockKey, keys_to_array
from kvstore.lookup_buffer import Item, LocalLookupBuffer, Selection
from kvstore.planes import Planes
from kvstore.slot import Slots

logger = logging.getLogger(__name__)

MakeEnd = Callable[[bool], PipeEnd]
"""Makes an end over the planes' rows; told whether it is the server's."""

_MOST_PIPES: Final = 64
_MOST_OPEN: Final = 1024  # selections, and tickets
_JOIN_S: Final = 10.0
_SEALED_AT_ONCE_NBYTES: Final = 4 << 20


@dataclass(slots=True, eq=False)
class _Held:
    """What a peer has open here."""

    peer: str


@dataclass(slots=True, eq=False)
class _Taken(_Held):
    """A selection that a peer may fetch from."""

    selection: Selection
    sealed: list[Future[None]]
    piece: int  # blocks that are sealed at once


@dataclass(slots=True, eq=False)
class _Ticket(_Held):
    """Room that a peer may fill."""

    item: Item
    keys: list[BlockKey]  # that are wanted, one for each slot
    slots: Slots
    current: tuple[int, bytes]
    expires: float


@dataclass(slots=True, eq=False)
class _Lane(_Held):
    """A pipe to a peer, and the one thread that uses it."""

    pool: ThreadPoolExecutor
    pipe: Future[Pipe] = field(default_factory=Future)


class LookupService:
    """Args:
    make_ends: by the transport's name.
    transfer_s: deadline of one transfer, and of what is held for a peer between two requests.
    pushes: of the same buffer; who asks for what is being pushed waits for that.
    """

    def __init__(
        self,
        buffer: LocalLookupBuffer,
        planes: Planes,
        make_ends: Mapping[str, MakeEnd],
        *,
        transfer_s: float = 30.0,
        pushes: Pushes | None = None,
    ) -> None:
        self._buffer, self._planes, self._make_ends, self._transfer_s = buffer, planes, dict(make_ends), transfer_s
        self._pushes = pushes
        self._fields = identity_fields(planes.identity)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._taken: dict[int, _Taken] = {}
        self._tickets: dict[int, _Ticket] = {}
        self._lanes: dict[int, _Lane] = {}
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-hand-over-sealer")
        self._waiters = ThreadPoolExecutor(4, thread_name_prefix="kvstore-hand-over-room")
        self._closed = False

    def handle(self, peer: Peer, request: Request) -> Answer | Future[Answer]:
        """Answer a peer that was let in; see `connectors.control.ControlServer`. Never waits.

        Raises:
            ControlRefusedError: what it asks for is not done.
        """
        self._forget_expired()
        match request:
            case Select():
                return self._select(peer.id, request)
            case Fetch():
                return self._fetch(peer.id, request)
            case Release():
                self._release(peer.id, request.selection)
                return Done()
            case Forget():
                self._buffer.forget(request.hand_over)
                return Done()
            case Join():
                return self._join(peer.id, request)
            case Reserve():
                return self._waiters.submit(self._reserve, peer.id, request)
            case Insert():
                return self._insert(peer.id, request)
        raise ControlRefusedError("not known")

    def usage(self) -> tuple[int, int, int]:
        """(selections, tickets, pipes) that peers hold."""
        with self._lock:
            return len(self._taken), len(self._tickets), len(self._lanes)

    def drop_peer(self, peer: str) -> None:
        """A peer is gone: give back what it holds."""
        for number in self._of(self._taken, peer):
            self._release(peer, number)
        for number in self._of(self._tickets, peer):
            self._end_ticket(number)
        for number in self._of(self._lanes, peer):
            self._end_lane(number)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            held: list[_Held] = [*self._taken.values(), *self._tickets.values(), *self._lanes.values()]
        peers = {one.peer for one in held}
        for peer in peers:
            self.drop_peer(peer)
        for pool in (self._waiters, self._sealer):
            pool.shutdown(wait=True, cancel_futures=True)

    # -- take

    def _select(self, peer: str, request: Select) -> Selected | Future[Answer]:
        keys, pushes = _keys(request.keys), self._pushes
        if not keys or pushes is None or not pushes.is_under_way(keys[0]):
            return self._take(peer, keys, request)

        def wait() -> Answer:
            if not pushes.wait(keys[0], time.monotonic() + min(request.timeout_s, self._transfer_s)):
                return Selected(0, 0)  # nobody waits for it any more
            return self._take(peer, keys, request)

        return self._waiters.submit(wait)

    def _take(self, peer: str, keys: list[BlockKey], request: Select) -> Selected:
        if request.namespace != self._planes.current()[1]:
            raise ControlRefusedError("another model, or another epoch")
        if len(self._taken) >= _MOST_OPEN:
            raise ControlRefusedError(f"{_MOST_OPEN} selections are open; release some")
        selection = self._buffer.select(keys, time.monotonic() + min(request.timeout_s, self._transfer_s))
        if not len(selection):
            self._buffer.release(selection)
            return Selected(0, 0)
        number, piece = next(self._numbers), max(1, _SEALED_AT_ONCE_NBYTES // self._planes.fmt.slot_nbytes)
        sealed = [
            self._sealer.submit(
                self._planes.seal,
                selection.slots[start : start + piece],
                selection.keys[start : start + piece],
                request.namespace,
            )
            for start in range(0, len(selection), piece)
        ]
        with self._lock:
            self._taken[number] = _Taken(peer, selection, sealed, piece)
        return Selected(number, len(selection))

    def _fetch(self, peer: str, request: Fetch) -> Answer:
        taken, lane = self._taken.get(request.selection), self._lanes.get(request.pipe)
        end = request.first + request.num_blocks
        if taken is None or taken.peer != peer or end > len(taken.selection):
            raise ControlRefusedError("no such blocks are selected")
        if lane is None or lane.peer != peer:
            raise ControlRefusedError("no such pipe")
        lane.pool.submit(self._send, lane, request.selection, taken, request.first, end)
        return Done()

    def _send(self, lane: _Lane, number: int, taken: _Taken, first: int, end: int) -> None:
        """In the pipe's thread; where it fails the peer sees the pipe close, and the selection is over."""
        deadline = time.monotonic() + self._transfer_s
        pipe = None
        try:
            pipe = lane.pipe.result(self._transfer_s)
            for sealed in taken.sealed[first // taken.piece : -(-end // taken.piece)]:
                sealed.result(max(0.0, deadline - time.monotonic()))
            taken.selection.expires = deadline + _JOIN_S  # they stay while they are being sent
            pipe.send_slots(taken.selection.slots[first:end], max(0.0, deadline - time.monotonic()))
        except Exception as e:
            logger.warning("%d blocks could not be sent to a peer: %s", end - first, e)
            if pipe is not None:
                pipe.close()
            self._release(taken.peer, number)

    def _release(self, peer: str, number: int) -> None:
        with self._lock:
            taken = self._taken.get(number)
            if taken is None or taken.peer != peer:
                return
            del self._taken[number]
        for sealed in taken.sealed:
            if not sealed.cancel():
                sealed.exception()  # it writes into the slots
        self._buffer.release(taken.selection)

    # -- insert

    def _reserve(self, peer: str, request: Reserve) -> Answer:
        """In a thread that may wait for room."""
        keys, timeout_s = _keys(request.keys), min(request.timeout_s, self._transfer_s)
        if request.namespace != self._planes.current()[1]:
            raise ControlRefusedError("another epoch")
        try:
            found = self._buffer.reserve(keys, time.monotonic() + timeout_s)
        except KVStoreError as e:  # it would never fit
            raise ControlRefusedError(str(e)) from e
        if found is None:
            return Reserved(0, [])
        item, wanted, slots = found
        ticket = _Ticket(peer, item, [keys[i] for i in wanted], slots, self._planes.current(), time.monotonic())
        ticket.expires += self._transfer_s
        with self._lock:
            number = next(self._numbers)
            self._tickets[number] = ticket
        return Reserved(number, wanted)

    def _insert(self, peer: str, request: Insert) -> Future[Answer]:
        lane = self._lanes.get(request.pipe)
        with self._lock:
            ticket = self._tickets.get(request.ticket)
            if ticket is None or ticket.peer != peer or lane is None or lane.peer != peer:
                raise ControlRefusedError("no such ticket, or no such pipe")
            del self._tickets[request.ticket]
        return lane.pool.submit(self._receive, lane, ticket)

    def _receive(self, lane: _Lane, ticket: _Ticket) -> Answer:
        """In the pipe's thread."""
        planes, good = self._planes, False
        try:
            pipe = lane.pipe.result(self._transfer_s)
            for _ in pipe.recv_slots(ticket.slots, self._transfer_s):
                pass
            found = planes.codec.verify(planes.arena.rows, ticket.slots, ticket.current[1])
            good = bool(found.valid.all()) and bool((found.keys[:, 0] == keys_to_array(ticket.keys)).all())
        except Exception as e:
            logger.warning("%d blocks of a peer did not come: %s", len(ticket.keys), e)
        if not good:
            self._buffer.give_back(ticket.item, ticket.slots)
            raise ControlRefusedError("what came is not what was to be inserted")
        self._buffer.publish(ticket.keys, ticket.slots, ticket.current, ticket.item)
        return Done()

    # -- pipes

    def _join(self, peer: str, request: Join) -> Joined:
        if request.version != VERSION:
            raise ControlRefusedError(f"version {VERSION} here, {request.version} there")
        if differs := differences(self._fields, request.identity):
            raise ControlRefusedError(f"KV of another identity: {'; '.join(differs)}")
        make_end = self._make_ends.get(request.transport)
        if make_end is None:
            raise ControlRefusedError(f"transport {request.transport!r}; allowed: {', '.join(self._make_ends)}")
        if len(self._lanes) >= _MOST_PIPES:
            raise ControlRefusedError(f"{_MOST_PIPES} pipes are open")
        end, number = make_end(True), next(self._numbers)
        lane = _Lane(peer, ThreadPoolExecutor(1, thread_name_prefix=f"kvstore-pipe-{number}"))
        with self._lock:
            self._lanes[number] = lane
        hello = end.hello()

        def join() -> None:
            try:
                lane.pipe.set_result(end.join(request.hello, _JOIN_S))
            except Exception as e:
                lane.pipe.set_exception(e)
                end.close()
                logger.warning("a pipe could not be joined: %s", e)

        lane.pool.submit(join)
        return Joined(number, hello)

    def _end_lane(self, number: int) -> None:
        with self._lock:
            lane = self._lanes.pop(number, None)
        if lane is None:
            return

        def close(pipe: Future[Pipe]) -> None:
            if pipe.exception() is None:
                pipe.result().close()

        lane.pipe.add_done_callback(close)  # wakes up its thread
        lane.pool.shutdown(wait=self._closed, cancel_futures=True)

    def _end_ticket(self, number: int) -> None:
        with self._lock:
            ticket = self._tickets.pop(number, None)
        if ticket is not None:
            self._buffer.give_back(ticket.item, ticket.slots)

    def _forget_expired(self) -> None:
        now = time.monotonic()
        with self._lock:
            ended = [(n, taken.peer) for n, taken in self._taken.items() if taken.selection.expires <= now]
            tickets = [n for n, ticket in self._tickets.items() if ticket.expires <= now]
        for number, peer in ended:
            self._release(peer, number)
        for number in tickets:
            self._end_ticket(number)

    def _of(self, held: Mapping[int, _Held], peer: str) -> list[int]:
        with self._lock:
            return [number for number, one in held.items() if one.peer == peer]


def _keys(data: bytes) -> list[BlockKey]:
    try:
        return keys_of(data)
    except ValueError as e:
        raise ControlRefusedError(str(e)) from e
