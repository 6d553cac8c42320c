"""What peers have taken out of the buffer, and not released yet.

    taken -> [sealing] -> [sending] ... -> ended -> the slots are free, once the last seal and send are done

A selection ends when its peer releases it, or has not asked for any of it for a while. Whoever
writes or reads its slots says so with `Taken.use`: an end does not take them away from below.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from connectors.control import ControlRefusedError
from connectors.lookup_messages import Select, Selected
from connectors.lookup_service.held import Held
from kvstore.keys import BlockKey
from kvstore.lookup_buffer import LocalLookupBuffer, Selection
from kvstore.planes import Planes
from kvstore.slot import Slots

_SEALED_AT_ONCE_NBYTES: Final = 4 << 20


class Taken:
    """One selection. Thread-safe.

    Attributes:
        peer: who may fetch from it.
        expires: put off by each fetch.
        sealed: of each ``piece`` of its blocks, whether it could still be sealed.
    """

    def __init__(self, peer: str, selection: Selection, expires: float, give_back: Callable[[Selection], None]) -> None:
        self.peer, self.selection, self.expires = peer, selection, expires
        self.sealed: list[Future[bool]] = []
        self._give_back = give_back
        self._lock = threading.Lock()
        self._num_users, self._ended = 0, False

    @contextmanager
    def use(self) -> Iterator[bool]:
        """Keeps the slots what they are meanwhile; False: they are somebody else's by now."""
        with self._lock:
            may = not self._ended
            self._num_users += may
        try:
            yield may
        finally:
            if may:
                self._leave()

    def end(self) -> None:
        """Nobody begins to use it any more. May be called twice."""
        with self._lock:
            is_free = not self._ended and not self._num_users
            self._ended = True
        if is_free:
            self._give_back(self.selection)

    def _leave(self) -> None:
        with self._lock:
            self._num_users -= 1
            is_free = self._ended and not self._num_users
        if is_free:
            self._give_back(self.selection)


class Selections(Held[Taken]):
    """Args:
    hold_s: how long one stays that its peer does not ask for.
    """

    def __init__(self, buffer: LocalLookupBuffer, planes: Planes, numbers: Iterator[int], hold_s: float) -> None:
        super().__init__("selections", numbers)
        self._buffer, self._planes, self._hold_s = buffer, planes, hold_s
        self._piece = max(1, _SEALED_AT_ONCE_NBYTES // planes.fmt.slot_nbytes)
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-hand-over-sealer")

    def take(self, peer: str, keys: list[BlockKey], request: Select) -> Selected:
        """Take blocks out of the buffer, and begin to hash them.

        Raises:
            ControlRefusedError: the peer is of another namespace, or too many are open.
        """
        if request.namespace != self._planes.current()[1]:
            raise ControlRefusedError("another model, or another epoch")
        self.check_room()
        selection = self._buffer.select(keys, request.hand_over)
        is_open = bool(request.hand_over) and self._buffer.is_open(request.hand_over)
        if not len(selection):
            self._buffer.release(selection)
            return Selected(0, 0, is_open)
        expires = time.monotonic() + min(request.timeout_s, self._hold_s)
        taken = Taken(peer, selection, expires, self._buffer.release)
        taken.sealed = [
            self._sealer.submit(self._seal, taken, slice(start, start + self._piece), request.namespace)
            for start in range(0, len(selection), self._piece)
        ]
        return Selected(self.add(taken), len(selection), is_open)

    def find_blocks(self, peer: str, number: int, end: int) -> Taken | None:
        """A peer's selection of at least ``end`` blocks; it stays for another while."""
        taken = self.find(peer, number)
        if taken is None or end > len(taken.selection):
            return None
        taken.expires = max(taken.expires, time.monotonic() + self._hold_s)
        return taken

    def sealed(self, taken: Taken, first: int, end: int, deadline: float) -> Slots | None:
        """Slots of blocks [first, end), ready to be sent; None where the selection had ended before they were.

        Raises:
            TimeoutError: the deadline has passed.
        """
        for piece in taken.sealed[first // self._piece : -(-end // self._piece)]:
            if not piece.result(max(0.0, deadline - time.monotonic())):
                return None
        slots: Slots = taken.selection.slots[first:end]
        return slots

    def close(self) -> None:
        """End all of them; what is being sent keeps its slots until it is."""
        self.end_where(lambda _: True)
        self._sealer.shutdown(wait=True, cancel_futures=True)

    def _seal(self, taken: Taken, part: slice, namespace: bytes) -> bool:
        """In the sealing thread; False where the selection has ended."""
        with taken.use() as is_mine:
            if is_mine:
                self._planes.seal(taken.selection.slots[part], taken.selection.keys[part], namespace)
            return is_mine
