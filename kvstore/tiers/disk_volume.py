"""An opened disk directory: files and locks, index, and what this process knows of its slots.

Joins `DiskDirectory`, `DiskIndex`, `DiskView` and `DiskWriter`, and opens, rebuilds, purges
and empties them as one. Payload never passes through here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.config import DiskTierConfig
from kvstore.events import TierEvents
from kvstore.identity import KVIdentity
from kvstore.keys import BlockKey, keys_to_array
from kvstore.slot import SlotCodec, Slots
from kvstore.slot_table import SlotTable
from kvstore.tiers import lmdb_env
from kvstore.tiers.disk_dir import DiskDirectory, Home
from kvstore.tiers.disk_header import DirectoryHeader
from kvstore.tiers.disk_index import DiskIndex, Records, empty_records
from kvstore.tiers.disk_trailers import DiskTrailers, void_keys
from kvstore.tiers.disk_view import DiskView, Pins
from kvstore.tiers.disk_writer import DiskWriter

logger = logging.getLogger(__name__)

_EMPTY_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """What a volume is opened with."""

    disk: DiskTierConfig
    identity: KVIdentity
    codec: SlotCodec
    num_slots: int
    events: TierEvents | None = None

    @property
    def header(self) -> DirectoryHeader:
        fmt = self.codec.fmt
        return DirectoryHeader(
            content=dict(self.identity.content()),
            placement=dict(self.identity.placed(fmt.blocks_per_chunk)),
            slot_nbytes=fmt.slot_nbytes,
            num_slots=self.num_slots,
        )


class DiskVolume:
    """Thread-safe. What writes (`writer`, `purge`, `empty`, `sync`) is for one thread at a time,
    which the caller sees to, and runs within `in_use`."""

    header: DirectoryHeader
    index: DiskIndex
    table: SlotTable
    view: DiskView
    writer: DiskWriter

    def __init__(self, config: VolumeConfig, namespace: bytes, *, distrust_index: bool = False) -> None:
        """Open, create, or rebuild.

        Args:
            distrust_index: reading it has failed, whatever a walk says.
        Raises:
            ConfigError: see `DiskDirectory` and `DiskDirectory.settle`.
            OSError, lmdb.Error: it cannot be opened now.
        """
        self.config, self.codec, self.header = config, config.codec, config.header
        self._users = threading.Lock()
        self._num_users = 0
        self._closing = False
        self.directory = DiskDirectory(config.disk.path)
        self._trailers = DiskTrailers(self.directory, config.codec)
        try:
            with self.directory.opening():
                self.index = self._open_index(distrust_index)
                try:
                    self._open_view(namespace)
                except BaseException:
                    self.index.close()
                    raise
        except BaseException:
            self.directory.close()
            raise

    @property
    def home(self) -> Home:
        return self.directory.home

    def pin_current(self, slots: Slots, generations: NDArray[np.uint64]) -> Pins:
        """Pin those slots that still hold these generations; `unpin` those."""
        with self.in_use():
            pins = self.view.pin_current(slots, generations)
            self._enter(int(np.count_nonzero(pins.current)))
        return pins

    def unpin(self, slots: Slots) -> None:
        self.view.unpin(slots)
        self._leave(len(slots))

    def purge(self, keys: Sequence[BlockKey]) -> int:
        """Delete every chunk that holds one of these keys, and what is left of evicted ones;
        returns the number of entries deleted."""
        self.view.refresh()
        wanted = void_keys(keys_to_array(keys))
        records = self.index.scan()
        records = records.at(np.flatnonzero(np.isin(void_keys(records.keys), wanted).any(axis=1)))
        self.writer.delete(records)
        self.writer.erase(wanted, records.slots)
        return len(records)

    def remove(self, slots: Slots, generations: NDArray[np.uint64]) -> int:
        """Delete the entries of these slots for good, where they still hold these generations; returns how many."""
        self.view.refresh()
        order = np.argsort(slots)
        slots, generations = slots[order], generations[order]
        records = self.index.get(slots)
        records = records.at(records.generations == generations[np.searchsorted(slots, records.slots)])
        self.writer.delete(records)
        self.writer.erase(np.unique(void_keys(records.keys)), records.slots)
        return len(records)

    def empty(self) -> None:
        """Delete everything for good, unless another process uses the directory."""
        with contextlib.suppress(TimeoutError), self.directory.opening(_EMPTY_TIMEOUT_S):
            if self.directory.is_only_member():
                self.directory.empty_data()
                self.index.clear()
                self.view.release(self.view.withdraw(self.view.table.ready_slots()))

    def sync(self) -> None:
        """Delete what is doomed and make the index durable."""
        self.writer.delete_doomed()
        self.index.sync()

    def is_intact(self) -> bool:
        """Whether the files in the directory are still the ones that are open."""
        return self.directory.is_intact() and self.index.is_intact()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The files stay open meanwhile: a write must not meet another file of the same number."""
        self._enter(1)
        try:
            yield
        finally:
            self._leave(1)

    def close(self) -> None:
        """Close the index, and the files once no transfer uses them. Later calls raise
        `lmdb.Error` or `OSError`; a second one does nothing."""
        with self._users:
            if self._closing:
                return
        self.index.close()
        with self._users:
            self._closing = True
            if self._num_users:
                self.directory.leave()
            else:
                self.directory.close()

    # -- inside

    def _enter(self, n: int) -> None:
        with self._users:
            self._num_users += n

    def _leave(self, n: int) -> None:
        with self._users:
            self._num_users -= n
            if self._closing and not self._num_users:
                self.directory.close()

    def _open_index(self, distrust: bool) -> DiskIndex:
        before = self.directory.settle(self.header, on_mismatch=self.config.disk.on_mismatch)
        path, num_slots, per_chunk = self.directory.index_path, self.header.num_slots, self.codec.fmt.blocks_per_chunk
        nothing = empty_records(per_chunk)
        kept = nothing
        problem = self._problem(path, before, distrust)
        if problem is not None:
            logger.warning("disk tier %s: index unusable (%s); it is rebuilt", path.parent, problem)
            self.directory.delete_index()
        elif before is not None and before.num_slots > num_slots:
            kept = _read(path, before.num_slots, per_chunk)  # its file would stay as large as it was
            self.directory.delete_index()
        index = DiskIndex(path, num_slots, per_chunk)
        try:
            on_disk = self.directory.num_slots_on_disk()
            if on_disk and index.is_new():
                records = kept if len(kept) else self._trailers.scan()
                index.commit(nothing, records.at(records.slots < on_disk))
                logger.info("disk tier %s: index rebuilt, %d chunks", path.parent, len(records))
        except BaseException:
            index.close()
            raise
        return index

    def _problem(self, path: Path, before: DirectoryHeader | None, distrust: bool) -> str | None:
        """What is wrong with the index; None where nothing is, or there is none."""
        if lmdb_env.file_id(path) is None:
            return None
        if distrust:
            return "reading it has failed"
        return lmdb_env.check(path) if before is not None else "store.json is missing or damaged"

    def _open_view(self, namespace: bytes) -> None:
        num_slots, per_chunk = self.header.num_slots, self.codec.fmt.blocks_per_chunk
        on_disk = self.directory.num_slots_on_disk()
        records = self.index.load()
        there = np.asarray(records.slots < on_disk)
        if not there.all():
            self.index.commit(records.at(~there), empty_records(per_chunk))
        self.table = SlotTable(num_slots, per_chunk, self.config.disk.eviction_policy, on_disk, self.config.events)
        self.view = DiskView(self.index, self.table, num_slots, namespace, self.directory.num_slots_on_disk)
        self.view.load(records.at(there))
        self.writer = DiskWriter(self.directory, self.view, self._trailers)


def _read(path: Path, num_slots: int, blocks_per_chunk: int) -> Records:
    index = DiskIndex(path, num_slots, blocks_per_chunk)
    try:
        return index.scan()
    finally:
        index.close()
