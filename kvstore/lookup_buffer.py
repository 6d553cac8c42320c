"""`LookupBuffer`: KV that is inserted for somebody to take. As in SQL, ``drop_select`` returns and removes.

Keys are exact hashes, and what is asked for is a prefix: the longest part of it that is there is
selected. Everything is bounded: what is inserted by memory, how long it stays by a lease, and
each wait by a deadline.

`LocalLookupBuffer` keeps blocks in the host memory of `kvstore.planes.Planes`, pinned:

    insert / hold   a claim on each key, for `lease_s`; a key may have several (prompts share prefixes)
    select          takes the claim of one item, or the oldest, on each leading key; what has none left can be
                    found no more
    release         the selected slots are free again. Nothing else frees them: who selects knows when the last
                    byte of them was read
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import numpy as np
import torch

from kvstore.config import HostTierConfig, StoreConfig
from kvstore.copier import Copier
from kvstore.errors import ConfigError, NoRoomError, StoreClosedError
from kvstore.identity import KVIdentity
from kvstore.keys import BlockKey, keys_to_array
from kvstore.manager import LoadLease
from kvstore.planes import Planes
from kvstore.slot import Slots

logger = logging.getLogger(__name__)

_JOIN_S: Final = 5.0
_POLL_S: Final = 0.2


class LookupBuffer(ABC):
    """Thread-safe."""

    @abstractmethod
    def insert(self, keys: Sequence[BlockKey], blocks: torch.Tensor, *, timeout_s: float) -> bool:
        """Add a prefix, all of it or nothing; it is copied when this returns.

        Args:
            blocks: shape (n, *layout.block_shape), one for each key.
        Returns:
            False where no room came free in time.
        Raises:
            NoRoomError: it is larger than the whole buffer.
            ConfigError: blocks are of another shape or dtype, or not as many as keys; or a key
                is there twice.
            StoreClosedError: the buffer was closed.
        """

    @abstractmethod
    def drop_select(self, keys: Sequence[BlockKey], out: torch.Tensor, *, timeout_s: float) -> int:
        """Take the longest stored prefix of keys out of the buffer and into ``out[:n]``; returns n.

        Of two who ask at once one gets a block that was inserted once. What was taken and could
        not be brought over by the deadline is lost: it counts as a miss.

        Raises:
            ConfigError: out is of another shape or dtype, or not contiguous.
            StoreClosedError: the buffer was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True, eq=False)
class Item:
    """A claim on each key of a prefix, until they are taken or the lease runs out.

    Attributes:
        number: random, so that who was told of one cannot name another.
        hand_over: of what was pushed here, the item's number at the peer that pushed it; 0: it was not.
        is_reserved: who claims them fills them, too.
    """

    number: int
    keys: list[BlockKey]
    expires: float
    hand_over: int = 0
    is_reserved: bool = False
    left: set[BlockKey] = field(default_factory=set)  # keys whose claim was not taken


@dataclass(slots=True, eq=False)
class Selection:
    """Leading blocks that were taken out: pinned until `LocalLookupBuffer.release`."""

    keys: list[BlockKey]
    lease: LoadLease

    @property
    def slots(self) -> Slots:
        return self.lease.slots

    def __len__(self) -> int:
        return len(self.keys)


class LocalLookupBuffer(LookupBuffer):
    """Args:
    planes: of one block a chunk. Others may use them too: what is in the buffer is pinned.
    lease_s: how long what nobody takes stays.
    """

    _owns_planes = False

    def __init__(self, planes: Planes, *, lease_s: float) -> None:
        if planes.fmt.blocks_per_chunk != 1:
            raise ConfigError(f"blocks_per_chunk: {planes.fmt.blocks_per_chunk}; a lookup buffer takes 1")
        if lease_s <= 0:
            raise ConfigError(f"lease_s: {lease_s!r}; give a number of seconds above 0")
        self._planes, self._manager, self._lease_s = planes, planes.manager, lease_s
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)  # something was published, or a claim has ended
        self._items: dict[int, Item] = {}
        self._claims: dict[BlockKey, deque[Item]] = {}  # oldest first
        self._pinned: dict[BlockKey, int] = {}  # slots of claimed keys that are there
        self._selections: set[Selection] = set()
        self._stop = threading.Event()
        self._reaper = threading.Thread(target=self._reap, name="kvstore-leases", daemon=True)
        self._reaper.start()

    @classmethod
    def open(cls, identity: KVIdentity, *, num_blocks: int, lease_s: float = 60.0) -> Self:
        """A buffer with memory of its own."""
        planes = Planes(StoreConfig(identity=identity, host=HostTierConfig(num_blocks=num_blocks)))
        buffer = cls(planes, lease_s=lease_s)
        buffer._owns_planes = True
        return buffer

    # -- tensors

    def insert(self, keys: Sequence[BlockKey], blocks: torch.Tensor, *, timeout_s: float) -> bool:
        copier = self._copier()
        copier.check(blocks, "blocks")
        if len(keys) != len(blocks):
            raise ConfigError(f"blocks: {len(blocks)}, and {len(keys)} keys; give one for each")
        deadline, current = time.monotonic() + timeout_s, self._planes.current()
        found = self.reserve(keys, deadline)
        if found is None:
            return False
        item, absent, slots = found
        try:
            copier.store(blocks[torch.tensor(absent, dtype=torch.int64)], slots)
        except BaseException:
            self.give_back(item, slots)
            raise
        self.publish([keys[i] for i in absent], slots, current, item)
        return True

    def drop_select(self, keys: Sequence[BlockKey], out: torch.Tensor, *, timeout_s: float) -> int:
        copier = self._copier()
        copier.check(out, "out")
        if not out.is_contiguous():
            raise ConfigError("out: not contiguous; give a contiguous tensor")
        selection = self.select(keys[: len(out)])
        try:
            copier.load(selection.slots, selection.lease.positions, out)
        finally:
            self.release(selection)
        return len(selection)

    # -- slots, for who fills and reads the planes' memory without a tensor

    def reserve(
        self, keys: Sequence[BlockKey], deadline: float, *, hand_over: int = 0
    ) -> tuple[Item, list[int], Slots] | None:
        """Claim keys and take a slot for each that is not there, to be filled; all of them or, at the deadline, none.
        The lease begins when there is room.

        Args:
            hand_over: see `Item`.
        Returns:
            The claim, which of the keys the slots are for, and the slots: for `publish` or `give_back`.
        Raises:
            NoRoomError: there will never be so much room.
            ConfigError: a key is there twice.
        """
        self._check_open()
        if len(keys) > self._manager.num_slots:
            raise NoRoomError(f"{len(keys)} blocks are more than the whole buffer, {self._manager.num_slots}")
        if len(set(keys)) < len(keys):
            raise ConfigError("keys: one is there twice; the keys of a prefix all differ")
        item = self.hold(keys, deadline + self._lease_s, is_reserved=True)  # what is there cannot go meanwhile
        absent = np.flatnonzero(~self._manager.contains(keys)).tolist()
        slots = self._manager.reserve_all(len(absent), deadline)
        if slots is None:
            self.cancel(item)
            return None
        item.hand_over, item.expires = hand_over, time.monotonic() + self._lease_s
        return item, absent, slots

    def publish(
        self, keys: Sequence[BlockKey], slots: Slots, current: tuple[int, bytes], item: Item | None = None
    ) -> None:
        """Filled slots, one for each key, can be selected by who claims them.

        Args:
            current: see `Planes.publish`.
            item: that they were reserved for; what nobody claims any more by now is dropped.
        """
        ready = self._planes.publish(slots, keys_to_array(keys)[:, None, :], current, pins=1)
        with self._lock:
            claimed = [key for key in keys if key in self._claims]
            self._pin(claimed)  # whoever has a claim finds them
            self._came.notify_all()
        self._manager.unpin(ready)  # before that nobody else may evict them
        if item is not None and len(claimed) < len(keys):
            self._manager.drop(list(set(keys).difference(claimed)))

    def give_back(self, item: Item, slots: Slots) -> None:
        """What was reserved will not be filled."""
        self._manager.give_back(slots)
        self.cancel(item)

    def hold(self, keys: Sequence[BlockKey], expires: float | None = None, *, is_reserved: bool = False) -> Item:
        """Claim keys, of which some may be published later; until then they have room that is not theirs yet.

        Args:
            expires: on the clock of `time.monotonic`; by default the lease begins now.
        """
        expires = time.monotonic() + self._lease_s if expires is None else expires
        item = Item(secrets.randbits(63) or 1, list(keys), expires, is_reserved=is_reserved, left=set(keys))
        with self._lock:
            self._items[item.number] = item
            for key in item.left:
                self._claims.setdefault(key, deque()).append(item)
            self._pin(keys)
        return item

    def cancel(self, item: Item) -> None:
        """Give up what is left of a claim."""
        with self._lock:
            self._end(item)

    def forget(self, number: int) -> None:
        """As `cancel`, of the item with this number; there may be none."""
        with self._lock:
            item = self._items.get(number)
            if item is not None:
                self._end(item)

    def abandon(self, keys: Iterable[BlockKey]) -> None:
        """These will not come, unless they are there: claims on them, and on what lies behind them, end. But for
        those of who is filling them."""
        with self._lock:
            for key in keys:
                claims = () if key in self._pinned else tuple(self._claims.get(key, ()))
                for item in claims:
                    if not item.is_reserved:
                        behind = item.keys[item.keys.index(key) :]
                        for one in item.left.intersection(behind):
                            self._take(one, item)

    def wait_for(self, item: Item, deadline: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all that is left of a claim is there; False: it has ended, or nobody waits any more.

        Args:
            is_over: asked now and then; where it says so nobody waits any more.
        """
        with self._came:
            while not is_over() and item.number in self._items:
                if item.left <= self._pinned.keys():
                    return True
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._came.wait(min(left_s, _POLL_S))
        return False

    def settle(self, hand_over: int) -> None:
        """End the claim on what was pushed: who it was for has it. It stays, until the room is needed."""
        with self._lock:
            for item in [item for item in self._items.values() if item.hand_over == hand_over != 0]:
                self._end(item, drop=False)

    def select(self, keys: Sequence[BlockKey], number: int = 0) -> Selection:
        """Take the leading keys that are there and claimed; atomic.

        Args:
            number: of the item whose claims are taken; 0: of each key the oldest.
        """
        self._check_open()
        with self._lock:
            item = self._items.get(number)
            wanted = list(dict.fromkeys(keys))  # a peer may name one twice

            def may_take(key: BlockKey) -> bool:
                return key in self._pinned and (not number or (item is not None and key in item.left))

            n = next((i for i, key in enumerate(wanted) if not may_take(key)), len(wanted))
            lease = self._manager.prepare_load(wanted[:n])
            taken = wanted[: len(lease)]
            for key in taken:
                self._take(key, item or self._claims[key][0])
            return self._selected(taken, lease)

    def is_open(self, number: int) -> bool:
        """Whether something is left to be taken of the item with this number, or is on its way."""
        return number in self._items

    def borrow(self, item: Item) -> Selection:
        """Pin what is left of a claim and leave it claimed: `cancel` it once it is somewhere else."""
        with self._lock:
            keys = [key for key in item.keys if key in item.left]
            lease = self._manager.prepare_load(keys)
            return self._selected(keys[: len(lease)], lease)

    def release(self, selection: Selection) -> None:
        """Nobody reads the slots any more: they may be used for something else. May be called twice."""
        with self._lock:
            if selection in self._selections:
                self._selections.remove(selection)
                self._manager.release(selection.lease)

    def usage(self) -> tuple[int, int]:
        """(blocks that wait to be taken, blocks that were taken and not released)."""
        with self._lock:
            return len(self._pinned), sum(map(len, self._selections))

    def reset(self) -> None:
        """Nothing that was inserted, or is on its way, is ever found again; see `Planes.reset`."""
        self._planes.reset()
        with self._lock:
            for item in list(self._items.values()):
                self._end(item)

    def close(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._reaper.join(_JOIN_S)
        if self._owns_planes:
            self._planes.close()

    # -- inside

    def _copier(self) -> Copier:
        self._check_open()
        return Copier(self._planes.identity.layout, 1, self._planes.arena.rows)

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise StoreClosedError("the lookup buffer was closed")

    def _selected(self, keys: list[BlockKey], lease: LoadLease) -> Selection:
        selection = Selection(keys, lease)
        self._selections.add(selection)
        return selection

    def _pin(self, keys: Sequence[BlockKey]) -> None:
        """Pin those that are there, once for all claims."""
        for key in keys:
            if key not in self._pinned:
                lease = self._manager.prepare_load([key])
                if len(lease):
                    self._pinned[key] = int(lease.slots[0])

    def _take(self, key: BlockKey, item: Item, *, drop: bool = True) -> None:
        """End an item's claim on a key; with the last one the key goes, or can be evicted."""
        claims = self._claims[key]
        claims.remove(item)
        item.left.discard(key)
        if not item.left:
            self._items.pop(item.number, None)
            self._came.notify_all()
        if claims:
            return
        del self._claims[key]
        slot = self._pinned.pop(key, None)
        if slot is not None:
            if drop:
                self._manager.drop([key])
            self._manager.unpin(np.array([slot]))

    def _end(self, item: Item, *, drop: bool = True) -> None:
        for key in list(item.left):
            self._take(key, item, drop=drop)
        self._items.pop(item.number, None)

    def _reap(self) -> None:
        """Runs in a thread: end what has run out."""
        while not self._stop.wait(min(1.0, self._lease_s / 4)):
            now = time.monotonic()
            with self._lock:
                for item in [item for item in self._items.values() if item.expires <= now]:
                    logger.info("nobody took %d of %d blocks in time", len(item.left), len(item.keys))
                    self._end(item)
