"""Room that peers have in the buffer, and not filled yet.

    reserved -> [receiving] -> published, or given back
    reserved -> given back: its peer has not filled it in time

A ticket can be found until its bytes begin to come: whatever happens before, its room comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from connectors.control import ControlRefusedError
from connectors.lookup_messages import Reserve, Reserved
from connectors.lookup_service.held import Held
from connectors.pipe import Pipe
from connectors.receive import receive_verified
from kvstore.errors import KVStoreError
from kvstore.keys import BlockKey
from kvstore.lookup_buffer import Item, LocalLookupBuffer
from kvstore.planes import Planes
from kvstore.slot import Slots

_LOOK_S: Final = 0.5  # whether it was closed


@dataclass(slots=True, eq=False)
class Ticket:
    """Room for a prefix.

    Attributes:
        keys: that are wanted, one for each slot.
        current: epoch and namespace that they are of.
    """

    peer: str
    item: Item
    keys: list[BlockKey]
    slots: Slots
    current: tuple[int, bytes]
    expires: float
    give_back: Callable[[Item, Slots], None]

    def end(self) -> None:
        self.give_back(self.item, self.slots)


class Tickets(Held[Ticket]):
    """Args:
    hold_s: how long a ticket stays that its peer does not fill; also the deadline of filling it.
    """

    def __init__(self, buffer: LocalLookupBuffer, planes: Planes, numbers: Iterator[int], hold_s: float) -> None:
        super().__init__("tickets", numbers)
        self._buffer, self._planes, self._hold_s = buffer, planes, hold_s
        self._closed = False

    def reserve(self, peer: str, keys: list[BlockKey], request: Reserve, timeout_s: float) -> Reserved:
        """Room for a prefix; may wait for it so long.

        Raises:
            ControlRefusedError: the peer is of another namespace, there will never be so much room, or
                too many tickets are open.
        """
        current = self._planes.current()
        if request.namespace != current[1]:
            raise ControlRefusedError("another epoch")
        self.check_room()
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                until = min(deadline, time.monotonic() + _LOOK_S)
                found = self._buffer.reserve(keys, until, hand_over=request.hand_over)
                if found is not None or until == deadline or self._closed:
                    break
        except KVStoreError as e:
            raise ControlRefusedError(str(e)) from e
        if found is None:
            return Reserved(0, [])
        item, wanted, slots = found
        expires, of_slots = time.monotonic() + self._hold_s, [keys[i] for i in wanted]
        ticket = Ticket(peer, item, of_slots, slots, current, expires, self._buffer.give_back)
        return Reserved(self.add(ticket), wanted)

    def fill(self, number: int, pipe: Pipe) -> None:
        """Receive what a ticket is for.

        Raises:
            ControlRefusedError: it has run out, or what came is not what it is for; the room is given back.
            PipeError: it did not come; likewise.
        """
        ticket = self.take_out(number)
        if ticket is None:
            raise ControlRefusedError("the ticket has run out")
        planes, is_right = self._planes, False
        try:
            good = receive_verified(
                pipe, planes.codec, planes.arena.rows, ticket.slots, ticket.keys,
                ticket.current[1], time.monotonic() + self._hold_s,
            )  # fmt: skip
            is_right = bool(good.all())
        finally:
            if not is_right:
                ticket.end()
        if not is_right:
            raise ControlRefusedError("what came is not what was to be inserted")
        self._buffer.publish(ticket.keys, ticket.slots, ticket.current, ticket.item)

    def close(self) -> None:
        """Nobody waits for room any more, and what is held is given back."""
        self._closed = True
        self.end_where(lambda _: True)
