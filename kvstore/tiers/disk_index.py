"""The disk tier's LMDB index: slot -> what it holds, and a log of slots that changed.

A rebuildable accelerator: the slots' own trailers are the truth. Keyed by slot, so that a
reused slot replaces its entry; a record holds the entries of some dozens of neighbours, so
that a million slots load in a fraction of a second. An entry of generation 0 is empty.
Written by one thread a process in unsynced, batched transactions; other processes follow
the log. It knows records, never payload.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.identity import NAMESPACE_NBYTES
from kvstore.keys import KEY_NBYTES
from kvstore.slot import KeyArray, Slots

_LOG_RECORDS: Final = 512
_RECORD_NBYTES: Final = 1900  # two fit an LMDB page
_MAX_GROUPS: Final = 1 << 40
_CHECK_TIMEOUT_S: Final = 120.0
_CLOSE_TIMEOUT_S: Final = 5.0
_WRITER_NBYTES: Final = 8
_CHECK_SCRIPT: Final = Path(__file__).with_name("lmdb_check.py")
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


def check(path: Path) -> str | None:
    """Let a child process walk the index; returns what is wrong with it, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_CHECK_SCRIPT), str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {_CHECK_TIMEOUT_S:g} s"
    if done.returncode < 0:
        return f"reading it was killed by signal {-done.returncode}"
    return done.stderr.decode(errors="replace").strip()[-300:] or "unreadable" if done.returncode else None


class DiskIndex:
    """One LMDB environment, shared by all openers of this process.

    Thread-safe for reading; `commit` is for one thread at a time.
    """

    def __init__(self, path: Path, num_slots: int, blocks_per_chunk: int) -> None:
        """Open or create.

        Raises:
            ConfigError: a process in another PID namespace has it open.
            lmdb.Error, OSError: it cannot be opened.
        """
        self.path = path
        self._blocks_per_chunk = blocks_per_chunk
        self._entry, self._group = _entry_format(blocks_per_chunk)
        self._env = _acquire(path, _map_nbytes(num_slots, self._entry.itemsize))
        self._inode = os.stat(path / "data.mdb").st_ino
        self._users = threading.Condition()
        self._num_users = 0
        self._closed = False
        self._slots_db = self._env.open_db(b"slots", integerkey=True)
        self._log_db = self._env.open_db(b"log", integerkey=True)
        self._writer = os.urandom(_WRITER_NBYTES)
        self._seen_txn = -1
        self._seen_log = 0

    def load(self) -> Records:
        """Everything, by ascending slot; later `changes` go on from here."""
        with self._begin() as txn:
            self._seen_txn = txn.id()
            self._seen_log = self._last_log(txn)
            items = [(bytes(k), bytes(v)) for k, v in txn.cursor(db=self._slots_db)]
        return decode(items, self._blocks_per_chunk)

    def changes(self) -> Changes | None:
        """What other processes committed since the last call.

        Returns:
            None where too much has changed to tell: `load` again.
        """
        with self._begin() as txn:
            current = txn.id()
            if current == self._seen_txn:
                return _NO_CHANGES
            slots = self._changed_slots(txn)
            if slots is None:
                return None
            self._seen_txn = current
            if not len(slots):
                return _NO_CHANGES
            return Changes(slots, self._get(txn, slots))

    def get(self, slots: Slots) -> Records:
        """The records of those of these slots that have one."""
        with self._begin() as txn:
            return self._get(txn, slots)

    def commit(self, deleted: Records, stored: Records) -> None:
        """Delete records (those whose generation is still the one given), then put others.

        Blocks while another process is in its own commit. On an error nothing was changed.
        """
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

    def sync(self) -> None:
        """Make durable what was committed."""
        with self._use():
            self._env.sync(True)

    def is_intact(self) -> bool:
        """Whether the file that is open is still the one at the path."""
        try:
            return os.stat(self.path / "data.mdb").st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        """Wait for transactions in progress, then close; later ones raise `lmdb.Error`.

        A transaction stuck behind another process's keeps the environment open until exit.
        """
        with self._users:
            if self._closed:
                return
            self._closed = True
            if self._users.wait_for(lambda: self._num_users == 0, timeout=_CLOSE_TIMEOUT_S):
                _release(self.path)

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        with self._users:
            if self._closed:
                raise lmdb.Error("the index was closed")
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
            yield txn

    @property
    def _record_nbytes(self) -> int:
        return self._group * self._entry.itemsize

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

    def _last_log(self, txn: lmdb.Transaction) -> int:
        cursor = txn.cursor(db=self._log_db)
        return _U64.unpack(cursor.key())[0] if cursor.last() else 0

    def _changed_slots(self, txn: lmdb.Transaction) -> Slots | None:
        cursor = txn.cursor(db=self._log_db)
        if not cursor.set_range(_U64.pack(self._seen_log + 1)):
            return np.empty(0, dtype=np.int64)
        if _U64.unpack(cursor.key())[0] != self._seen_log + 1:
            return None
        parts = []
        for key, value in cursor.iternext():
            self._seen_log = _U64.unpack(key)[0]
            if value[:_WRITER_NBYTES] != self._writer:
                parts.append(np.frombuffer(value[_WRITER_NBYTES:], dtype=np.int64))
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)

    def _append_log(self, txn: lmdb.Transaction, slots: Slots) -> None:
        last = self._last_log(txn)
        txn.put(_U64.pack(last + 1), self._writer + slots.tobytes(), db=self._log_db, append=True)
        cursor = txn.cursor(db=self._log_db)
        while cursor.first() and _U64.unpack(cursor.key())[0] <= last + 1 - _LOG_RECORDS:
            cursor.delete()


def decode(items: Iterable[tuple[bytes, bytes]], blocks_per_chunk: int) -> Records:
    """Records from keys and values of the slots database; those that are damaged are left out."""
    dtype, group = _entry_format(blocks_per_chunk)
    sound = [(k, v) for k, v in items if len(k) == _U64.size and len(v) == group * dtype.itemsize]
    groups = np.frombuffer(b"".join([k for k, _ in sound]), dtype=np.uint64)
    entries = np.frombuffer(b"".join([v for _, v in sound]), dtype=dtype).reshape(len(groups), group)
    possible = groups < _MAX_GROUPS
    slots = groups[possible].astype(np.int64)[:, None] * group + np.arange(group)
    held = np.flatnonzero(entries[possible]["generation"])
    return _records(slots.reshape(-1)[held], entries[possible].reshape(-1)[held])


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


def _map_nbytes(num_slots: int, entry_nbytes: int) -> int:
    """A bound of the file: records at half-full pages twice over, the log, and slack."""
    log = _LOG_RECORDS * (64 << 10)
    return -(-(num_slots * 4 * (entry_nbytes + 8) + log + (32 << 20)) // 4096) * 4096


# LMDB forbids to open one environment twice in a process: openers share it.
_environments: dict[str, tuple[lmdb.Environment, int]] = {}
_environments_lock = threading.Lock()


def _acquire(path: Path, map_nbytes: int) -> lmdb.Environment:
    name = os.path.realpath(path)
    with _environments_lock:
        env, users = _environments.get(name, (None, 0))
        if env is None:
            path.mkdir(mode=0o700, exist_ok=True)
            try:
                env = lmdb.open(
                    name, map_size=map_nbytes, max_dbs=2, max_readers=512, mode=0o600,
                    sync=False, metasync=False, readahead=False, meminit=False,
                )  # fmt: skip
            except lmdb.LockError as e:
                raise ConfigError(
                    f"disk.path: {path} is open in another PID namespace ({e}); run the processes that share it "
                    "in one PID namespace (containers: --pid=host or a shared pod), or give each its own path"
                ) from e
            env.reader_check()
        _environments[name] = (env, users + 1)
        return env


def _release(path: Path) -> None:
    name = os.path.realpath(path)
    with _environments_lock:
        env, users = _environments.pop(name, (None, 0))
        if env is None:
            return
        if users > 1:
            _environments[name] = (env, users - 1)
        else:
            env.close()
