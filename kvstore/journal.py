"""The event journal: who asked for what, what was stored where, and why it left. Format and reader.

A journal is a directory of segments ``*.kvj``, each written by one process, so that several
may write beside each other. A segment is `MAGIC`, then frames: length (uint32, little-endian),
xxh3_64 of the payload, payload. A payload is one of the `Record` kinds as msgpack. The first of
a segment is an `Opened`, so that each can be read alone.

Nothing in it is trusted: a length is checked before it is used, a frame that does not verify ends
its segment. What a kill has cut off at the end is no problem; anything else is told.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.keys import BLOCK_HASH_NBYTES

MAGIC: Final = b"KVSJNL01"
SUFFIX: Final = ".kvj"
MAX_PAYLOAD_NBYTES: Final = 1 << 20
MAX_HASHES: Final = (MAX_PAYLOAD_NBYTES - (64 << 10)) // BLOCK_HASH_NBYTES  # of one `Asked`
MOVE_ID_NBYTES: Final = 8
MAX_MOVES: Final = (MAX_PAYLOAD_NBYTES - (64 << 10)) // MOVE_ID_NBYTES  # of one `Moved`
MAX_TEXT: Final = 256
MAX_SEGMENTS: Final = 1024  # that are looked at; the newest
_MAX_SEGMENT_NBYTES: Final = 4 << 30
_HEAD_NBYTES: Final = 12
_GROUP_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)
_BATCH: Final = 256  # records, and bytes, that are decoded while a segment is open
_BATCH_NBYTES: Final = 256 << 10
_NAME: Final = re.compile(r"[0-9]{20}-[0-9]{1,10}-[0-9a-f]{8}\.kvj")
_MAX_PROBLEMS: Final = 100

_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
_Name = Annotated[str, msgspec.Meta(max_length=64)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
_Counts = Annotated[dict[_Name, _Count], msgspec.Meta(max_length=16)]
_Numbers = Annotated[dict[_Name, float], msgspec.Meta(max_length=64)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{0,64}$")]


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """``t_ns``: wall clock, nanoseconds since 1970."""

    t_ns: _Count


class Opened(Record, tag="o", frozen=True, array_like=True, kw_only=True):
    """A process has opened a store, or begun a segment.

    Attributes:
        who: "TieredStore" or the engine's connector.
        content, placed: of the identity.
        num_groups: KV cache groups: each block hash has so many keys.
        capacity_nbytes: by tier.
        place, started: see `kvstore.process`; empty and 0 where they are not known.
        sample_s: how often it writes at least.
    """

    pid: _Count
    who: _Text
    namespace: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    content: dict[str, Any]
    placed: dict[str, Any]
    num_groups: Annotated[int, msgspec.Meta(ge=1, le=64)]
    capacity_nbytes: _Counts
    place: _Name = ""
    started: _Count = 0
    sample_s: _Seconds = 10.0


class Asked(Record, tag="a", frozen=True, array_like=True, kw_only=True):
    """A request's prompt, once its lookup has been answered for good.

    Attributes:
        tenant: digest of the salt, empty without one; the salt itself is never written.
        adapter: digest of the adapter's content, in hex.
        num_tokens: of the prompt.
        depth, parent: how many leading blocks this process's segments have already, and the last one's hash.
        hashes: of the full blocks behind those, joined.
        hits: leading blocks, by the tier that had them.
        is_late: its deadline had passed before everything had come.
    """

    request: _Text
    tenant: _Digest
    adapter: _Digest
    num_tokens: _Count
    depth: _Count
    parent: Annotated[bytes, msgspec.Meta(max_length=BLOCK_HASH_NBYTES)]
    hashes: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD_NBYTES)]
    hits: _Counts
    waited_s: _Seconds
    is_late: bool


class Ended(Record, tag="e", frozen=True, array_like=True, kw_only=True):
    """A request is over, and these of its blocks were stored: its prompt's, and those of what was generated.

    Attributes:
        depth, parent, hashes: see `Asked`.
    """

    request: _Text
    tenant: _Digest
    depth: _Count
    parent: Annotated[bytes, msgspec.Meta(max_length=BLOCK_HASH_NBYTES)]
    hashes: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD_NBYTES)]


class Moved(Record, tag="m", frozen=True, array_like=True, kw_only=True):
    """Blocks that a tier has from now on, or no more.

    Attributes:
        why: empty: stored. Else why they left: see `kvstore.events.RemovedWhy`.
        ids: of block keys, see `move_ids`, as bytes.
    """

    tier: _Name
    why: _Name
    ids: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD_NBYTES)]


class Reset(Record, tag="r", frozen=True, array_like=True, kw_only=True):
    """The store goes on under another namespace, and finds nothing of the old one."""

    namespace: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Sample(Record, tag="s", frozen=True, array_like=True, kw_only=True):
    """Numbers of `kvstore.tiers.base.TierStats` by tier: counters since the start, sizes now."""

    tiers: Annotated[dict[_Name, _Numbers], msgspec.Meta(max_length=16)]


class Closed(Record, tag="c", frozen=True, array_like=True, kw_only=True):
    """The process has closed its store; what was in its memory is gone."""


class Lost(Record, tag="l", frozen=True, array_like=True, kw_only=True):
    """What the writer could not keep up with since its last record."""

    records: _Count
    blocks: _Count


AnyRecord = Opened | Asked | Ended | Moved | Reset | Sample | Closed | Lost
_DECODER: Final = msgspec.msgpack.Decoder(AnyRecord)
_ENCODER: Final = msgspec.msgpack.Encoder()


def move_ids(keys: bytes) -> NDArray[np.uint64]:
    """A number for each of joined block keys: the first 8 bytes of its hash, and its group mixed in. A hash is
    cryptographic, so that two keys of one number will not be met."""
    parts = np.frombuffer(keys, dtype=[("head", "<u8"), ("rest", "V24"), ("group", "<u4")])
    numbers: NDArray[np.uint64] = parts["head"] ^ (parts["group"].astype(np.uint64) * _GROUP_FACTOR)
    return numbers


def frame(record: AnyRecord) -> bytes:
    """A record as it lies in a segment.

    Raises:
        ValueError: it is too large.
    """
    payload = _ENCODER.encode(record)
    if len(payload) > MAX_PAYLOAD_NBYTES:
        raise ValueError(f"a record of {len(payload)} bytes; at most {MAX_PAYLOAD_NBYTES}")
    return len(payload).to_bytes(4, "little") + xxhash.xxh3_64_digest(payload) + payload


@dataclass(frozen=True, slots=True)
class Segment:
    """One file of a journal, as it was when it was listed."""

    path: Path
    nbytes: int
    modified_ns: int


def segments(path: Path) -> list[Segment]:
    """Of a journal, oldest first; other files, and links, are passed over.

    Raises:
        OSError: the directory cannot be read.
    """
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                if stat.S_ISREG(status.st_mode):
                    found.append(Segment(Path(entry.path), status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda segment: segment.path.name)


@dataclass(slots=True)
class JournalReader:
    """Reads a journal's directory, beside those who write it.

    Attributes:
        since_ns: segments that nobody has written to since are passed over.
        problems: what was wrong with segments that have been read; bounded.
        num_torn: segments whose last frame was not whole: of a killed, or a running, process.
    """

    path: Path
    since_ns: int = 0
    problems: list[str] = field(default_factory=list)
    num_torn: int = 0

    def records(self) -> Iterator[tuple[str, AnyRecord]]:
        """(name of the segment, record), by time.

        Raises:
            ConfigError: there is no such directory, or it holds no journal.
        """
        try:
            found = segments(self.path)
        except OSError as e:
            raise ConfigError(f"--journal: {str(self.path)!r} cannot be read ({e.strerror})") from e
        if not found:
            raise ConfigError(f"--journal: {str(self.path)!r} holds no journal; give the directory set as journal_path")
        found = [segment for segment in found if segment.modified_ns >= self.since_ns]
        if len(found) > MAX_SEGMENTS:
            self._problem(f"{len(found)} segments; only the newest {MAX_SEGMENTS} are read")
            found = found[-MAX_SEGMENTS:]
        streams = (self._stream(i, segment) for i, segment in enumerate(found))
        for _, _, name, record in heapq.merge(*streams, key=lambda item: item[:2]):
            yield name, record

    def _stream(self, number: int, segment: Segment) -> Iterator[tuple[int, int, str, AnyRecord]]:
        """What a merge by time needs."""
        for record in self._read(segment):
            yield record.t_ns, number, segment.path.name, record

    def _read(self, segment: Segment) -> Iterator[AnyRecord]:
        """Of one segment, in the order written; opened only while it is read."""
        at, last_ns = 0, 0
        while True:  # a few hundred files need not be open at once: each is opened for a batch
            try:
                batch, at = self._batch(segment, at)
            except FileNotFoundError:  # its writer has made room
                return
            except OSError as e:
                self._problem(f"{segment.path.name}: cannot be read ({e.strerror})")
                return
            for record in batch:
                last_ns = max(last_ns, record.t_ns)  # a clock that was set back does not reorder what one process did
                yield record if record.t_ns == last_ns else msgspec.structs.replace(record, t_ns=last_ns)
            if at == 0:
                return

    def _batch(self, segment: Segment, at: int) -> tuple[list[AnyRecord], int]:
        """Some records from a position on, and where the next ones are; 0: there are no more."""
        end = min(segment.nbytes, _MAX_SEGMENT_NBYTES)
        batch: list[AnyRecord] = []
        descriptor = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=1 << 18) as file:
            if at == 0:
                if file.read(len(MAGIC)) != MAGIC:
                    if segment.nbytes >= len(MAGIC):
                        self._problem(f"{segment.path.name}: is no journal of this version")
                    return [], 0
                at = len(MAGIC)
            file.seek(at)
            until = min(end, at + _BATCH_NBYTES)
            while at < until and len(batch) < _BATCH:
                record, size = self._one(segment, file, end - at)
                if record is None:
                    return batch, 0
                batch.append(record)
                at += size
        return batch, at if at < end else 0

    def _one(self, segment: Segment, file: BinaryIO, left: int) -> tuple[AnyRecord | None, int]:
        head = file.read(_HEAD_NBYTES)
        size = int.from_bytes(head[:4], "little")
        if len(head) < _HEAD_NBYTES or (size <= MAX_PAYLOAD_NBYTES and size + _HEAD_NBYTES > left):
            self.num_torn += 1
            return None, 0
        if size > MAX_PAYLOAD_NBYTES:
            self._problem(f"{segment.path.name}: a record says that it has {size} bytes; what follows is not read")
            return None, 0
        payload = file.read(size)
        if xxhash.xxh3_64_digest(payload) != head[4:]:
            self._problem(f"{segment.path.name}: a record does not verify; what follows is not read")
            return None, 0
        try:
            return _DECODER.decode(payload), size + _HEAD_NBYTES
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
            self._problem(f"{segment.path.name}: a record is none ({e}); what follows is not read")
            return None, 0

    def _problem(self, text: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)


def is_journal(path: Path) -> bool:
    """Whether a directory holds a segment of a journal."""
    try:
        return path.is_dir() and bool(segments(path))
    except OSError:
        return False
