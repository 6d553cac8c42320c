"""A child process that answers JSON lines, one at a time, with a deadline.

The parent writes one request a line to the child's stdin and reads one reply a line from its
stdout; stderr goes to a file. Knows nothing of what is asked.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from kvstore.errors import KVStoreError

_TAIL_LINES: Final = 20
_EXIT_TIMEOUT_S: Final = 20.0


class ChildError(KVStoreError):
    """A child failed, died or was late; the message holds its exit code and what it wrote to stderr."""


class Child:
    """One child process running ``python -m module``.

    Args:
        name: for messages.
        module: what to run; it must answer each line with one line.
        folder: where its stderr goes.
        environ: set beside this process's environment.
        prefix: a command that runs it.
    """

    def __init__(
        self, name: str, module: str, folder: Path, environ: Mapping[str, str], prefix: Sequence[str] = ()
    ) -> None:
        self.name = name
        self._stderr_path = folder / f"{name}.stderr"
        with self._stderr_path.open("wb") as stderr:
            self._process = self._start([*prefix, sys.executable, "-m", module], stderr, environ)
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._asked: list[str] = []
        self._reader = threading.Thread(target=self._read, name=f"demo-{name}", daemon=True)
        self._reader.start()

    def send(self, command: str, **arguments: Any) -> None:
        """Ask for something; collect the answer by `receive`."""
        assert self._process.stdin is not None
        self._asked.append(command)
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as e:
            raise self._error("is gone") from e

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to the oldest request that has none yet.

        Raises:
            ChildError: the child died, was late, or answered with an error.
        """
        command = self._asked.pop(0)
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise self._error(f"did not answer {command!r} within {timeout_s:.0f} s") from None
        if line is None:
            raise self._error(f"died at {command!r}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(f"failed at {command!r}: {answer['error']}")
        return answer

    def ask(self, command: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """`send`, then `receive`."""
        self.send(command, **arguments)
        return self.receive(timeout_s)

    def close(self) -> None:
        """End its input and wait until it has left; kills it if it does not.

        Raises:
            ChildError: it did not leave by itself, or with an exit code.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            code = self._process.wait(_EXIT_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
            raise self._error("did not leave") from None
        if code != 0:
            raise self._error("failed on leaving")

    def kill(self) -> None:
        """Make sure that it is gone, and its pipes with it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not written yet has no reader
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _start(self, command: Sequence[str], stderr: IO[bytes], environ: Mapping[str, str]) -> subprocess.Popen[str]:
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, **environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
        )

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _error(self, what: str) -> ChildError:
        deadline = time.monotonic() + 1.0  # a dying child may be reaped a moment later
        while self._process.poll() is None and what.startswith("died") and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._process.poll()
        state = "still running" if code is None else f"exit code {code}"
        lines = self._stderr_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return ChildError("\n".join([f"the {self.name} process {what} ({state})", *(f"  | {line}" for line in lines)]))


def serve(commands: object) -> None:
    """The child's side: answer with what its methods return, until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        command = getattr(commands, request.pop("command"))
        try:
            answer = {"answer": command(**request)}
        except Exception as e:
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
