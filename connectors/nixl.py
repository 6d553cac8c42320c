"""A pipe over NIXL: the receiver reads the sender's registered slots, one-sided.

What is to be read, that it was read, deadlines and ends go over the sockets of `connectors.tcp`;
NIXL's metadata goes in `hello`, never through its own listener.

    sender    rows, where it offers them   [registered]
    receiver  landing -> copied -> rows    [only the landing is registered]

Registered memory is a capability: who has a hello can read it, and on most transports write it. So what
is received is copied out of it before anyone verifies it. Landing and copy stay in the processor's cache,
which makes up for the copy. Where UCX copies between processes by itself (cma), a peer of
the same user can write any memory of this process, registered or not.

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
from dataclasses import dataclass
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
from kvstore.slot import ALIGNMENT, Rows, Slots

_BOUNCE_NBYTES: Final = 8 << 20  # for each way; tensors move in parts of this size
_CELL_NBYTES: Final = 1 << 20  # a slot lands in cells of this size, or in a smaller one
_TRANSFER_NBYTES: Final = 3 << 19
_TOLD_NBYTES: Final = 2 << 20  # slots are reported after about so many bytes
_MOST_CELLS: Final = 1 << 24
_PAUSE_S: Final = 50e-6
_MOVES: Final = 8  # between two looks at the socket
_BUSY_S: Final = 0.2  # of a peer that reads: then it is not as busy that each microsecond counts
T = TypeVar("T")


_Address = Annotated[int, msgspec.Meta(ge=0, lt=1 << 47)]


class NixlHello(TcpHello, frozen=True, kw_only=True, forbid_unknown_fields=True):
    metadata: bytes
    rows: tuple[_Address, Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]]  # the first, and how many are offered
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
        self._cells: list[Any] = []  # mine, the peer's
        self._transfers: dict[int, Any] = {}
        self._next = 0

    def metadata(self) -> bytes:
        return self._call(lambda: bytes(self._nixl.get_agent_metadata()))

    def meet(self, metadata: bytes, mine: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> None:
        """Get to know the peer, and where its cells are, and mine to read them into: (n, 3) each."""

        def meet() -> None:
            self._peer = self._nixl.add_remote_agent(metadata)
            if len(theirs):
                for name, cells in (("NIXL_INIT_AGENT", mine), (self._peer, theirs)):
                    self._cells.append(self._nixl.prep_xfer_dlist(name, cells, "DRAM"))

        self._call(meet)

    def read_cells(self, into: NDArray[np.int64], of: NDArray[np.int64]) -> int:
        """Begin to read cells of the peer into cells of this end, as one transfer; its number."""
        mine, theirs = into.astype(np.int32), of.astype(np.int32)
        return self._begin(lambda: self._nixl.make_prepped_xfer("READ", self._cells[0], mine, self._cells[1], theirs))

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
                *[cells.release for cells in self._cells],
                *[lambda: self._nixl.remove_remote_agent(self._peer)][: self._peer is not None],
                lambda: self._nixl.deregister_memory(self._registered),
            ):
                with contextlib.suppress(Exception):
                    undo()
            del undo
            self._transfers.clear()
            self._cells.clear()
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


@dataclass(frozen=True, slots=True)
class _Cells:
    """How slots are cut to land: each into ``per_slot`` cells of ``nbytes``, the last one of ``last_nbytes``."""

    slot_nbytes: int
    nbytes: int
    per_slot: int

    @classmethod
    def of(cls, slot_nbytes: int) -> _Cells:
        parts = -(-slot_nbytes // _CELL_NBYTES)
        nbytes = -(-slot_nbytes // parts // ALIGNMENT) * ALIGNMENT if parts > 1 else slot_nbytes
        return cls(slot_nbytes, nbytes, -(-slot_nbytes // nbytes))

    @property
    def last_nbytes(self) -> int:
        return self.slot_nbytes - (self.per_slot - 1) * self.nbytes

    @property
    def num_landing(self) -> int:
        return _BOUNCE_NBYTES // self.nbytes

    def of_rows(self, first: int, count: int) -> NDArray[np.uint64]:
        """Of ``count`` slots from address ``first`` on, slot by slot; shape (count * per_slot, 3), as NIXL takes them:
        address, size and device."""
        starts = first + np.arange(count)[:, None] * self.slot_nbytes + np.arange(self.per_slot) * self.nbytes
        places = np.zeros((count, self.per_slot, 3), dtype=np.uint64)
        places[:, :, 0] = starts
        places[:, :, 1] = self.nbytes
        places[:, -1, 1] = self.last_nbytes
        return places.reshape(-1, 3)

    def of_landing(self, first: int) -> NDArray[np.uint64]:
        """Of the landing at address ``first``, as whole cells, then as last ones; shape (2 * num_landing, 3)."""
        places = np.zeros((2, self.num_landing, 3), dtype=np.uint64)
        places[:, :, 0] = first + np.arange(self.num_landing) * self.nbytes
        places[0, :, 1] = self.nbytes
        places[1, :, 1] = self.last_nbytes
        return places.reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A transfer: cells [first, end) of what is received, in the landing from cell ``at`` on."""

    number: int
    first: int
    end: int
    at: int


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
        self._rows, self._landing = rows, bounce.rows[1]
        self._cells = _Cells.of(rows.shape[1])

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
            theirs = self._cells.of_rows(*self._theirs.rows)
            self._agent.meet(self._theirs.metadata, self._cells.of_landing(self._landing.ctypes.data), theirs)
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
        if len(slots) and not self._mine.rows[1]:
            raise PipeProtocolError("slots: this end offers none")
        self._out.send([memoryview(frame.pack()), slots.astype("<i8").view(np.uint8).data], deadline)

    def _recv_rows(self, slots: Slots, deadline: float) -> Iterator[int]:
        theirs = np.empty(len(slots), dtype="<i8")
        self._in.receive([theirs.view(np.uint8).data], deadline)
        if len(theirs) and not 0 <= theirs.min() <= theirs.max() < self._theirs.rows[1]:
            raise PipeProtocolError(f"the peer offers {self._theirs.rows[1]} slots, but sends others")
        per_slot, total = self._cells.per_slot, len(slots) * self._cells.per_slot
        step = max(1, min(self._cells.num_landing, _TRANSFER_NBYTES // self._cells.nbytes))
        free = list(
            range(0, self._cells.num_landing - step + 1, step)
        )  # last in, first out: that is still in the cache
        cells = (theirs[:, None] * per_slot + np.arange(per_slot)).reshape(-1)
        under_way: deque[_UnderWay] = deque()
        come, told = 0, False
        for first in range(0, total, step):
            end, at = min(first + step, total), free.pop()
            under_way.append(_UnderWay(self._read(cells, first, end, at), first, end, at))
            told = told or self._ask_for_help(under_way[-1].number, deadline)
            while under_way and (end == total or not free or self._agent.is_done(under_way[0].number)):
                free.append(under_way[0].at)
                landed = self._land(under_way.popleft(), slots, deadline)
                if (landed - come) * self._slot_nbytes >= _TOLD_NBYTES or landed == len(slots) > come:
                    come = landed
                    yield come

    def _read(self, cells: NDArray[np.int64], first: int, end: int, at: int) -> int:
        """Begin to read cells [first, end) into the landing; the transfer's number."""
        is_last = np.arange(first, end) % self._cells.per_slot == self._cells.per_slot - 1
        into = np.arange(at, at + end - first) + self._cells.num_landing * is_last
        return self._agent.read_cells(into, cells[first:end])

    def _land(self, transfer: _UnderWay, slots: Slots, deadline: float) -> int:
        """Copy what has come to where it belongs; how many leading slots are whole by then."""
        self._wait_for(transfer.number, deadline)
        cells, per_slot = self._cells, self._cells.per_slot
        for i in range(transfer.first, transfer.end):
            slot, part = slots[i // per_slot], i % per_slot
            nbytes = cells.last_nbytes if part == per_slot - 1 else cells.nbytes
            start = (transfer.at + i - transfer.first) * cells.nbytes
            self._rows[slot, part * cells.nbytes :][:nbytes] = self._landing[start : start + nbytes]
        return transfer.end // per_slot

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
        listen: as for TCP; where UCX listens, UCX_NET_DEVICES says.
        offers: rows are registered, all of them, and nothing else that is not the pipe's own; an end that
            offers none only receives slots.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        is_server: bool,
        max_nbytes: int = MAX_NBYTES,
        listen: str = "127.0.0.1",
        offers: bool = True,
    ) -> None:
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
            offered = [rows] if offers else []
            regions = [(memory.ctypes.data, memory.nbytes) for memory in (*offered, self._bounce.rows)]
            self._agent: _Agent | None = _Agent(regions)
            self._nixl_hello = NixlHello(
                **{**msgspec.structs.asdict(self._hello), "transport": "nixl"},
                metadata=self._agent.metadata(),
                rows=(rows.ctypes.data, len(rows)) if offers else (0, 0),
                bounce=self._bounce.rows.ctypes.data,
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
        if theirs.rows[1] * _Cells.of(theirs.slot_nbytes).per_slot > _MOST_CELLS:
            raise PipeProtocolError(f"{theirs.rows[1]} slots of {theirs.slot_nbytes} bytes are offered: too many")
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
