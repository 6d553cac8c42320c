"""An LMDB index in pieces, through a child process: memory does not grow with the index, and what kills
the index's reader kills the child."""

from __future__ import annotations

import contextlib
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.disk_index import RecordFormat, Records

_DUMP_SCRIPT: Final = Path(__file__).with_name("lmdb_dump.py")
_TIMEOUT_S: Final = 120.0  # without a word
_PIECE_NBYTES: Final = 1 << 20
_LENGTHS: Final = struct.Struct("=II")
_KEY_NBYTES: Final = 8
_MESSAGE_NBYTES: Final = 300


class UnreadableIndexError(Exception):
    """Says why; what has come before is not to be used."""


def stream_index(path: Path, mode: str, blocks_per_chunk: int) -> Iterator[Records]:
    """What the slots of an index hold, by ascending slot.

    Args:
        mode: "lock" beside a running store, else "nolock"; see `lmdb_dump`.
    Raises:
        UnreadableIndexError: at any time.
    """
    command = [sys.executable, "-I", str(_DUMP_SCRIPT), str(path), mode]
    with tempfile.TemporaryFile() as errors, contextlib.ExitStack() as stack:
        child = stack.enter_context(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, bufsize=0,
                start_new_session=True,
            )
        )  # fmt: skip
        stack.callback(child.kill)  # who stops early, or is interrupted, reads no further
        assert child.stdout is not None
        frames = _Frames(RecordFormat.of(blocks_per_chunk))
        while True:
            if not select.select([child.stdout], [], [], _TIMEOUT_S)[0]:
                raise UnreadableIndexError(f"nothing came of it for {_TIMEOUT_S:g} s")
            data = child.stdout.read(_PIECE_NBYTES)
            if not data:
                break
            yield frames.feed(data)
        code = child.wait(_TIMEOUT_S)
        errors.seek(0)
        message = errors.read(1 << 16).decode(errors="replace").strip()[-_MESSAGE_NBYTES:]
    if code < 0:
        raise UnreadableIndexError(f"reading it was killed by signal {-code}")
    if code:
        raise UnreadableIndexError(message or "unreadable")


class _Frames:
    """Takes `lmdb_dump`'s output apart; records that cannot be are left out: of another size, or not ascending."""

    def __init__(self, fmt: RecordFormat) -> None:
        self._fmt, self._left, self._last = fmt, b"", -1
        self._lengths = np.array([_KEY_NBYTES, fmt.record_nbytes], dtype="=u4").view(np.uint8)
        self._frame_nbytes = _LENGTHS.size + _KEY_NBYTES + fmt.record_nbytes

    def feed(self, data: bytes) -> Records:
        data, at = self._left + data, 0
        parts: list[NDArray[np.uint8]] = []
        while True:
            sound = self._sound_run(data, at)
            parts.append(sound)
            at += sound.size
            if len(data) - at < _LENGTHS.size:
                break
            key, value = _LENGTHS.unpack_from(data, at)
            if len(data) - at < _LENGTHS.size + key + value:
                break
            if (key, value) != (_KEY_NBYTES, self._fmt.record_nbytes):
                at += _LENGTHS.size + key + value  # of another size
        self._left = data[at:]
        return self._records(np.concatenate(parts))

    def _sound_run(self, data: bytes, at: int) -> NDArray[np.uint8]:
        """Whole frames of the right size from ``at`` on; shape (n, frame_nbytes)."""
        size = self._frame_nbytes
        n = (len(data) - at) // size
        frames = np.frombuffer(data, dtype=np.uint8, count=n * size, offset=at).reshape(n, size)
        if not n:
            return frames
        are_sound = (frames[:, : _LENGTHS.size] == self._lengths).all(axis=1)
        return frames if are_sound.all() else frames[: int(are_sound.argmin())]

    def _records(self, frames: NDArray[np.uint8]) -> Records:
        start = _LENGTHS.size
        numbers = np.ascontiguousarray(frames[:, start : start + _KEY_NBYTES]).view(np.uint64).reshape(-1)
        possible = numbers < self._fmt.most_groups
        groups, frames = numbers[possible].astype(np.int64), frames[possible]
        if len(groups):
            ascends = groups > np.maximum.accumulate(np.concatenate(([self._last], groups[:-1])))
            groups, frames = groups[ascends], frames[ascends]
            self._last = max(self._last, int(groups[-1]) if len(groups) else -1)
        return self._fmt.records(groups, np.ascontiguousarray(frames[:, start + _KEY_NBYTES :]))
