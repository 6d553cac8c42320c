"""The demo's processes: vLLM servers and the proxy, each with its children in a process group of its own.

What they say goes to a file a process; its end is in the message where one fails. Whatever
happens, nothing of them is left when the context that started them closes.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kvstore.errors import ConfigError
from tools.demo_process import ChildError

HOST: Final = "127.0.0.1"
_TAIL_LINES: Final = 25
_POLL_S: Final = 0.2
_REQUEST_S: Final = 5.0
_LEAVE_S: Final = 10.0
_KILL_S: Final = 5.0
_SIBLINGS: Final = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_TRACKER: Final = b"multiprocessing.resource_tracker"


class ServerProcess:
    """A process that serves HTTP at a free port of loopback.

    Args:
        name: for messages, and for its log.
        command: what to run, after ``python``; the port is given as ``--port``.
        environ: set beside this process's environment.
        cores: the only ones that it and its children run on.
        log_folder: where what it says goes.
    """

    def __init__(
        self, name: str, command: Sequence[str], environ: Mapping[str, str], cores: Iterable[int], log_folder: Path
    ) -> None:
        self.name, self.port = name, _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._log = log_folder / f"{name.replace(' ', '-')}.log"
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
        self._leave_by_s: float | None = None
        with suppress(ProcessLookupError):  # it died at once; `wait` says so
            os.sched_setaffinity(self._process.pid, set(cores))  # before it has threads or children

    def wait(self, deadline_s: float, waiting: Callable[[], None] = lambda: None) -> None:
        """Until it says that it is healthy.

        Args:
            deadline_s: on the clock of `time.monotonic`.
            waiting: called while it does not.
        Raises:
            ChildError: it died, or was not healthy in time.
        """
        while True:
            self.check()
            with suppress(OSError, http.client.HTTPException):
                if self.get("/health")[0] == 200:
                    return
            if time.monotonic() > deadline_s:
                raise self.error("was not ready in time")
            waiting()
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raises:
        ChildError: it is gone.
        """
        if self._process.poll() is not None:
            raise self.error("died")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_REQUEST_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()

    def error(self, what: str) -> ChildError:
        """What is wrong, and the last lines that it said."""
        code = self._process.poll()
        state = "still running" if code is None else f"exit code {code}"
        lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return ChildError("\n".join([f"the {self.name} {what} ({state})", *(f"  | {line}" for line in lines)]))

    def ask_to_leave(self) -> None:
        """Does not wait for it: several can leave at a time."""
        if self._leave_by_s is None:
            self._leave_by_s = time.monotonic() + _LEAVE_S
            self._process.terminate()

    def stop(self) -> None:
        """Make sure that it is gone, its children too, and the shared memory that they named."""
        self.ask_to_leave()
        assert self._leave_by_s is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, self._leave_by_s - time.monotonic()))
        # Those that free the others' shared memory go when the others have gone.
        self._kill(lambda command: _TRACKER not in command)
        self._kill(lambda command: True)
        self._process.wait()

    def _kill(self, which: Callable[[bytes], bool]) -> None:
        """Kill what is left of the group, but for some; those have a while to leave by themselves."""
        for pid, command in _members(self._process.pid).items():
            if which(command):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_S
        while self._members_but_for_zombie() and time.monotonic() < deadline:
            time.sleep(_POLL_S / 4)

    def _members_but_for_zombie(self) -> bool:
        self._process.poll()
        return bool(_members(self._process.pid))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def two_cores() -> tuple[int, int]:
    """Two processor cores that this process may use and that are no two threads of one.

    Raises:
        ConfigError: there are no two.
    """
    allowed = sorted(os.sched_getaffinity(0))
    for core in allowed[1:]:
        if _siblings(core) != _siblings(allowed[0]):
            return allowed[0], core
    raise ConfigError(f"the demo needs two processor cores; it may use {allowed}")


def _siblings(core: int) -> str:
    try:
        return Path(_SIBLINGS.format(core)).read_text()
    except OSError:
        return str(core)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def _members(group: int) -> dict[int, bytes]:
    """Living processes of a group, with their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                state, _, pgrp = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:3]
                if int(pgrp) == group and state not in b"ZX":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes()
    return found
