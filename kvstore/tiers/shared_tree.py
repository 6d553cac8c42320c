"""Names and folders of a shared path.

    <path>/<namespace>/namespace.json                       content identity
    <path>/<namespace>/<placement>/placement.json           how it is cut
    <path>/<namespace>/<placement>/<2 hex>/<key>.safetensors    a chunk (chunk_file)
                                          /.<16 hex>.tmp        one being written

Both JSON files are canonical, so that the SHA-256 of their bytes is the identity's own
digest. Folders are checked to be folders, not symlinks, every few seconds before what is
in them is used. Knows names, never bytes of chunks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
from typing import Final

from cachetools import TTLCache

from kvstore.errors import ConfigError
from kvstore.identity import KVIdentity
from kvstore.keys import BlockKey
from kvstore.stored_format import canonical_json
from kvstore.tiers.chunk_file import remove

SUFFIX: Final = ".safetensors"
NAMESPACE_NAME: Final = re.compile(r"[0-9a-f]{32}")
PLACEMENT_NAME: Final = re.compile(r"[0-9a-f]{16}")
FAN_OUT_NAME: Final = re.compile(r"[0-9a-f]{2}")
CHUNK_NAME: Final = re.compile(r"[0-9a-f]{64}\.[0-9]{1,10}\.safetensors")
TEMPORARY_NAME: Final = re.compile(r"\.[0-9a-f]{16}\.tmp")
NAMESPACE_JSON: Final = "namespace.json"
PLACEMENT_JSON: Final = "placement.json"
_CHECK_EVERY_S: Final = 5.0


class SharedRoot:
    """The directory that is mounted, or is to be. Never fills what lies behind a lost mount."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._parent = os.path.dirname(os.path.abspath(path))
        self._device: int | None = None  # of the root; before it was ever seen, of its parent
        self._known_namespaces: tuple[str, ...] = ()

    def create(self) -> None:
        """Make it at the start if need be.

        Raises:
            ConfigError: it can't be a directory, or may not be used.
            OSError: it can't be reached now.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                self._device = os.stat(self._parent).st_dev
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            self.check()
            read_only = os.statvfs(self.path).f_flag & os.ST_RDONLY
            if not os.access(self.path, os.R_OK | os.X_OK | (0 if read_only else os.W_OK)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.path)
        except (FileExistsError, NotADirectoryError, PermissionError) as e:
            raise ConfigError(
                f"shared.path: {self.path!r} cannot be used ({e}); give a directory that this user may write"
            ) from e

    def check(self) -> None:
        """See that it is there and is the same one; make it again only where it was.

        Raises:
            OSError: it is not there, not to be read, or another file system is in its place.
        """
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            if os.stat(self._parent).st_dev != self._device:
                raise
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            status = os.stat(self.path)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", self.path)
        if self._device not in (None, status.st_dev) and not self._is_mounted_again():
            raise OSError(errno.ENODEV, "another file system is there; is it mounted?", self.path)
        with os.scandir(self.path) as entries:  # a mount that is dead answers stat from its cache
            next(entries, None)
        self._device = status.st_dev

    def remember(self, namespace: str) -> None:
        """A namespace that was seen here: where it is found again, so is the root."""
        if namespace not in self._known_namespaces:
            self._known_namespaces = (*self._known_namespaces[-7:], namespace)

    def _is_mounted_again(self) -> bool:
        return os.path.ismount(self.path) or any(
            os.path.exists(os.path.join(self.path, name)) for name in self._known_namespaces
        )


class SharedTree:
    """One placement's folders in all namespaces below a root. Thread-safe."""

    def __init__(self, root: SharedRoot, identity: KVIdentity, blocks_per_chunk: int) -> None:
        self.root = root
        self.placement = identity.placement_digest(blocks_per_chunk).hex()[:16]
        self._json = {
            NAMESPACE_JSON: canonical_json(identity.content()),
            PLACEMENT_JSON: canonical_json(identity.placed(blocks_per_chunk)),
        }
        self._checked: TTLCache[str, bool] = TTLCache(maxsize=1024, ttl=_CHECK_EVERY_S)
        self._lock = threading.Lock()

    def folder_of(self, namespace: bytes, key: BlockKey) -> str:
        return f"{self.root.path}/{namespace.hex()}/{self.placement}/{key[:1].hex()}"

    def path_of(self, namespace: bytes, key: BlockKey) -> str:
        """Where a block key's chunk has a name."""
        return f"{self.folder_of(namespace, key)}/{key}{SUFFIX}"

    def is_there(self, namespace: bytes, key: BlockKey) -> bool:
        """Whether a key's folder is there and is no symlink.

        Raises:
            OSError: the file system does not answer.
        """
        folder = self.folder_of(namespace, key)
        with self._lock:
            if folder in self._checked:
                return True
        for path in _chain(folder):
            try:
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    return False
            except (FileNotFoundError, NotADirectoryError):
                return False
        self.root.remember(namespace.hex())
        with self._lock:
            self._checked[folder] = True
        return True

    def make(self, namespace: bytes, key: BlockKey) -> str:
        """Make a key's folder, and what says what is in it; returns its path.

        Raises:
            OSError: it can't be made, the root is gone, or a symlink is in the way.
        """
        folder = self.folder_of(namespace, key)
        with self._lock:
            if folder in self._checked:
                return folder
        self.root.check()
        for path in _chain(folder):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, "not a directory", path) from None
        top, placed, _ = _chain(folder)
        self._describe(top, NAMESPACE_JSON)
        self._describe(placed, PLACEMENT_JSON)
        self.root.remember(namespace.hex())
        with self._lock:
            self._checked[folder] = True
        return folder

    def forget(self) -> None:
        """Look at every folder again before it is used."""
        with self._lock:
            self._checked.clear()

    def _describe(self, folder: str, name: str) -> None:
        """Write what is below a folder, also over what is damaged: the folder's name says what it must be."""
        path = f"{folder}/{name}"
        if _has(path, self._json[name]):
            return
        temporary = temporary_path(folder)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as f:
                f.write(self._json[name])
            os.replace(temporary, path)
        except OSError:
            remove(temporary)
            raise


def temporary_path(folder: str) -> str:
    """A name for a file that is being written; `shared_gc` removes those left behind."""
    return f"{folder}/.{secrets.token_hex(8)}.tmp"


def _has(path: str, content: bytes) -> bool:
    """Whether there is a regular file of just this content."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            return stat.S_ISREG(os.fstat(f.fileno()).st_mode) and f.read(len(content) + 1) == content
    except OSError:
        return False


def _chain(folder: str) -> tuple[str, str, str]:
    """Namespace, placement and fan-out folder of a fan-out folder."""
    placed = os.path.dirname(folder)
    return os.path.dirname(placed), placed, folder
