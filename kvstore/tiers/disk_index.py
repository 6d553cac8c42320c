"""The disk tier's LMDB index: slot -> what it holds, and a log of slots that changed.

A rebuildable accelerator: the slots' own trailers are the truth. Keyed by slot, so that a
reused slot replaces its entry; a record holds the entries of some dozens of neighbours, so
that a million slots load in a fraction of a second. An entry of generation 0 is empty.
Written by one thread a process in unsynced, batched transactions; other processes follow
the log. The map's size is the index's share of the directory's bound: where a stopped
reader keeps old pages from being reused, commits fail and nothing grows. It knows records,
never payload.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.identity import NAMESPACE_NBYTES
from kvstore.keys import KEY_NBYTES
from kvstore.slot import KeyArray, Slots
from kvstore.tiers import lmdb_env

NBYTES_PER_KEY: Final = 512
FIXED_NBYTES: Final = 256 << 10
_LOG_RECORDS: Final = 256
_MIN_LOG_SLOTS: Final = 1024
_RECORD_NBYTES: Final = 1900  # two fit an LMDB page
_MAX_GROUPS: Final = 1 << 40
_CLOSE_TIMEOUT_S: Final = 5.0
_WRITER_NBYTES: Final = 8
_LOGGED: Final = np.dtype("=u4")
_U64: Final = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Records:
    """What n slots hold."""

    slots: Slots  # (n,)
    generations: NDArray[np.uint64]  # (n,)
    namespaces: NDArray[np.void]  # (n,) V16
    keys: KeyArray  # (n, blocks_per_chunk, KEY_NBYTES)

    def __len__(self) -> int:
        return len(self.slots)

    def at(self, where: NDArray[np.bool_ | np.int64]) -> Records:
        return Records(self.slots[where], self.generations[where], self.namespaces[where], self.keys[where])


@dataclass(frozen=True, slots=True)
class Changes:
    """What other processes did to ``slots`` since the last look; ``records`` are those that hold something now."""

    slots: Slots
    records: Records


def index_nbytes(num_slots: int, blocks_per_chunk: int) -> int:
    """The most that an index of so many slots may take on disk."""
    return -(-(FIXED_NBYTES + num_slots * blocks_per_chunk * NBYTES_PER_KEY) // 4096) * 4096


class DiskIndex:
    """One LMDB environment, shared by all openers of this process.

    Thread-safe for reading, `load` and `changes` excepted: they are for one thread at a
    time, and so is `commit`. After a fork the child can use none of it.
    """

    def __init__(self, path: Path, num_slots: int, blocks_per_chunk: int) -> None:
        """Open or create. Waits while another process is in its own commit.

        Raises:
            ConfigError: a process in another PID namespace has it open.
            lmdb.Error, OSError: it cannot be opened.
        """
        self.path = path
        self._num_slots, self._blocks_per_chunk = num_slots, blocks_per_chunk
        self._entry, self._group = _entry_format(blocks_per_chunk)
        self._env = lmdb_env.acquire(path, index_nbytes(num_slots, blocks_per_chunk))
        self._file, self._pid = lmdb_env.file_id(path), os.getpid()
        self._users = threading.Condition()
        self._num_users = 0
        self._closed = False
        self._writer = os.urandom(_WRITER_NBYTES)
        self._seen_txn = -1
        self._seen_log = 0
        try:
            with self._env.begin(write=True) as txn:  # open_db's own would wait with the interpreter lock held
                self._slots_db = self._env.open_db(b"slots", txn, integerkey=True)
                self._log_db = self._env.open_db(b"log", txn, integerkey=True)
        except BaseException:
            self.close()
            raise

    def is_new(self) -> bool:
        """Whether nothing was ever committed to it."""
        with self._begin() as txn:
            return self._log_end(txn) == (0, 0)

    def load(self) -> Records:
        """Everything, by ascending slot; later `changes` go on from here."""
        with self._begin() as txn:
            self._seen_txn, (self._seen_log, _) = txn.id(), self._log_end(txn)
            return self._all(txn)

    def scan(self) -> Records:
        """Everything, by ascending slot; `changes` take no notice."""
        with self._begin() as txn:
            return self._all(txn)

    def changes(self) -> Changes | None:
        """What other processes committed since the last call.

        Returns:
            None where too much has changed to tell: `load` again.
        """
        with self._begin() as txn:
            if txn.id() == self._seen_txn:
                return _NO_CHANGES
            slots, last = self._changed_slots(txn)
            if slots is None:
                return None
            found = Changes(slots, self._get(txn, slots)) if len(slots) else _NO_CHANGES
            self._seen_txn, self._seen_log = txn.id(), last
            return found

    def get(self, slots: Slots) -> Records:
        """The records of those of these slots that have one, in the order of ``slots``."""
        with self._begin() as txn:
            return self._get(txn, slots)

    def commit(self, deleted: Records, stored: Records) -> None:
        """Delete records (those whose generation is still the one given), then put others.

        Blocks while another process is in its own commit. On an error nothing was changed.

        Raises:
            lmdb.MapFullError: no page is free, because a process that reads it was stopped.
        """
        try:
            self._commit(deleted, stored)
        except lmdb.MapFullError:
            if not self._env.reader_check():
                raise
            self._commit(deleted, stored)  # what kept the pages was killed

    def clear(self) -> None:
        """Delete every record; for who is alone in the directory."""
        with self._begin(write=True) as txn:
            txn.drop(self._slots_db, delete=False)

    def sync(self) -> None:
        """Make durable what was committed."""
        with self._use():
            self._env.sync(True)

    def is_intact(self) -> bool:
        """Whether the file that is open is still the one at the path."""
        return lmdb_env.file_id(self.path) == self._file

    def close(self) -> None:
        """Wait for transactions in progress, then close; later ones raise `lmdb.Error`.

        A transaction stuck behind another process's keeps the environment open until exit.
        """
        with self._users:
            if self._closed:
                return
            self._closed = True
            if self._users.wait_for(lambda: self._num_users == 0, timeout=_CLOSE_TIMEOUT_S):
                lmdb_env.release(self._env)

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        with self._users:
            if self._closed or os.getpid() != self._pid:
                raise lmdb.Error("the index was closed" if self._closed else "the index was opened before a fork")
            self._num_users += 1
        try:
            yield
        finally:
            with self._users:
                self._num_users -= 1
                self._users.notify_all()

    @contextlib.contextmanager
    def _begin(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        with self._use(), self._env.begin(write=write) as txn:
            try:
                yield txn
            except (struct.error, ValueError, IndexError) as e:  # damage that a walk does not notice
                raise lmdb.CorruptedError(f"records make no sense: {e}") from e

    @property
    def _record_nbytes(self) -> int:
        return self._group * self._entry.itemsize

    def _all(self, txn: lmdb.Transaction) -> Records:
        records = decode([(bytes(k), bytes(v)) for k, v in txn.cursor(db=self._slots_db)], self._blocks_per_chunk)
        return records.at(records.slots < self._num_slots)

    def _commit(self, deleted: Records, stored: Records) -> None:
        with self._begin(write=True) as txn:
            touched = np.concatenate((deleted.slots, stored.slots))
            groups = np.unique(touched // self._group)
            entries = self._read(txn, groups)
            at = np.searchsorted(groups, deleted.slots // self._group), deleted.slots % self._group
            same = entries["generation"][at] == deleted.generations
            entries[at[0][same], at[1][same]] = np.zeros(1, dtype=self._entry)
            at = np.searchsorted(groups, stored.slots // self._group), stored.slots % self._group
            new = np.zeros(len(stored), dtype=self._entry)
            new["generation"], new["namespace"], new["keys"] = stored.generations, stored.namespaces, stored.keys
            entries[at] = new
            data, size = entries.tobytes(), self._record_nbytes
            items = [(_U64.pack(g), data[i * size : (i + 1) * size]) for i, g in enumerate(groups.tolist())]
            txn.cursor(db=self._slots_db).putmulti(items)
            self._append_log(txn, np.concatenate((deleted.slots[same], stored.slots)))

    def _read(self, txn: lmdb.Transaction, groups: NDArray[np.int64]) -> NDArray[np.void]:
        """Entries of these groups, shape (len(groups), self._group); writable."""
        empty = bytes(self._record_nbytes)
        found = (txn.get(_U64.pack(g), empty, db=self._slots_db) for g in groups.tolist())
        data = b"".join([v if len(v) == len(empty) else empty for v in found])
        return np.frombuffer(bytearray(data), dtype=self._entry).reshape(len(groups), self._group)

    def _get(self, txn: lmdb.Transaction, slots: Slots) -> Records:
        groups = np.unique(slots // self._group)
        entries = self._read(txn, groups)[np.searchsorted(groups, slots // self._group), slots % self._group]
        held = np.flatnonzero(entries["generation"])
        return _records(slots[held], entries[held])

    def _log_end(self, txn: lmdb.Transaction) -> tuple[int, int]:
        """The last number in the log, and how many slots were ever logged."""
        cursor = txn.cursor(db=self._log_db)
        return (_U64.unpack(cursor.key())[0], _total(bytes(cursor.value()))) if cursor.last() else (0, 0)

    def _changed_slots(self, txn: lmdb.Transaction) -> tuple[Slots | None, int]:
        """What others logged since the last look (None: too much to tell), and the log's last number."""
        cursor, last = txn.cursor(db=self._log_db), self._seen_log
        parts = [np.empty(0, dtype=np.int64)]
        if cursor.set_range(_U64.pack(last + 1)):
            if _U64.unpack(cursor.key())[0] != last + 1:
                return None, last
            for key, value in cursor.iternext():
                last = _U64.unpack(key)[0]
                if value[:_WRITER_NBYTES] != self._writer:
                    parts.append(np.frombuffer(value[_WRITER_NBYTES + _U64.size :], dtype=_LOGGED).astype(np.int64))
        slots = np.unique(np.concatenate(parts))
        return slots[slots < self._num_slots], last

    def _append_log(self, txn: lmdb.Transaction, slots: Slots) -> None:
        """Who lags further behind than the log reaches loads everything: it keeps a fraction of all slots."""
        last, total = self._log_end(txn)
        last, total = last + 1, total + len(slots)
        value = self._writer + _U64.pack(total) + slots.astype(_LOGGED).tobytes()
        txn.put(_U64.pack(last), value, db=self._log_db, append=True)
        cursor, most = txn.cursor(db=self._log_db), max(_MIN_LOG_SLOTS, self._num_slots // 4)
        while cursor.first():
            number = _U64.unpack(cursor.key())[0]
            if number > last - _LOG_RECORDS and (number == last or total - _total(bytes(cursor.value())) <= most):
                break
            cursor.delete()


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """What a record of the slots database looks like: entries of neighbouring slots."""

    entry: np.dtype[np.void]
    group: int

    @classmethod
    def of(cls, blocks_per_chunk: int) -> Self:
        return cls(*_entry_format(blocks_per_chunk))

    @property
    def record_nbytes(self) -> int:
        return self.group * self.entry.itemsize

    @property
    def most_groups(self) -> int:
        """A number of a group that is as large is none."""
        return _MAX_GROUPS

    def records(self, groups: NDArray[np.int64], values: NDArray[np.uint8]) -> Records:
        """What the slots of these groups hold.

        Args:
            values: shape (len(groups), record_nbytes), contiguous.
        """
        entries = values.view(self.entry).reshape(-1)
        held = np.flatnonzero(entries["generation"])
        slots = groups[held // self.group] * self.group + held % self.group
        return _records(slots, entries[held])


def decode(items: Iterable[tuple[bytes, bytes]], blocks_per_chunk: int) -> Records:
    """Records from keys and values of the slots database; those that are damaged are left out."""
    fmt = RecordFormat.of(blocks_per_chunk)
    sound = {k: v for k, v in items if len(k) == _U64.size and len(v) == fmt.record_nbytes}
    groups = np.frombuffer(b"".join(sound), dtype=np.uint64)
    values = np.frombuffer(b"".join(sound.values()), dtype=np.uint8).reshape(-1, fmt.record_nbytes)
    possible = groups < _MAX_GROUPS
    return fmt.records(groups[possible].astype(np.int64), values[possible])


def _total(value: bytes) -> int:
    number: int = _U64.unpack_from(value, _WRITER_NBYTES)[0]
    return number


def _entry_format(blocks_per_chunk: int) -> tuple[np.dtype[np.void], int]:
    """What is kept of a slot, and of how many slots in one LMDB record."""
    dtype = np.dtype(
        [("generation", "=u8"), ("namespace", f"V{NAMESPACE_NBYTES}"), ("keys", "u1", (blocks_per_chunk, KEY_NBYTES))]
    )
    return dtype, max(1, _RECORD_NBYTES // dtype.itemsize)


def _records(slots: Slots, entries: NDArray[np.void]) -> Records:
    return Records(slots, entries["generation"].astype(np.uint64), entries["namespace"], entries["keys"])


def empty_records(blocks_per_chunk: int) -> Records:
    return Records(
        np.empty(0, dtype=np.int64),
        np.empty(0, dtype=np.uint64),
        np.empty(0, dtype=f"V{NAMESPACE_NBYTES}"),
        np.empty((0, blocks_per_chunk, KEY_NBYTES), dtype=np.uint8),
    )


def joined(parts: Sequence[Records]) -> Records:
    """Several records as one; at least one part."""
    return Records(*(np.concatenate([getattr(part, name) for part in parts]) for name in Records.__slots__))


_NO_CHANGES: Final = Changes(np.empty(0, dtype=np.int64), empty_records(1))
