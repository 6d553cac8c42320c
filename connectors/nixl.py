"""A pipe over NIXL: the receiver reads the sender's registered slots, one-sided.

What is to be read, that it was read, deadlines and ends go over the sockets of `connectors.tcp`;
NIXL's metadata goes in `hello`, never through its own listener. Registered are the rows of an end
and a small arena that tensors go by. That is a capability: who has a hello can read, and write, all
of both for as long as the process lives, wherever UCX copies between processes by itself (cma).

Agents have no progress thread, which would keep a core busy for each pipe even when nothing moves
(NIXL 1.5.1), and is slower: who waits moves things on.

After an error nothing is written into the receiver's slots: not because a transfer was released, which
NIXL allows of one that goes on and writes, but because the agent is destroyed first. Where UCX has only
tcp, a peer that was stopped (SIGSTOP) while it was read from may not survive that: it goes on, and UCX
ends the process ("Fatal: unexpected error: Endpoint timeout"; 1 of 60 times).

Set where they are not, before nixl is imported, as UCX reads them then:

    UCX_NET_DEVICES=lo    where ends listen on loopback: else UCX listens on every interface
    UCX_MODULES=^ib       where there is no InfiniBand device: Debian's libibverbs crashes at exit
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from connectors.pipe import MAX_NBYTES, PipeClosedError, PipeError, PipeProtocolError
from connectors.tcp import (
    TOKEN_NBYTES,
    Frame,
    Kind,
    Stream,
    TcpEnd,
    TcpHello,
    TcpPipe,
    is_loopback,
    read_hello,
    seconds_left,
)
from kvstore.arena import HostArena
from kvstore.errors import MissingExtraError
from kvstore.slot import Rows, Slots

_BOUNCE_NBYTES: Final = 4 << 20  # tensors move in parts of this size; half the arena for each way
_TRANSFER_NBYTES: Final = 2 << 20
_WINDOW: Final = 32  # transfers under way
_PAUSE_S: Final = 50e-6
_MOVES: Final = 8  # between two looks at the socket
_BUSY_S: Final = 0.2  # of a peer that reads: then it is not as busy that each microsecond counts
T = TypeVar("T")


_Address = Annotated[int, msgspec.Meta(ge=0, lt=1 << 47)]


class NixlHello(TcpHello, frozen=True, kw_only=True, forbid_unknown_fields=True):
    metadata: bytes
    rows: tuple[_Address, Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]]  # the first, and how many
    bounce: _Address  # what the peer reads tensors from


class _Agent:
    """An agent and what it has registered. Any thread may call, one call is made at a time; none after `close`.

    Nothing of NIXL leaves it, nor stays in a traceback: an agent is destroyed with the last reference.
    """

    def __init__(self, regions: list[tuple[int, int]]) -> None:
        api = _import_nixl()
        self._lock = threading.Lock()
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            self._nixl: Any = api.nixl_agent(secrets.token_hex(8), config)
            self._registered: Any = self._nixl.register_memory([(*region, 0, "") for region in regions], "DRAM")
        except Exception as e:
            raise PipeError(f"NIXL does not get going: {type(e).__name__}: {e}") from e
        self._peer: Any = None
        self._rows: list[Any] = []  # mine, the peer's
        self._transfers: dict[int, Any] = {}
        self._next = 0

    def metadata(self) -> bytes:
        return self._call(lambda: bytes(self._nixl.get_agent_metadata()))

    def meet(self, metadata: bytes, mine: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> None:
        """Get to know the peer, and where both have their rows."""

        def meet() -> None:
            self._peer = self._nixl.add_remote_agent(metadata)
            for name, rows in (("NIXL_INIT_AGENT", mine), (self._peer, theirs)):
                self._rows.append(self._nixl.prep_xfer_dlist(name, rows, "DRAM"))

        self._call(meet)

    def read_rows(self, into: Slots, of: Slots) -> int:
        """Begin to read rows of the peer into rows of this end; the transfer's number."""
        mine, theirs = into.astype(np.int32), of.astype(np.int32)
        return self._begin(lambda: self._nixl.make_prepped_xfer("READ", self._rows[0], mine, self._rows[1], theirs))

    def read(self, into: int, of: int, nbytes: int) -> int:
        """Begin to read between two addresses; the transfer's number."""

        def make() -> Any:
            mine, theirs = (self._nixl.get_xfer_descs([(at, nbytes, 0)], "DRAM") for at in (into, of))
            return self._nixl.initialize_xfer("READ", mine, theirs, self._peer)

        return self._begin(make)

    def is_done(self, number: int) -> bool:
        """Raises PipeClosedError where the transfer has failed."""

        def is_done() -> bool:
            transfer = self._transfers.get(number)
            if transfer is None:
                return True
            state = self._nixl.check_xfer_state(transfer)
            if state != "PROC":
                self._end(number, state)
            return bool(state != "PROC")

        return self._call(is_done)

    def move_on(self) -> None:
        """Let the peer read."""

        def move_on() -> None:
            self._nixl.get_new_notifs()

        self._call(move_on)

    def close(self) -> None:
        with self._lock:
            if self._nixl is None:
                return
            for undo in (
                *[transfer.release for transfer in self._transfers.values()],
                *[rows.release for rows in self._rows],
                *[lambda: self._nixl.remove_remote_agent(self._peer)][: self._peer is not None],
                lambda: self._nixl.deregister_memory(self._registered),
            ):
                with contextlib.suppress(Exception):
                    undo()
            del undo
            self._transfers.clear()
            self._rows.clear()
            self._nixl = self._registered = None

    def _begin(self, make: Callable[[], Any]) -> int:
        def begin() -> int:
            self._next += 1
            self._transfers[self._next] = make()
            state = self._nixl.transfer(self._transfers[self._next])
            if state != "PROC":
                self._end(self._next, state)
            return self._next

        return self._call(begin)

    def _end(self, number: int, state: str) -> None:
        if state != "DONE":
            raise RuntimeError("a transfer has failed")
        self._transfers.pop(number).release()

    def _call(self, function: Callable[[], T]) -> T:
        with self._lock:
            if self._nixl is None:
                raise PipeClosedError("the pipe was closed")
            try:
                return function()
            except Exception as e:  # NIXL's have no base of their own
                problem = f"{type(e).__name__}: {e}"
        raise PipeClosedError(f"the pipe was closed: {problem}")  # not from it: see above


class NixlPipe(TcpPipe):
    """Made by `NixlEnd.join`."""

    def __init__(
        self,
        rows: Rows,
        hellos: tuple[NixlHello, NixlHello],
        streams: tuple[Stream, Stream],
        agent: _Agent,
        bounce: HostArena,
    ) -> None:
        super().__init__(rows, hellos[0].max_nbytes, hellos[1].max_nbytes, *streams)
        self._mine, self._theirs = hellos
        self._agent, self._arena = agent, bounce
        self._bounce = torch.from_numpy(bounce.rows)  # [0] is read by the peer, [1] is read into

    def close(self) -> None:
        super().close()
        self._agent.close()
        self._arena.close()  # goes with the last view of it

    def meet(self, deadline: float) -> None:
        """Read one's own token where the peer has put it; this also makes the connection.

        Raises:
            PipeProtocolError, PipeClosedError, PipeTimeoutError
        """
        with self._closed_by_errors():
            self._agent.meet(self._theirs.metadata, _places_of(self._mine), _places_of(self._theirs))
            self._bounce[0, :TOKEN_NBYTES] = torch.frombuffer(bytearray(self._theirs.token), dtype=torch.uint8)
            self._send_frame(self._out, Frame(Kind.GO), deadline)  # it is there
            self._recv_frame(self._in, deadline).expect(Kind.GO)
            self._read_bounce(TOKEN_NBYTES, deadline)
            if not hmac.compare_digest(self._bounce[1, :TOKEN_NBYTES].numpy().tobytes(), self._mine.token):
                raise PipeProtocolError("whose memory was read is not the peer")
            self._send_frame(self._in, Frame(Kind.ACK), deadline)
            self._await_ack(deadline)

    def _send_bytes(self, frame: Frame, flat: torch.Tensor, deadline: float) -> None:
        for start in range(0, len(flat), _BOUNCE_NBYTES):
            part = flat[start : start + _BOUNCE_NBYTES]
            self._bounce[0, : len(part)] = part
            self._send_frame(self._out, frame if start == 0 else Frame(Kind.GO), deadline)
            self._await_ack(deadline)

    def _recv_bytes(self, flat: torch.Tensor, deadline: float) -> None:
        for start in range(0, len(flat), _BOUNCE_NBYTES):
            part = flat[start : start + _BOUNCE_NBYTES]
            if start:
                self._recv_frame(self._in, deadline).expect(Kind.GO)
            self._read_bounce(len(part), deadline)
            part.copy_(self._bounce[1, : len(part)])
            self._send_frame(self._in, Frame(Kind.ACK), deadline)

    def _send_rows(self, frame: Frame, slots: Slots, deadline: float) -> None:
        numbers = slots.astype("<i8")
        self._out.send([memoryview(frame.pack()), numbers.view(np.uint8).data], deadline)

    def _recv_rows(self, slots: Slots, deadline: float) -> Iterator[int]:
        theirs = np.empty(len(slots), dtype="<i8")
        self._in.receive([theirs.view(np.uint8).data], deadline)
        if len(theirs) and not 0 <= theirs.min() <= theirs.max() < self._theirs.rows[1]:
            raise PipeProtocolError(f"the peer has {self._theirs.rows[1]} slots, but sends others")
        step = max(1, _TRANSFER_NBYTES // self._slot_nbytes)
        under_way: deque[tuple[int, int]] = deque()  # how many slots have come with it, and its number
        told = False
        for start in range(0, len(slots), step):
            part = slice(start, start + step)
            under_way.append((min(start + step, len(slots)), self._agent.read_rows(slots[part], theirs[part])))
            told = told or self._ask_for_help(under_way[-1][1], deadline)
            while under_way and (len(under_way) >= _WINDOW or self._agent.is_done(under_way[0][1])):
                yield self._finish(under_way, deadline)
        while under_way:
            yield self._finish(under_way, deadline)

    def _finish(self, under_way: deque[tuple[int, int]], deadline: float) -> int:
        come, number = under_way.popleft()
        self._wait_for(number, deadline)
        return come

    def _read_bounce(self, nbytes: int, deadline: float) -> None:
        number = self._agent.read(self._bounce[1].data_ptr(), self._theirs.bounce, nbytes)
        self._ask_for_help(number, deadline)
        self._wait_for(number, deadline)

    def _ask_for_help(self, number: int, deadline: float) -> bool:
        """Have the peer move things on, which it need not where one process can copy from the other."""
        if self._agent.is_done(number):
            return False
        self._send_frame(self._in, Frame(Kind.GO), deadline)
        return True

    def _wait_for(self, number: int, deadline: float) -> None:
        while not self._agent.is_done(number):
            if self._in.is_over():
                raise PipeClosedError("the pipe was closed")
            time.sleep(min(_PAUSE_S, seconds_left(deadline)))

    def _await_ack(self, deadline: float) -> None:
        frame = self._recv_frame(self._out, deadline)
        if frame.kind is Kind.GO:
            calm = time.monotonic() + _BUSY_S
            while not self._out.is_readable(0.0 if time.monotonic() < calm else 1e-3):
                for _ in range(_MOVES):
                    self._agent.move_on()
                seconds_left(deadline)
            frame = self._recv_frame(self._out, deadline)
        frame.expect(Kind.ACK)


class NixlEnd(TcpEnd):
    """
    Args:
        rows: all of these, and nothing else that is not the pipe's own, can be read by the peer.
        listen: as for TCP; where UCX listens, UCX_NET_DEVICES says.
    """

    def __init__(self, rows: Rows, *, is_server: bool, max_nbytes: int = MAX_NBYTES, listen: str = "127.0.0.1") -> None:
        """
        Raises:
            MissingExtraError: nixl is not installed.
            ConfigError, PipeError: NIXL does not get going.
        """
        super().__init__(rows, is_server=is_server, max_nbytes=max_nbytes, listen=listen)
        self._bounce: HostArena | None = None
        try:
            _import_nixl(is_local=is_loopback(listen))
            self._bounce = HostArena(2, _BOUNCE_NBYTES)
            places = [(memory.ctypes.data, memory.nbytes) for memory in (rows, self._bounce.rows)]
            self._agent: _Agent | None = _Agent(places)
            self._nixl_hello = NixlHello(
                **{**msgspec.structs.asdict(self._hello), "transport": "nixl"},
                metadata=self._agent.metadata(),
                rows=(places[0][0], len(rows)),
                bounce=places[1][0],
            )
        except BaseException:
            self._agent = None
            self.close()
            raise

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(self._nixl_hello)

    def join(self, peer_hello: bytes, timeout_s: float) -> NixlPipe:
        deadline = time.monotonic() + timeout_s
        mine, theirs = self._nixl_hello, read_hello(peer_hello, self._nixl_hello)
        if self._agent is None or self._bounce is None:
            raise PipeClosedError("the end was closed, or joined before")
        outward, inward = self._meet(theirs, deadline)
        pipe = NixlPipe(self._rows, (mine, theirs), (outward, inward), self._agent, self._bounce)
        self._agent = self._bounce = None
        pipe.meet(deadline)
        return pipe

    def close(self) -> None:
        super().close()
        if self._agent is not None:
            self._agent.close()
        if self._bounce is not None:
            self._bounce.close()
        self._agent = self._bounce = None


def _places_of(hello: NixlHello) -> NDArray[np.uint64]:
    """Of rows, as NIXL takes them: address, size and device."""
    first, count = hello.rows
    places = np.zeros((count, 3), dtype=np.uint64)
    places[:, 0] = first + np.arange(count, dtype=np.uint64) * np.uint64(hello.slot_nbytes)
    places[:, 1] = hello.slot_nbytes
    return places


def _import_nixl(*, is_local: bool = False) -> Any:
    if "nixl" not in sys.modules:
        if is_local:
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        if not any(Path("/sys/class/infiniband").glob("*")):
            os.environ.setdefault("UCX_MODULES", "^ib")
    try:
        from nixl import _api
    except ImportError as e:
        raise MissingExtraError("nixl", "nixl") from e
    if "NIXL_LOG_LEVEL" not in os.environ:  # it tells on stdout whatever it does
        logging.getLogger("nixl").setLevel(logging.WARNING)
    return _api
