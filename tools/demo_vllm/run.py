"""The demo of disaggregated prefill: the same load on the same two cores, three ways.

    alone     one vLLM server on both cores
    chunked   ... that computes prompts in small pieces, vLLM's own remedy for long waits
    apart     a prefill server on one core and a decode server on the other, behind `kvstore proxy`;
              KV goes from one to the other by a path that they share

Some streams decode while long prompts arrive. One set-up runs at a time.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import ExitStack
from typing import Any, Final

from rich.console import Console

from tools.demo_model import MODEL_NAME
from tools.demo_vllm.client import Answer, Request
from tools.demo_vllm.load import Load, warm_up
from tools.demo_vllm.report import SetUpRow, VllmDemoResult
from tools.demo_vllm.servers import ServerProcess
from tools.demo_vllm.stage import BLOCK_TOKENS, START_S, Stage, stage

ALONE, CHUNKED, APART = "one server", "one server, small chunks", "prefill and decode apart"
CHUNK_TOKENS: Final = 256
_SHARED_NBYTES: Final = 4 << 30
_COUNT_S: Final = 10.0
_SHARED_HITS: Final = re.compile(r'^vllm:kvstore_tier_hit_blocks_total\{[^}]*tier="shared"[^}]*\} (\S+)$', re.MULTILINE)


def run(load: Load | None = None, console: Console | None = None) -> VllmDemoResult:
    """Run the demo; progress goes to ``console`` (stderr by default).

    Raises:
        ConfigError, MissingExtraError: vLLM, the model or two cores can't be had.
        ChildError: a server failed; the message says which, and the last that it said.
        AnswerError: a request was not answered.
    """
    load, start = load or Load(), time.monotonic()
    requests = load.requests()
    with stage(console, num_steps=9) as here:
        alone, _ = _alone(here, load, ALONE, requests)
        chunked, _ = _alone(here, load, CHUNKED, requests, "--max-num-batched-tokens", str(CHUNK_TOKENS))
        apart, blocks = _apart(here, load, requests)
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


def _alone(here: Stage, load: Load, name: str, requests: list[Request], *arguments: str) -> tuple[list[Answer], int]:
    with ExitStack() as stack:
        here.step(f"{name}: starting vLLM")
        server = here.server(stack, name, here.cores, *arguments)
        server.wait(time.monotonic() + START_S)
        return _measure(here, load, name, server, server, requests)


def _apart(here: Stage, load: Load, requests: list[Request]) -> tuple[list[Answer], int]:
    """The answers, and how many blocks came to the decode server from the shared path."""
    prefill_core, decode_core = here.cores
    with ExitStack() as stack:
        here.step(f"{APART}: starting two vLLM servers")
        prefill = here.server(stack, "prefill server", [prefill_core], *_transfer(here, "kv_producer"))
        decode = here.server(stack, "decode server", [decode_core], *_transfer(here, "kv_consumer"))
        for server in (prefill, decode):
            stack.callback(server.ask_to_leave)  # both at a time
        deadline_s = time.monotonic() + START_S
        for server in (prefill, decode):
            server.wait(deadline_s)
        proxy = here.proxy(stack, [prefill], [decode], [prefill_core])
        proxy.wait(deadline_s)
        return _measure(here, load, APART, proxy, decode, requests)


def _measure(
    here: Stage, load: Load, name: str, front: ServerProcess, decode: ServerProcess, requests: list[Request]
) -> tuple[list[Answer], int]:
    """Answers to the load from ``front``, and what was loaded by ``decode`` in the meantime."""
    here.step(f"{name}: warming up")
    here.play([front, decode], warm_up(load))
    before = _shared_hits(decode)
    here.step(f"{name}: {len(requests)} requests")
    answers = here.play([front, decode], requests, f"{name}: {{}} of {len(requests)} requests answered")
    loaded = sum(answer.cached_tokens for answer in answers)
    deadline = time.monotonic() + _COUNT_S
    while (blocks := _shared_hits(decode) - before) * BLOCK_TOKENS < loaded and time.monotonic() < deadline:
        here.play([front, decode], warm_up(load)[-1:])  # counters are told with a step of the engine
    return answers, blocks


def _shared_hits(server: ServerProcess) -> int:
    """Blocks that its store has loaded from the shared path; 0 where it has none."""
    return int(sum(float(value) for value in _SHARED_HITS.findall(server.get("/metrics")[1])))


def _transfer(here: Stage, role: str) -> tuple[str, str]:
    settings: dict[str, Any] = {
        "kv_connector": "KVStoreSharedStorageConnector",
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {
            "shared_storage_path": str(here.folder / "kv"),
            "shared_capacity_bytes": _SHARED_NBYTES,
        },
    }
    return "--kv-transfer-config", json.dumps(settings)
