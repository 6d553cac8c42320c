"""A pipe over plain sockets; and what all pipes share: `Hello` and `Frame`.

Two connections, one for each way: each carries frames one way and acknowledgements the other, so
that who sends and who receives never touch one stream. Payload goes from memory to the socket and
from the socket to memory. What comes in is never unpickled, and is bounded before anything is
allocated for it.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import ipaddress
import math
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import torch

from connectors.pipe import (
    MAX_DIMS,
    MAX_NBYTES,
    Pipe,
    PipeClosedError,
    PipeEnd,
    PipeProtocolError,
    PipeTimeoutError,
)
from kvstore.errors import ConfigError
from kvstore.slot import Rows, Slots

HELLO_NBYTES: Final = 64 << 10
STEP_NBYTES: Final = 1 << 19  # slots are reported after about so many bytes, which are still in the processor's cache
TOKEN_NBYTES: Final = 32
_BUFFER_NBYTES: Final = 4 << 20  # the kernel gives what net.core.*mem_max allows
_IOV_MAX: Final = 1024
_WAITALL: Final = int(socket.MSG_WAITALL)  # or-ed for each part: an enum's `|` is a call
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # seconds, tries
_TIMEVAL: Final = struct.Struct("@ll")  # seconds, microseconds
_MAX_STRANGERS: Final = 16
_STRANGER_S: Final = 2.0

# -- frames: a header of one size, then the bytes of what it describes

HEADER: Final = struct.Struct(f"<4sBBBxQ{MAX_DIMS}Q")  # magic, kind, dtype, dimensions, bytes, sizes
_MAGIC: Final = b"KVP1"
DTYPES: Final = (  # a dtype's code is its place in here, from 1: only ever append
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
)
_CODES: Final = {dtype: code for code, dtype in enumerate(DTYPES, 1)}
_MAX_EXTENT: Final = 1 << 62  # of strides too, where a tensor is empty


class Kind(enum.IntEnum):
    TENSOR = 1
    NONE = 2
    SLOTS = 3
    ACK = 4  # of slots: the peer has them
    GO = 5  # of `connectors.nixl`


@dataclass(frozen=True, slots=True)
class Frame:
    """What follows a header: bytes of a tensor; slots are a uint8 tensor of shape (n, slot_nbytes)."""

    kind: Kind
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: torch.Tensor | None, max_nbytes: int) -> Frame:
        """Raises PipeProtocolError where that cannot be sent."""
        if tensor is None:
            return cls(Kind.NONE)
        if tensor.layout is not torch.strided or tensor.dtype not in _CODES:
            raise PipeProtocolError(f"a tensor of {tensor.dtype} and {tensor.layout} cannot be sent")
        frame = cls(Kind.TENSOR, tensor.dtype, tuple(tensor.shape))
        frame.check(max_nbytes)
        return frame

    @classmethod
    def of_slots(cls, num_slots: int, slot_nbytes: int) -> Frame:
        return cls(Kind.SLOTS, torch.uint8, (num_slots, slot_nbytes))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize if self.dtype is not None else 0

    def check(self, max_nbytes: int) -> None:
        """Raises PipeProtocolError where it is too large for a pipe, or for a tensor."""
        if len(self.shape) > MAX_DIMS:
            raise PipeProtocolError(f"a tensor has {len(self.shape)} dimensions; at most {MAX_DIMS} are taken")
        if self.kind is Kind.TENSOR and self.nbytes > max_nbytes:
            raise PipeProtocolError(f"a tensor has {self.nbytes} bytes; at most {max_nbytes} are taken")
        if math.prod(max(size, 1) for size in self.shape) > _MAX_EXTENT // 16:
            raise PipeProtocolError(f"no tensor has the shape {self.shape}")

    def pack(self) -> bytes:
        sizes = (*self.shape, *[0] * (MAX_DIMS - len(self.shape)))
        code = 0 if self.dtype is None else _CODES[self.dtype]
        return HEADER.pack(_MAGIC, self.kind, code, len(self.shape), self.nbytes, *sizes)

    @classmethod
    def parse(cls, header: bytes | memoryview, max_nbytes: int) -> Frame:
        """Of any bytes; raises PipeProtocolError where `pack` gives no such header, or too much follows it."""
        if len(header) != HEADER.size:
            raise PipeProtocolError(f"a header has {HEADER.size} bytes, not {len(header)}")
        _, kind, code, ndim, _, *sizes = HEADER.unpack(header)
        if kind not in Kind._value2member_map_ or code > len(DTYPES) or ndim > MAX_DIMS:
            raise PipeProtocolError("that is no frame")
        dtype = DTYPES[code - 1] if code else None
        frame = cls(Kind(kind), dtype, tuple(sizes[:ndim]))
        has_payload = frame.kind in (Kind.TENSOR, Kind.SLOTS)
        if has_payload != (dtype is not None) or (ndim and not has_payload):
            raise PipeProtocolError("that is no frame")
        frame.check(max_nbytes)
        if frame.pack() != header:
            raise PipeProtocolError("that is no frame")
        return frame

    def expect(self, kind: Kind, shape: tuple[int, ...] = ()) -> None:
        """Raises PipeProtocolError unless it is of this kind and shape."""
        if self.kind is not kind or self.shape != shape:
            raise PipeProtocolError(f"{self.kind.name} of shape {self.shape} came, not {kind.name} of {shape}")

    def place(self, out: torch.Tensor | None, device: torch.device | None = None) -> torch.Tensor:
        """Contiguous memory for this tensor: ``out`` where given, which must fit, else on a device."""
        if out is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        if out.dtype != self.dtype or tuple(out.shape) != self.shape or not out.is_contiguous():
            raise PipeProtocolError(
                f"a tensor of {self.dtype} and shape {self.shape} came, which does not fit where it goes: "
                f"{out.dtype}, shape {tuple(out.shape)}, {'' if out.is_contiguous() else 'not '}contiguous"
            )
        return out.detach()


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor on its device, uint8 and flat; a view where it is contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


# -- hellos


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an end says of itself before it is joined; each transport adds to it."""

    transport: str
    is_server: bool
    slot_nbytes: int
    max_nbytes: int


HelloT = TypeVar("HelloT", bound=Hello)


def read_hello(data: bytes, mine: HelloT) -> HelloT:
    """The peer's hello, which must be of the same transport and slots as mine.

    Raises:
        PipeProtocolError: it is not.
    """
    if len(data) > HELLO_NBYTES:
        raise PipeProtocolError(f"a hello has at most {HELLO_NBYTES} bytes, not {len(data)}")
    try:
        transport = msgspec.msgpack.decode(data, type=_AnyHello).transport
        if transport != mine.transport:
            raise PipeProtocolError(f"the peer's pipe is {transport!r}, this one is {mine.transport!r}")
        theirs = msgspec.msgpack.decode(data, type=type(mine))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise PipeProtocolError(f"that is no hello of {mine.transport}: {e}") from e
    if theirs.slot_nbytes != mine.slot_nbytes:
        raise PipeProtocolError(f"the peer's slots have {theirs.slot_nbytes} bytes, these have {mine.slot_nbytes}")
    if theirs.is_server == mine.is_server:
        raise PipeProtocolError("of two ends one is the server")
    return theirs


class _AnyHello(msgspec.Struct):
    transport: str


def check_end(rows: Rows, max_nbytes: int) -> None:
    """Raises ConfigError where no end can be made with these."""
    if rows.dtype != np.uint8 or rows.ndim != 2 or not rows.flags.c_contiguous or not rows.flags.writeable:
        raise ConfigError(f"rows: got {rows.dtype} of shape {rows.shape}; give contiguous uint8 of 2 dimensions")
    if not 0 < max_nbytes <= MAX_NBYTES:
        raise ConfigError(f"max_nbytes: got {max_nbytes}; allowed are 1 to {MAX_NBYTES}")


def check_slots(slots: Slots, num_slots: int) -> None:
    """Raises ValueError where there are no such rows."""
    if slots.ndim != 1 or (len(slots) and not 0 <= slots.min() <= slots.max() < num_slots):
        raise ValueError(f"slots of shape {slots.shape} are not all among {num_slots} rows")


def runs_of(slots: Slots) -> list[tuple[int, int]]:
    """Half-open ranges of rows, in the order of slots: each as long as rows are adjacent."""
    runs: list[tuple[int, int]] = []
    first = end = -1
    for slot in slots.tolist():  # of few slots this takes a tenth of what numpy does
        if slot != end:
            runs.append((first, end))
            first = slot
        end = slot + 1
    runs.append((first, end))
    return runs[1:]


def seconds_left(deadline: float) -> float:
    """Raises PipeTimeoutError where none are."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise PipeTimeoutError("the deadline has passed")
    return left


# -- sockets


class Stream:
    """A socket with deadlines; one thread at a time sends and receives, any may close."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # with deadlines of the kernel's, which then needs no other call to wait
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that is gone says nothing
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._sock = sock
        self._in_use = threading.Lock()  # the socket is not closed below a thread that waits on it

    def send(self, parts: list[memoryview], deadline: float) -> None:
        """All of these, which are used up."""
        first = _skip(parts, 0, 0)
        with self._in_use:
            while first < len(parts):
                try:
                    n = self._sock.sendmsg(
                        parts[first : first + _IOV_MAX], [], self._flags(socket.SO_SNDTIMEO, deadline)
                    )
                except BlockingIOError:
                    raise PipeTimeoutError("the deadline has passed") from None
                except OSError as e:
                    raise PipeClosedError(f"the pipe was closed: {e.strerror}") from e
                first = _skip(parts, first, n)

    def receive(self, parts: list[memoryview], deadline: float) -> None:
        """Fill all of these, which are used up."""
        first = _skip(parts, 0, 0)
        with self._in_use:
            while first < len(parts):
                try:
                    flags = self._flags(socket.SO_RCVTIMEO, deadline) | _WAITALL
                    n = self._sock.recvmsg_into(parts[first : first + _IOV_MAX], 0, flags)[0]
                except BlockingIOError:
                    raise PipeTimeoutError("the deadline has passed") from None
                except OSError as e:
                    raise PipeClosedError(f"the pipe was closed: {e.strerror}") from e
                if n == 0:
                    raise PipeClosedError("the pipe was closed")
                first = _skip(parts, first, n)

    def is_over(self) -> bool:
        """Whether either end has closed it; what has come before may not have been received."""
        if not self._in_use.acquire(blocking=False):
            return False  # who waits on it is told
        try:
            if self._sock.fileno() < 0:
                return True
            poll = select.poll()
            poll.register(self._sock, select.POLLRDHUP)
            return bool(poll.poll(0))
        finally:
            self._in_use.release()

    def is_readable(self, wait_s: float = 0.0) -> bool:
        """Whether something comes, of which an end is one."""
        try:
            self.wait_readable(time.monotonic() + wait_s)
        except PipeTimeoutError:
            return False
        return True

    def wait_readable(self, deadline: float) -> None:
        """Raises PipeTimeoutError where nothing comes; an end of the stream counts as something."""
        with self._in_use:
            self._wait(select.POLLIN, deadline)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes up who waits, here and at the peer
        with self._in_use:
            self._sock.close()

    def _flags(self, option: int, deadline: float) -> int:
        """Have the next call wait until then; for one that must not wait at all there is a flag."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return int(socket.MSG_DONTWAIT)
        seconds, fraction = divmod(left_s, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(seconds), int(fraction * 1e6) or 1))
        return 0

    def _wait(self, event: int, deadline: float) -> None:
        if self._sock.fileno() < 0:
            raise PipeClosedError("the pipe was closed")
        poll = select.poll()
        poll.register(self._sock, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise PipeTimeoutError("the deadline has passed")


def _skip(parts: list[memoryview], first: int, nbytes: int) -> int:
    """The first part that is not all done after so many more bytes; cut to what is left of it."""
    while first < len(parts) and nbytes >= len(parts[first]):
        nbytes -= len(parts[first])
        first += 1
    if nbytes:
        parts[first] = parts[first][nbytes:]
    return first


class TcpPipe(Pipe):
    """Made by `TcpEnd.join`. Pipes that move payload by other means take its frames, and its way of ending."""

    def __init__(self, rows: Rows, max_nbytes: int, peer_max_nbytes: int, outward: Stream, inward: Stream) -> None:
        self._num_slots, self._slot_nbytes = rows.shape
        self._memory = rows.reshape(-1).data
        self._max_nbytes = max_nbytes
        self._max_sent_nbytes = min(max_nbytes, peer_max_nbytes)
        self._out, self._in = outward, inward

    def send_tensor(self, tensor: torch.Tensor | None, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        frame = Frame.of(tensor, self._max_sent_nbytes)
        with self._closed_by_errors():
            if tensor is None or not frame.nbytes:
                self._send_frame(self._out, frame, deadline)
            else:
                self._send_bytes(frame, to_bytes(tensor), deadline)

    def recv_tensor(self, timeout_s: float, out: torch.Tensor | None = None) -> torch.Tensor | None:
        deadline = time.monotonic() + timeout_s
        self._in.wait_readable(deadline)
        with self._closed_by_errors():
            frame = self._recv_frame(self._in, deadline)
            if frame.kind is Kind.NONE:
                return None
            frame.expect(Kind.TENSOR, frame.shape)
            tensor = self._place(frame, out)
            if frame.nbytes:
                self._recv_bytes(to_bytes(tensor), deadline)
            return tensor if out is None else out

    def send_slots(self, slots: Slots, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        check_slots(slots, self._num_slots)
        with self._closed_by_errors():
            self._send_rows(Frame.of_slots(len(slots), self._slot_nbytes), slots, deadline)
            self._await_ack(deadline)

    def recv_slots(self, slots: Slots, timeout_s: float) -> Iterator[int]:
        check_slots(slots, self._num_slots)
        return self._recv_slots(slots, time.monotonic() + timeout_s)

    @property
    def is_closed(self) -> bool:
        return self._out.is_over() or self._in.is_over()

    def close(self) -> None:
        self._out.close()
        self._in.close()

    def _recv_slots(self, slots: Slots, deadline: float) -> Iterator[int]:
        with self._closed_by_errors():
            frame = self._recv_frame(self._in, deadline)
            frame.expect(Kind.SLOTS, (len(slots), self._slot_nbytes))
            for come in self._recv_rows(slots, deadline):
                if come < len(slots):
                    yield come
            self._send_frame(self._in, Frame(Kind.ACK), deadline)
        yield len(slots)

    # -- how payload moves; `flat` is contiguous uint8

    def _send_bytes(self, frame: Frame, flat: torch.Tensor, deadline: float) -> None:
        self._out.send([memoryview(frame.pack()), flat.cpu().numpy().data], deadline)

    def _recv_bytes(self, flat: torch.Tensor, deadline: float) -> None:
        host = flat.cpu()  # itself, unless it is on a device
        self._in.receive([host.numpy().data], deadline)
        if host is not flat:
            flat.copy_(host)

    def _send_rows(self, frame: Frame, slots: Slots, deadline: float) -> None:
        self._out.send([memoryview(frame.pack()), *self._parts(slots)], deadline)

    def _recv_rows(self, slots: Slots, deadline: float) -> Iterator[int]:
        step = max(1, round(STEP_NBYTES / self._slot_nbytes))
        for start in range(0, len(slots), step):
            self._in.receive(self._parts(slots[start : start + step]), deadline)
            yield min(start + step, len(slots))

    def _await_ack(self, deadline: float) -> None:
        self._recv_frame(self._out, deadline).expect(Kind.ACK)

    def _place(self, frame: Frame, out: torch.Tensor | None) -> torch.Tensor:
        return frame.place(out)

    def _send_frame(self, stream: Stream, frame: Frame, deadline: float) -> None:
        stream.send([memoryview(frame.pack())], deadline)

    def _recv_frame(self, stream: Stream, deadline: float) -> Frame:
        header = bytearray(HEADER.size)
        stream.receive([memoryview(header)], deadline)
        return Frame.parse(bytes(header), self._max_nbytes)

    def _parts(self, slots: Slots) -> list[memoryview]:
        size = self._slot_nbytes
        return [self._memory[start * size : end * size] for start, end in runs_of(slots)]

    @contextlib.contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # an iterator that is given up, too: what comes next would be read as a header
            self.close()
            raise


# -- joining

_ROLES: Final = (b"\x01", b"\x02")  # of the client's connections: it sends on the first, receives on the second


class TcpHello(Hello, frozen=True, kw_only=True, forbid_unknown_fields=True):
    token: bytes
    host: str = ""
    port: int = 0


class TcpEnd(PipeEnd):
    """Either end shows the other's token before anything else is sent.

    Args:
        listen: the address that a server binds to, which must be one that the peer can reach.
    """

    def __init__(self, rows: Rows, *, is_server: bool, max_nbytes: int = MAX_NBYTES, listen: str = "127.0.0.1") -> None:
        """Raises ConfigError where it cannot listen there."""
        check_end(rows, max_nbytes)
        self._rows = rows
        self._listener = listen_on(listen, 2 * _MAX_STRANGERS) if is_server else None
        host, port = self._listener.getsockname()[:2] if self._listener is not None else ("", 0)
        self._hello = TcpHello(
            transport="tcp",
            is_server=is_server,
            slot_nbytes=rows.shape[1],
            max_nbytes=max_nbytes,
            token=secrets.token_bytes(TOKEN_NBYTES),
            host=host,
            port=port,
        )

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(self._hello)

    def join(self, peer_hello: bytes, timeout_s: float) -> TcpPipe:
        theirs = read_hello(peer_hello, self._hello)
        outward, inward = self._meet(theirs, time.monotonic() + timeout_s)
        return TcpPipe(self._rows, self._hello.max_nbytes, theirs.max_nbytes, outward, inward)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _meet(self, theirs: TcpHello, deadline: float) -> list[Stream]:
        """The connections for sending and for receiving."""
        if len(theirs.token) != TOKEN_NBYTES:
            raise PipeProtocolError("the hello has no token")
        if self._listener is None:
            return self._connect(theirs, deadline)
        streams = self._accept(self._listener, theirs, deadline)
        self._listener.close()
        return streams[::-1]

    def _connect(self, theirs: TcpHello, deadline: float) -> list[Stream]:
        streams: list[Stream] = []
        try:
            for role in _ROLES:
                streams.append(Stream(connect_to(theirs.host, theirs.port, deadline)))
                streams[-1].send([memoryview(_MAGIC + role + theirs.token)], deadline)
            for stream in streams:
                answer = bytearray(TOKEN_NBYTES)
                stream.receive([memoryview(answer)], deadline)
                if not hmac.compare_digest(answer, self._hello.token):
                    raise PipeProtocolError("who listens there is not the peer")
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def _accept(self, listener: socket.socket, theirs: TcpHello, deadline: float) -> list[Stream]:
        """The peer's two connections; nobody else's, and these are no hindrance."""
        found: dict[bytes, socket.socket] = {}
        with contextlib.ExitStack() as undo, _Strangers(listener, _MAGIC, self._hello.token) as strangers:
            while len(found) < len(_ROLES):
                for sock, role in strangers.wait(deadline):
                    if role not in _ROLES or role in found:
                        sock.close()
                        continue
                    found[role] = undo.enter_context(sock)
                    with contextlib.suppress(OSError):  # it is gone again: the pipe will be closed
                        sock.sendall(theirs.token)  # fits into any buffer
            undo.pop_all()
        return [Stream(found[role]) for role in _ROLES]


class _Strangers:
    """Connections that have not shown the token yet: some, and for a short while."""

    def __init__(self, listener: socket.socket, magic: bytes, token: bytes) -> None:
        self._listener, self._magic, self._token = listener, magic, token
        self._open: dict[int, tuple[socket.socket, bytearray, float]] = {}  # by fd, the oldest first
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def __enter__(self) -> _Strangers:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in list(self._open):
            self._drop(fd).close()

    def wait(self, deadline: float) -> list[tuple[socket.socket, bytes]]:
        """Some that have shown it now, and the byte that says what for."""
        ends = [deadline, *[end for _, _, end in self._open.values()]]
        ready = self._poll.poll(max(0.0, min(ends) - time.monotonic()) * 1000)
        known = []
        for fd, _ in ready:
            if fd == self._listener.fileno():
                self._take()
            elif (come := self._read(fd)) is not None:
                known.append(come)
        now = time.monotonic()
        if not known and now >= deadline:
            raise PipeTimeoutError("the peer has not come")
        for fd in [fd for fd, (_, _, end) in self._open.items() if end <= now]:
            self._drop(fd).close()
        return known

    def _take(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # gone before it was taken
            return
        sock.setblocking(False)
        if len(self._open) >= _MAX_STRANGERS:
            self._drop(next(iter(self._open))).close()
        self._open[sock.fileno()] = sock, bytearray(), time.monotonic() + _STRANGER_S
        self._poll.register(sock, select.POLLIN)

    def _read(self, fd: int) -> tuple[socket.socket, bytes] | None:
        if fd not in self._open:  # dropped in this round
            return None
        sock, shown, _ = self._open[fd]
        need = len(self._magic) + 1 + len(self._token)
        try:
            more = sock.recv(need - len(shown))
        except BlockingIOError:
            return None
        except OSError:
            more = b""
        shown += more
        if more and len(shown) < need:
            return None
        self._drop(fd)
        magic, role, token = shown[: len(self._magic)], shown[len(self._magic)], shown[len(self._magic) + 1 :]
        if more and hmac.compare_digest(token, self._token) and magic == self._magic:
            return sock, bytes([role])
        sock.close()
        return None

    def _drop(self, fd: int) -> socket.socket:
        self._poll.unregister(fd)
        return self._open.pop(fd)[0]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(_resolve(address)[1][0]).is_loopback


def listen_on(address: str, backlog: int) -> socket.socket:
    """A listening socket on a port that is free; raises ConfigError where there is no such address here."""
    family, where = _resolve(address)
    if ipaddress.ip_address(where[0]).is_unspecified:
        raise ConfigError(f"listen: got {address!r}; give the one address that the peer reaches this host by")
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _enlarge(sock)  # what it accepts has the same
        sock.bind(where)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as e:
        sock.close()
        raise ConfigError(f"listen: {address!r} is no address of this host: {e}") from e
    return sock


def _resolve(address: str) -> tuple[socket.AddressFamily, Any]:
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise ConfigError(f"listen: {address!r} is no address: {e}") from e
    return family, where


def connect_to(host: str, port: int, deadline: float) -> socket.socket:
    """Raises PipeProtocolError, PipeClosedError where nobody listens there, PipeTimeoutError."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError as e:
        raise PipeProtocolError(f"the hello has no address: {host[:64]!r}") from e
    if not 0 < port < 1 << 16:
        raise PipeProtocolError(f"the hello has no port: {port}")
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _enlarge(sock)
        sock.settimeout(seconds_left(deadline))
        sock.connect((host, port))
    except TimeoutError as e:
        sock.close()
        raise PipeTimeoutError("the peer has not come") from e
    except OSError as e:
        sock.close()
        raise PipeClosedError(f"the peer does not listen any more: {e.strerror}") from e
    return sock


def _enlarge(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_NBYTES)
