"""A pipe over torch.distributed: NCCL between GPUs, gloo where there is none.

Headers, acknowledgements, deadlines and ends go over the sockets of `connectors.tcp`, payload over
a process group of its own: to gloo a receive that was given up is the end of the group, and to NCCL
an end of the peer is nothing at all. So a transfer is begun when both ends are known to be at it,
and the sockets tell how it ends.

Nothing touches the environment, the default process group, or any interface but that of ``listen``;
NCCL itself chooses its interface by NCCL_SOCKET_IFNAME. Whoever can reach the ports of gloo, NCCL or
their store may keep a pipe from being joined, as these ask nobody who he is; but where somebody else
has come in the peer's place, `join` finds out and refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import torch
import torch.distributed

from connectors.pipe import MAX_NBYTES, PipeClosedError, PipeProtocolError, PipeTimeoutError
from connectors.tcp import (
    TOKEN_NBYTES,
    Frame,
    Stream,
    TcpEnd,
    TcpHello,
    TcpPipe,
    listen_on,
    read_hello,
    seconds_left,
)
from kvstore.errors import ConfigError
from kvstore.slot import Rows, Slots

dist: Any = torch.distributed  # not all of which has types
_STEP_NBYTES: Final = 2 << 20  # each is an operation of gloo, which costs more than what is lost of the cache
_TAG: Final = 0
_CLOSING_TAG: Final = 1  # nothing is ever sent with it
_LOOK_S: Final = 0.05  # whether the peer is still there
_LAST_BYTES_S: Final = 1.0  # for what was under way when the peer closed the pipe

Finish = Callable[[], None]
"""Wait until a transfer is done; raises PipeTimeoutError or PipeClosedError."""


class _Link(Protocol):
    """Moves flat uint8 tensors to the peer, or from it, in the order in which transfers are begun.

    What is begun together is waited for together. When a transfer has ended, so have those before.
    """

    window: int  # transfers that may be under way

    def send(self, parts: list[torch.Tensor], deadline: float) -> Finish: ...
    def receive(self, parts: list[torch.Tensor], deadline: float) -> Finish: ...

    def close(self) -> None:
        """End what is under way, in any thread; memory is left alone from then on."""


class _Waiter:
    """A thread that waits for one way's transfers, in order, so that others need not.

    When a peer dies, gloo often lets who waits for what was half through wait on, until his deadline
    (torch 2.13: of 12 killed receivers 10 left their sender waiting). The socket knows better.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._jobs: queue.SimpleQueue[tuple[Any, float, queue.SimpleQueue[RuntimeError | None]] | None]
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kvstore-gloo", daemon=True).start()

    def close(self) -> None:
        """Once the transfers have ended; which they do, at the latest, when they are late."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, deadline, result = job
            left_ms = math.ceil((deadline - time.monotonic()) * 1000)
            try:
                work.wait(timedelta(milliseconds=max(left_ms, 0) + 1))  # 0 would be for ever
                result.put(None)
            except RuntimeError as e:
                result.put(e)
            del job, work, result

    def wait(self, works: list[Any], deadline: float) -> None:
        """For the last of some; the others must be kept till then, or gloo forgets them.

        Raises:
            PipeTimeoutError, PipeClosedError
        """
        result: queue.SimpleQueue[RuntimeError | None] = queue.SimpleQueue()
        self._jobs.put((works[-1], deadline, result))
        give_up = math.inf
        while True:
            try:
                error = result.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                if time.monotonic() >= give_up:
                    raise PipeClosedError("the pipe was closed") from None
                if give_up == math.inf and self._stream.is_over():
                    give_up = time.monotonic() + _LAST_BYTES_S  # they may be there already
        if error is not None and time.monotonic() >= deadline:
            raise PipeTimeoutError("the deadline has passed") from error
        if error is not None:
            raise PipeClosedError("the pipe was closed") from error


class _Gloo:
    window = 64

    def __init__(self, store: Any, rank: int, address: str, streams: tuple[Stream, Stream], deadline: float) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=seconds_left(deadline))  # of connecting
        options._threads = 1
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        self._peer = 1 - rank
        self._outward, self._inward = map(_Waiter, streams)

    def send(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        works = [self._begin(self._group.send, part) for part in parts]
        return partial(self._outward.wait, works, deadline)

    def receive(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        works = [self._begin(self._group.recv, part) for part in parts]
        return partial(self._inward.wait, works, deadline)

    def close(self) -> None:
        """A group whose receive is late closes its connection, which wakes up everybody else."""
        with contextlib.suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._peer, _CLOSING_TAG).wait(timedelta(milliseconds=1))
        self._outward.close()
        self._inward.close()

    def _begin(self, operation: Callable[..., Any], memory: torch.Tensor) -> Any:
        try:
            return operation([memory], self._peer, _TAG)
        except RuntimeError as e:
            raise PipeClosedError("the pipe was closed") from e


class _Nccl:
    """Only one way, as a communicator's transfers wait for each other; host memory goes by the device."""

    window = 8

    def __init__(self, store: Any, rank: int, device: torch.device, stream: Stream) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=365)  # its watchdog would end the process
        self._group = dist.ProcessGroupNCCL(store, rank, 2, options)
        self._peer, self._device, self._stream = 1 - rank, device, stream

    def send(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        staged = [part.to(self._device) for part in parts]
        return self._begin(self._group.send, staged, [], deadline)

    def receive(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        staged = [
            part if part.device == self._device else torch.empty_like(part, device=self._device) for part in parts
        ]
        return self._begin(self._group.recv, staged, parts, deadline)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._group.abort()

    def _begin(
        self, operation: Callable[..., Any], staged: list[torch.Tensor], parts: list[torch.Tensor], deadline: float
    ) -> Finish:
        with torch.cuda.device(self._device):
            works = [operation([part], self._peer, _TAG) for part in staged]
        return partial(self._finish, works, staged, parts, deadline)

    def _finish(self, works: list[Any], staged: list[torch.Tensor], parts: list[torch.Tensor], deadline: float) -> None:
        for work in works:
            self._wait(work, deadline)
        for part, came in zip(parts, staged, strict=False):
            if came is not part:
                part.copy_(came)

    def _wait(self, work: Any, deadline: float) -> None:
        pause, give_up = 20e-6, math.inf
        while not work.is_completed():
            if time.monotonic() >= give_up:
                raise PipeClosedError("the pipe was closed")
            if give_up == math.inf and self._stream.is_over():
                give_up = time.monotonic() + _LAST_BYTES_S
            time.sleep(min(pause, seconds_left(deadline)))
            pause = min(2 * pause, 1e-3)
        if work.exception() is not None:
            raise PipeClosedError("the pipe was closed")


class NcclPipe(TcpPipe):
    """Made by `NcclEnd.join`. What is received by NCCL lies on its device, unless ``out`` says where."""

    def __init__(
        self,
        rows: Rows,
        hellos: tuple[TcpHello, TcpHello],
        streams: tuple[Stream, Stream],
        links: tuple[_Link, _Link],
        device: torch.device,
    ) -> None:
        super().__init__(rows, hellos[0].max_nbytes, hellos[1].max_nbytes, *streams)
        self._rows = torch.from_numpy(rows)
        self._links: tuple[_Link, _Link] | None = links
        self._closing = threading.Lock()
        self._device = device

    def close(self) -> None:
        super().close()
        with self._closing:
            links, self._links = self._links, None
        for link in set(links or ()):
            link.close()

    def _way(self, index: int) -> _Link:
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
        self._nccl_hello = NcclHello(**fields, backend=backend, store_port=port)

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(self._nccl_hello)

    def join(self, peer_hello: bytes, timeout_s: float) -> NcclPipe:
        deadline = time.monotonic() + timeout_s
        mine, theirs = self._nccl_hello, read_hello(peer_hello, self._nccl_hello)
        if theirs.backend != mine.backend:
            raise PipeProtocolError(f"the peer moves tensors by {theirs.backend}, this end by {mine.backend}")
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

    def _link(self, theirs: NcclHello, streams: tuple[Stream, Stream], deadline: float) -> tuple[_Link, _Link]:
        """Outward and inward, each of which has carried a token."""
        mine = self._nccl_hello
        by_rank: list[_Link]
        try:
            store, rank = self._store(theirs, deadline), 0 if mine.is_server else 1
            if mine.backend == "gloo":
                by_rank = [_Gloo(store, rank, self._address, streams, deadline)] * 2
            else:
                of_rank = [dist.PrefixStore(str(sender), store) for sender in range(2)]
                by_rank = [
                    _Nccl(part, rank, self._device, streams[sender != rank]) for sender, part in enumerate(of_rank)
                ]
            came = torch.empty(TOKEN_NBYTES, dtype=torch.uint8)
            sent = torch.frombuffer(bytearray(theirs.token), dtype=torch.uint8)
            for sender, link in enumerate(by_rank):
                (link.send([sent], deadline) if sender == rank else link.receive([came], deadline))()
        except (RuntimeError, ValueError) as e:
            seconds_left(deadline)
            raise PipeClosedError(f"the {mine.backend} group was not made: {e}") from e
        if not hmac.compare_digest(came.numpy().tobytes(), mine.token):
            raise PipeProtocolError(f"who has joined the {mine.backend} group is not the peer")
        return by_rank[rank], by_rank[1 - rank]

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
