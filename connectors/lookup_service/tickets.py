"""Room that peers have in the buffer, and not filled yet.

    reserved -> [receiving] -> published, or given back
    reserved -> given back: its peer has not filled it in time

A ticket stays in the table until its bytes begin to come: whatever happens before, its room comes back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from connectors.control import ControlRefusedError
from connectors.lookup_messages import Reserve, Reserved
from connectors.pipe import Pipe
from connectors.receive import receive_verified
from kvstore.errors import KVStoreError
from kvstore.keys import BlockKey, keys_to_array
from kvstore.lookup_buffer import Item, LocalLookupBuffer
from kvstore.planes import Planes
from kvstore.slot import Slots

MOST_OPEN: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    peer: str
    item: Item
    keys: list[BlockKey]  # that are wanted, one for each slot
    slots: Slots
    current: tuple[int, bytes]
    expires: float


class Tickets:
    """Args:
    hold_s: how long a ticket stays that its peer does not fill; also the deadline of filling it.
    """

    def __init__(self, buffer: LocalLookupBuffer, planes: Planes, numbers: Iterator[int], hold_s: float) -> None:
        self._buffer, self._planes, self._numbers, self._hold_s = buffer, planes, numbers, hold_s
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def reserve(self, peer: str, keys: list[BlockKey], request: Reserve, timeout_s: float) -> Reserved:
        """Room for a prefix; may wait for it so long.

        Raises:
            ControlRefusedError: the peer is of another namespace, there will never be so much room, or
                too many tickets are open.
        """
        current = self._planes.current()
        if request.namespace != current[1]:
            raise ControlRefusedError("another epoch")
        if len(self._tickets) >= MOST_OPEN:
            raise ControlRefusedError(f"{MOST_OPEN} tickets are open; fill some")
        try:
            found = self._buffer.reserve(keys, time.monotonic() + timeout_s, hand_over=request.hand_over)
        except KVStoreError as e:
            raise ControlRefusedError(str(e)) from e
        if found is None:
            return Reserved(0, [])
        item, wanted, slots = found
        ticket = Ticket(peer, item, [keys[i] for i in wanted], slots, current, time.monotonic() + self._hold_s)
        with self._lock:
            number = next(self._numbers)
            self._tickets[number] = ticket
        return Reserved(number, wanted)

    def is_of(self, peer: str, number: int) -> bool:
        ticket = self._tickets.get(number)
        return ticket is not None and ticket.peer == peer

    def fill(self, number: int, pipe: Pipe) -> None:
        """Receive what a ticket is for.

        Raises:
            ControlRefusedError: it has run out, or what came is not what it is for; the room is given back.
            PipeError: it did not come; likewise.
        """
        with self._lock:
            ticket = self._tickets.pop(number, None)
        if ticket is None:
            raise ControlRefusedError("the ticket has run out")
        planes, is_right = self._planes, False
        try:
            good = receive_verified(
                pipe, planes.codec, planes.arena.rows, ticket.slots, keys_to_array(ticket.keys),
                ticket.current[1], time.monotonic() + self._hold_s,
            )  # fmt: skip
            is_right = bool(good.all())
        finally:
            if not is_right:
                self._buffer.give_back(ticket.item, ticket.slots)
        if not is_right:
            raise ControlRefusedError("what came is not what was to be inserted")
        self._buffer.publish(ticket.keys, ticket.slots, ticket.current, ticket.item)

    def end_expired(self) -> None:
        now = time.monotonic()
        self._end_where(lambda ticket: ticket.expires <= now)

    def end_all_of(self, peer: str) -> None:
        self._end_where(lambda ticket: ticket.peer == peer)

    def close(self) -> None:
        self._end_where(lambda _: True)

    def _end_where(self, is_over: Callable[[Ticket], bool]) -> None:
        with self._lock:
            ended = {number: ticket for number, ticket in self._tickets.items() if is_over(ticket)}
            for number in ended:
                del self._tickets[number]
        for ticket in ended.values():
            self._buffer.give_back(ticket.item, ticket.slots)
