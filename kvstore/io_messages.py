"""What a store and its I/O process say to each other: msgpack frames over a socket pair.

Every frame is a 4-byte little-endian length, at most `MAX_FRAME_NBYTES`, and a msgpack map
that is validated against the classes below. Both ends are of one version: the store starts
the process. Slots and deadlines mean the same on both sides (one arena, one host's clock).
"""

from __future__ import annotations

import socket
import threading
from typing import Any, Final

import msgspec

from kvstore.errors import KVStoreError

MAX_FRAME_NBYTES: Final = 256 << 20
_LENGTH_NBYTES: Final = 4


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; ``id`` pairs an answer with its question."""

    id: int


class Start(Message, frozen=True):
    config: dict[str, Any]
    namespace: bytes
    num_slots: int


class Started(Message, frozen=True):
    error: str = ""  # empty: running
    mismatch_path: str = ""
    mismatch: dict[str, tuple[Any, Any]] = {}


class Find(Message, frozen=True):
    keys: bytes


class Found(Message, frozen=True):
    num_keys: list[int]  # of each chunk
    tier: str


class Read(Message, frozen=True):
    find_id: int  # the `Find` that found the chunks
    first: int  # of those, the first one to read; as many as there are slots
    host_slots: list[int]
    deadline: float


class ReadCame(Message, frozen=True):
    """Chunks of a read: verified or not. ``late`` ones were given up before they returned."""

    indices: list[int]
    ok: list[bool]
    late: bool = False


class ReadEnd(Message, frozen=True):
    """No chunk comes any more but late ones."""


class Store(Message, frozen=True):
    host_slots: list[int]
    keys: bytes
    namespace: bytes


class StoreDone(Message, frozen=True):
    host_slots: list[int]


class Call(Message, frozen=True):
    """flush, purge, set_namespace, stats, take_events or close."""

    verb: str
    payload: bytes = b""
    deadline: float = 0.0


class Answer(Message, frozen=True):
    value: Any = None
    error: str = ""


_TO_PROCESS: Final = msgspec.msgpack.Decoder(Start | Find | Read | Store | Call)
_TO_STORE: Final = msgspec.msgpack.Decoder(Started | Found | ReadCame | ReadEnd | StoreDone | Answer)


class ProtocolError(KVStoreError):
    """The other end sent what is not a message."""


class Channel:
    """One end of the socket pair. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket, *, process_side: bool) -> None:
        self._sock = sock
        self._decoder: msgspec.msgpack.Decoder[Any] = _TO_PROCESS if process_side else _TO_STORE
        self._send_lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises OSError where the other end is gone."""
        data = msgspec.msgpack.encode(message)
        if len(data) > MAX_FRAME_NBYTES:
            raise ProtocolError(f"a message of {len(data)} bytes is over {MAX_FRAME_NBYTES}")
        with self._send_lock:
            self._sock.sendall(len(data).to_bytes(_LENGTH_NBYTES, "little") + data)

    def receive(self) -> Any:
        """The next message; None where the other end is gone.

        Raises:
            ProtocolError: it is not one.
        """
        head = self._exactly(_LENGTH_NBYTES)
        if head is None:
            return None
        length = int.from_bytes(head, "little")
        if length > MAX_FRAME_NBYTES:
            raise ProtocolError(f"a frame of {length} bytes is over {MAX_FRAME_NBYTES}")
        data = self._exactly(length)
        if data is None:
            return None
        try:
            return self._decoder.decode(data)
        except msgspec.DecodeError as e:
            raise ProtocolError(str(e)) from e

    def close(self) -> None:
        self._sock.close()

    def shutdown(self) -> None:
        """Wake whoever receives at either end."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _exactly(self, n: int) -> bytearray | None:
        data = bytearray(n)
        view = memoryview(data)
        while n:
            try:
                got = self._sock.recv_into(view[-n:], n)
            except OSError:
                return None
            if got == 0:
                return None
            n -= got
        return data
