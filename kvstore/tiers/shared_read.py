"""Reads chunks of a shared path: pool threads read whole files, whoever collects verifies them.

A file that is not what its name says is dropped: its name, and where its trailer can be
read, every name of its keys that stands for the same file. Nothing here decides whether
the path as a whole is in order; that is told to the tier.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from kvstore.jobs import Indices, IoPool, PooledReadJob, ReadJob, ReadOperation
from kvstore.keys import BlockKey, array_to_keys
from kvstore.slot import Rows, SlotCodec, Slots
from kvstore.tiers.chunk_file import ChunkReader, FileFormat, Inode, Outcome, remove
from kvstore.tiers.shared_lookup import Place
from kvstore.tiers.shared_tree import SharedTree

OPERATION_NBYTES: Final = 1 << 20
USED_STEP_NS: Final = 2048  # later chunks of a prefix count as used earlier, so that gc takes tails first


class ReadObserver(Protocol):
    """What a tier is told of its reads, from whichever thread sees it."""

    def namespace(self) -> bytes: ...
    def on_read(self, nbytes: int, num_blocks: int) -> None: ...
    def on_miss(self, reason: str, place: Place) -> None: ...
    def on_error(self, error: OSError) -> None: ...
    def on_end(self, seconds: float, num_late: int) -> None: ...


class SharedReader:
    """What all reads of a tier have in common."""

    def __init__(self, tree: SharedTree, pool: IoPool, rows: Rows, codec: SlotCodec, header_nbytes: int) -> None:
        self.tree, self.pool, self.rows, self.codec = tree, pool, rows, codec
        self.files = ChunkReader(header_nbytes)

    def trailer_keys(self, path: str, fmt: FileFormat) -> list[BlockKey]:
        """The keys in a file's trailer, its payload unread; [] where the trailer is not valid.

        Raises:
            OSError: the file can't be opened or read.
        """
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            nbytes = self.codec.fmt.trailer_nbytes
            data = os.pread(fd, nbytes, fmt.file_nbytes - nbytes) if fmt.is_like(os.fstat(fd)) else b""
        finally:
            os.close(fd)
        if len(data) != nbytes:
            return []
        found = self.codec.parse(np.frombuffer(data, dtype=np.uint8).reshape(1, nbytes))
        return array_to_keys(found.keys[0]) if found.valid[0] else []

    def drop(self, place: Place, inode: Inode | None, keys: Iterable[BlockKey]) -> int:
        """Unlink those keys' names that still stand for a bad file; how many were."""
        dropped = 0
        for key in keys:
            path = self.tree.path_of(place.namespace, key)
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) == (inode or place.inode):
                    dropped += remove(path)
        return dropped


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """n chunks to be read into n slots, out of one namespace."""

    fmt: FileFormat
    namespace: bytes
    places: Sequence[Place]
    host_slots: Slots


class SharedReadJob(ReadJob):
    """One read of n chunks."""

    def __init__(self, reader: SharedReader, observer: ReadObserver, request: ReadRequest, deadline: float) -> None:
        fmt, places = request.fmt, request.places
        self._reader, self._observer, self._fmt, self._namespace = reader, observer, fmt, request.namespace
        self._places, self._slots = places, request.host_slots
        self._outcomes: list[tuple[Outcome | OSError, Inode | None]] = [(Outcome.GONE, None)] * len(places)
        self._start, self._used_ns = time.monotonic(), time.time_ns()
        n, threads = len(places), reader.pool.num_threads
        step = max(1, min(OPERATION_NBYTES // fmt.file_nbytes, n // (2 * threads)))
        operations = [self._operation(list(range(i, min(i + step, n)))) for i in range(0, n, step)]
        self._num_missing = n
        self._job = PooledReadJob(reader.pool, operations, self._check, self._failed, deadline)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for result in self._job:
            self._num_missing -= 1
            yield result
        self._observer.on_end(time.monotonic() - self._start, self._num_missing)

    def abandon(self, release: Callable[[Indices], None]) -> None:
        self._job.abandon(release)

    def _operation(self, indices: Indices) -> ReadOperation:
        def run() -> None:
            for i in indices:
                self._outcomes[i] = self._read(i)

        return ReadOperation(indices, run)

    def _read(self, i: int) -> tuple[Outcome | OSError, Inode | None]:
        """Runs in a pool thread: one file into its row."""
        place, reader = self._places[i], self._reader
        path = reader.tree.path_of(place.namespace, place.name)
        try:
            if place.namespace != self._namespace or not reader.tree.is_there(place.namespace, place.name):
                return Outcome.GONE, None
            used_ns = self._used_ns - i * USED_STEP_NS
            return reader.files.read(path, self._fmt, reader.rows[self._slots[i]], used_ns)
        except OSError as e:
            if e.errno == errno.EIO:  # perhaps this file's own: it would be read, and fail, for ever
                reader.drop(place, None, place.keys)
            return e, None

    def _failed(self, error: BaseException, indices: Indices) -> None:
        if isinstance(error, OSError):
            self._observer.on_error(error)
        for i in indices:
            self._observer.on_miss("closed", self._places[i])

    def _check(self, indices: Indices) -> list[bool]:
        """Runs in the collecting thread: which of these chunks are what was asked for."""
        read = [i for i in indices if self._outcomes[i][0] is Outcome.READ]
        good = dict(zip(read, self._verify(read), strict=True))
        for i in indices:
            outcome, inode = self._outcomes[i]
            place = self._places[i]
            if isinstance(outcome, OSError):
                self._observer.on_error(outcome)
                self._observer.on_miss("error", place)
            elif outcome is Outcome.GONE:
                self._observer.on_miss("gone", place)
            elif outcome is Outcome.DAMAGED:
                self._reader.drop(place, inode, place.keys)
                self._observer.on_miss("corrupt", place)
        return [good.get(i, False) for i in indices]

    def _verify(self, indices: Indices) -> list[bool]:
        reader, observer = self._reader, self._observer
        slots, namespace = self._slots[indices], observer.namespace()
        found = reader.codec.verify(reader.rows, slots, namespace)
        good = []
        for k, i in enumerate(indices):
            place = self._places[i]
            keys = array_to_keys(found.keys[k])
            reason = self._why_not(place, bool(found.valid[k]), keys, namespace)
            if reason == "corrupt":
                has_trailer = reader.codec.parse(reader.rows[slots[k : k + 1], reader.codec.fmt.body_nbytes :]).valid[0]
                names = [*place.keys, *keys] if has_trailer and not found.valid[k] else place.keys
                reader.drop(place, self._outcomes[i][1], names)
            if reason:
                observer.on_miss(reason, place)
            else:
                observer.on_read(self._fmt.file_nbytes, len(place.keys))
            good.append(not reason)
        return good

    def _why_not(self, place: Place, valid: bool, keys: list[BlockKey], namespace: bytes) -> str:
        """The reason for a miss; "" for a chunk that has all the asked-for keys."""
        if place.namespace != namespace:
            return "other namespace"  # it was changed meanwhile
        if not valid or place.name not in keys:
            return "corrupt"
        at = keys.index(place.name) - place.named
        # else a name that was given to another chunk with the same head since it was found
        return "" if at >= 0 and tuple(keys[at : at + len(place.keys)]) == place.keys else "changed"
