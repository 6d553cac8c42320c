"""Which names there are on a shared path, and which of them stand for one file.

What is there is remembered for a few seconds; what is not is asked for again each time, so
that what another host has just stored is found. Reads no file.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cachetools import TTLCache

from kvstore.keys import BlockKey
from kvstore.tiers.chunk_file import Inode
from kvstore.tiers.shared_tree import SharedTree

FOUND_TTL_S: Final = 3.0
MAX_FOUND: Final = 16384


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk was found: consecutive asked-for keys, and one of them that is its name.

    Where there are hard links, all of them are names of that one file.
    """

    namespace: bytes
    inode: Inode
    named: int  # position in keys
    keys: tuple[BlockKey, ...]

    @property
    def name(self) -> BlockKey:
        return self.keys[self.named]


class SharedLookup:
    """Finds names. Thread-safe; waits for as long as the file system does."""

    def __init__(self, tree: SharedTree) -> None:
        self._tree = tree
        self._lock = threading.Lock()
        self._found: TTLCache[tuple[bytes, BlockKey], Inode] = TTLCache(maxsize=MAX_FOUND, ttl=FOUND_TTL_S)

    def find(self, namespace: bytes, keys: Sequence[BlockKey], *, has_links: bool) -> Place | None:
        """The chunk that holds the first of these keys, with those that follow it there.

        Args:
            keys: as many as a chunk has, at most.
            has_links: whether each key of a chunk has a name, or the last one only.
        Raises:
            OSError: the file system does not answer.
        """
        for i in range(1 if has_links else len(keys)):
            inode = self.inode(namespace, keys[i])
            if inode is not None:
                n = i + 1
                while n < len(keys) and self.inode(namespace, keys[n]) == inode:
                    n += 1
                return Place(namespace, inode, i, tuple(keys[:n]))
        return None

    def inode(self, namespace: bytes, key: BlockKey) -> Inode | None:
        """The file that a key is a name of; None where there is none, or no regular file.

        Raises:
            OSError: the file system does not answer.
        """
        with self._lock:
            known = self._found.get((namespace, key))
        if known is not None:
            return known
        try:
            if not self._tree.is_there(namespace, key):
                return None
            status = os.lstat(self._tree.path_of(namespace, key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        inode = (status.st_dev, status.st_ino)
        with self._lock:
            self._found[namespace, key] = inode
        return inode

    def forget(self, namespace: bytes, keys: Iterable[BlockKey]) -> None:
        """Ask for these again."""
        with self._lock:
            for key in keys:
                self._found.pop((namespace, key), None)
