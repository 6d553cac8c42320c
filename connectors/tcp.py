"""A pipe over plain sockets, whose frames and ends other transports share.

Two connections, one for each way: each carries frames one way and acknowledgements the other, so
that who sends and who receives never touch one stream. Payload goes from memory to the socket and
from the socket to memory. What comes in is never unpickled, and is bounded before anything is
allocated for it.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Final

import msgspec
import torch

from connectors.pipe import MAX_NBYTES, Pipe, PipeEnd, PipeProtocolError
from connectors.wire.frame import HEADER, MAGIC, Frame, Kind, to_bytes
from connectors.wire.hello import Hello, read_hello
from connectors.wire.rendezvous import MOST_STRANGERS, TOKEN_NBYTES, Strangers, connect_to, listen_on
from connectors.wire.slots import check_end, check_slots, runs_of
from connectors.wire.stream import Stream
from kvstore.slot import Rows, Slots

STEP_NBYTES: Final = 1 << 19  # slots are reported after about so many bytes, which are still in the processor's cache
_ROLES: Final = (b"\x01", b"\x02")  # of the client's connections: it sends on the first, receives on the second


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
        self._listener = listen_on(listen, 2 * MOST_STRANGERS) if is_server else None
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
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes up who joins
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
                streams[-1].send([memoryview(MAGIC + role + theirs.token)], deadline)
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
        with contextlib.ExitStack() as undo, Strangers(listener, MAGIC, self._hello.token) as strangers:
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
