"""Writes chunks into a shared path: side by side in pool threads, made visible in order.

Each file is written under a temporary name. The calling thread then gives it its names,
chunk by chunk in prefix order, and stops at the first chunk that failed, so that nobody
ever sees a chunk whose predecessor was lost. Within a chunk every block key but the last
is a hard link, made before the last one, the canonical name, is renamed into place.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.config import Fsync
from kvstore.errors import StoreClosedError
from kvstore.jobs import IoPool
from kvstore.keys import BlockKey, array_to_keys
from kvstore.slot import Rows
from kvstore.tiers.base import SealedChunks
from kvstore.tiers.chunk_file import FileFormat, remove, sync_file, touch, write_file
from kvstore.tiers.shared_read import USED_STEP_NS
from kvstore.tiers.shared_tree import SharedTree, temporary_path

MAX_UNSYNCED: Final = 4096
_NO_DEADLINE_S: Final = 86400.0
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


@dataclass(slots=True)
class _Pending:
    """A chunk on its way; what its pool thread found or made is valid once ``future`` is done."""

    index: int
    keys: list[BlockKey]
    used_ns: int
    is_present: bool = False
    temporary: str = ""
    future: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Written:
    """Outcome of one `SharedWriter.write`."""

    stored: NDArray[np.bool_]  # (n,)
    new_nbytes: int
    error: BaseException | None  # why it stopped


class SharedWriter:
    """Owns what has been written and is not yet durable. `write` from one thread at a time."""

    def __init__(self, tree: SharedTree, pool: IoPool, rows: Rows, fsync: Fsync) -> None:
        self.has_links = True
        self._tree, self._pool, self._rows, self._fsync = tree, pool, rows, fsync
        self._lock = threading.Lock()
        self._unsynced: dict[str, None] = {}  # files, in order of writing
        self._unsynced_folders: dict[str, None] = {}

    def write(self, chunks: SealedChunks, fmt: FileFormat) -> Written:
        """Store chunks in order up to the first that fails; returns when no thread uses their slots."""
        stored = np.zeros(len(chunks.host_slots), dtype=np.bool_)
        window: deque[_Pending] = deque()
        new, error, now_ns = 0, None, time.time_ns()
        try:
            for i, slot in enumerate(chunks.host_slots.tolist()):
                pending = _Pending(i, array_to_keys(chunks.keys[i]), now_ns - i * USED_STEP_NS)
                self._start(pending, chunks.namespace, fmt, self._rows[slot])
                window.append(pending)
                if len(window) > 2 * self._pool.num_threads:
                    new += self._finish(window.popleft(), chunks.namespace, stored)
            while window:
                new += self._finish(window.popleft(), chunks.namespace, stored)
            if self._num_unsynced() > MAX_UNSYNCED:
                self.flush(time.monotonic() + _NO_DEADLINE_S)
        except (OSError, queue.Full, StoreClosedError) as e:
            error = e
        finally:
            for pending in window:
                self._give_up(pending)
        return Written(stored, new * fmt.file_nbytes, error)

    def probe_links(self) -> None:
        """Find out whether the file system has hard links; where that can't be told, it has.

        A name without them is a chunk's last block only, so only whole chunks are hits.
        """
        first, second = temporary_path(self._tree.root.path), temporary_path(self._tree.root.path)
        with contextlib.suppress(OSError):
            os.close(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            try:
                self.has_links = self._link(first, second)
            finally:
                remove(first)
                remove(second)

    def flush(self, deadline: float) -> bool:
        """Make durable what was written, as far as the policy asks for it.

        Raises:
            OSError: what the kernel said; what is not durable yet is tried again next time.
        """
        with self._lock:
            files, folders = self._unsynced, self._unsynced_folders
            self._unsynced, self._unsynced_folders = {}, {}
        done: set[str] = set()
        try:
            return self._sync(list(files), deadline, done) and self._sync(list(folders), deadline, done)
        finally:
            with self._lock:
                for path in files.keys() - done:
                    self._unsynced[path] = None
                for path in folders.keys() - done:
                    self._unsynced_folders[path] = None

    def _start(self, pending: _Pending, namespace: bytes, fmt: FileFormat, row: NDArray[np.uint8]) -> None:
        def run() -> None:
            if self._is_present(pending, namespace, fmt):
                pending.is_present = True
                return
            for attempt in range(2):
                pending.temporary = temporary_path(self._tree.make(namespace, pending.keys[-1]))
                try:
                    write_file(pending.temporary, fmt, row, pending.used_ns, sync=self._fsync == "always")
                    return
                except FileNotFoundError:  # gc removed the empty folder, or the root is gone
                    self._tree.forget()
                    if attempt:
                        raise

        pending.future = self._pool.submit(run, time.monotonic() + _NO_DEADLINE_S)

    def _is_present(self, pending: _Pending, namespace: bytes, fmt: FileFormat) -> bool:
        """Whether all names of a chunk stand for files of the right size; notes their use."""
        for key in pending.keys if self.has_links else pending.keys[-1:]:
            path = self._tree.path_of(namespace, key)
            try:
                if not self._tree.is_there(namespace, key):
                    return False
                status = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            if not fmt.is_like(status):
                return False
            touch(path, status, pending.used_ns)
        return True

    def _finish(self, pending: _Pending, namespace: bytes, stored: NDArray[np.bool_]) -> int:
        """Wait for a chunk and make it visible; returns the files that are new."""
        try:
            pending.future.result()
            if not pending.is_present:
                self._publish(pending, namespace)
        finally:
            self._give_up(pending)
        stored[pending.index] = True
        return not pending.is_present

    def _publish(self, pending: _Pending, namespace: bytes) -> None:
        *members, last = pending.keys
        names = [self._tree.path_of(namespace, key) for key in members] if self.has_links else []
        for key, name in zip(members, names, strict=False):
            self._tree.make(namespace, key)
            if not self._link(pending.temporary, name):
                self.has_links = False
                names = []
                break
        canonical = self._tree.path_of(namespace, last)
        os.rename(pending.temporary, canonical)
        pending.temporary = ""
        with self._lock:
            if self._fsync == "flush":
                self._unsynced[canonical] = None
            if self._fsync != "never":
                self._unsynced_folders.update(dict.fromkeys(os.path.dirname(n) for n in (*names, canonical)))

    def _link(self, source: str, name: str) -> bool:
        """Make ``name`` stand for the source's file, whatever it stood for; False: no hard links here."""
        try:
            os.link(source, name, follow_symlinks=False)
            return True
        except FileExistsError:
            pass
        except OSError as e:
            if e.errno in _NO_LINKS:
                return False
            raise
        step = temporary_path(os.path.dirname(name))
        try:
            os.link(source, step, follow_symlinks=False)
            os.rename(step, name)
        finally:
            remove(step)  # still there where both names stood for one file already
        return True

    def _give_up(self, pending: _Pending) -> None:
        """Wait until no thread uses the slot, and leave no temporary file behind."""
        pending.future.exception()
        if pending.temporary:
            remove(pending.temporary)

    def _num_unsynced(self) -> int:
        with self._lock:
            return len(self._unsynced)

    def _sync(self, paths: Sequence[str], deadline: float, done: set[str]) -> bool:
        """Sync paths side by side, adding to ``done``; False if some are left at the deadline."""
        futures: dict[Future[None], str] = {}
        for path in paths:
            with contextlib.suppress(queue.Full, StoreClosedError):
                futures[self._pool.submit(_syncer(path), deadline)] = path
        finished, _ = concurrent.futures.wait(futures, max(0.0, deadline - time.monotonic()))
        errors = [e for f in finished if (e := f.exception()) is not None]
        done.update(futures[f] for f in finished if f.exception() is None)
        if errors:
            raise errors[0]
        return len(finished) == len(paths)


def _syncer(path: str) -> Callable[[], None]:
    return lambda: sync_file(path)
