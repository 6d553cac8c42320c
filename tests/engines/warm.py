"""Engine processes that need not import vLLM, which takes longer than starting the engine itself.

The standard library's fork server imports it once; each process is forked from there, before anything of
vLLM was started, and has nothing in common with the others.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import IO, Any

from tests.engines.vllm_settings import SETTINGS
from tools.demo_process import Child, serve

_context: ForkServerContext = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.engines.vllm_imported"])


class WarmChild(Child):
    """A `Child` that runs `tests.engines.vllm_worker`."""

    def _start(self, command: Sequence[str], stderr: IO[bytes], environ: Mapping[str, str]) -> Any:
        return _Process(stderr, environ)


class _Process:
    """What `Child` uses of `subprocess.Popen`."""

    def __init__(self, stderr: IO[bytes], environ: Mapping[str, str]) -> None:
        requests, to_child = os.pipe()
        from_child, answers = os.pipe()
        ends = [Connection(requests), Connection(answers), Connection(os.dup(stderr.fileno()))]
        self._process: ForkServerProcess = _context.Process(target=_run, args=(*ends, {**os.environ, **environ}))
        self._process.start()
        for end in ends:
            end.close()
        self.stdin, self.stdout = os.fdopen(to_child, "w"), os.fdopen(from_child)
        atexit.register(self._process.kill)  # else multiprocessing waits for it

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int | None:
        self._process.join(timeout_s)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("an engine", timeout_s or 0.0)
        return self.poll()

    def kill(self) -> None:
        self._process.kill()


def _run(requests: Connection, answers: Connection, stderr: Connection, environ: dict[str, str]) -> None:
    """In the process."""
    for fd, end in enumerate((requests, answers, stderr)):
        os.dup2(end.fileno(), fd)
        end.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # as long as the process lives
    for name in set(os.environ) - set(environ) - set(SETTINGS):  # of when the server was started
        del os.environ[name]
    os.environ |= environ | SETTINGS
    sys.path += [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    if "OMP_NUM_THREADS" in environ:
        import torch

        torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))  # OpenMP has read it already
    from tests.engines.vllm_worker import TestedEngine  # imported by the server: see `tests.engines.vllm_imported`

    serve(TestedEngine())
