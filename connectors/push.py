"""Pushes: what a prompt has left here is inserted at its consumer before that asks for it.

    claimed -> [all of it published] -> pinned -> inserted at the consumer -> the claim ends
                                               -> or it could not be: it can still be pulled

A consumer that asks while its push is under way is answered once that has ended: nothing goes twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from connectors.remote_peer import RemotePeer
from kvstore.lookup_buffer import Item, LocalLookupBuffer
from kvstore.planes import Planes
from kvstore.slot import Slots

logger = logging.getLogger(__name__)

_THREADS: Final = 4
_MOST: Final = 256  # under way or waiting; what comes then is pulled
_ROOM_S: Final = 1.0  # for a consumer to have room


class Pushes:
    """Args:
    transfer_s: deadline of one push.
    """

    def __init__(self, buffer: LocalLookupBuffer, planes: Planes, transfer_s: float) -> None:
        self._buffer, self._planes, self._transfer_s = buffer, planes, transfer_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="kvstore-push")
        self._lock = threading.Lock()
        self._under_way: dict[int, Future[None]] = {}  # by the item's number
        self._num_waiting = 0
        self._stopping = threading.Event()

    def start(self, item: Item, peer: RemotePeer, on_done: Callable[[], None]) -> bool:
        """Push a prefix as soon as all of it is there; False where too many wait already."""
        with self._lock:
            if self._num_waiting >= _MOST or self._stopping.is_set():
                return False
            self._num_waiting += 1
        self._pool.submit(self._run, item, peer, on_done)
        return True

    def under_way(self, number: int) -> Future[None] | None:
        """Done when the push of this item is over; None where it is not under way."""
        return self._under_way.get(number)

    def close(self) -> None:
        """Join the threads; close the peers first, so that none waits for one."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, item: Item, peer: RemotePeer, on_done: Callable[[], None]) -> None:
        try:
            deadline = time.monotonic() + self._transfer_s
            if self._buffer.wait_for(item, deadline, self._stopping.is_set):
                self._push(item, peer, deadline)
        except Exception:
            logger.exception("%d blocks could not be pushed to %s", len(item.keys), peer.name)
        finally:
            with self._lock:
                self._num_waiting -= 1
            on_done()

    def _push(self, item: Item, peer: RemotePeer, deadline: float) -> None:
        over: Future[None] = Future()
        self._under_way[item.number] = over  # first: who asks from here on waits
        selection = self._buffer.borrow(item)

        def seal(wanted: list[int]) -> Slots:
            slots: Slots = selection.slots[wanted]
            self._planes.seal(slots, [selection.keys[i] for i in wanted])
            return slots

        try:
            if peer.insert(selection.keys, seal, deadline, room_s=_ROOM_S, hand_over=item.number):
                self._buffer.cancel(item)
        finally:
            self._buffer.release(selection)
            del self._under_way[item.number]
            over.set_result(None)
