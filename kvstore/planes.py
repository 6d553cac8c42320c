"""Host memory and what lies below it: the arena, who decides what is in it, and the I/O service.

What a store and an engine's scheduler have in common. An epoch ties the parts together: what
was promised, published or looked up in an old one never counts in the new one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from kvstore.arena import HostArena, Sharing
from kvstore.config import StoreConfig
from kvstore.events import EventLog, TierEvent, TierEvents
from kvstore.identity import INITIAL_EPOCH
from kvstore.io_client import ProcessIo
from kvstore.io_service import CLOSE_TIMEOUT_S, IoService, ThreadIo
from kvstore.journal import Opened
from kvstore.journal_writer import JournalWriter
from kvstore.keys import BlockKey, keys_to_array
from kvstore.manager import TierManager
from kvstore.policy import make_policy
from kvstore.process import process_place, started_ticks
from kvstore.promotion import Promotion, Sink
from kvstore.slot import KeyArray, SlotCodec, SlotFormat, Slots, read_integrity_key
from kvstore.tiers.base import TierStats

_EPOCH_NBYTES: Final = 16
_JOURNAL_EVENT_BLOCKS: Final = 1 << 16  # that wait for the journal's thread, where nobody else takes them

_JOURNAL_WAIT_S: Final = 1.0


class Planes:
    """Owns the arena and the I/O service; `close` gives both back. Thread-safe.

    Args:
        shared_arena: other processes map the arena too (a memfd).
        io: what lies below, where it is not what the configuration says; owned from now on.

    Attributes:
        io: None where there is no lower tier.
        journal: None where none is written.
    """

    io: IoService | None
    journal: JournalWriter | None

    def __init__(self, config: StoreConfig, *, shared_arena: bool = False, io: IoService | None = None) -> None:
        """Raises ConfigError: a setting is wrong, a directory holds another identity, or the
        host memory cannot be had. Nothing is left open."""
        self.identity, self.journal, self._config = config.identity, None, config
        self._for_others = EventLog(config.event_log_blocks)  # events that the journal has seen
        if config.journal is not None and not config.event_log_blocks:
            config = replace(config, event_log_blocks=_JOURNAL_EVENT_BLOCKS)
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

    def open_journal(self, who: str, stats: Callable[[], Iterable[TierStats]], *, num_groups: int = 1) -> None:
        """Begin to write the journal, where the configuration asks for one.

        Args:
            who: "TieredStore", or an engine's half.
            stats: of all tiers; called by the journal's thread.
            num_groups: KV cache groups.
        Raises:
            ConfigError: its path cannot be used.
        """
        if self._config.journal is not None:
            self.journal = JournalWriter(
                self._config.journal, lambda: self._opened(who, num_groups), self._events_for_journal, stats
            )

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
        """Write the trailers of slots that hold one block each, before they leave this host. The same bytes whenever
        it is done: a slot may be on its way to one peer when it is sealed for another.

        Args:
            namespace: by default the one in effect.
        """
        if not len(slots):
            return
        namespace = self.current()[1] if namespace is None else namespace
        generations = np.zeros(len(slots), dtype=np.uint64)
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
            if self.journal is not None:
                self.journal.reset(self._namespace)
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
        if self.journal is None:
            return self._new_events()
        is_written = self.journal.flush(_JOURNAL_WAIT_S)
        rest = [] if is_written else self._new_events()  # its disk hangs: these it will not see
        return [*self._for_others.take(), *rest]

    def _new_events(self) -> list[TierEvent]:
        lower = [] if self.io is None else self.io.take_events()
        return [*self._log.take(), *lower]

    def _events_for_journal(self) -> list[TierEvent]:
        events = self._new_events()
        if self._config.event_log_blocks:
            for event in events:
                self._for_others.add(event)
        return events

    def _opened(self, who: str, num_groups: int) -> Opened:
        config = self._config
        capacities = {"host": self.host_nbytes}
        if config.disk is not None:
            nbytes = (config.disk.num_blocks or 0) // config.blocks_per_chunk * self.fmt.slot_nbytes
            capacities["disk"] = config.disk.capacity_nbytes or nbytes
        if config.shared is not None:
            capacities["shared"] = config.shared.capacity_nbytes
        return Opened(
            t_ns=time.time_ns(),
            pid=os.getpid(),
            who=who,
            namespace=self.current()[1],
            content=dict(self.identity.content()),
            placed=dict(self.identity.placed(config.blocks_per_chunk)),
            num_groups=num_groups,
            capacity_nbytes=capacities,
            place=process_place(),
            started=started_ticks(os.getpid()),
            sample_s=config.journal.sample_s if config.journal is not None else 0.0,
        )

    def close(self) -> None:
        """Finish write-behind, then release everything."""
        if self.journal is not None:
            if self.io is not None:
                self.io.flush(time.monotonic() + CLOSE_TIMEOUT_S)
            self.journal.close()
        if self.io is not None:
            self.io.close()
        self.arena.close()
