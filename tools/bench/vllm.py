"""A vLLM engine with the connectors against others: time to first token, throughput, and vLLM's own tiering.

Rates are first tokens, or batches, a second. Where the other side is the same engine's own
prefix cache, each prompt is touched first from our tier and then from that cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.errors import MissingExtraError
from tools.bench.common import Figure, Row, Scale
from tools.bench.raw import RawFile
from tools.demo_model import prepare_model
from tools.demo_process import Child

_PROMPTS: Final = 10
_AT_ONCE: Final = 8
_PROMPT_TOKENS: Final = 4000  # 31 blocks of 128, and 32 tokens to compute
_CACHED_TOKENS: Final = _PROMPT_TOKENS // 128 * 128
_BLOCK_NBYTES: Final = 128 * 23_040  # SmolLM2-135M in bf16
_BATCH, _BATCH_TOKENS, _ANSWER_TOKENS = 8, 1000, 16
_START_S, _STEP_S = 300.0, 600.0
_OWN: Final = "the engine's own prefix-cache hit of the same prompt, right after"
_FS_SETTLES_S: Final = 5.0
Pairs = list[tuple[float, float]]


def run(path: Path, scale: Scale) -> Iterator[Row]:
    """Raises MissingExtraError where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    bench = _Bench(path, prepare_model(lambda message: None), scale, np.random.default_rng(0))
    yield from bench.first_tokens_on_one_server()
    yield bench.first_tokens_from_another_server()
    yield bench.throughput()
    yield bench.at_once_beside_vllms_tiering()


@dataclass
class _Bench:
    path: Path
    model: Path
    scale: Scale
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.prompts = self.make_prompts(max(2, min(_PROMPTS, self.scale.nbytes >> 26)))

    def make_prompts(self, n: int, num_tokens: int = _PROMPT_TOKENS) -> list[list[int]]:
        return [self.rng.integers(100, 40_000, num_tokens).tolist() for _ in range(n)]

    def first_tokens_on_one_server(self) -> Iterator[Row]:
        """From host memory, then from disk after a restart; what is stored stays for who comes next."""
        with ExitStack() as stack:
            server = self._start(stack, "offloading", self._offloading())
            for prompt in self.prompts:
                server.seconds([prompt])
            host = [server.first_tokens(self.prompts, forget_host=False) for _ in range(self.scale.rounds + 1)]
            yield self._first_token("first token, from host memory", 1.10, host)
        with ExitStack() as stack:
            server = self._start(stack, "restarted", self._offloading())
            n = _CACHED_TOKENS // 128
            bare = RawFile(self.path / "bare", _BLOCK_NBYTES, n)
            stack.callback(bare.close)
            bare.grow()
            disk: Pairs = []
            limit: Pairs = []
            for _ in range(self.scale.rounds + 1):
                ours, own = server.first_tokens(self.prompts, forget_host=True)
                disk.append((ours, own))
                bare_s = n * _BLOCK_NBYTES / 1e9 / bare.read(np.arange(n))()
                limit.append((ours, 1 / (1 / own + bare_s)))
            yield self._first_token("first token, from disk after a restart", 1.25, disk)
            figure = Figure(name="the same", slot_nbytes=0, floor=0.85, unit="tokens/s",
                            raw_is="that hit, and a bare read of as many bytes from the disk")  # fmt: skip
            yield figure.row(limit[1:])

    def first_tokens_from_another_server(self) -> Row:
        transfer = _transfer("KVStoreSharedStorageConnector", "kv_consumer", self._shared())
        with ExitStack() as stack:
            server = self._start(stack, "reader", transfer)
            shared = [server.first_tokens(self.prompts, forget_host=True) for _ in range(self.scale.rounds + 1)]
        return self._first_token("first token, from a path that another server wrote", 1.35, shared)

    def throughput(self) -> Row:
        """Prompts that are all different, each stored to host memory, disk and path while others run."""
        with ExitStack() as stack:
            ours = self._start(stack, "storing", self._offloading())
            plain = self._start(stack, "plain", None)
            pairs: Pairs = []
            for _ in range(self.scale.rounds + 1):
                batch = self.make_prompts(_BATCH, _BATCH_TOKENS)
                pairs.append((1 / ours.seconds(batch, _ANSWER_TOKENS), 1 / plain.seconds(batch, _ANSWER_TOKENS)))
            stats = ours.settle()
            stored = ", ".join(f"{stats[tier]['written_nbytes'] / 1e9:.2f} GB to {tier}" for tier in ("host", "disk"))
        figure = Figure(name="throughput, all stored and nothing reused", slot_nbytes=0, floor=0.97, unit="batches/s",
                        raw_is=f"vLLM without a connector, same prompts; stored meanwhile: {stored}")  # fmt: skip
        return figure.row(pairs[1:])

    def at_once_beside_vllms_tiering(self) -> Row:
        """Requests that come at once and all hit on disk."""
        prompts = self.prompts[:_AT_ONCE]
        with ExitStack() as stack:
            ours = self._start(stack, "ours", self._offloading(), disable_log_stats=False)
            fs = self._start(stack, "fs-tier", self._fs_tiering(), disable_log_stats=False)
            for prompt in prompts:
                fs.seconds([prompt])
            pairs: Pairs = []
            for _ in range(self.scale.rounds + 1):
                ours.empty(forget_host=True)
                fs.wait(_FS_SETTLES_S)
                fs.empty_all()
                pairs.append((1 / ours.mean_first_token(prompts), 1 / fs.mean_first_token(prompts)))
        figure = Figure(name=f"mean first token, {len(prompts)} requests at once, all on disk", slot_nbytes=0,
                        floor=1.0, unit="tokens/s", raw_is="vLLM's own tiering with its fs tier")  # fmt: skip
        return figure.row(pairs[1:])

    def _start(self, stack: ExitStack, name: str, transfer: dict[str, Any] | None, **settings: Any) -> _Server:
        child = stack.enter_context(Child(name, "tools.bench.vllm_engine", self.path, {"VLLM_CPU_KVCACHE_SPACE": "1"}))
        server = _Server(child)
        stack.callback(server.close)
        server.ask("load", _START_S, model=str(self.model), transfer=transfer, dtype="bfloat16", max_model_len=8192,
                   **settings)  # fmt: skip
        for prompt in self.make_prompts(2):  # warmed by others
            server.seconds([prompt])
        return server

    def _offloading(self) -> dict[str, Any]:
        capacity = 2 * self._num_blocks() * _BLOCK_NBYTES
        disk = {"disk_path": str(self.path / "disk"), "disk_capacity_bytes": capacity}
        return _transfer("KVStoreOffloadingConnector", "kv_both", {**self._shared(), **disk})

    def _shared(self) -> dict[str, Any]:
        capacity = 4 * self._num_blocks() * _BLOCK_NBYTES
        shared = {"shared_storage_path": str(self.path / "shared"), "shared_capacity_bytes": capacity}
        return {"num_cpu_blocks": self._num_blocks(), **shared}

    def _num_blocks(self) -> int:
        return (len(self.prompts) + 12) * 32

    def _fs_tiering(self) -> dict[str, Any]:
        spec = {"spec_name": "CpuTieringSpec", "spec_module_path": "tools.bench.vllm_fs_tiering"}
        tiers = [{"type": "fs", "root_dir": str(self.path / "fs")}]
        extra = {**spec, "cpu_bytes_to_use": self._num_blocks() * _BLOCK_NBYTES, "secondary_tiers": tiers}
        return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    def _first_token(self, name: str, times: float, pairs: Pairs) -> Row:
        figure = Figure(name=name, slot_nbytes=0, floor=round(1 / times, 3), raw_is=_OWN, unit="tokens/s")
        return figure.row(pairs[1:])


@dataclass
class _Server:
    """One engine in a process of its own."""

    child: Child

    def seconds(self, prompts: list[list[int]], max_tokens: int = 1, cached: int | None = None) -> float:
        answer = self.ask("seconds", prompts=prompts, max_tokens=max_tokens)
        if cached is not None:
            _check(answer, cached)
        return float(answer["seconds"])

    def first_tokens(self, prompts: list[list[int]], *, forget_host: bool) -> tuple[float, float]:
        """Medians of each prompt's first touch, and of the second, which the engine's own cache answers; as rates."""
        self.empty(forget_host=forget_host)
        times = [(self.seconds([p], cached=_CACHED_TOKENS), self.seconds([p], cached=_CACHED_TOKENS)) for p in prompts]
        ours, own = np.median(np.array(times), axis=0)
        return float(1 / ours), float(1 / own)

    def mean_first_token(self, prompts: list[list[int]]) -> float:
        answer = self.ask("first_tokens", prompts=prompts)
        _check(answer, _CACHED_TOKENS)
        return float(np.mean(answer["seconds"]))

    def empty(self, *, forget_host: bool) -> None:
        """Empty the engine's own cache, and with ``forget_host`` the connector's host memory."""
        self.settle()
        if forget_host:
            self.ask("forget_host")
        self.ask("reset", connector=False)

    def empty_all(self) -> None:
        """Of vLLM's tiering: its own cache and its primary tier; files stay."""
        self.ask("reset", connector=True)

    def settle(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.ask("settle")["stats"][0]
        return stats

    def wait(self, seconds: float) -> None:
        self.ask("settle_own", seconds=seconds)

    def close(self) -> None:
        self.ask("close")

    def ask(self, command: str, timeout_s: float = _STEP_S, **arguments: Any) -> Any:
        return self.child.ask(command, timeout_s=timeout_s, **arguments)["answer"]


def _check(answer: dict[str, Any], cached: int) -> None:
    if set(answer["cached"]) != {cached}:
        raise RuntimeError(f"{answer['cached']} tokens were cached, not {cached}: the figure would mean nothing")


def _transfer(connector: str, role: str, extra: dict[str, Any]) -> dict[str, Any]:
    module = {"kv_connector_module_path": "connectors.vllm"}
    return {"kv_connector": connector, "kv_role": role, "kv_connector_extra_config": extra, **module}
