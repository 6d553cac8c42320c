"""NIXL's transport process: when it starts and ends, and what its end means to pipes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest

from connectors.nixl import NixlEnd, NixlPipe
from connectors.nixl_process.life import ProcessHold
from connectors.nixl_process.messages import Meet, ReadBounce, ReadCells
from connectors.pipe import Pipe, PipeClosedError, PipeTimeoutError
from connectors.testing.pipe_content import (
    LONG_S,
    NUM_SLOTS,
    SOON_S,
    assert_closed,
    at_once,
    carry_slots,
    join,
    make_arena,
    raised,
)
from connectors.testing.pipe_peer import PeerProcess
from kvstore.arena import HostArena
from kvstore.errors import ConfigError
from tests.pipe_ends import nixl_end
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed")
EVERY = np.arange(NUM_SLOTS)


@pytest.fixture
def arena() -> Iterator[HostArena]:
    with contextlib.closing(make_arena()) as arena:
        yield arena


@pytest.fixture
def peer() -> Iterator[PeerProcess]:
    peer = PeerProcess("tests.pipe_ends:nixl_end", {})
    yield peer
    peer.close()


@pytest.fixture
def pipe(arena: HostArena, peer: PeerProcess) -> Iterator[Pipe]:
    with contextlib.closing(nixl_end(arena, is_server=True)) as end, peer.join(end) as pipe:
        yield pipe


def processes(of: int | None = None) -> list[psutil.Process]:
    """Transport processes of a process."""
    return [child for child in psutil.Process(of).children() if "connectors.nixl_process" in child.cmdline()]


def transport_of(of: int | None = None) -> psutil.Process:
    (process,) = processes(of)
    return process


def receive(pipe: Pipe, times: int = 1 << 30) -> None:
    for _ in range(times):
        for _ in pipe.recv_slots(EVERY, LONG_S):
            pass


def send(pipe: Pipe) -> None:
    while True:
        pipe.send_slots(EVERY, LONG_S)


def assert_works(arena: HostArena) -> None:
    """A pipe of new ends."""
    other = make_arena()
    arena.rows[:] = np.arange(NUM_SLOTS)[:, None]
    a, b = join(nixl_end(arena, is_server=True), nixl_end(other, is_server=False))
    with a, b:
        carry_slots(a, b, EVERY, EVERY[::-1])
        assert np.array_equal(other.rows[::-1], arena.rows)
    other.close()


# -- one process, from the first end to the last


def test_one_process_serves_all_pipes_and_ends_with_the_last(arena: HostArena) -> None:
    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    assert not processes()
    before = left()
    pairs = [join(*(nixl_end(arena, is_server=is_server) for is_server in (True, False))) for _ in range(3)]
    process = transport_of()
    for a, b in pairs:
        carry_slots(a, b, EVERY[:4], EVERY[4:8])
    for pipe in pairs[0] + pairs[1]:
        pipe.close()
    assert processes() == [process]
    carry_slots(*pairs[2], EVERY[:4], EVERY[4:8])
    for pipe in pairs[2]:
        pipe.close()
    assert not process.is_running()
    del pairs, a, b, pipe  # memory goes with the last view of it
    assert left() == before
    assert_works(arena)
    assert not processes()


def test_it_is_held_between_pipes(arena: HostArena) -> None:
    with contextlib.closing(ProcessHold(is_local=True)):
        process = transport_of()
        assert_works(arena)
        assert processes() == [process]
        process.kill()
        process.wait(LONG_S)
        assert_works(arena)
        another = transport_of()
        assert_works(arena)
        assert processes() == [another]
    assert not processes()


def test_it_keeps_no_memory_of_pipes_that_are_gone(arena: HostArena) -> None:
    def mapped() -> int:
        return sum("kvstore-arena" in part.path for part in transport_of().memory_maps(grouped=False))

    with contextlib.closing(ProcessHold(is_local=True)):
        assert_works(arena)
        wait_until(lambda: mapped() == 0)


def test_pipes_are_closed_though_one_cannot_be(arena: HostArena, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(make_arena()) as other:
        ends = [nixl_end(arena, is_server=True), nixl_end(other, is_server=False)]
        a, b = join(*ends)

        def close() -> None:
            raise OSError("broken by a test")

        first = next(iter(a._agent._process._users))  # type: ignore[attr-defined]
        broken, other_pipe = (a, b) if first is a._agent else (b, a)  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(first, "end", close)
            transport_of().kill()
            wait_until(lambda: other_pipe.is_closed)
        broken.close()


def test_threads_close_a_pipe_at_once(arena: HostArena) -> None:
    for _ in range(8):
        other = make_arena()
        pipes = join(nixl_end(arena, is_server=True), nixl_end(other, is_server=False))
        at_once(*[pipe.close for pipe in pipes for _ in range(4)])
        other.close()


def test_its_environment(monkeypatch: pytest.MonkeyPatch, arena: HostArena) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.setenv("UCX_MODULES", "^ib,cuda")
    with contextlib.closing(nixl_end(arena, is_server=True)):
        environment = transport_of().environ()
    assert environment["UCX_NET_DEVICES"] == "lo"
    assert environment["UCX_MODULES"] == "^ib,cuda"
    assert "UCX_NET_DEVICES" not in os.environ


def test_it_has_neither_torch_nor_other_memory(arena: HostArena) -> None:
    mine = make_arena()
    with contextlib.closing(nixl_end(arena, is_server=True)):
        mapped = transport_of().memory_maps(grouped=False)
    mine.close()
    assert not any("libtorch" in region.path for region in mapped)
    sizes = sorted(region.rss for region in mapped if "memfd" in region.path)
    assert len(sizes) == 2, "the bounce memory and the arena, and nothing else"


def test_an_interrupt_is_not_its_end(pipe: Pipe, peer: PeerProcess) -> None:
    transport_of().send_signal(signal.SIGINT)
    peer.start("send_slots", EVERY.tolist(), LONG_S)
    receive(pipe, 1)
    assert peer.result() is None


def test_it_ends_with_its_parent(pipe: Pipe, peer: PeerProcess) -> None:
    process = transport_of(peer._pid)
    peer.signal(signal.SIGKILL)
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


# -- its end before that


@pytest.mark.parametrize("whose", ["own", "peer's"])
@pytest.mark.parametrize("what", ["recv_slots", "send_slots", "idle"])
def test_it_is_killed(pipe: Pipe, peer: PeerProcess, arena: HostArena, whose: str, what: str) -> None:
    calls: dict[str, tuple[Callable[[Pipe], Any], list[Any]]] = {
        "recv_slots": (receive, ["send_slots", EVERY.tolist(), LONG_S, 1 << 30]),
        "send_slots": (send, ["recv_slots", EVERY.tolist(), LONG_S, 1 << 30]),
        "idle": (lambda pipe: pipe.recv_tensor(LONG_S), ["recv_tensor", LONG_S]),
    }
    call, command = calls[what]
    peer.start(*command)
    killer = threading.Timer(0.3, transport_of(None if whose == "own" else peer._pid).kill)
    killer.start()
    error, seconds = raised(partial(call, pipe))
    assert isinstance(error, PipeClosedError) and seconds < SOON_S
    assert peer.result() == "raised PipeClosedError"
    killer.join(LONG_S)
    assert_closed(pipe)
    assert_works(arena)


def test_what_is_received_into_is_left_alone_once_it_is_killed(pipe: Pipe, peer: PeerProcess, arena: HostArena) -> None:
    peer.ask("fill", 1)
    peer.start("send_slots", EVERY.tolist(), LONG_S, 1 << 30)
    killer = threading.Timer(0.2, transport_of().kill)
    killer.start()
    error, _ = raised(partial(receive, pipe))
    arena.rows[:] = 0xEE
    assert isinstance(error, PipeClosedError)
    killer.join(LONG_S)
    assert peer.result() == "raised PipeClosedError"
    assert (arena.rows == 0xEE).all()


def test_it_is_killed_before_ends_are_joined(arena: HostArena) -> None:
    ends = [nixl_end(arena, is_server=is_server) for is_server in (True, False)]
    transport_of().kill()
    hellos = [end.hello() for end in ends]
    errors = at_once(*(partial(raised, partial(ends[i].join, hellos[1 - i], LONG_S)) for i in range(2)))
    assert all(isinstance(error, PipeClosedError) and seconds < SOON_S for error, seconds in errors)
    assert_works(arena)


def test_it_is_stopped(pipe: Pipe, peer: PeerProcess, arena: HostArena) -> None:
    """A deadline is one all the same, and it is killed when its last pipe is closed."""
    process = transport_of()
    peer.start("send_slots", EVERY.tolist(), LONG_S)
    process.suspend()
    error, seconds = raised(lambda: list(pipe.recv_slots(EVERY, 0.5)))
    assert isinstance(error, PipeTimeoutError) and seconds < SOON_S
    _, seconds = raised(pipe.close)
    assert seconds < SOON_S
    assert not process.is_running()
    assert peer.result() == "raised PipeClosedError"
    assert_works(arena)


# -- what it takes


@pytest.mark.parametrize(
    "what",
    [
        b"nonsense",
        ReadBounce(4096),
        ReadCells([(bytes(4), bytes(4))]),
        Meet(b"nobody", (0, 0), 0),
    ],
    ids=lambda what: type(what).__name__,
)
def test_what_is_not_due_ends_the_pipe_and_no_other(arena: HostArena, what: Any) -> None:
    with contextlib.closing(nixl_end(arena, is_server=True)) as end:
        process, agent = transport_of(), end._agent
        assert agent is not None
        if isinstance(what, bytes):
            agent._socket.send(what)
        else:
            agent._tell(what, time.monotonic() + LONG_S)
        with pytest.raises(PipeClosedError, match=r": \S"):
            agent.answer(time.monotonic() + LONG_S)
        assert_works(arena)
        assert processes() == [process]


@pytest.mark.parametrize(("into", "of"), [([0], [NUM_SLOTS]), ([1 << 20], [0]), ([0], [-1]), ([], [])])
def test_cells_that_there_are_not(arena: HostArena, into: list[int], of: list[int]) -> None:
    a, b = join(*(nixl_end(arena, is_server=is_server) for is_server in (True, False)))
    with a, b:
        assert isinstance(a, NixlPipe)
        until = time.monotonic() + LONG_S
        a._agent.read_cells([(np.array(into, np.int32).tobytes(), np.array(of, np.int32).tobytes())], until)
        with pytest.raises(PipeClosedError, match="no such cells"):
            a._agent.answer(until)


def test_what_is_offered_is_not_what_rows_are(arena: HostArena) -> None:
    with pytest.raises(ConfigError, match="offer_fd: a file of"):
        NixlEnd(arena.rows[:4], is_server=True, offer_fd=arena.fd)
    with pytest.raises(ConfigError, match="offer_fd: 999999 is no open file"):
        NixlEnd(arena.rows, is_server=True, offer_fd=999_999)
    assert not processes()


# -- the calling process


@pytest.mark.parametrize("way", ["send", "receive"])
def test_the_interpreter_goes_on_during_a_transfer(pipe: Pipe, peer: PeerProcess, way: str) -> None:
    """The best of some rounds: other work of the machine takes from either."""
    peer.start({"send": "recv_slots", "receive": "send_slots"}[way], EVERY.tolist(), LONG_S, 1 << 30)
    paces = []
    for _ in range(5):
        idle = pace()
        stop = threading.Event()
        mover = threading.Thread(target=until_stopped, args=(pipe, way, stop))
        mover.start()
        paces.append(pace() / idle)
        stop.set()
        mover.join(LONG_S)
        if paces[-1] >= 0.7:
            break
    assert max(paces) >= 0.7, paces


def until_stopped(pipe: Pipe, way: str, stop: threading.Event) -> None:
    while not stop.is_set():
        if way == "send":
            pipe.send_slots(EVERY, LONG_S)
        else:
            receive(pipe, 1)


def pace() -> float:
    """Turns of a Python loop a second."""
    turns, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 0.3:
        turns += 1
    return turns / seconds
