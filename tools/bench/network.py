"""Hand-over between two processes over loopback: pipes against their transport alone, and a buffer's answers.

64 MiB in slots of 360 KiB; ours verifies each slot while the rest is under way.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from connectors.control import ControlClient
from connectors.lookup_messages import ANSWERS, Select, Selected
from connectors.pipe import Pipe
from connectors.receive import receive_verified
from kvstore.planes import Planes
from kvstore.slot import Slots
from tools.bench.common import Figure, Measure, Row, Scale, random_keys, rate_of
from tools.bench.network_peer import BARE, KEYS, NUM_SLOTS, SLOT_NBYTES, TIMEOUT_S, make_end, open_planes
from tools.demo_process import Child, serve

_START_S: Final = 120.0
_MISSES: Final = 500
_AT_ONCE: Final = 64
_KEYS: Final = 256
# transport, what it is called, environment of both ends, floor, what is bare
_PIPES: Final[tuple[tuple[str, str, dict[str, str], float, str], ...]] = (
    ("tcp", "TCP pipe", {}, 0.85, "sendmsg and recv_into of the same memory"),
    ("gloo", "gloo pipe", {}, 0.9, "one tensor of as many bytes by gloo"),
    ("nixl", "NIXL pipe, UCX over tcp", {"UCX_TLS": "tcp,self"}, 0.9, "one READ of all slots, once told to"),
    ("nixl", "NIXL pipe, UCX with cma", {"UCX_TLS": "tcp,cma,self"}, 0.75, "one READ of all slots, once told to"),
)  # fmt: skip
_UCX: Final = {"UCX_NET_DEVICES": "lo", "UCX_MODULES": "^ib"}


def run(path: Path, scale: Scale) -> Iterator[Row]:
    """Each transport has two processes of its own: UCX reads its settings once in one."""
    for transport, name, environ, floor, raw_is in _PIPES:
        if transport != "nixl" or importlib.util.find_spec("nixl") is not None:
            figure = Figure(name=name, slot_nbytes=SLOT_NBYTES, floor=floor, raw_is=raw_is)
            yield figure.row(_pairs(path, transport, {**_UCX, **environ}, scale.rounds))
    yield from _misses(path, scale.rounds)


def _pairs(path: Path, transport: str, environ: dict[str, str], rounds: int) -> list[tuple[float, float]]:
    with ExitStack() as stack:
        receiver = Child(f"receiver-{transport}", "tools.bench.network", path, environ)
        stack.callback(receiver.kill)
        answer = receiver.ask("pairs", timeout_s=_START_S, transport=transport, rounds=rounds, folder=str(path))
        return [(ours, raw) for ours, raw in answer["answer"]]


class Receiver:
    """The client's end, in a process of its own; commands' answers are JSON."""

    def pairs(self, transport: str, rounds: int, folder: str) -> list[tuple[float, float]]:
        """GB/s of (ours, raw), one pair a round, after one that does not count."""
        with ExitStack() as stack:
            sender = Child(f"sender-{transport}", "tools.bench.network_peer", Path(folder), {})
            stack.callback(sender.kill)
            planes = open_planes()
            stack.callback(planes.close)
            ours = self._pipe(sender, transport, planes)
            raw = self._bare(sender, transport)
            found = []
            for i in range(rounds + 1):
                if i % 2:
                    found.append((ours(), raw()))
                else:
                    bare = raw()
                    found.append((ours(), bare))
            return found[1:]

    def _pipe(self, sender: Child, transport: str, planes: Planes) -> Measure:
        theirs = sender.ask("hello", timeout_s=_START_S, transport=transport)["answer"]
        end = make_end(transport, planes.arena, is_server=False)
        sender.send("join", transport=transport, hello=end.hello().hex())
        pipe = end.join(bytes.fromhex(theirs), TIMEOUT_S)
        sender.receive(_START_S)
        slots = np.arange(NUM_SLOTS)

        def measure() -> float:
            planes.arena.rows[:] = 0
            sender.send("send", transport=transport)
            rate = rate_of(NUM_SLOTS * SLOT_NBYTES, lambda: _receive(pipe, planes, slots))
            sender.receive(TIMEOUT_S)
            return rate

        return measure

    def _bare(self, sender: Child, transport: str) -> Measure:
        theirs = sender.ask("bare_hello", timeout_s=_START_S, transport=transport)["answer"]
        bare = BARE[transport](False)
        sender.send("bare_join", transport=transport, hello=bare.hello())
        bare.join(theirs)
        sender.receive(_START_S)

        def measure() -> float:
            sender.send("bare_send", transport=transport)
            rate = rate_of(NUM_SLOTS * SLOT_NBYTES, bare.receive)
            sender.receive(TIMEOUT_S)
            return rate

        return measure


def _receive(pipe: Pipe, planes: Planes, slots: Slots) -> None:
    """As a consumer does."""
    deadline, namespace = time.monotonic() + TIMEOUT_S, planes.current()[1]
    if not receive_verified(pipe, planes.codec, planes.arena.rows, slots, KEYS, namespace, deadline).all():
        raise RuntimeError("what came does not verify")


def _misses(path: Path, rounds: int) -> Iterator[Row]:
    """How fast a peer says that it has none of some keys."""
    with ExitStack() as stack:
        sender = Child("sender-lookup", "tools.bench.network_peer", path, {})
        stack.callback(sender.kill)
        address = sender.ask("serve", timeout_s=_START_S)["answer"]
        client = stack.enter_context(ControlClient(address, messages=ANSWERS, keys=None, server_key=None))
        planes = open_planes()
        stack.callback(planes.close)
        request = Select(planes.current()[1], b"".join(random_keys(_KEYS)), TIMEOUT_S)
        pool = stack.enter_context(ThreadPoolExecutor(_AT_ONCE))

        def ask(_: Any) -> float:
            start = time.perf_counter()
            answer = client.ask(request, TIMEOUT_S)
            if not isinstance(answer, Selected) or answer.num_blocks:
                raise RuntimeError(f"{answer!r} is no miss")
            return time.perf_counter() - start

        pairs, many = [], []
        for _ in range(rounds + 1):
            one = 1 / statistics.median(ask(i) for i in range(_MISSES))
            start = time.perf_counter()
            asked: list[Future[float]] = [pool.submit(ask, i) for i in range(_MISSES * 4)]
            for future in asked:
                future.result()
            many.append((_MISSES * 4 / (time.perf_counter() - start), one))
            pairs.append((one, 1000.0))
    figure = Figure(name=f"misses a second, of {_KEYS} keys, one at a time", slot_nbytes=0, floor=1.0, unit="/s",
                    raw_is="1 ms each")  # fmt: skip
    yield figure.row(pairs[1:])
    figure = Figure(name=f"misses a second, {_AT_ONCE} in flight", slot_nbytes=0, floor=1.0, unit="/s",
                    raw_is="one at a time")  # fmt: skip
    yield figure.row(many[1:])


if __name__ == "__main__":
    serve(Receiver())
    os._exit(0)  # what transports leave running ends with the process
