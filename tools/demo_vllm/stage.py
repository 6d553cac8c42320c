"""Where the demos with vLLM servers run: a model, cores, a folder, progress, and servers that end with it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from connectors.weights_digest import cache_root
from kvstore.errors import ConfigError, MissingExtraError
from tools.demo_model import MODEL_NAME, prepare_model
from tools.demo_vllm.client import Answer, Request, play
from tools.demo_vllm.servers import HOST, ServerProcess, two_cores

BLOCK_TOKENS: Final = 32  # the last, partial block is computed again: by the decode server
START_S: Final = 300.0
ANSWER_S: Final = 180.0
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# float32: how a prompt is cut into pieces then changes no token.
_SETTINGS: Final = (
    "--served-model-name", MODEL_NAME, "--host", HOST, "--dtype", "float32", "--max-model-len", "4096",
    "--block-size", str(BLOCK_TOKENS), "--enforce-eager", "--enable-prompt-tokens-details",
)  # fmt: skip
_ENVIRON: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the process has only its cores
    "OMP_WAIT_POLICY": "passive",  # threads that spin would keep other work off two cores: one server gains most
}


@dataclass(slots=True)
class Stage:
    """Attributes:
    cores: two that servers are pinned to.
    folder: for logs and what is stored; removed at the end.
    """

    folder: Path
    model: Path
    cores: tuple[int, int]
    progress: Progress
    task: TaskID

    def step(self, description: str) -> None:
        """Say what comes next; what was said before is done."""
        self.progress.update(self.task, description=description, advance=1)

    def server(self, stack: ExitStack, name: str, cores: Sequence[int], *arguments: str) -> ServerProcess:
        """Start a vLLM server."""
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model), *_SETTINGS, *arguments]
        environ = {**_ENVIRON, "OMP_NUM_THREADS": str(len(cores))}
        return stack.enter_context(ServerProcess(name, command, environ, cores, self.folder))

    def proxy(
        self, stack: ExitStack, prefill: Sequence[ServerProcess], decode: Sequence[ServerProcess], cores: Sequence[int]
    ) -> ServerProcess:
        """Start `kvstore proxy` before these."""
        command = ["-c", "from tools.cli import main; main()", "proxy"]
        for option, servers in (("--prefill", prefill), ("--decode", decode)):
            for server in servers:
                command += [option, server.url]
        return stack.enter_context(ServerProcess("proxy", command, {}, cores, self.folder))

    def play(
        self, servers: Sequence[ServerProcess], requests: Sequence[Request], message: str | None = None
    ) -> list[Answer]:
        """Answers of the first of these servers; all of them must be alive.

        Args:
            message: shown with the number of those that are answered, in place of ``{}``.
        """
        num_done = 0

        def done(_: Request) -> None:
            nonlocal num_done
            num_done += 1
            if message is not None:
                self.progress.update(self.task, description=message.format(num_done))

        for server in servers:
            server.check()
        return asyncio.run(play(servers[0].url, MODEL_NAME, requests, timeout_s=ANSWER_S, done=done))


@contextmanager
def stage(console: Console | None, num_steps: int) -> Iterator[Stage]:
    """Progress goes to ``console`` (stderr by default).

    Raises:
        ConfigError, MissingExtraError: vLLM, the model or two cores can't be had.
    """
    _check_vllm()
    with _signals(), _progress(console) as progress, _folder() as folder:
        task = progress.add_task("preparing the model", total=num_steps)
        model = prepare_model(lambda message: progress.update(task, description=f"preparing the model: {message}"))
        yield Stage(folder, model, two_cores(), progress, task)


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    names = {*importlib.metadata.packages_distributions().get("vllm", ())}
    if not any("cpu" in f"{name} {importlib.metadata.version(name)}" for name in names):
        raise ConfigError("the demo shares two processor cores between servers and needs vLLM's CPU build, vllm-cpu")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does; a second one does not disturb its clearing up."""

    def interrupt(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _folder() -> Iterator[Path]:
    """For logs and the shared path; removed at the end."""
    runs = cache_root() / "runs"
    runs.mkdir(mode=0o700, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=runs))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(file=sys.stderr), transient=True) as progress:
        yield progress
