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
from kvstore.keys import BlockKey
from kvstore.lookup_buffer import LocalLookupBuffer, Selection
from kvstore.planes import Planes
from kvstore.slot import Slots

MOST_OPEN: Final = 1024
_SEALED_AT_ONCE_NBYTES: Final = 4 << 20


class Taken:
    """One selection. Thread-safe.

    Attributes:
        peer: who may fetch from it.
        expires: on the clock of `time.monotonic`; put off by each fetch.
    """

    def __init__(self, peer: str, selection: Selection, expires: float, give_back: Callable[[Selection], None]) -> None:
        self.peer, self.selection, self.expires = peer, selection, expires
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
            if self._ended:
                return
            self._ended, is_free = True, not self._num_users
        if is_free:
            self._give_back(self.selection)

    def _leave(self) -> None:
        with self._lock:
            self._num_users -= 1
            is_free = self._ended and not self._num_users
        if is_free:
            self._give_back(self.selection)


class Selections:
    """Args:
    hold_s: how long one stays that its peer does not ask for.
    """

    def __init__(self, buffer: LocalLookupBuffer, planes: Planes, numbers: Iterator[int], hold_s: float) -> None:
        self._buffer, self._planes, self._numbers, self._hold_s = buffer, planes, numbers, hold_s
        self._piece = max(1, _SEALED_AT_ONCE_NBYTES // planes.fmt.slot_nbytes)
        self._lock = threading.Lock()
        self._taken: dict[int, tuple[Taken, list[Future[bool]]]] = {}
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-hand-over-sealer")

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, peer: str, keys: list[BlockKey], request: Select) -> Selected:
        """Take blocks out of the buffer, and begin to hash them.

        Raises:
            ControlRefusedError: the peer is of another namespace, or too many are open.
        """
        if request.namespace != self._planes.current()[1]:
            raise ControlRefusedError("another model, or another epoch")
        if len(self._taken) >= MOST_OPEN:
            raise ControlRefusedError(f"{MOST_OPEN} selections are open; release some")
        selection = self._buffer.select(keys, request.hand_over)
        is_open = bool(request.hand_over) and self._buffer.is_open(request.hand_over)
        if not len(selection):
            self._buffer.release(selection)
            return Selected(0, 0, is_open)
        taken = Taken(peer, selection, self._expiry(request.timeout_s), self._buffer.release)
        sealed = [
            self._sealer.submit(self._seal, taken, slice(start, start + self._piece), request.namespace)
            for start in range(0, len(selection), self._piece)
        ]
        with self._lock:
            number = next(self._numbers)
            self._taken[number] = taken, sealed
        return Selected(number, len(selection), is_open)

    def find(self, peer: str, number: int, end: int) -> Taken | None:
        """A peer's selection of at least ``end`` blocks; it stays for another while."""
        with self._lock:
            taken, _ = self._taken.get(number, (None, None))
            if taken is None or taken.peer != peer or end > len(taken.selection):
                return None
            taken.expires = max(taken.expires, self._expiry(self._hold_s))
            return taken

    def sealed(self, number: int, first: int, end: int, deadline: float) -> Slots | None:
        """Slots of blocks [first, end), ready to be sent; None where the selection has ended.

        Raises:
            TimeoutError: the deadline has passed.
        """
        with self._lock:
            taken, sealed = self._taken.get(number, (None, []))
        if taken is None:
            return None
        for piece in sealed[first // self._piece : -(-end // self._piece)]:
            if not piece.result(max(0.0, deadline - time.monotonic())):
                return None
        slots: Slots = taken.selection.slots[first:end]
        return slots

    def end(self, peer: str, number: int) -> None:
        """Give it back; there may be none."""
        with self._lock:
            taken, _ = self._taken.get(number, (None, None))
            if taken is None or taken.peer != peer:
                return
            del self._taken[number]
        taken.end()

    def end_expired(self) -> None:
        now = time.monotonic()
        self._end_where(lambda taken: taken.expires <= now)

    def end_all_of(self, peer: str) -> None:
        self._end_where(lambda taken: taken.peer == peer)

    def close(self) -> None:
        """End all of them; what is being sent keeps its slots until it is."""
        self._end_where(lambda _: True)
        self._sealer.shutdown(wait=True, cancel_futures=True)

    def _end_where(self, is_over: Callable[[Taken], bool]) -> None:
        with self._lock:
            ended = [(number, taken) for number, (taken, _) in self._taken.items() if is_over(taken)]
            for number, _ in ended:
                del self._taken[number]
        for _, taken in ended:
            taken.end()

    def _expiry(self, wanted_s: float) -> float:
        return time.monotonic() + min(wanted_s, self._hold_s)

    def _seal(self, taken: Taken, part: slice, namespace: bytes) -> bool:
        """In the sealing thread; False where the selection has ended."""
        with taken.use() as is_mine:
            if is_mine:
                self._planes.seal(taken.selection.slots[part], taken.selection.keys[part], namespace)
            return is_mine
