"""The demo of disaggregated prefill: the same load on the same two cores, three ways.

    alone     one vLLM server on both cores
    chunked   ... that computes prompts in small pieces, vLLM's own remedy for long waits
    apart     a prefill server on one core and a decode server on the other, behind `kvstore proxy`;
              KV goes from one to the other by a path that they share

Some streams decode while long prompts arrive. One set-up runs at a time.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from connectors.weights_digest import cache_root
from kvstore.errors import ConfigError, MissingExtraError
from tools.demo_model import MODEL_NAME, prepare_model
from tools.demo_vllm.client import Answer, Request, play
from tools.demo_vllm.load import Load, warm_up
from tools.demo_vllm.report import SetUpRow, VllmDemoResult
from tools.demo_vllm.servers import HOST, ServerProcess, two_cores

ALONE, CHUNKED, APART = "one server", "one server, small chunks", "prefill and decode apart"
CHUNK_TOKENS: Final = 256
BLOCK_TOKENS: Final = 32  # the last, partial block is computed again: by the decode server
_SHARED_NBYTES: Final = 4 << 30
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_START_S, _ANSWER_S, _COUNT_S = 300.0, 180.0, 10.0
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
_SHARED_HITS: Final = re.compile(r'^vllm:kvstore_tier_hit_blocks_total\{[^}]*tier="shared"[^}]*\} (\S+)$', re.MULTILINE)


@dataclass(slots=True)
class _Run:
    """One run on its way."""

    load: Load
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


def run(load: Load | None = None, console: Console | None = None) -> VllmDemoResult:
    """Run the demo; progress goes to ``console`` (stderr by default).

    Raises:
        ConfigError, MissingExtraError: vLLM, the model or two cores can't be had.
        ChildError: a server failed; the message says which, and the last that it said.
        AnswerError: a request was not answered.
    """
    _check_vllm()
    load, start = load or Load(), time.monotonic()
    requests = load.requests()
    with _signals(), _progress(console) as progress, _folder() as folder:
        task = progress.add_task("preparing the model", total=9)
        model = prepare_model(lambda message: progress.update(task, description=f"preparing the model: {message}"))
        state = _Run(load, folder, model, two_cores(), progress, task)
        alone, _ = _alone(state, ALONE, requests)
        chunked, _ = _alone(state, CHUNKED, requests, "--max-num-batched-tokens", str(CHUNK_TOKENS))
        apart, blocks = _apart(state, requests)
    return VllmDemoResult(
        model=MODEL_NAME,
        load=load.describe([a.prompt_tokens for a in alone if a.request.is_long]),
        prompt_tokens=sum(answer.prompt_tokens for answer in alone),
        set_ups=[
            SetUpRow.of(ALONE, "2", alone, alone),
            SetUpRow.of(CHUNKED, "2", chunked, alone),
            SetUpRow.of(APART, "1 + 1", apart, alone, shared_blocks=blocks),
        ],
        seconds=time.monotonic() - start,
    )


def _alone(state: _Run, name: str, requests: list[Request], *arguments: str) -> tuple[list[Answer], int]:
    with ExitStack() as stack:
        state.step(f"{name}: starting vLLM")
        server = state.server(stack, name, state.cores, *arguments)
        server.wait(time.monotonic() + _START_S)
        return _measure(state, name, server, server, requests)


def _apart(state: _Run, requests: list[Request]) -> tuple[list[Answer], int]:
    """The answers, and how many blocks came to the decode server from the shared path."""
    prefill_core, decode_core = state.cores
    with ExitStack() as stack:
        state.step(f"{APART}: starting two vLLM servers")
        prefill = state.server(stack, "prefill server", [prefill_core], *_transfer(state, "kv_producer"))
        decode = state.server(stack, "decode server", [decode_core], *_transfer(state, "kv_consumer"))
        for server in (prefill, decode):
            stack.callback(server.ask_to_leave)  # both at a time
        deadline_s = time.monotonic() + _START_S
        for server in (prefill, decode):
            server.wait(deadline_s)
        command = [
            "-c",
            "from tools.cli import main; main()",
            "proxy",
            "--prefill",
            prefill.url,
            "--decode",
            decode.url,
        ]
        proxy = stack.enter_context(ServerProcess("proxy", command, {}, [prefill_core], state.folder))
        proxy.wait(deadline_s)
        return _measure(state, APART, proxy, decode, requests)


def _measure(
    state: _Run, name: str, front: ServerProcess, decode: ServerProcess, requests: list[Request]
) -> tuple[list[Answer], int]:
    """Answers to the load from ``front``, and what was loaded by ``decode`` in the meantime."""
    state.step(f"{name}: warming up")
    _play(state, front, decode, warm_up(state.load))
    before = _shared_hits(decode)
    state.step(f"{name}: {len(requests)} requests")
    answers = _play(state, front, decode, requests, f"{name}: {{}} of {len(requests)} requests answered")
    loaded = sum(answer.cached_tokens for answer in answers)
    deadline = time.monotonic() + _COUNT_S
    while (blocks := _shared_hits(decode) - before) * BLOCK_TOKENS < loaded and time.monotonic() < deadline:
        _play(state, front, decode, warm_up(state.load)[-1:])  # counters are told with a step of the engine
    return answers, blocks


def _play(
    state: _Run, front: ServerProcess, decode: ServerProcess, requests: list[Request], message: str | None = None
) -> list[Answer]:
    num_done = 0

    def done(_: Request) -> None:
        nonlocal num_done
        num_done += 1
        if message is not None:
            state.progress.update(state.task, description=message.format(num_done))

    for server in (front, decode):
        server.check()
    return asyncio.run(play(front.url, MODEL_NAME, requests, timeout_s=_ANSWER_S, done=done))


def _shared_hits(server: ServerProcess) -> int:
    """Blocks that its store has loaded from the shared path; 0 where it has none."""
    return int(sum(float(value) for value in _SHARED_HITS.findall(server.get("/metrics")[1])))


def _transfer(state: _Run, role: str) -> tuple[str, str]:
    settings: dict[str, Any] = {
        "kv_connector": "KVStoreSharedStorageConnector",
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {
            "shared_storage_path": str(state.folder / "kv"),
            "shared_capacity_bytes": _SHARED_NBYTES,
        },
    }
    return "--kv-transfer-config", json.dumps(settings)


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
