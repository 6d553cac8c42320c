"""Host memory and what lies below it: the arena, who decides what is in it, and the I/O service.

What a store and an engine's scheduler have in common. An epoch ties the parts together: what
was promised, published or looked up in an old one never counts in the new one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvstore.arena import HostArena, Sharing
from kvstore.config import StoreConfig
from kvstore.events import EventLog, TierEvent, TierEvents
from kvstore.identity import INITIAL_EPOCH
from kvstore.io_client import ProcessIo
from kvstore.io_service import IoService, ThreadIo
from kvstore.keys import BlockKey, keys_to_array
from kvstore.manager import TierManager
from kvstore.policy import make_policy
from kvstore.promotion import Promotion, Sink
from kvstore.slot import KeyArray, SlotCodec, SlotFormat, Slots, read_integrity_key

_EPOCH_NBYTES: Final = 16


class Planes:
    """Owns the arena and the I/O service; `close` gives both back. Thread-safe.

    Args:
        shared_arena: other processes map the arena too (a memfd).
        io: what lies below, where it is not what the configuration says; owned from now on.

    Attributes:
        io: None where there is no lower tier.
    """

    io: IoService | None

    def __init__(self, config: StoreConfig, *, shared_arena: bool = False, io: IoService | None = None) -> None:
        """Raises ConfigError: a setting is wrong, a directory holds another identity, or the
        host memory cannot be had. Nothing is left open."""
        self.identity = config.identity
        self.fmt = SlotFormat.of(config.identity, config.blocks_per_chunk)
        codec = SlotCodec(self.fmt, read_integrity_key(config.integrity_key_file))
        num_slots = config.host.num_blocks // config.blocks_per_chunk
        make_policy(config.host.eviction_policy, 1)  # a wrong name stops the start before memory is taken
        sharing: Sharing = "memfd" if config.io == "process" or shared_arena else "private"
        self.arena = HostArena(num_slots, self.fmt.slot_nbytes, sharing=sharing)
        self._log = EventLog(config.event_log_blocks)
        events = TierEvents(self._log, "host") if config.event_log_blocks else None
        self.manager = TierManager(num_slots, config.blocks_per_chunk, config.host.eviction_policy, events)
        self.codec = codec
        self._namespace = self.identity.namespace(INITIAL_EPOCH)
        self._lower_epoch = self.manager.epoch  # the epoch that the lower tiers look up in
        self._lock = threading.Lock()
        self._resetting = threading.Lock()
        self.io = io
        try:
            if io is None and (config.disk is not None or config.shared is not None):
                start_io = ProcessIo if config.io == "process" else ThreadIo
                self.io = start_io(config, self.arena, codec, self._namespace)
        except BaseException:
            self.arena.close()
            raise

    @property
    def host_nbytes(self) -> int:
        return self.manager.num_slots * self.fmt.slot_nbytes

    def current(self) -> tuple[int, bytes]:
        """(epoch, namespace) of what is filled from now on."""
        with self._lock:
            return self.manager.epoch, self._namespace

    def publish(
        self,
        slots: Slots,
        keys: KeyArray,
        filled_in: tuple[int, bytes],
        *,
        absent_as_of: int | None = None,
        pins: int = 0,
    ) -> Slots:
        """Make filled slots ready, prefix first, and write them behind to the lower tiers.

        Args:
            filled_in: `current` when the slots were reserved; in another epoch they are freed.
            absent_as_of: see `TierManager.publish`.
            pins: how often the caller wants each one pinned.
        Returns:
            Those that are ready; the others' chunks were there already, or their epoch has passed.
        """
        epoch, namespace = filled_in
        pins += 0 if self.io is None else 1
        kept = self.manager.publish(slots, keys, epoch, pins=pins, absent_as_of=absent_as_of)
        if self.io is not None and kept.any():
            self.io.store(slots[kept], keys[kept], namespace, self.manager.unpin)
        ready: Slots = slots[kept]
        return ready

    def seal(self, slots: Slots, keys: Sequence[BlockKey], namespace: bytes | None = None) -> None:
        """Write the trailers of slots that hold one block each, before they leave this host.

        Args:
            namespace: by default the one in effect.
        """
        if not len(slots):
            return
        namespace = self.current()[1] if namespace is None else namespace
        generations = np.full(len(slots), time.time_ns(), dtype=np.uint64)
        self.codec.seal(self.arena.rows, slots, keys_to_array(keys)[:, None, :], namespace, generations)

    def promotion(self, sink: Sink | None = None) -> Promotion | None:
        """A way up from the lower tiers, of the epoch in effect; None where there is none, or while they go over
        to another. What was begun before a reset ends with nothing."""
        epoch = self.manager.epoch  # first: whatever is found later is of this epoch, or is not published
        if self.io is None or self._lower_epoch != epoch:
            return None
        return Promotion(self.manager, self.io, self.arena.rows, self.fmt, epoch, sink)

    def reset(self) -> None:
        """Go on under a fresh random epoch, in every tier."""
        with self._resetting:
            with self._lock:  # from here on nothing old is published, and lower tiers are not asked
                self._lower_epoch = -1
                self._namespace = self.identity.namespace(os.urandom(_EPOCH_NBYTES))
                epoch = self.manager.reset()
            if self.io is not None:
                self.io.set_namespace(self._namespace)
            self._lower_epoch = epoch

    def forget_host(self) -> None:
        """Empty host memory and leave the lower tiers as they are: for measurements."""
        self._lower_epoch = self.manager.reset()

    def purge(self, keys: Sequence[BlockKey]) -> int:
        """Delete chunks that hold one of these keys; returns how many were deleted."""
        deleted = self.manager.drop(keys)
        return max(deleted, self.io.purge(keys)) if self.io is not None else deleted

    def take_events(self) -> list[TierEvent]:
        """What has come into host memory and the lower tiers, and gone, since the last call."""
        lower = [] if self.io is None else self.io.take_events()
        return [*self._log.take(), *lower]

    def close(self) -> None:
        """Finish write-behind, then release everything."""
        if self.io is not None:
            self.io.close()
        self.arena.close()
