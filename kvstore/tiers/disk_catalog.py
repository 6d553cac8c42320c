"""What a disk directory holds, for people: read only, beside running stores or without one.

What the index names is what a store can find; the slots say whether it is still true. Where
the index cannot be read, the slots' own trailers are gone through, as a rebuild would.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.direct_io import open_direct, preadv_full
from kvstore.slot import ALIGNMENT, FOOTER, MAGIC, SlotCodec
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import (
    LARGE_CHUNK_NBYTES,
    TRAILER_IS_DAMAGED,
    Catalog,
    Space,
    StoredChunk,
    Summary,
    Verdict,
    why_bad,
)
from kvstore.tiers.disk_dir import is_in_use, link_in
from kvstore.tiers.disk_header import DirectoryHeader, read_header
from kvstore.tiers.disk_index import Records, empty_records, joined
from kvstore.tiers.index_stream import UnreadableIndexError, stream_index
from kvstore.tiers.page_buffer import page_aligned

_ATTEMPTS: Final = 3
_READ_NBYTES: Final = 8 << 20
_SCAN_SLOTS: Final = 256
T = TypeVar("T")
_BEHIND_END: Final = "lies behind the end of the data file"


def is_disk_directory(path: Path) -> bool:
    """Whether this is, or was, a disk tier's directory."""
    has = {name: os.path.lexists(path / name) for name in ("store.json", "data", "index", "locks")}
    return has["store.json"] or (has["data"] and (has["index"] or has["locks"]))


class DiskCatalog(Catalog):
    """See `Catalog`. A directory whose description cannot be read has problems and no chunks."""

    tier = "disk"

    def __init__(self, path: Path, integrity_key: bytes | None = None) -> None:
        super().__init__(path, integrity_key)
        self._described = self._read_header()
        self._index: Records | None = None
        self._is_read = self._is_unreadable = False
        self._spaces: dict[bytes, Space] = {}

    def formats(self) -> list[StoredFormat]:
        return [self._described[1]] if self._described else []

    def chunks(self) -> Iterator[StoredChunk]:
        if self._described is None:
            return
        _, fmt = self._described
        records = self.records()
        for i, (slot, generation) in enumerate(zip(records.slots.tolist(), records.generations.tolist(), strict=True)):
            space = self.space(records.namespaces[i].tobytes())
            keys = records.keys[i].tobytes()
            yield StoredChunk(space, slot, keys, fmt.slot.slot_nbytes, generation, generation, is_whole=True)

    def records(self) -> Records:
        """Everything that a store could find here, as arrays."""
        if self._described is None:
            return empty_records(1)
        _, fmt = self._described
        index = self._read_index_once(fmt)
        return self._scan(fmt) if index is None else index

    def fold(self, fold: Callable[[Iterable[Records]], T]) -> T:
        """What becomes of everything that a store could find here, piece by piece: memory does not grow with it.

        Args:
            fold: called again, from the start, where the index turns out to be unreadable; does not return None.
        """
        if self._described is None:
            return fold(())
        _, fmt = self._described
        found = None if self._is_unreadable else self._fold_index(fmt, fold)
        return fold(self._scan_pieces(fmt)) if found is None else found

    def summary(self, progress: Callable[[int], None] = lambda _: None) -> list[Summary]:
        def fold(pieces: Iterable[Records]) -> list[Summary]:
            found: dict[bytes, Summary] = {}
            for records in pieces:
                self._add(found, records)
                progress(len(records))
            return list(found.values())

        return self.fold(fold)

    def _add(self, found: dict[bytes, Summary], records: Records) -> None:
        halves = np.ascontiguousarray(records.namespaces).view(np.uint64).reshape(-1, 2)
        left = np.ones(len(records), dtype=np.bool_)
        while left.any():
            first = int(left.argmax())
            mine = left & (halves == halves[first]).all(axis=1)
            left &= ~mine
            namespace = records.namespaces[first].tobytes()
            space, n, times = self.space(namespace), int(mine.sum()), records.generations[mine]
            assert space.fmt is not None
            slot, ages = space.fmt.slot, (int(times.min()), int(times.max()))
            summary = found.setdefault(namespace, Summary(space))
            summary.add(n, n * slot.blocks_per_chunk, n * slot.slot_nbytes, *ages)

    def check(self) -> Iterator[Verdict]:
        if self._described is None:
            return
        _, fmt = self._described
        suspects: list[Verdict] = []
        slots: set[int] = set()
        most = max(1, _READ_NBYTES // fmt.slot.slot_nbytes)
        rows = page_aligned(most * fmt.slot.slot_nbytes).reshape(most, -1)
        with self._data() as fd:
            for run in _runs(self.chunks(), most):
                slots.update(chunk.slot for chunk in run)
                for verdict in self._check_run(fd, rows[: len(run)], run):
                    if verdict.is_bad:
                        suspects.append(verdict)
                    else:
                        yield verdict
        yield from self._look_again(fmt, suspects)
        if self._index is None:
            yield from self._lost(fmt, slots)

    def read(self, chunk: StoredChunk) -> Verdict:
        assert chunk.space.fmt is not None
        fmt = chunk.space.fmt
        row = page_aligned(fmt.slot.slot_nbytes)
        with self._data() as fd:
            problem = self._not_worth_reading(fd, fmt, chunk.slot) or _read_slots(fd, row.reshape(1, -1), chunk.slot)[0]
        if problem:
            return Verdict(chunk, problem)
        return Verdict(chunk, why_bad(self._codec(fmt), row, chunk), row=row)

    # -- inside

    def _read_header(self) -> tuple[DirectoryHeader, StoredFormat] | None:
        try:
            header = read_header(self.path)
            if header is None:
                raise ValueError("it is missing or damaged")
            fmt = StoredFormat.of(header.content, header.placement)
            if fmt.slot.slot_nbytes != header.slot_nbytes:
                raise ValueError(f"slots of {header.slot_nbytes} bytes, not {fmt.slot.slot_nbytes}")
        except (OSError, ValueError) as e:
            self._problem(f"store.json: {e}; what is stored here cannot be told")
            return None
        return header, fmt

    def _codec(self, fmt: StoredFormat) -> SlotCodec:
        return SlotCodec(fmt.slot, self._integrity_key)

    def space(self, namespace: bytes) -> Space:
        fmt = self._described[1] if self._described else None
        if namespace not in self._spaces:
            self._spaces[namespace] = Space(self.tier, self.path, namespace, fmt)
        return self._spaces[namespace]

    @contextlib.contextmanager
    def _data(self) -> Iterator[int | None]:
        """The data file; None where there is none to be read."""
        try:
            fd = open_direct(self.path / "data", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as e:
            self._problem(f"data: {e.strerror}")
            yield None
            return
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                yield fd
            else:
                self._problem("data: not a regular file")
                yield None
        finally:
            os.close(fd)

    def _read_index_once(self, fmt: StoredFormat) -> Records | None:
        if not self._is_read:
            self._index = self._read_index(fmt)
            self._is_read = True
        return self._index

    def _read_index(self, fmt: StoredFormat) -> Records | None:
        """What the index holds; None where it cannot be read."""
        empty = [empty_records(fmt.slot.blocks_per_chunk)]
        return self._fold_index(fmt, lambda pieces: joined(empty + list(pieces)))

    def _fold_index(self, fmt: StoredFormat, fold: Callable[[Iterator[Records]], T]) -> T | None:
        """What becomes of the index, piece by piece; None where it cannot be read. May be tried again."""
        file, problem, link = self.path / "index" / "data.mdb", "missing", link_in(self.path)
        if link is not None and link.startswith("index"):
            problem = f"{link} is a link, and not followed"
        elif file.is_file():
            for attempt in range(_ATTEMPTS):
                # In use: join its readers, or pages could be reused under us. The last try goes
                # without, for a lock file of another user or another PID namespace.
                mode = "lock" if is_in_use(self.path) and attempt < _ATTEMPTS - 1 else "nolock"
                try:
                    return fold(stream_index(file.parent, mode, fmt.slot.blocks_per_chunk))
                except UnreadableIndexError as e:
                    problem = str(e)
        self._is_unreadable = True
        self._problem(f"index: {problem}; the next store that opens the directory rebuilds it")
        return None

    def _scan(self, fmt: StoredFormat) -> Records:
        """Entries from the trailers in the data file, as a rebuild makes them."""
        return joined([empty_records(fmt.slot.blocks_per_chunk), *self._scan_pieces(fmt)])

    def _scan_pieces(self, fmt: StoredFormat) -> Iterator[Records]:
        codec = self._codec(fmt)
        for slots, trailers in self._trailers(fmt):
            parsed = codec.parse(trailers)
            records = Records(slots, parsed.generations, parsed.namespaces, parsed.keys)
            yield records.at(parsed.valid & (parsed.generations > 0))

    def _not_worth_reading(self, fd: int | None, fmt: StoredFormat, slot: int) -> str:
        """Of a large slot, which is read alone, the trailer is looked at first: who describes slots of gigabytes
        has no memory taken by it."""
        if fmt.slot.slot_nbytes <= LARGE_CHUNK_NBYTES or fd is None:
            return ""
        tail = page_aligned(-(-fmt.slot.trailer_nbytes // ALIGNMENT) * ALIGNMENT)
        try:
            if preadv_full(fd, [tail], (slot + 1) * fmt.slot.slot_nbytes - len(tail)) != len(tail):
                return _BEHIND_END
        except (OSError, OverflowError) as e:
            return f"cannot be read: {e}"
        is_valid = self._codec(fmt).parse(tail[None, -fmt.slot.trailer_nbytes :]).valid[0]
        return "" if is_valid else TRAILER_IS_DAMAGED

    def _lost(self, fmt: StoredFormat, known: set[int]) -> Iterator[Verdict]:
        """Slots that were sealed once, and whose trailers no longer say what they hold."""
        for slots, trailers in self._trailers(fmt):
            footers = np.ascontiguousarray(trailers[:, -FOOTER.itemsize :]).view(FOOTER).reshape(-1)
            for i in np.flatnonzero(footers["magic"] == np.void(MAGIC)).tolist():
                if int(slots[i]) not in known:
                    space = Space(self.tier, self.path, footers["namespace"][i].tobytes(), fmt)
                    chunk = StoredChunk(space, int(slots[i]), b"", fmt.slot.slot_nbytes, 0)
                    yield Verdict(chunk, TRAILER_IS_DAMAGED)

    def _trailers(self, fmt: StoredFormat) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        nbytes, slot_nbytes = fmt.slot.trailer_nbytes, fmt.slot.slot_nbytes
        tail = page_aligned(-(-nbytes // ALIGNMENT) * ALIGNMENT)
        with self._data() as fd:
            num_slots = os.fstat(fd).st_size // slot_nbytes if fd is not None else 0
            for start in range(0, num_slots, _SCAN_SLOTS):
                slots = np.arange(start, min(start + _SCAN_SLOTS, num_slots), dtype=np.int64)
                trailers = np.zeros((len(slots), nbytes), dtype=np.uint8)
                for i, slot in enumerate(slots.tolist()):
                    with contextlib.suppress(OSError):  # no trailer: nothing is found there
                        assert fd is not None
                        preadv_full(fd, [tail], (slot + 1) * slot_nbytes - len(tail))
                        trailers[i] = tail[-nbytes:]
                yield slots, trailers

    def _check_run(self, fd: int | None, rows: NDArray[np.uint8], run: list[StoredChunk]) -> Iterator[Verdict]:
        fmt = run[0].space.fmt
        assert fmt is not None
        codec, problem = self._codec(fmt), self._not_worth_reading(fd, fmt, run[0].slot)
        if problem:
            yield Verdict(run[0], problem)
            return
        problems = _read_slots(fd, rows, run[0].slot)
        sound = _are_sound(codec, rows, run)
        for i, chunk in enumerate(run):
            yield Verdict(chunk, problems[i] or ("" if sound[i] else why_bad(codec, rows[i], chunk)))

    def _look_again(self, fmt: StoredFormat, suspects: list[Verdict]) -> Iterator[Verdict]:
        """Beside a running store, a slot may have been evicted and reused since it was listed."""
        records = self._read_index(fmt) if suspects and self._index is not None and is_in_use(self.path) else None
        if records is None:
            yield from suspects
            return
        current = dict(zip(records.slots.tolist(), records.generations.tolist(), strict=True))
        for verdict in suspects:
            if current.get(verdict.chunk.slot) == verdict.chunk.generation:
                yield Verdict(verdict.chunk, self.read(verdict.chunk).reason)
            else:
                yield Verdict(verdict.chunk, verdict.reason, is_gone=True)


def _runs(chunks: Iterable[StoredChunk], most: int) -> Iterator[list[StoredChunk]]:
    """Chunks in neighbouring ascending slots, up to ``most`` at a time."""
    run: list[StoredChunk] = []
    for chunk in chunks:
        if run and (chunk.slot != run[-1].slot + 1 or len(run) == most):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


def _are_sound(codec: SlotCodec, rows: NDArray[np.uint8], run: list[StoredChunk]) -> NDArray[np.bool_]:
    """Which rows hold what they are found as; all at once, where `why_bad` takes one at a time."""
    sound = np.zeros(len(run), dtype=np.bool_)
    for namespace in {chunk.space.namespace for chunk in run}:
        at = np.array([i for i, chunk in enumerate(run) if chunk.space.namespace == namespace])
        found = codec.verify(rows, at, namespace)
        keys = [run[i].key_bytes == k.tobytes() for i, k in zip(at, found.keys, strict=True)]
        generations = [run[i].generation == g for i, g in zip(at, found.generations.tolist(), strict=True)]
        sound[at] = found.valid & keys & generations
    return sound


def _read_slots(fd: int | None, rows: NDArray[np.uint8], first: int) -> list[str]:
    """Read neighbouring slots into rows; says what went wrong with each."""
    if fd is None:
        return ["the data file cannot be read"] * len(rows)
    try:
        whole = preadv_full(fd, [rows.reshape(-1)], first * rows.shape[1]) // rows.shape[1]
        return [""] * whole + [_BEHIND_END] * (len(rows) - whole)
    except (OSError, OverflowError) as e:
        if len(rows) == 1:
            return [f"cannot be read: {e}"]
    return [_read_slots(fd, rows[i : i + 1], first + i)[0] for i in range(len(rows))]
