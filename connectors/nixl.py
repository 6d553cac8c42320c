"""A pipe over NIXL: the receiver reads the sender's registered slots, one-sided.

NIXL itself runs in a process beside this one (`connectors.nixl_process`), which maps the memory that is
registered. What is to be read, that it was read, deadlines and ends go over the sockets of
`connectors.tcp`; NIXL's metadata goes in `hello`, never through its own listener.

    sender    rows, where it offers them   [mapped there, registered]
    receiver  landing -> copied -> rows    [only the landing is mapped there, and registered]

Registered memory is a capability: who has a hello can read it, and on most transports write it. So what
is received is copied out of it before anyone verifies it. Landing and copy stay in the processor's cache,
which makes up for the copy. Where UCX copies between processes by itself (cma), a peer of
the same user can write any memory of the transport process, registered or not.

Only this process writes into the receiver's slots, and only while `recv_slots` runs: after an error, or
`close`, whatever NIXL still has under way ends in the landing.

Set where they are not, in the environment of the transport process:

    UCX_NET_DEVICES=lo    where ends listen on loopback: else UCX listens on every interface
    UCX_MODULES=^ib       where there is no InfiniBand device: Debian's libibverbs crashes at exit
"""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Iterator
from typing import Final

import msgspec
import numpy as np
import torch

from connectors.nixl_arrival import Arrival
from connectors.nixl_process.client import AgentClient
from connectors.nixl_process.messages import BOUNCE_NBYTES, Address, Cells, Landed, Meet, NumSlots, Open, Waits
from connectors.pipe import MAX_NBYTES, PipeClosedError, PipeProtocolError
from connectors.tcp import TcpEnd, TcpHello, TcpPipe
from connectors.wire.frame import Frame, Kind
from connectors.wire.hello import read_hello
from connectors.wire.rendezvous import TOKEN_NBYTES, is_loopback
from connectors.wire.stream import Stream, seconds_left
from kvstore.arena import HostArena
from kvstore.errors import ConfigError
from kvstore.slot import Rows, Slots

_MOST_CELLS: Final = 1 << 24
_LOOK_S: Final = 0.05  # whether the peer is still there


class NixlHello(TcpHello, frozen=True, kw_only=True, forbid_unknown_fields=True):
    metadata: bytes
    rows: tuple[Address, NumSlots]  # the first, and how many are offered
    bounce: Address  # what the peer reads tensors from


class NixlPipe(TcpPipe):
    """Made by `NixlEnd.join`."""

    def __init__(
        self,
        rows: Rows,
        hellos: tuple[NixlHello, NixlHello],
        streams: tuple[Stream, Stream],
        agent: AgentClient,
        bounce: HostArena,
        bounce_rows: Rows,
    ) -> None:
        super().__init__(rows, hellos[0].max_nbytes, hellos[1].max_nbytes, *streams)
        self._mine, self._theirs = hellos
        self._agent, self._arena, self._rows = agent, bounce, rows
        self._landing = bounce_rows[1]
        self._bounce = torch.from_numpy(bounce_rows)  # [0] is read by the peer, [1] is read into
        self._has_asked = False  # the peer to move on what is received now
        agent.end = self.close

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
            theirs = self._theirs
            self._agent.meet(Meet(theirs.metadata, theirs.rows, theirs.bounce), deadline)
            self._bounce[0, :TOKEN_NBYTES] = torch.frombuffer(bytearray(theirs.token), dtype=torch.uint8)
            self._send_frame(self._out, Frame(Kind.GO), deadline)  # it is there
            self._recv_frame(self._in, deadline).expect(Kind.GO)
            self._read_bounce(TOKEN_NBYTES, deadline)
            if not hmac.compare_digest(self._bounce[1, :TOKEN_NBYTES].numpy().tobytes(), self._mine.token):
                raise PipeProtocolError("whose memory was read is not the peer")
            self._send_frame(self._in, Frame(Kind.ACK), deadline)
            self._await_ack(deadline)

    def _send_bytes(self, frame: Frame, flat: torch.Tensor, deadline: float) -> None:
        for start in range(0, len(flat), BOUNCE_NBYTES):
            part = flat[start : start + BOUNCE_NBYTES]
            self._bounce[0, : len(part)] = part
            self._send_frame(self._out, frame if start == 0 else Frame(Kind.GO), deadline)
            self._await_ack(deadline)

    def _recv_bytes(self, flat: torch.Tensor, deadline: float) -> None:
        for start in range(0, len(flat), BOUNCE_NBYTES):
            part = flat[start : start + BOUNCE_NBYTES]
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
        self._has_asked = False
        arrival, come = Arrival(self._rows, slots, self._landing, theirs), 0
        arrival.begin(self._agent, deadline)
        while arrival.under_way:
            for _ in range(self._landed(len(arrival.under_way), deadline)):
                for whole in arrival.copy_out():
                    if whole > come:
                        come = whole
                        yield come
                arrival.begin(self._agent, deadline)

    def _read_bounce(self, nbytes: int, deadline: float) -> None:
        self._has_asked = False
        self._agent.read_bounce(nbytes, deadline)
        self._landed(1, deadline)

    def _landed(self, most: int, deadline: float) -> int:
        """Wait until transfers are done; how many."""
        while True:
            answer = self._agent.answer(min(deadline, time.monotonic() + _LOOK_S))
            match answer:
                case Landed(count=count) if count <= most:
                    return count
                case Waits():
                    self._ask_for_help(deadline)
                case None:
                    if self._in.is_over():
                        raise PipeClosedError("the pipe was closed")
                    seconds_left(deadline)
                case _:
                    raise PipeProtocolError("more has landed than was asked for")

    def _ask_for_help(self, deadline: float) -> None:
        """Have the peer move things on, which it need not where one process can copy from the other."""
        if not self._has_asked:
            self._has_asked = True
            self._send_frame(self._in, Frame(Kind.GO), deadline)

    def _await_ack(self, deadline: float) -> None:
        frame = self._recv_frame(self._out, deadline)
        if frame.kind is Kind.GO:
            self._agent.move_on(deadline)
            frame = self._recv_frame(self._out, deadline)
            self._agent.rest(deadline)
        frame.expect(Kind.ACK)


class NixlEnd(TcpEnd):
    """
    Args:
        listen: as for TCP; where UCX listens, UCX_NET_DEVICES says.
        offer_fd: the memfd that rows are all of, as `HostArena` has it: they are registered, and nothing else
            that is not the pipe's own. By default this end offers none, and only receives slots.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        is_server: bool,
        max_nbytes: int = MAX_NBYTES,
        listen: str = "127.0.0.1",
        offer_fd: int | None = None,
    ) -> None:
        """
        Raises:
            MissingExtraError: nixl is not installed.
            ConfigError, PipeError: NIXL does not get going.
        """
        super().__init__(rows, is_server=is_server, max_nbytes=max_nbytes, listen=listen)
        self._agent: AgentClient | None = None
        self._bounce: HostArena | None = None
        self._bounce_rows: Rows | None = None
        try:
            offered = _check_offer(rows, offer_fd)
            self._bounce = HostArena(2, BOUNCE_NBYTES, sharing="memfd")
            self._bounce_rows = self._bounce.rows
            order = Open(rows.shape[1], len(rows) if offered else 0)
            fds = [fd for fd in (self._bounce.fd, *offered) if fd is not None]
            self._agent = AgentClient(order, fds, is_local=is_loopback(listen))
            opened = self._agent.opened
            self._nixl_hello = NixlHello(
                **{**msgspec.structs.asdict(self._hello), "transport": "nixl"},
                metadata=opened.metadata,
                rows=(opened.rows, order.num_offered),
                bounce=opened.bounce,
            )
        except BaseException:
            self.close()
            raise

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(self._nixl_hello)

    def join(self, peer_hello: bytes, timeout_s: float) -> NixlPipe:
        deadline = time.monotonic() + timeout_s
        mine, theirs = self._nixl_hello, read_hello(peer_hello, self._nixl_hello)
        agent, bounce, bounce_rows = self._agent, self._bounce, self._bounce_rows
        if agent is None or bounce is None or bounce_rows is None:  # whoever closes the end meanwhile closes these
            raise PipeClosedError("the end was closed, or joined before")
        if theirs.rows[1] * Cells.of(theirs.slot_nbytes).per_slot > _MOST_CELLS:
            raise PipeProtocolError(f"{theirs.rows[1]} slots of {theirs.slot_nbytes} bytes are offered: too many")
        outward, inward = self._meet(theirs, deadline)
        pipe = NixlPipe(self._rows, (mine, theirs), (outward, inward), agent, bounce, bounce_rows)
        self._agent = self._bounce = self._bounce_rows = None
        pipe.meet(deadline)
        return pipe

    def close(self) -> None:
        super().close()
        if self._agent is not None:
            self._agent.close()
        if self._bounce is not None:
            self._bounce.close()
        self._agent = self._bounce = self._bounce_rows = None


def _check_offer(rows: Rows, fd: int | None) -> list[int]:
    """Raises ConfigError where rows are not all that is in it."""
    if fd is None:
        return []
    try:
        nbytes = os.fstat(fd).st_size
    except OSError as e:
        raise ConfigError(f"offer_fd: {fd} is no open file: {e.strerror}") from e
    if nbytes != rows.nbytes:
        raise ConfigError(f"offer_fd: a file of {nbytes} bytes; give the memfd that all of rows, {rows.nbytes}, are")
    return [fd]
