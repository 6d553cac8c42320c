"""What a shared path holds, for people: read only, beside running stores or without one.

Names say what is there, each namespace's JSON what it is. Nothing but folders and regular
files with names of our own making is looked at.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import KeyFormatError
from kvstore.keys import BlockKey
from kvstore.slot import SlotCodec
from kvstore.stored_format import StoredFormat
from kvstore.strict_json import parse_json
from kvstore.tiers.catalog import LARGE_CHUNK_NBYTES, TRAILER_IS_DAMAGED, Catalog, Space, StoredChunk, Verdict, why_bad
from kvstore.tiers.chunk_file import ChunkReader, FileFormat, Inode, Outcome, file_format
from kvstore.tiers.page_buffer import page_aligned
from kvstore.tiers.shared_tree import (
    CHUNK_NAME,
    FAN_OUT_NAME,
    NAMESPACE_JSON,
    NAMESPACE_NAME,
    PLACEMENT_JSON,
    PLACEMENT_NAME,
    SUFFIX,
)

_JSON_MAX_NBYTES: Final = 64 << 10


def is_shared_path(path: Path) -> bool:
    """Whether there is a namespace in it."""
    try:
        with os.scandir(path) as entries:
            return any(NAMESPACE_NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False) for e in entries)
    except OSError:
        return False


@dataclass(slots=True)
class _File:
    """One file and its names, of which each block key of its chunk has one."""

    path: Path
    status: os.stat_result
    keys: list[BlockKey] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What it takes to read the files of one space."""

    space: Space
    files: FileFormat
    reader: ChunkReader
    codec: SlotCodec
    row: NDArray[np.uint8]


class SharedCatalog(Catalog):
    """See `Catalog`."""

    tier = "shared"

    def __init__(self, path: Path, integrity_key: bytes | None = None) -> None:
        super().__init__(path, integrity_key)
        self._spaces = list(self._find_spaces())
        self._buffers: _Buffers | None = None

    def formats(self) -> list[StoredFormat]:
        return [space.fmt for _, space in self._spaces if space.fmt is not None]

    def chunks(self) -> Iterator[StoredChunk]:
        for folder, space in self._spaces:
            for file in self._files(folder):
                keys, status = b"".join(file.keys), file.status
                yield StoredChunk(space, file.path, keys, status.st_size, status.st_mtime_ns)

    def names(self, first_bytes: range) -> Iterator[tuple[int, BlockKey]]:
        """The blocks whose keys begin so, each with the number of its space, from names alone: memory does not grow
        with them. `chunk_of` takes both."""
        for number, (folder, _) in enumerate(self._spaces):
            for _, key in self._named(folder, first_bytes):
                yield number, key

    def chunk_of(self, number: int, key: BlockKey) -> StoredChunk:
        """One block's chunk, without its other blocks, its size and its age."""
        folder, space = self._spaces[number]
        return StoredChunk(space, folder / key[:1].hex() / f"{key}{SUFFIX}", bytes(key), 0, 0)

    def check(self) -> Iterator[Verdict]:
        for chunk in self.chunks():
            verdict = self.read(chunk)
            yield Verdict(chunk, verdict.reason, is_gone=verdict.is_gone)

    def read(self, chunk: StoredChunk) -> Verdict:
        space = chunk.space
        if space.fmt is None:
            return Verdict(chunk, f"cannot be verified: {NAMESPACE_JSON} or {PLACEMENT_JSON} is damaged")
        to = self._buffers_of(space, space.fmt)
        try:
            if not self._is_worth_reading(str(chunk.place), to):
                return Verdict(chunk, TRAILER_IS_DAMAGED)
            outcome, _ = to.reader.read(str(chunk.place), to.files, to.row, used_ns=0)  # 0: its mtime is left alone
        except OSError as e:
            return Verdict(chunk, f"cannot be read: {e.strerror}")
        if outcome is Outcome.GONE:
            return Verdict(chunk, "gone", is_gone=True)
        if outcome is Outcome.DAMAGED:
            return Verdict(chunk, "size or header is not that of its namespace's files")
        return Verdict(chunk, why_bad(to.codec, to.row, chunk), row=to.row)

    # -- inside

    @staticmethod
    def _is_worth_reading(path: str, to: _Buffers) -> bool:
        """Of a large file the trailer is looked at first, as of a large slot; whether it is there is told later."""
        slot = to.codec.fmt
        if slot.slot_nbytes <= LARGE_CHUNK_NBYTES:
            return True
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            if not to.files.is_like(os.fstat(fd)):
                return True
            tail = os.pread(fd, slot.trailer_nbytes, to.files.file_nbytes - slot.trailer_nbytes)
        finally:
            os.close(fd)
        if len(tail) != slot.trailer_nbytes:
            return True
        return bool(to.codec.parse(np.frombuffer(tail, dtype=np.uint8)[None]).valid[0])

    def _buffers_of(self, space: Space, fmt: StoredFormat) -> _Buffers:
        """Of one space at a time, for a chunk may be large."""
        if self._buffers is None or self._buffers.space is not space:
            files = file_format(fmt.layout, fmt.slot, space.namespace, fmt.byte_layout, fmt.tp_size)
            row, codec = page_aligned(fmt.slot.slot_nbytes), SlotCodec(fmt.slot, self._integrity_key)
            self._buffers = _Buffers(space, files, ChunkReader(files.header.nbytes), codec, row)
        return self._buffers

    def _find_spaces(self) -> Iterator[tuple[Path, Space]]:
        for top in self._subfolders(self.path, NAMESPACE_NAME):
            content = self._read_json(top / NAMESPACE_JSON)
            for folder in self._subfolders(top, PLACEMENT_NAME):
                fmt = self._format(folder, content)
                yield folder, Space(self.tier, self.path, bytes.fromhex(top.name), fmt)

    def _format(self, folder: Path, content: object) -> StoredFormat | None:
        placed = self._read_json(folder / PLACEMENT_JSON)
        if content is None or placed is None:
            return None
        try:
            fmt = StoredFormat.of(content, placed)
        except ValueError as e:
            self._problem(f"{folder}: {e}")
            return None
        if fmt.slot.placement.hex()[: len(folder.name)] != folder.name:
            self._problem(f"{folder / PLACEMENT_JSON}: it is another placement's")
            return None
        return fmt

    def _read_json(self, path: Path) -> object:
        """What a description says; None where it is missing or damaged, which is a problem."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as f:
                found: object = parse_json(f.read(_JSON_MAX_NBYTES))
        except (OSError, ValueError) as e:
            self._problem(f"{path}: {e.strerror if isinstance(e, OSError) else 'damaged'}")
            return None
        return found

    def _subfolders(self, folder: Path, pattern: re.Pattern[str]) -> list[Path]:
        try:
            with os.scandir(folder) as entries:
                names = [e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        except OSError as e:
            self._problem(f"{folder}: {e.strerror}")
            return []
        return [folder / name for name in sorted(names)]

    def _files(self, placed: Path) -> Iterator[_File]:
        """Files with all of their names; those with one name come first."""
        linked: dict[Inode, _File] = {}
        for file, key in self._named(placed):
            if file.status.st_nlink == 1:
                file.keys.append(key)
                yield file
            else:
                inode = (file.status.st_dev, file.status.st_ino)
                linked.setdefault(inode, file).keys.append(key)
        yield from linked.values()

    def _named(self, placed: Path, first_bytes: range = range(256)) -> Iterator[tuple[_File, BlockKey]]:
        for folder in self._subfolders(placed, FAN_OUT_NAME):
            if int(folder.name, 16) in first_bytes:
                try:
                    yield from self._names(folder)
                except OSError as e:
                    self._problem(f"{folder}: {e.strerror}")

    def _names(self, folder: Path) -> Iterator[tuple[_File, BlockKey]]:
        with os.scandir(folder) as entries:
            for entry in entries:
                key = _key_of(entry.name)
                if key is None or key[:1].hex() != folder.name:
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield _File(folder / entry.name, status), key
                else:
                    self._problem(f"{folder / entry.name}: not a regular file")


def _key_of(name: str) -> BlockKey | None:
    if not CHUNK_NAME.fullmatch(name):
        return None
    try:
        return BlockKey.parse(name.removesuffix(SUFFIX))
    except KeyFormatError:
        return None
