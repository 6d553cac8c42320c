"""One end of a pipe in a process of its own, which can be killed and stopped; see `connectors.testing.pipe`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from connectors.pipe import Pipe, PipeEnd, PipeError
from connectors.testing.pipe_content import (
    LONG_S,
    MAX_NBYTES,
    as_slots,
    fill,
    make_arena,
)


class PeerProcess:
    """The other end in a process of its own, told over a socket what to do.

    Args:
        end: "module:name" of what makes the end.
    """

    def __init__(self, end: str, env: Mapping[str, str]) -> None:
        mine, theirs = socket.socketpair()
        mine.settimeout(LONG_S)
        with theirs:
            self._pid = _nursery().fork(theirs.fileno(), end, env)
        self._orders, self._results = mine.makefile("w"), mine.makefile("r")
        self._socket = mine

    def start(self, verb: str, *args: Any) -> None:
        """Tell it to do something, and do not wait."""
        print(json.dumps([verb, *args]), file=self._orders, flush=True)

    def result(self) -> Any:
        """What came of it; "raised <error>" where it raised one."""
        return json.loads(self._results.readline())

    def ask(self, verb: str, *args: Any) -> Any:
        self.start(verb, *args)
        return self.result()

    def join(self, end: PipeEnd) -> Pipe:
        """Join its end, which is not the server, with one of ours."""
        hello = bytes.fromhex(self.ask("hello"))
        self.start("join", end.hello().hex())
        pipe = end.join(hello, LONG_S)
        assert self.result() is None
        return pipe

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)
        while number == signal.SIGKILL and os.path.exists(f"/proc/{self._pid}"):
            time.sleep(0.01)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        for opened in (self._orders, self._results, self._socket):
            with contextlib.suppress(OSError):
                opened.close()


class _Nursery:
    """A process that has imported what peers need, and forks one at a time: that takes no second each."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(LONG_S)
        code = "from connectors.testing.pipe_peer import fork_peers; fork_peers()"
        path = os.pathsep.join(p for p in sys.path if p)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},  # it forks: no threads
            )
        atexit.register(self.close)

    def fork(self, fd: int, end: str, env: Mapping[str, str]) -> int:
        socket.send_fds(self._socket, [json.dumps([end, dict(env)]).encode()], [fd])
        return int(self._socket.recv(64))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(LONG_S)


@functools.cache
def _nursery() -> _Nursery:
    return _Nursery()


def fork_peers() -> None:
    """Be the nursery, until the socket ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        while True:
            order, fds, _, _ = socket.recv_fds(orders, 1 << 16, 1)
            if not order:
                return
            pid = os.fork()
            if pid == 0:
                orders.close()
                end, env = json.loads(order)
                os.environ.update(env)
                serve_end(fds[0], end)
                os._exit(0)
            os.close(fds[0])
            orders.send(str(pid).encode())


class _Served:
    """What a `PeerProcess` can be told."""

    def __init__(self, make_end: Callable[..., PipeEnd]) -> None:
        self._make_end = make_end
        self._arena = make_arena()

    def hello(self) -> str:
        self._end = self._make_end(self._arena, is_server=False, max_nbytes=MAX_NBYTES)
        return self._end.hello().hex()

    def join(self, hello: str) -> None:
        self._pipe = self._end.join(bytes.fromhex(hello), LONG_S)

    def fill(self, seed: int) -> None:
        fill(self._arena.rows, seed)

    def digests(self) -> list[str]:
        return [hashlib.sha256(row.tobytes()).hexdigest() for row in self._arena.rows]

    def echo(self, count: int) -> None:
        """Send tensors back as they come."""
        for _ in range(count):
            self._pipe.send_tensor(self._pipe.recv_tensor(LONG_S), LONG_S)

    def recv_tensor(self, timeout_s: float) -> list[int] | None:
        tensor = self._pipe.recv_tensor(timeout_s)
        return None if tensor is None else list(tensor.shape)

    def send_slots(self, slots: list[int], timeout_s: float, times: int = 1) -> None:
        for _ in range(times):
            self._pipe.send_slots(as_slots(slots), timeout_s)

    def recv_slots(self, slots: list[int], timeout_s: float, times: int = 1) -> list[int]:
        for _ in range(times):
            steps = list(self._pipe.recv_slots(as_slots(slots), timeout_s))
        return steps

    def close(self) -> None:
        self._pipe.close()
        self._end.close()


def serve_end(fd: int, end: str) -> None:
    """Be a `PeerProcess`, until the socket ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    module, _, name = end.partition(":")
    served = _Served(getattr(importlib.import_module(module), name))
    with socket.socket(fileno=fd) as sock, sock.makefile("r") as orders, sock.makefile("w") as results:
        for line in orders:
            verb, *args = json.loads(line)
            try:
                result = getattr(served, verb)(*args)
            except PipeError as e:
                result = f"raised {type(e).__name__}"
            print(json.dumps(result), file=results, flush=True)
