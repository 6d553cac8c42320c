"""Keeps a disk tier's volume open: opens it beside the callers, turns it off, brings it back.

Opening may take long (a rebuild) or for ever (a hung device, a stopped process), so a thread
of its own does it, and who asks meanwhile finds the tier off. What could not be deleted
because the storage was away is owed, and is deleted before anything is looked up there again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import lmdb

from kvstore.keys import BlockKey
from kvstore.tiers.disk_dir import Home
from kvstore.tiers.disk_volume import DiskVolume, VolumeConfig
from kvstore.tiers.health import TierHealth

logger = logging.getLogger(__name__)

_FIRST_OPEN_TIMEOUT_S: Final = 60.0
_DAMAGE: Final = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PageFullError, lmdb.CursorFullError, lmdb.PanicError,
    lmdb.InvalidError, lmdb.IncompatibleError, lmdb.BadTxnError, lmdb.BadDbiError, lmdb.BadValsizeError,
)  # fmt: skip
STORAGE_ERRORS: Final = (OSError, lmdb.Error)
T = TypeVar("T")


@dataclass(slots=True)
class Purge:
    """Keys to be deleted, and how many entries that were once it is done."""

    keys: Sequence[BlockKey]
    num_deleted: int = 0


class VolumeKeeper:
    """Thread-safe."""

    def __init__(self, config: VolumeConfig, namespace: bytes) -> None:
        """Open the volume. One that cannot be opened now is tried again later.

        Raises:
            ConfigError: a wrong setting.
        """
        self.config, self.namespace = config, namespace
        self.volume: DiskVolume | None = None
        self.health = TierHealth(f"disk tier {config.disk.path}")
        self._state = threading.Lock()
        self._writing = threading.Lock()
        self._closed = False
        self._home: Home | None = None
        self._distrust_index = False
        self._owed: list[Purge] = []
        self._owes_emptying = False
        self._wrong_setting: BaseException | None = None
        self._opener = self._start_opening(first=True)
        self._opener.join(_FIRST_OPEN_TIMEOUT_S)
        if self._wrong_setting is not None:
            raise self._wrong_setting
        if self._opener.is_alive():
            self.health.fail(TimeoutError(f"it has not opened within {_FIRST_OPEN_TIMEOUT_S:g} s"))

    def usable(self) -> DiskVolume | None:
        """The open volume; where the tier is off and it is time to try, opening it is begun."""
        volume = self.volume
        if self._closed or (volume is not None and self.health.on):
            return None if self._closed else volume
        with self._state:
            if not self._opener.is_alive() and self.health.allow():
                self._opener = self._start_opening()
        return None

    def write(self, work: Callable[[DiskVolume], T], timeout_s: float = -1) -> T | None:
        """Run work as the only writer of this process.

        Returns:
            What work returned. None where the storage is off, or failed, or another writer
            was not through within ``timeout_s`` (negative: no limit).
        """
        if not self._writing.acquire(timeout=timeout_s):
            return None
        try:
            volume = self.usable()
            if volume is None:
                return None
            with volume.in_use():
                try:
                    if not volume.is_intact():
                        raise FileNotFoundError(f"{self.config.disk.path} vanished")
                    self._pay(volume)
                    return work(volume)
                except STORAGE_ERRORS as e:
                    self.fail(volume, e)
                    return None
        finally:
            self._writing.release()

    def write_by(self, deadline: float, work: Callable[[DiskVolume], T]) -> T | None:
        """As `write`, in a thread of its own that is not waited for after the deadline."""
        results: list[T | None] = []

        def run() -> None:
            results.append(self.write(work, max(0.0, deadline - time.monotonic())))

        thread = threading.Thread(target=run, name="kvstore-disk-write", daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        return results[0] if results else None

    def fail(self, volume: DiskVolume, error: BaseException) -> None:
        """A volume raised this; it is given up if it is the one in use."""
        if volume is not self.volume:
            return
        if isinstance(error, lmdb.MapFullError):  # for as long as a process is stopped; reads go on
            logger.debug("disk tier %s: the index is full", self.config.disk.path)
            return
        self._distrust_index |= isinstance(error, _DAMAGE)
        self.health.fail(error)

    def set_namespace(self, namespace: bytes) -> None:
        """Hide everything now; it is deleted with the next `write`, unless other processes use it."""
        with self._state:
            self.namespace, self._owes_emptying = namespace, True
            if self.volume is not None:
                self.volume.view.set_namespace(namespace)

    def owe(self, purge: Purge) -> None:
        """Hide keys now; they are deleted with the next `write`."""
        with self._state:
            self._owed.append(purge)
            if self.volume is not None:
                self.volume.view.hide(purge.keys)

    def close(self, timeout_s: float) -> None:
        """Make the index durable and close; what is stuck is left to the end of the process."""
        self.write_by(time.monotonic() + timeout_s, lambda volume: volume.sync())
        with self._state:
            self._closed = True
            volume, self.volume = self.volume, None
        if volume is not None:
            volume.close()

    # -- inside

    def _start_opening(self, *, first: bool = False) -> threading.Thread:
        thread = threading.Thread(target=self._open, args=(first,), name="kvstore-disk-open", daemon=True)
        thread.start()
        return thread

    def _open(self, first: bool) -> None:
        try:
            if self._home is not None and not self._home.has(Path(self.config.disk.path)):
                raise FileNotFoundError(f"{self.config.disk.path} is not there")
            if self.volume is not None:
                self.volume.close()
            volume = DiskVolume(self.config, self.namespace, distrust_index=self._distrust_index)
        except STORAGE_ERRORS as e:
            self.health.fail(e)
        except BaseException as e:
            if first:
                self._wrong_setting = e
            else:
                self.health.fail(e)
        else:
            self._take(volume)

    def _take(self, volume: DiskVolume) -> None:
        """Use a volume that was opened, once what is owed is deleted there."""
        try:
            with volume.in_use():
                self._pay(volume)
        except STORAGE_ERRORS as e:
            volume.close()
            self.health.fail(e)
            return
        with self._state:
            if volume.view.namespace != self.namespace:
                volume.view.set_namespace(self.namespace)
            self._home, self._distrust_index = volume.home, False
            self.volume = None if self._closed else volume
        if self._closed:
            volume.close()
        self.health.recover()

    def _pay(self, volume: DiskVolume) -> None:
        """Delete what is owed."""
        with self._state:
            owes_emptying, owed = self._owes_emptying, list(self._owed)
        if owes_emptying:
            volume.empty()
        for purge in owed:
            purge.num_deleted = volume.purge(purge.keys)
        with self._state:
            self._owes_emptying &= not owes_emptying
            del self._owed[: len(owed)]
