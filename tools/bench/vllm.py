"""A vLLM server with the connectors against the same server without: time to first token, and throughput."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.errors import MissingExtraError
from tools.bench.common import Figure, Row, Scale
from tools.demo_model import prepare_model
from tools.demo_process import Child

_PROMPTS: Final = 10
_PROMPT_TOKENS: Final = 4000  # 31 blocks of 128, and 32 tokens to compute
_BLOCK_NBYTES: Final = 128 * 23_040  # SmolLM2-135M in bf16
_BATCH, _BATCH_TOKENS, _ANSWER_TOKENS = 4, 1000, 16
_START_S, _STEP_S = 300.0, 600.0
_ENVIRON: Final = {"VLLM_CPU_KVCACHE_SPACE": "1"}
_OWN: Final = "the engine's own prefix-cache hit of the same prompt, right after"


def run(path: Path, scale: Scale) -> Iterator[Row]:
    """Rates are first tokens, or batches, a second."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    model = prepare_model(lambda message: None)
    rng = np.random.default_rng(0)
    n = max(2, min(_PROMPTS, scale.nbytes >> 26))
    prompts = [rng.integers(100, 40_000, _PROMPT_TOKENS).tolist() for _ in range(n)]
    with ExitStack() as stack:

        def start(name: str, transfer: dict[str, Any] | None) -> _Server:
            child = stack.enter_context(Child(name, "tools.bench.vllm_engine", path, _ENVIRON))
            return _Server(child, model, transfer, rng)

        ours = start("offloading", _transfer(path, "KVStoreOffloadingConnector", "kv_both", n, disk=True))
        for prompt in prompts:
            ours.seconds([prompt])
        host, disk = [], []
        for _ in range(scale.rounds + 1):
            ours.empty(host=False)
            host.append(ours.first_tokens(prompts))
            ours.empty(host=True)
            disk.append(ours.first_tokens(prompts))
        yield _row("first token, from host memory", 1.10, host)
        yield _row("first token, from disk, host memory emptied", 1.25, disk)
        reader = start("reader", _transfer(path, "KVStoreSharedStorageConnector", "kv_consumer", n, disk=False))
        shared = []
        for _ in range(scale.rounds + 1):
            reader.empty(host=True)
            shared.append(reader.first_tokens(prompts))
        yield _row("first token, from a path that another server wrote", 1.35, shared)
        reader.close()
        plain = start("plain", None)
        pairs = []
        for _ in range(scale.rounds + 1):
            batch = [rng.integers(100, 40_000, _BATCH_TOKENS).tolist() for _ in range(_BATCH)]
            pairs.append((1 / ours.seconds(batch, _ANSWER_TOKENS), 1 / plain.seconds(batch, _ANSWER_TOKENS)))
        figure = Figure(name="throughput, all stored and nothing reused", slot_nbytes=0, floor=0.97, unit="batches/s",
                        raw_is="vLLM without a connector, same prompts")  # fmt: skip
        yield figure.row(pairs[1:])


class _Server:
    """One engine, warmed by other prompts."""

    def __init__(self, child: Child, model: Path, transfer: dict[str, Any] | None, rng: np.random.Generator) -> None:
        self._child = child
        child.ask("load", timeout_s=_START_S, model=str(model), transfer=transfer, dtype="bfloat16", max_model_len=8192)
        for _ in range(2):
            self.seconds([rng.integers(100, 40_000, _PROMPT_TOKENS).tolist()])

    def seconds(self, prompts: list[list[int]], max_tokens: int = 1, cached: int | None = None) -> float:
        answer = self._ask("seconds", prompts=prompts, max_tokens=max_tokens)
        if cached is not None and set(answer["cached"]) != {cached}:
            raise RuntimeError(f"{answer['cached']} tokens were cached, not {cached}: the figure would mean nothing")
        return float(answer["seconds"])

    def empty(self, *, host: bool) -> None:
        """Empty the engine's own cache, and with ``host`` the connector's host memory."""
        self._ask("settle")
        if host:
            self._ask("forget_host")
        self._ask("reset", connector=False)

    def first_tokens(self, prompts: list[list[int]]) -> tuple[float, float]:
        """Medians of each prompt's first touch, and of the second, which the engine's own cache answers; as rates."""
        cached = _PROMPT_TOKENS // 128 * 128
        times = [(self.seconds([p], cached=cached), self.seconds([p], cached=cached)) for p in prompts]
        ours, own = np.median(np.array(times), axis=0)
        return float(1 / ours), float(1 / own)

    def close(self) -> None:
        self._ask("close")
        self._child.kill()

    def _ask(self, command: str, **arguments: Any) -> Any:
        return self._child.ask(command, timeout_s=_STEP_S, **arguments)["answer"]


def _row(name: str, times: float, pairs: list[tuple[float, float]]) -> Row:
    figure = Figure(name=name, slot_nbytes=0, floor=round(1 / times, 3), raw_is=_OWN, unit="tokens/s")
    return figure.row(pairs[1:])


def _transfer(path: Path, connector: str, role: str, num_prompts: int, *, disk: bool) -> dict[str, Any]:
    blocks = (num_prompts + 12) * 32
    extra: dict[str, Any] = {
        "num_cpu_blocks": blocks,
        "shared_storage_path": str(path / "shared"),
        "shared_capacity_bytes": 4 * blocks * _BLOCK_NBYTES,
    }
    if disk:
        extra |= {"disk_path": str(path / "disk"), "disk_capacity_bytes": 2 * blocks * _BLOCK_NBYTES}
    module = {"kv_connector_module_path": "connectors.vllm"}
    return {"kv_connector": connector, "kv_role": role, "kv_connector_extra_config": extra, **module}
