"""The demo of direct hand-over: the same prompts, by one server and by two prefill and two decode servers.

The servers share two processor cores, the proxy too; KV goes from a prefill server to a decode
server over loopback, by one transport after the other.
"""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from tools.demo_model import MODEL_NAME
from tools.demo_p2p.report import P2pDemoResult, TransportRow
from tools.demo_vllm.client import Answer, Request
from tools.demo_vllm.load import long_prompt
from tools.demo_vllm.servers import ServerProcess
from tools.demo_vllm.stage import START_S, Stage, stage

ALONE: Final = "one server"
TRANSPORTS: Final = {
    "NIXL": "KVStoreNixlConnector",
    "gloo": "KVStoreNcclConnector",
    "TCP": "KVStoreTcpConnector",
}
_NUM_HOST_BLOCKS: Final = 220  # three prompts at a time
_COUNTERS: Final = re.compile(
    r'^vllm:kvstore_tier_(hit_blocks|read_bytes|read_seconds)_total\{[^}]*tier="peer"[^}]*\} (\S+)$', re.MULTILINE
)
_COUNT_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class P2pLoad:
    """Args:
    prompts: sent one after the other.
    chars: length of each.
    tokens: length of their answers.
    gap_s: from one to the next.
    """

    prompts: int = 8
    chars: int = 6000
    tokens: int = 16
    gap_s: float = 3.0

    def requests(self, first: int = 0) -> list[Request]:
        return [
            Request(
                name=f"prompt {first + i}",
                is_long=True,
                at_s=i * self.gap_s,
                prompt=long_prompt(first + i, self.chars),
                max_tokens=self.tokens,
            )
            for i in range(self.prompts)
        ]


def run(
    load: P2pLoad | None = None, transports: Sequence[str] = tuple(TRANSPORTS), console: Console | None = None
) -> P2pDemoResult:
    """Run the demo; progress goes to ``console`` (stderr by default).

    A transport whose package is not installed is left out, and named in the result.

    Raises:
        ConfigError, MissingExtraError: vLLM, the model or two cores can't be had.
        ChildError: a server failed; the message says which, and the last that it said.
        AnswerError: a request was not answered.
    """
    load, start = load or P2pLoad(), time.monotonic()
    missing = ["NIXL"] if "NIXL" in transports and importlib.util.find_spec("nixl") is None else []
    with stage(console, num_steps=3 + 3 * len(transports)) as here:
        alone = _alone(here, load)
        rows = [TransportRow.of(ALONE, alone, alone)]
        for name in transports:
            if name not in missing:
                rows.append(_two_and_two(here, load, name, alone))
    return P2pDemoResult(
        model=MODEL_NAME,
        prompt_tokens=[answer.prompt_tokens for answer in alone],
        rows=rows,
        missing=missing,
        seconds=time.monotonic() - start,
    )


def _alone(here: Stage, load: P2pLoad) -> list[Answer]:
    with ExitStack() as stack:
        here.step(f"{ALONE}: starting vLLM")
        server = here.server(stack, ALONE, here.cores)
        server.wait(time.monotonic() + START_S)
        here.play([server], _warm_up(load))
        return _measure(here, load, ALONE, [server])


def _two_and_two(here: Stage, load: P2pLoad, name: str, alone: list[Answer]) -> TransportRow:
    prefill_core, decode_core = here.cores
    with ExitStack() as stack:
        here.step(f"{name}: starting four vLLM servers")
        prefill = [_server(here, stack, f"{name} prefill {i}", prefill_core, name, "kv_producer") for i in (1, 2)]
        decode = [_server(here, stack, f"{name} decode {i}", decode_core, name, "kv_consumer") for i in (1, 2)]
        for server in (*prefill, *decode):
            stack.callback(server.ask_to_leave)  # all at a time
        deadline_s = time.monotonic() + START_S
        for server in (*prefill, *decode):
            server.wait(deadline_s)
        proxy = here.proxy(stack, prefill, decode, [prefill_core])
        proxy.wait(deadline_s)
        here.play([proxy, *prefill, *decode], _warm_up(load))  # the first of each pair joins a pipe
        before = _counters(decode)
        answers = _measure(here, load, name, [proxy, *prefill, *decode])
        loaded = sum(answer.cached_tokens for answer in answers)
        deadline = time.monotonic() + _COUNT_S
        while (now := _counters(decode))["hit_blocks"] == before["hit_blocks"] and loaded:
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)  # counters are told now and then
        blocks, nbytes, seconds = (now[field] - before[field] for field in ("hit_blocks", "read_bytes", "read_seconds"))
        return TransportRow.of(name, answers, alone, blocks=int(blocks), nbytes=int(nbytes), seconds=seconds)


def _measure(here: Stage, load: P2pLoad, name: str, servers: Sequence[ServerProcess]) -> list[Answer]:
    requests = load.requests()
    here.step(f"{name}: {len(requests)} prompts")
    return here.play(servers, requests, f"{name}: {{}} of {len(requests)} prompts answered")


def _warm_up(load: P2pLoad) -> list[Request]:
    """Prompts of no load: two for each server."""
    return load.requests(first=50)[:4]


def _server(here: Stage, stack: ExitStack, name: str, core: int, transport: str, role: str) -> ServerProcess:
    settings = {
        "kv_connector": TRANSPORTS[transport],
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"num_cpu_blocks": _NUM_HOST_BLOCKS},
    }
    return here.server(stack, name, [core], "--kv-transfer-config", json.dumps(settings))


def _counters(servers: Sequence[ServerProcess]) -> dict[str, float]:
    """What servers' stores have loaded from peers, summed."""
    total = {"hit_blocks": 0.0, "read_bytes": 0.0, "read_seconds": 0.0}
    for server in servers:
        for field, value in _COUNTERS.findall(server.get("/metrics")[1]):
            total[field] += float(value)
    return total
