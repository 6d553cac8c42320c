"""Removes chosen chunks from a tier's directory, beside running stores or without one.

On disk as a store does it: this process becomes one more user of the directory, deletes the entries durably and
overwrites the slots' trailers, so that no rebuild brings anything back. On a shared path names are unlinked, as
its collector does. A chunk that has changed since it was listed is left alone.
"""

from __future__ import annotations

import functools
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.config import DiskTierConfig
from kvstore.errors import KVStoreError
from kvstore.keys import KEY_NBYTES
from kvstore.slot import SlotCodec
from kvstore.stored_format import StoredFormat
from kvstore.tiers import lmdb_env
from kvstore.tiers.catalog import Catalog, Space, StoredChunk
from kvstore.tiers.disk_catalog import DiskCatalog
from kvstore.tiers.disk_dir import is_in_use, link_in
from kvstore.tiers.disk_header import DirectoryHeader, read_header
from kvstore.tiers.disk_keeper import VolumeKeeper
from kvstore.tiers.disk_volume import DiskVolume, VolumeConfig

_OPEN_S: Final = 60.0
_REMOVE_S: Final = 3600.0
_BATCHES, _LEAST_BATCH = 16, 1024  # chunks
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class RemovalError(KVStoreError):
    """Nothing, or not all, was removed; says why."""


class Candidates(ABC):
    """Chunks of one directory, as arrays; of n chunks.

    Attributes:
        times_ns: (n,), see `StoredChunk.time_ns`.
        nbytes: (n,)
        keys: uint8 (n, blocks, 36); rows with fewer blocks end in zeros.
        spaces: by number; ``space_of``, shape (n,), says whose a chunk is.
    """

    times_ns: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    keys: NDArray[np.uint8]
    spaces: list[Space]
    space_of: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.times_ns)

    def num_blocks(self, where: NDArray[np.bool_]) -> int:
        """How many blocks these chunks hold."""
        return int(self.keys[where].any(axis=2).sum())

    @abstractmethod
    def remove(self, where: NDArray[np.bool_], progress: Callable[[int], None]) -> int:
        """Remove chunks for good; returns how many.

        Args:
            progress: called with how many more have gone. What it raises ends the removal; what has gone is gone.
        Raises:
            RemovalError: the directory does not answer, or is not to be written.
        """


def candidates(catalog: Catalog, integrity_key: bytes | None) -> Candidates:
    """What could be removed from a directory."""
    if isinstance(catalog, DiskCatalog):
        return _DiskCandidates(catalog, integrity_key)
    return _SharedCandidates(catalog)


class _DiskCandidates(Candidates):
    def __init__(self, catalog: DiskCatalog, integrity_key: bytes | None) -> None:
        self._path, self._integrity_key = catalog.path, integrity_key
        records = catalog.records()
        self._slots, self._generations = records.slots, records.generations
        self.times_ns, self.keys = records.generations.astype(np.int64), records.keys
        namespaces, self.space_of = np.unique(records.namespaces, return_inverse=True)
        self.spaces = [catalog.space(namespace.tobytes()) for namespace in namespaces]
        nbytes = self.spaces[0].fmt.slot.slot_nbytes if self.spaces and self.spaces[0].fmt else 0
        self.nbytes = np.full(len(records), nbytes, dtype=np.int64)

    def remove(self, where: NDArray[np.bool_], progress: Callable[[int], None]) -> int:
        if not where.any():
            return 0
        _refuse_links(self._path)
        header = read_header(self._path)
        problem = lmdb_env.check(self._path / "index")
        if header is None or problem:
            raise RemovalError(f"{self._path}: the index is damaged ({problem}); kvstore verify --repair mends it")
        keeper = keeper_of(self._path, _format_of(self._path, header), header.num_slots,
                           self._integrity_key)  # fmt: skip
        slots, generations = self._slots[where], self._generations[where]
        try:
            return _remove(keeper, slots, generations, progress)
        finally:
            keeper.close(_OPEN_S)


def _remove(
    keeper: VolumeKeeper, slots: NDArray[np.int64], generations: NDArray[np.uint64], progress: Callable[[int], None]
) -> int:
    """In some batches, between which it can be interrupted: for each all free slots' trailers are looked through."""
    removed, step = 0, max(_LEAST_BATCH, -(-len(slots) // _BATCHES))
    for at in range(0, len(slots), step):
        part = slots[at : at + step], generations[at : at + step]
        n = keeper.write_by(time.monotonic() + _REMOVE_S, functools.partial(_remove_part, part))
        if n is None:
            raise RemovalError(f"the directory could not be written: {keeper.health.last_error}")
        removed += n
        progress(n)
    return removed


def _remove_part(part: tuple[NDArray[np.int64], NDArray[np.uint64]], volume: DiskVolume) -> int:
    return volume.remove(*part)


def _format_of(path: Path, header: DirectoryHeader) -> StoredFormat:
    try:
        return StoredFormat.of(header.content, header.placement)
    except ValueError as e:
        raise RemovalError(f"{path}: store.json describes no KV that this version knows ({e})") from e


def _refuse_links(path: Path) -> None:
    link = link_in(path)
    if link is not None:
        raise RemovalError(f"{path / link} is a link, or has a second name elsewhere: nothing is written through it")


def keeper_of(path: os.PathLike[str], fmt: StoredFormat, num_slots: int, integrity_key: bytes | None) -> VolumeKeeper:
    """Open a disk directory as one more of its users, with the bound that it has; to be closed.

    Raises:
        RemovalError: it cannot be opened.
        ConfigError: it may not be: it is in use in another PID namespace, say.
    """
    codec = SlotCodec(fmt.slot, integrity_key)
    disk = DiskTierConfig(path=os.fspath(path), num_blocks=num_slots * fmt.slot.blocks_per_chunk)
    keeper = VolumeKeeper(VolumeConfig(disk, fmt.identity(), codec, num_slots), fmt.initial_namespace)
    if keeper.usable() is None:
        keeper.close(_OPEN_S)
        raise RemovalError(f"{path} cannot be opened: {keeper.health.last_error}")
    return keeper


def repair(catalog: Catalog, bad: Sequence[StoredChunk], integrity_key: bytes | None) -> int:
    """Remove chunks that are damaged, and have a damaged index rebuilt from what is sound; how many were removed.

    Raises:
        RemovalError: it is in use and its index is damaged, or it cannot be written.
    """
    if not isinstance(catalog, DiskCatalog):
        return sum(map(_unlink, bad))
    _refuse_links(catalog.path)
    header, problem = read_header(catalog.path), lmdb_env.check(catalog.path / "index")
    if header is None:
        raise RemovalError(f"{catalog.path}: store.json is damaged: what is stored there cannot be told")
    if problem and is_in_use(catalog.path):
        raise RemovalError(f"{catalog.path} is in use, and its index is damaged ({problem}); stop its stores first")
    fmt = _format_of(catalog.path, header)
    keeper = keeper_of(catalog.path, fmt, header.num_slots, integrity_key)  # rebuilds
    try:
        named = sorted((chunk.slot, chunk.generation) for chunk in bad)
        slots = np.array([slot for slot, _ in named], dtype=np.int64)
        generations = np.array([generation for _, generation in named], dtype=np.uint64)
        return _remove(keeper, slots, generations, lambda n: None)
    finally:
        keeper.close(_OPEN_S)


class _SharedCandidates(Candidates):
    def __init__(self, catalog: Catalog) -> None:
        self._chunks = list(catalog.chunks())
        self.spaces = list({id(chunk.space): chunk.space for chunk in self._chunks}.values())
        number = {id(space): i for i, space in enumerate(self.spaces)}
        self.space_of = np.array([number[id(chunk.space)] for chunk in self._chunks], dtype=np.int64)
        self.times_ns = np.array([chunk.time_ns for chunk in self._chunks], dtype=np.int64)
        self.nbytes = np.array([chunk.nbytes for chunk in self._chunks], dtype=np.int64)
        most = max((len(chunk.key_bytes) for chunk in self._chunks), default=KEY_NBYTES)
        padded = b"".join(chunk.key_bytes.ljust(most, b"\0") for chunk in self._chunks)
        self.keys = np.frombuffer(padded, dtype=np.uint8).reshape(len(self._chunks), most // KEY_NBYTES, KEY_NBYTES)

    def remove(self, where: NDArray[np.bool_], progress: Callable[[int], None]) -> int:
        removed = 0
        for i in np.flatnonzero(where).tolist():
            removed += _unlink(self._chunks[i])
            progress(1)
        return removed


def _unlink(chunk: StoredChunk) -> bool:
    """All names of a chunk's file, where they still name it."""
    place = chunk.place
    assert not isinstance(place, int)
    placed, removed = place.parent.parent, False
    inode: int | None = None
    for key in chunk.keys:
        name = f"{key}.safetensors"
        try:
            folder = os.open(placed / key[:1].hex(), _FOLDER_FLAGS)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise RemovalError(f"{placed / key[:1].hex()}: {e.strerror}") from e
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            is_it = stat.S_ISREG(status.st_mode) and (inode is None or status.st_ino == inode)
            if is_it and status.st_mtime_ns <= chunk.time_ns and status.st_size == chunk.nbytes:
                inode = status.st_ino
                os.unlink(name, dir_fd=folder)
                removed = True
        except FileNotFoundError:
            continue
        except OSError as e:
            raise RemovalError(f"{placed / key[:1].hex() / name}: {e.strerror}") from e
        finally:
            os.close(folder)
    return removed
