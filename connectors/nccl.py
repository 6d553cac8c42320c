"""A pipe over torch.distributed: NCCL between GPUs, gloo where there is none.

Headers, acknowledgements, deadlines and ends go over the sockets of `connectors.tcp`, payload over
a process group of its own: to gloo a receive that was given up is the end of the group, and to NCCL
an end of the peer is nothing at all. So a transfer is begun when both ends are known to be at it,
and the sockets tell how it ends.

Nothing touches the environment, the default process group, or any interface but that of ``listen``;
NCCL itself chooses its interface by NCCL_SOCKET_IFNAME. Whoever can reach the ports of gloo, NCCL or
their store may keep a pipe from being joined, as these ask nobody who he is; but where somebody else
has come in the peer's place, `join` finds out and refuses. These ports stay open as long as the pipe, and each
connection to them takes a file descriptor till then; a peer that is let in can end this process, as gloo
does where more comes than was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import msgspec
import numpy as np
import torch
import torch.distributed

from connectors.nccl_links import Finish, Gloo, Link, Nccl
from connectors.pipe import MAX_NBYTES, PipeClosedError, PipeProtocolError
from connectors.tcp import TcpEnd, TcpHello, TcpPipe
from connectors.wire.frame import Frame
from connectors.wire.hello import read_hello
from connectors.wire.rendezvous import TOKEN_NBYTES, listen_on
from connectors.wire.stream import Stream, seconds_left
from kvstore.errors import ConfigError
from kvstore.slot import Rows, Slots

dist: Any = torch.distributed  # not all of which has types
_STEP_NBYTES: Final = 2 << 20  # each is an operation of gloo, which costs more than what is lost of the cache


class NcclPipe(TcpPipe):
    """Made by `NcclEnd.join`. What is received by NCCL lies on its device, unless ``out`` says where."""

    def __init__(
        self,
        rows: Rows,
        hellos: tuple[TcpHello, TcpHello],
        streams: tuple[Stream, Stream],
        links: tuple[Link, Link],
        device: torch.device,
    ) -> None:
        super().__init__(rows, hellos[0].max_nbytes, hellos[1].max_nbytes, *streams)
        self._rows = torch.from_numpy(rows)
        self._links: tuple[Link, Link] | None = links
        self._closing = threading.Lock()
        self._device = device

    def close(self) -> None:
        super().close()
        with self._closing:  # until it is over, for whoever closes it too
            links, self._links = self._links, None
            for link in set(links or ()):
                link.close()

    def _way(self, index: int) -> Link:
        links = self._links
        if links is None:
            raise PipeClosedError("the pipe was closed")
        return links[index]

    def _place(self, frame: Frame, out: torch.Tensor | None) -> torch.Tensor:
        return frame.place(out, self._device)

    def _send_bytes(self, frame: Frame, flat: torch.Tensor, deadline: float) -> None:
        link = self._way(0)
        self._send_frame(self._out, frame, deadline)
        link.send([flat if self._device.type != "cpu" else flat.cpu()], deadline)()

    def _recv_bytes(self, flat: torch.Tensor, deadline: float) -> None:
        host_only = self._device.type == "cpu" and flat.device.type != "cpu"
        memory = torch.empty_like(flat, device="cpu") if host_only else flat
        self._way(1).receive([memory], deadline)()
        if host_only:
            flat.copy_(memory)

    def _send_rows(self, frame: Frame, slots: Slots, deadline: float) -> None:
        link, cuts = self._way(0), _cuts_of(slots)
        their_cuts = bytearray(len(cuts))
        self._out.send([memoryview(frame.pack()), memoryview(cuts)], deadline)
        self._out.receive([memoryview(their_cuts)], deadline)
        under_way: deque[Finish] = deque()
        for _, parts in self._pieces(slots, cuts, their_cuts):
            under_way.append(link.send(parts, deadline))
            if len(under_way) > link.window:
                under_way.popleft()()
        if under_way:
            under_way.pop()()  # the last

    def _recv_rows(self, slots: Slots, deadline: float) -> Iterator[int]:
        link, cuts = self._way(1), _cuts_of(slots)
        their_cuts = bytearray(len(cuts))
        self._in.receive([memoryview(their_cuts)], deadline)
        under_way: deque[tuple[int, Finish]] = deque()
        pieces = self._pieces(slots, cuts, their_cuts)
        begun = ((come, link.receive(parts, deadline)) for come, parts in pieces)
        under_way.extend(itertools.islice(begun, link.window))
        self._in.send([memoryview(cuts)], deadline)  # memory awaits what comes now
        while under_way:
            come, finish = under_way.popleft()
            finish()
            under_way.extend(itertools.islice(begun, 1))
            yield come

    def _pieces(self, slots: Slots, cuts: bytes, their_cuts: bytearray) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """The same numbers of rows at both ends, in parts that lie in one piece here and there.

        Yields:
            How many slots are done with the next megabytes, and its parts.
        """
        is_cut = np.unpackbits(np.frombuffer(cuts, np.uint8) | np.frombuffer(their_cuts, np.uint8), count=len(slots))
        starts = np.flatnonzero(is_cut).tolist()
        step = max(1, round(_STEP_NBYTES / self._slot_nbytes))
        parts: list[torch.Tensor] = []
        num_rows = 0
        for start, end in zip(starts, [*starts, len(slots)][1:], strict=True):
            for at in range(start, end, step):
                first, count = int(slots[at]), min(step, end - at)
                parts.append(self._rows[first : first + count].reshape(-1))
                num_rows += count
                if num_rows >= step:
                    yield at + count, parts
                    parts, num_rows = [], 0
        if parts:
            yield len(slots), parts


def _cuts_of(slots: Slots) -> bytes:
    """A bit for each slot: set where it does not lie behind the one before."""
    if not len(slots):
        return b""
    return np.packbits(np.diff(slots, prepend=slots[0] - 2) != 1).tobytes()


class NcclHello(TcpHello, frozen=True, kw_only=True, forbid_unknown_fields=True):
    backend: str
    store_port: int
    step_nbytes: int  # gloo ends the process where two ends do not agree about an operation's size


class NcclEnd(TcpEnd):
    """
    Args:
        listen: an address of this host that the peer can reach; here clients listen too.
        device: a CUDA device: NCCL; by default gloo, in host memory. The same kind at both ends.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        is_server: bool,
        max_nbytes: int = MAX_NBYTES,
        listen: str = "127.0.0.1",
        device: torch.device | None = None,
    ) -> None:
        """Raises ConfigError where it cannot listen there, or NCCL is asked for where there is no GPU."""
        self._device = check_device(device)
        super().__init__(rows, is_server=is_server, max_nbytes=max_nbytes, listen=listen)
        self._store_listener = listen_on(listen, backlog=8)
        self._address, port = self._store_listener.getsockname()[:2]
        if not is_server:
            self._store_listener.close()
        backend = "gloo" if self._device.type == "cpu" else "nccl"
        fields = {**msgspec.structs.asdict(self._hello), "transport": "nccl"}
        self._nccl_hello = NcclHello(**fields, backend=backend, store_port=port, step_nbytes=_STEP_NBYTES)

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(self._nccl_hello)

    def join(self, peer_hello: bytes, timeout_s: float) -> NcclPipe:
        deadline = time.monotonic() + timeout_s
        mine, theirs = self._nccl_hello, read_hello(peer_hello, self._nccl_hello)
        if theirs.backend != mine.backend:
            raise PipeProtocolError(f"the peer moves tensors by {theirs.backend}, this end by {mine.backend}")
        if theirs.step_nbytes != mine.step_nbytes:
            raise PipeProtocolError(f"the peer sends {theirs.step_nbytes} bytes at a time, this end {mine.step_nbytes}")
        outward, inward = self._meet(theirs, deadline)
        try:
            links = self._link(theirs, (outward, inward), deadline)
        except BaseException:
            outward.close()
            inward.close()
            raise
        return NcclPipe(self._rows, (mine, theirs), (outward, inward), links, self._device)

    def close(self) -> None:
        super().close()
        self._store_listener.close()

    def _link(self, theirs: NcclHello, streams: tuple[Stream, Stream], deadline: float) -> tuple[Link, Link]:
        """Outward and inward, each of which has carried a token."""
        mine, rank = self._nccl_hello, 0 if self._nccl_hello.is_server else 1
        came = torch.empty(TOKEN_NBYTES, dtype=torch.uint8)
        sent = torch.frombuffer(bytearray(theirs.token), dtype=torch.uint8)
        with contextlib.ExitStack() as undo:
            try:
                by_rank = self._by_rank(rank, self._store(theirs, deadline), streams, deadline, undo)
                for sender, link in enumerate(by_rank):
                    (link.send([sent], deadline) if sender == rank else link.receive([came], deadline))()
            except (RuntimeError, ValueError) as e:
                seconds_left(deadline)
                raise PipeClosedError(f"the {mine.backend} group was not made: {e}") from e
            if not hmac.compare_digest(came.numpy().tobytes(), mine.token):
                raise PipeProtocolError(f"who has joined the {mine.backend} group is not the peer")
            undo.pop_all()
        return by_rank[rank], by_rank[1 - rank]

    def _by_rank(
        self, rank: int, store: Any, streams: tuple[Stream, Stream], deadline: float, undo: contextlib.ExitStack
    ) -> tuple[Link, Link]:
        """What rank 0 sends by, and rank 1; ``undo`` closes them."""
        if self._device.type == "cpu":
            gloo = Gloo(store, rank, self._address, streams, deadline)
            undo.callback(gloo.close)
            return gloo, gloo

        def nccl(sender: int) -> Link:
            link = Nccl(dist.PrefixStore(str(sender), store), rank, self._device, streams[sender != rank])
            undo.callback(link.close)
            return link

        return nccl(0), nccl(1)

    def _store(self, theirs: NcclHello, deadline: float) -> Any:
        """The server's, under keys that nobody else knows."""
        mine = self._nccl_hello
        is_server = mine.is_server
        host, port = (self._address, mine.store_port) if is_server else (theirs.host, theirs.store_port)
        store = dist.TCPStore(
            host,
            port,
            world_size=2,
            is_master=is_server,
            timeout=timedelta(seconds=seconds_left(deadline)),
            wait_for_workers=False,
            master_listen_fd=self._store_listener.detach() if is_server else None,
        )
        return dist.PrefixStore((mine if is_server else theirs).token.hex(), store)


def check_device(device: torch.device | None) -> torch.device:
    """With its index; the CPU for None. Raises ConfigError where NCCL cannot use it."""
    kind = "cpu" if device is None else str(device.type)
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ConfigError(f"device: got {device}; allowed are a CUDA device, for NCCL, and none, for gloo")
    problem = _why_no_nccl()
    if problem:
        raise ConfigError(f"device: got {device}, but {problem}, so NCCL cannot be used; leave device out to use gloo")
    index = None if device is None else device.index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _why_no_nccl() -> str:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no libcuda.so.1"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return "" if dist.is_nccl_available() else "this torch was built without NCCL"
