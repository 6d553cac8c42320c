"""The life of NIXL's transport process, beside this one.

One process serves all pipes of this one whose ends listen on loopback, one all others. It is started
by the first of them, and has ended when the last was closed. When it dies, its pipes are closed; the
next one starts another.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from connectors.nixl_process.messages import Open
from connectors.pipe import PipeError
from kvstore.errors import MissingExtraError

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0  # whether the process is still there, should the socket not tell
_END_S: Final = 4.0  # then it is killed
_KILL_S: Final = 10.0


class _User(Protocol):
    """What keeps a process running."""

    @property
    def end(self) -> Callable[[], None]:
        """What is called when the process has died."""


class TransportProcess:
    """One life of the process. `of` finds the one that runs, or starts it."""

    def __init__(self, *, is_local: bool) -> None:
        """Raises PipeError where no process can be started."""
        self._users: set[_User] = set()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_LOOK_S)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "connectors.nixl_process", str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=_environment(is_local=is_local),
                )
        except OSError as e:
            self._control.close()
            raise PipeError(f"NIXL's transport process cannot be started: {e}") from e
        self._watcher = threading.Thread(target=self._watch, name="kvstore-nixl-process", daemon=True)
        self._watcher.start()

    @classmethod
    def of(cls, user: _User, *, is_local: bool) -> TransportProcess:
        """The one that runs, which it does until every user was released."""
        with _lock:
            process = _running.get(is_local)
            if process is None or process._is_over():
                process = _running[is_local] = cls(is_local=is_local)
                process._users |= {hold for hold in _holds if hold.is_local == is_local}
            process._users.add(user)
            return process

    def open(self, order: Open, fds: list[int]) -> None:
        """Raises PipeError where it has ended, or takes no orders any more."""
        try:
            socket.send_fds(self._control, [msgspec.msgpack.encode(order)], fds)
        except OSError as e:
            raise PipeError(f"NIXL's transport process takes no orders, see its output above: {e}") from e

    def release(self, user: _User) -> None:
        """With the last one, the process has ended when this returns."""
        with _lock:
            is_last = self._users == {user}
            self._users.discard(user)
            if is_last:
                self._forget()
        if is_last:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # wakes up both ends
            if threading.current_thread() is not self._watcher:
                self._watcher.join(_END_S + 2 * _KILL_S)

    def _is_over(self) -> bool:
        """Whether it has died, which its watcher may not have seen yet: it says nothing on this socket."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        return bool(poll.poll(0))

    def _forget(self) -> None:
        for is_local in [is_local for is_local, process in _running.items() if process is self]:
            del _running[is_local]

    def _watch(self) -> None:
        """Wait for its end, reap it, and close the pipes that it has served."""
        while self._process.poll() is None:
            try:
                self._control.recv(1)
            except TimeoutError:
                continue
            except OSError:
                logger.debug("the control socket was closed")
            break
        code = self._reap()
        with _lock:
            self._forget()
            users = list(self._users)
        if users:
            logger.error("NIXL's transport process has ended (exit code %s): its pipes are closed", code)
        for user in users:
            try:
                user.end()
            except Exception:
                logger.exception("a pipe of NIXL could not be closed")
        self._control.close()

    def _reap(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_END_S)
        logger.warning("NIXL's transport process does not end, and is killed")
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_KILL_S)
        return None  # the kernel does not let it go; its sockets are closed, so nothing waits for it


_lock = threading.Lock()
_running: dict[bool, TransportProcess] = {}  # by whether its pipes are on loopback
_holds: set[ProcessHold] = set()


def _after_fork() -> None:
    """The parent's processes are not this one's."""
    global _lock  # noqa: PLW0603  # it may have been held
    _lock = threading.Lock()
    _running.clear()
    _holds.clear()


os.register_at_fork(after_in_child=_after_fork)


def _environment(*, is_local: bool) -> dict[str, str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    found = {"OPENBLAS_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    if is_local:
        found.setdefault("UCX_NET_DEVICES", "lo")
    if not any(Path("/sys/class/infiniband").glob("*")):
        found.setdefault("UCX_MODULES", "^ib")
    return found


def check_installed() -> None:
    """Raises MissingExtraError."""
    if importlib.util.find_spec("nixl") is None:
        raise MissingExtraError("nixl", "nixl")


class ProcessHold:
    """Starts the process before the first pipe is asked for, and keeps it between pipes, until `close`. Where it
    dies, the one that the next pipe starts is kept.
    """

    def __init__(self, *, is_local: bool) -> None:
        """
        Raises:
            MissingExtraError: nixl is not installed.
            PipeError: no process can be started.
        """
        check_installed()
        self.is_local = is_local
        TransportProcess.of(self, is_local=is_local)
        with _lock:
            _holds.add(self)

    def end(self) -> None:
        """The next pipe starts another."""

    def close(self) -> None:
        """May be called twice."""
        with _lock:
            _holds.discard(self)
            process = _running.get(self.is_local)
        if process is not None:
            process.release(self)
