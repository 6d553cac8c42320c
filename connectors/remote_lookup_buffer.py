"""`PeerIo`: what peers hold, as the I/O service below a host arena; and a peer's buffer as a `LookupBuffer`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from connectors.remote_peer import RemotePeer, RemoteSelection
from kvstore.copier import Copier
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.events import TierEvent
from kvstore.io_service import NOWHERE, IoService, Located
from kvstore.jobs import NothingRead, ReadJob
from kvstore.keys import BlockKey
from kvstore.lookup_buffer import LookupBuffer
from kvstore.planes import Planes
from kvstore.promotion import Promotion
from kvstore.slot import KeyArray, Slots
from kvstore.tiers.base import FoundChunks, TierStats


@dataclass(slots=True, eq=False)
class Holder:
    """A peer that is said to hold a prefix.

    Attributes:
        hand_over: number of the claim there that is ours; 0: whatever it has.
        is_open: more of it may come, as far as is known.
    """

    peer: RemotePeer
    hand_over: int = 0
    is_open: bool = True


class PeerIo(IoService):
    """Reads from whichever peer is said to have a prefix, and stores nothing.

    Args:
        holders_of: given keys, who may have them; they are asked one after the other.
        timeout_s: how long peers are waited for, and hold what they have found.
    """

    def __init__(self, holders_of: Callable[[Sequence[BlockKey]], Sequence[Holder]], timeout_s: float) -> None:
        self._holders_of, self._timeout_s = holders_of, timeout_s

    def find_prefix(self, keys: Sequence[BlockKey]) -> Located:
        """Takes it out of the peer's buffer: what is found must be read."""
        deadline = time.monotonic() + self._timeout_s
        for holder in self._holders_of(keys):
            selection = holder.peer.select(keys, deadline, holder.hand_over)
            holder.is_open = selection.is_open
            if n := len(selection.keys):
                chunks = FoundChunks(np.arange(n), np.ones(n, dtype=np.int64), np.zeros(n, dtype=np.uint64))
                return Located((holder.peer, selection), chunks, "peer")
        return NOWHERE

    def read(self, located: Located, host_slots: Slots, deadline: float) -> ReadJob:
        if not len(located):
            return NothingRead(0)
        peer: RemotePeer
        selection: RemoteSelection
        peer, selection = located.source
        return peer.read(selection, int(located.chunks.places[0]), host_slots, deadline)

    def store(self, host_slots: Slots, keys: KeyArray, namespace: bytes, on_done: Callable[[Slots], None]) -> None:
        on_done(host_slots)

    def flush(self, deadline: float) -> bool:
        return True

    def set_namespace(self, namespace: bytes) -> None:
        """A peer is asked in the namespace of each moment."""

    def purge(self, keys: Sequence[BlockKey]) -> int:
        return 0

    def stats(self) -> list[TierStats]:
        return []

    def take_events(self) -> list[TierEvent]:
        return []

    def close(self) -> None:
        """Peers belong to who made them."""


class RemoteLookupBuffer(LookupBuffer):
    """Args:
    planes: of one block a chunk and without lower tiers; blocks pass through its memory. The buffer's own.
    """

    def __init__(self, peer: RemotePeer, planes: Planes) -> None:
        self._peer, self._planes, self._closed = peer, planes, False
        self._copier = Copier(planes.identity.layout, 1, planes.arena.rows)

    def insert(self, keys: Sequence[BlockKey], blocks: torch.Tensor, *, timeout_s: float) -> bool:
        """As `LookupBuffer.insert`; larger than this end's memory is refused too. The peer says what it lacks
        and is sent only that."""
        self._check_open()
        self._copier.check(blocks, "blocks")
        if len(keys) != len(blocks):
            raise ConfigError(f"blocks: {len(blocks)}, and {len(keys)} keys; give one for each")
        planes, deadline = self._planes, time.monotonic() + timeout_s
        taken = np.empty(0, dtype=np.int64)

        def seal(wanted: list[int]) -> Slots:
            nonlocal taken
            while len(taken) < len(wanted):
                more = planes.manager.reserve(len(wanted) - len(taken), deadline)
                if not len(more):
                    raise TimeoutError("no memory came free at this end")
                taken = np.concatenate([taken, more])
            self._copier.store(blocks[torch.tensor(wanted, dtype=torch.int64)], taken)
            planes.seal(taken, [keys[i] for i in wanted])
            return taken

        try:
            return self._peer.insert(keys, seal, deadline)
        finally:
            planes.manager.give_back(taken)

    def drop_select(self, keys: Sequence[BlockKey], out: torch.Tensor, *, timeout_s: float) -> int:
        self._check_open()
        self._copier.check(out, "out")
        if not out.is_contiguous():
            raise ConfigError("out: not contiguous; give a contiguous tensor")
        planes = self._planes
        io = PeerIo(lambda _: [Holder(self._peer)], timeout_s)
        promotion = Promotion(planes.manager, io, planes.arena.rows, planes.fmt, planes.manager.epoch, self._copier)
        wanted = keys[: len(out)]
        n = promotion.run(wanted, out, time.monotonic() + timeout_s)
        planes.manager.drop(wanted)  # it has passed through
        return n

    def stats(self) -> TierStats:
        """What has come from the peer, and gone there."""
        return replace(self._peer.stats())

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._peer.close()
            self._planes.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the lookup buffer was closed")
