"""Pipes: the suite of `connectors.testing` over every transport, and what is peculiar to them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import msgspec
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from connectors.nccl import NcclEnd
from connectors.nixl import NixlEnd, NixlPipe
from connectors.nixl_process.life import ProcessHold
from connectors.pipe import Pipe, PipeClosedError, PipeEnd, PipeError, PipeProtocolError, PipeTimeoutError
from connectors.tcp import TcpEnd, TcpPipe
from connectors.testing import PipeTests
from connectors.testing.pipe_content import MAX_NBYTES, SLOT_NBYTES, assert_closed, at_once, carry, join, raised
from connectors.wire.frame import HEADER, Frame, Kind
from connectors.wire.hello import Hello, read_hello
from connectors.wire.stream import Stream
from kvstore.arena import HostArena
from kvstore.errors import ConfigError, MissingExtraError
from tests.pipe_ends import nccl_end, nixl_end, tcp_end
from tests.waiting import wait_until

TIMEOUT_S = 30.0
needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed")
every_end = pytest.mark.parametrize("end", [TcpEnd, NcclEnd, pytest.param(NixlEnd, marks=needs_nixl)])


class TestTcpPipe(PipeTests):
    end = tcp_end


class TestNcclPipe(PipeTests):
    """By gloo: NCCL needs a GPU for each end."""

    end = nccl_end


@needs_nixl
class TestNixlPipe(PipeTests):
    """By what UCX finds best, which within a host is to copy from the peer's memory."""

    end = nixl_end

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def one_process(cls) -> Iterator[None]:
        """It takes a second to start: it need not for each case."""
        with contextlib.closing(ProcessHold(is_local=True)):
            yield


@needs_nixl
@pytest.mark.slow
class TestNixlPipeByTcp(TestNixlPipe):
    """As between hosts without InfiniBand."""

    env: ClassVar = {"UCX_TLS": "tcp"}

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def one_process(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UCX_TLS", "tcp")
            with contextlib.closing(ProcessHold(is_local=True)):
                yield


def make_rows() -> np.ndarray:
    return np.zeros((4, SLOT_NBYTES), dtype=np.uint8)


@contextlib.contextmanager
def offered(num_slots: int, slot_nbytes: int = SLOT_NBYTES) -> Iterator[HostArena]:
    with contextlib.closing(HostArena(num_slots, slot_nbytes, sharing="memfd")) as arena:
        yield arena


@pytest.fixture
def pair(end: type[TcpEnd]) -> Iterator[tuple[TcpPipe, TcpPipe]]:
    ends = [end(make_rows(), is_server=is_server, max_nbytes=MAX_NBYTES) for is_server in (True, False)]
    pipes = join(*ends)
    for pipe in pipes:
        assert isinstance(pipe, TcpPipe)
    yield pipes[0], pipes[1]
    for opened in (*pipes, *ends):
        opened.close()


# -- all of them


@every_end
def test_listens_on_loopback_only(pair: tuple[Pipe, Pipe], end: type[TcpEnd]) -> None:
    with_ends = [end(make_rows(), is_server=is_server) for is_server in (True, False)]
    processes = [psutil.Process(), *psutil.Process().children()]
    opened_by = [c for process in processes for c in process.net_connections("inet")]
    listening = [c.laddr.ip for c in opened_by if c.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
    for opened in with_ends:
        opened.close()


@every_end
@pytest.mark.parametrize("shape", [(MAX_NBYTES + 1,), (1 << 60,), (1 << 20, 1 << 20)])
def test_a_header_of_too_much_is_refused_before_memory_is_had(
    pair: tuple[TcpPipe, TcpPipe], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not(*_: object) -> torch.Tensor:
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(Frame, "place", must_not)
    pair[0]._out.send([memoryview(Frame(Kind.TENSOR, torch.uint8, shape).pack())], time.monotonic() + TIMEOUT_S)
    with pytest.raises(PipeProtocolError, match="at most"):
        pair[1].recv_tensor(TIMEOUT_S)
    assert_closed(*pair)


@every_end
@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "192.0.2.77", "no such host.invalid"])
def test_addresses_that_are_none_of_this_host(end: type[TcpEnd], listen: str) -> None:
    with pytest.raises(ConfigError, match="listen"):
        end(make_rows(), is_server=True, listen=listen)


@every_end
@pytest.mark.parametrize(
    "rows", [np.zeros(8192, np.uint8), np.zeros((2, 4096), np.int8), np.zeros((4, 8192), np.uint8)[:, ::2]]
)
def test_rows_that_are_no_slots(end: type[TcpEnd], rows: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="rows"):
        end(rows, is_server=True)


@every_end
def test_a_largest_tensor_that_is_none(end: type[TcpEnd]) -> None:
    with pytest.raises(ConfigError, match="max_nbytes"):
        end(make_rows(), is_server=True, max_nbytes=0)


def test_ends_that_take_tensors_of_other_sizes() -> None:
    ends = TcpEnd(make_rows(), is_server=True, max_nbytes=100), TcpEnd(make_rows(), is_server=False, max_nbytes=200)
    a, b = join(*ends)
    with a, b:
        for one, other in ((a, b), (b, a)):
            with pytest.raises(PipeProtocolError, match="at most 100"):
                one.send_tensor(torch.zeros(101, dtype=torch.uint8), TIMEOUT_S)
            assert carry(one, other, torch.zeros(100, dtype=torch.uint8)) is not None


# -- TCP


def connect(hello: bytes) -> socket.socket:
    fields = msgspec.msgpack.decode(hello)
    return socket.create_connection((fields["host"], fields["port"]), timeout=TIMEOUT_S)


@every_end
def test_strangers_are_dropped_and_are_no_hindrance(end: type[TcpEnd]) -> None:
    server, client = end(make_rows(), is_server=True), end(make_rows(), is_server=False)
    token = msgspec.msgpack.decode(server.hello())["token"]
    shown = [b"", b"GET / HTTP/1.1\r\n\r\n" * 9, b"KVP1\x01" + bytes(32), b"KVP1\x07" + token, b"XXXX\x01" + token]
    strangers = [connect(server.hello()) for _ in range(20)]
    for i, stranger in enumerate(strangers):
        stranger.sendall(shown[i % len(shown)])
    strangers[1].close()
    a, b = join(server, client)
    assert carry(a, b, torch.arange(3)) is not None
    for stranger in strangers[2:]:
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()
    strangers[0].close()
    with pytest.raises(ConnectionRefusedError):
        connect(server.hello())
    for opened in (a, b, server, client):
        opened.close()


@pytest.mark.parametrize("end", [TcpEnd, pytest.param(NixlEnd, marks=needs_nixl)])
def test_an_end_that_is_closed_while_it_joins(end: type[TcpEnd]) -> None:
    ends = [end(make_rows(), is_server=is_server) for is_server in (True, False)]
    timer = threading.Timer(0.2, ends[0].close)
    timer.start()
    error, seconds = raised(partial(ends[0].join, ends[1].hello(), TIMEOUT_S))
    assert isinstance(error, PipeClosedError)
    assert seconds < TIMEOUT_S / 2
    timer.join()
    for one in ends:
        one.close()


def test_only_strangers_come() -> None:
    server, client = TcpEnd(make_rows(), is_server=True), TcpEnd(make_rows(), is_server=False)
    stop = threading.Event()

    def bother() -> None:
        while not stop.is_set():
            with connect(server.hello()) as stranger:
                stranger.sendall(bytes(37))
                stop.wait(0.01)

    thread = threading.Thread(target=bother)
    thread.start()
    error, seconds = raised(lambda: server.join(client.hello(), 0.5))
    stop.set()
    thread.join()
    assert isinstance(error, PipeTimeoutError) and 0.5 <= seconds < TIMEOUT_S
    server.close()
    client.close()


def test_who_listens_there_is_not_the_peer() -> None:
    """He learns a token that is worth nothing any more, and gets nothing."""
    with socket.create_server(("127.0.0.1", 0)) as thief:
        server, client = TcpEnd(make_rows(), is_server=True), TcpEnd(make_rows(), is_server=False)
        fields = msgspec.msgpack.decode(server.hello())
        server.close()
        hello = msgspec.msgpack.encode({**fields, "port": thief.getsockname()[1]})

        def steal() -> None:
            for conn in [thief.accept()[0] for _ in range(2)]:
                with conn:
                    conn.sendall(bytes(32))

        _, (error, _) = at_once(steal, lambda: raised(lambda: client.join(hello, TIMEOUT_S)))
        assert isinstance(error, PipeProtocolError)
        client.close()


def make_streams() -> tuple[socket.socket, Stream]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine = socket.create_connection(listener.getsockname())
        return mine, Stream(listener.accept()[0])


def garbage(rng: random.Random) -> bytes:
    """A header of random bytes, or a good one with some of its bytes changed."""
    if rng.random() < 0.3:
        return rng.randbytes(HEADER.size)
    shape = [rng.choice((0, 1, 2, 7, 4096, 1 << 33, (1 << 64) - 1)) for _ in range(rng.randrange(5))]
    good = bytearray(Frame(Kind.TENSOR, torch.float32, tuple(rng.randrange(9) for _ in range(rng.randrange(5)))).pack())
    for size, at in zip(shape, range(16, HEADER.size, 8), strict=False):
        if rng.random() < 0.3:
            good[at : at + 8] = size.to_bytes(8, "little")
    for _ in range(rng.randrange(4)):
        good[rng.randrange(24) if rng.random() < 0.7 else rng.randrange(HEADER.size)] = rng.randrange(256)
    return bytes(good)


def test_garbage_is_refused_or_is_small() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        try:
            frame = Frame.parse(garbage(rng), 4096)
        except PipeProtocolError:
            refused += 1
        else:
            assert frame.kind is not Kind.TENSOR or frame.place(None).nbytes <= 4096
    assert 1000 < refused < 2000


def take_all(pipe: Pipe, are_slots: bool) -> None:
    while True:
        if are_slots:
            list(pipe.recv_slots(np.arange(2), TIMEOUT_S))
        else:
            pipe.recv_tensor(TIMEOUT_S)


def test_a_hello_that_is_nested_deeply_is_refused() -> None:
    mine = Hello(transport="tcp", is_server=True, slot_nbytes=SLOT_NBYTES, max_nbytes=MAX_NBYTES)
    with pytest.raises(PipeProtocolError, match="that is no hello of tcp"):
        read_hello(b"\x81\xa1x" + b"\x91" * 5000 + b"\xc0", mine)


def test_garbage_on_a_pipe_closes_it() -> None:
    rng = random.Random(1)
    for i in range(300):
        (mine, inward), (other, outward) = make_streams(), make_streams()
        with mine, other, TcpPipe(make_rows(), 4096, 4096, outward, inward) as pipe:
            mine.sendall(garbage(rng) + rng.randbytes(rng.randrange(64)))
            mine.shutdown(socket.SHUT_WR)
            error, _ = raised(partial(take_all, pipe, i % 2 == 0))
            assert isinstance(error, PipeProtocolError | PipeClosedError)
            assert isinstance(raised(partial(pipe.send_tensor, None, TIMEOUT_S))[0], PipeError)


# -- NCCL and gloo


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="leave device out to use gloo"):
        NcclEnd(make_rows(), is_server=True, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match="CUDA device"):
        NcclEnd(make_rows(), is_server=True, device=torch.device("meta"))


def test_gloo_ends_that_send_other_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """To gloo that would be the end of the process."""
    server = NcclEnd(make_rows(), is_server=True)
    monkeypatch.setattr("connectors.nccl._STEP_NBYTES", 1 << 20)
    client = NcclEnd(make_rows(), is_server=False)
    for end, hello in ((server, client.hello()), (client, server.hello())):
        with pytest.raises(PipeProtocolError, match="bytes at a time"):
            end.join(hello, TIMEOUT_S)
        end.close()


def test_gloo_that_joins_a_stranger_leaves_nothing() -> None:
    server, client = (NcclEnd(make_rows(), is_server=is_server) for is_server in (True, False))
    others = gloo_threads()
    hellos = client.hello(), server.hello()
    client._nccl_hello = msgspec.structs.replace(client._nccl_hello, token=b"x" * 32)
    pipes: list[Pipe] = []
    (_, _), (error, _) = at_once(
        partial(raised, lambda: pipes.append(server.join(hellos[0], TIMEOUT_S))),
        partial(raised, lambda: pipes.append(client.join(hellos[1], TIMEOUT_S))),
    )
    assert isinstance(error, PipeProtocolError)
    for pipe in pipes:
        pipe.close()
    for end in (server, client):
        end.close()
    wait_until(lambda: gloo_threads() <= others)


def gloo_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "kvstore-gloo"}


def test_beside_another_default_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict(os.environ)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ends = [NcclEnd(make_rows(), is_server=is_server) for is_server in (True, False)]
        a, b = join(*ends)
        with a, b:
            assert torch.equal(carry(a, b, torch.arange(5)), torch.arange(5))
            x = torch.ones(3)
            dist.all_reduce(x)
            assert torch.equal(carry(b, a, x), x)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert dict(os.environ) == environment


# -- NIXL


def test_nixl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(MissingExtraError, match=r"kvstore\[nixl\]"):
        NixlEnd(make_rows(), is_server=True)


@needs_nixl
@pytest.mark.parametrize("slot", [4, -1, 1 << 62])
def test_slots_that_the_peer_has_not_registered(slot: int) -> None:
    parts = [Frame.of_slots(1, SLOT_NBYTES).pack(), np.array([slot], dtype="<i8").tobytes()]
    with offered(4) as arena:
        a, b = join(nixl_end(arena, is_server=True), NixlEnd(make_rows(), is_server=False))
        assert isinstance(a, NixlPipe)
        a._out.send([memoryview(part) for part in parts], time.monotonic() + TIMEOUT_S)
        with pytest.raises(PipeProtocolError, match="4 slots"):
            list(b.recv_slots(np.arange(1), TIMEOUT_S))
        assert_closed(a, b)


@needs_nixl
@pytest.mark.parametrize("slot_nbytes", [4096, 1 << 20, (1 << 20) + 4096, (5 << 20) + 8192, 9 << 20])
def test_slots_of_more_than_one_cell(slot_nbytes: int) -> None:
    """They come by way of the landing, which may be smaller than one slot."""
    sent, into = np.array([6, 0, 3, 5]), np.array([1, 4, 0, 2])
    with offered(7, slot_nbytes) as arena:
        arena.rows[:] = np.random.default_rng(0).integers(0, 256, arena.rows.shape, dtype=np.uint8)
        rows = np.zeros((5, slot_nbytes), dtype=np.uint8)
        a, b = join(nixl_end(arena, is_server=True), NixlEnd(rows, is_server=False))
        with a, b:
            came, _ = at_once(lambda: list(b.recv_slots(into, TIMEOUT_S)), lambda: a.send_slots(sent, TIMEOUT_S))
        assert came == sorted(set(came)) and came[-1] == 4
        assert np.array_equal(rows[into], arena.rows[sent])
        assert not rows[3].any()


@needs_nixl
def test_an_end_that_offers_nothing() -> None:
    """Its peer is told of no rows, and cannot be sent any; it receives."""
    with offered(4) as arena:
        arena.rows[:] = 7
        rows = make_rows()
        a, b = join(nixl_end(arena, is_server=True), NixlEnd(rows, is_server=False))
        with a, b:
            at_once(lambda: list(b.recv_slots(np.arange(4), TIMEOUT_S)), lambda: a.send_slots(np.arange(4), TIMEOUT_S))
        assert (rows == 7).all()
        assert isinstance(a, NixlPipe) and a._theirs.rows == (0, 0)
    a, b = join(*(NixlEnd(make_rows(), is_server=is_server) for is_server in (True, False)))
    with a, b, pytest.raises(PipeProtocolError, match="offers none"):
        b.send_slots(np.arange(1), TIMEOUT_S)


@needs_nixl
def test_nixl_is_asked_for_where_the_peer_has_something_else() -> None:
    ends: list[PipeEnd] = [NixlEnd(make_rows(), is_server=True), TcpEnd(make_rows(), is_server=False)]
    for one, other in (ends, ends[::-1]):
        with pytest.raises(PipeProtocolError, match="the peer's pipe is"):
            one.join(other.hello(), TIMEOUT_S)
    for end in ends:
        end.close()
