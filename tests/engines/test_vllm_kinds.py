"""Kinds of KV in a real vLLM engine: sliding windows, latent attention, fp8, and speculation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.engine import NEEDS_VLLM, Engine, make_llama, offloading, prompt, save_scaled, shared_storage
from tools.demo_process import ChildError

pytestmark = NEEDS_VLLM
LENGTHS = (1500, 700, 130, 100, 2049)


def make_sliding(path: Path) -> Path:
    """Two of three layers see 256 tokens back: three KV cache groups, of which one reads all of a prefix."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    kinds = {"sliding_window": 256, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
    return save_scaled(Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, **kinds)), path)


def make_latent(path: Path) -> Path:
    """One latent vector a token instead of K and V (MLA)."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    latent = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    dense = {"v_head_dim": 128, "first_k_dense_replace": 3, "moe_intermediate_size": 64}
    return save_scaled(DeepseekV2ForCausalLM(DeepseekV2Config(**sizes, **heads, **latent, **dense)), path)


@dataclass(frozen=True)
class Kind:
    make: Any
    block_size: int = 128
    settings: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-3  # of log probabilities, between what was computed in other pieces
    repeats: bool = False

    def prompts(self) -> list[list[int]]:
        prompts = [prompt(i, n) for i, n in enumerate(LENGTHS)]
        return [(ids[:40] * 60)[: len(ids)] for ids in prompts] if self.repeats else prompts


# vLLM's reference kernel: on a processor with AMX it takes another one, which computes in bfloat16 only
LATENT = {"attention_backend": "CPU_MLA"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
KINDS = {
    "sliding": Kind(make_sliding),
    # vLLM's CPU kernel for it gives other last digits for a prefix from its own cache, too
    "latent": Kind(make_latent, block_size=16, settings=LATENT, tolerance=0.3),
    "latent by AMX": Kind(make_latent, block_size=128, settings={"dtype": "bfloat16"}, tolerance=0.3),
    "fp8": Kind(make_llama, settings={"kv_cache_dtype": "fp8"}),
    "ngram": Kind(make_llama, settings={"speculative_config": NGRAM}, repeats=True),
}


@dataclass
class Running:
    kind: Kind
    engine: Engine
    data: Path
    cold: list[dict[str, Any]]


HAS_AMX = torch.cpu._is_amx_tile_supported()
NEEDS_AMX = pytest.mark.skipif(not HAS_AMX, reason="needs a processor with AMX")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=NEEDS_AMX if "AMX" in name else ()) for name in KINDS])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    engine = Engine("engine", folder, kind.make(folder / "model"))
    transfer = offloading(folder, num_cpu_blocks=96 * 128 // kind.block_size)
    engine.load(transfer, max_num_batched_tokens=512, **kind.settings)
    cold = engine.generate(*kind.prompts(), max_tokens=24)
    assert [answer["cached"] for answer in cold] == [0] * len(LENGTHS)
    yield Running(kind, engine, folder, cold)
    engine.stop()


def check(running: Running, warm: list[dict[str, Any]]) -> None:
    size = running.kind.block_size
    assert [answer["cached"] for answer in warm] == [(n - 1) // size * size for n in LENGTHS]
    for one, other in zip(warm, running.cold, strict=True):
        if running.kind.tolerance < 0.1:
            assert one["tokens"] == other["tokens"]
        assert one["logprobs"][0] == pytest.approx(other["logprobs"][0], abs=running.kind.tolerance)
    assert running.engine.settle()["host"]["pinned_blocks"] == 0


def test_host_memory_answers(running: Running) -> None:
    check(running, running.engine.from_store(*running.kind.prompts(), max_tokens=24))


def test_disk_answers(running: Running) -> None:
    running.engine.settle()
    running.engine.ask("forget_host")
    check(running, running.engine.from_store(*running.kind.prompts(), max_tokens=24))


def test_what_was_answered_is_stored_right(running: Running) -> None:
    """A long answer, drafts accepted and rejected, is the prefix of the next turn."""
    (first,) = running.engine.generate(running.kind.prompts()[3], max_tokens=300)
    turn = [*running.kind.prompts()[3], *first["tokens"], 7]
    (warm,) = running.engine.from_store(turn)
    num_computed = len(turn) - 2  # neither the 7 nor the last token of the answer has been
    assert warm["cached"] == num_computed // running.kind.block_size * running.kind.block_size
    running.engine.settle()
    running.engine.ask("reset", connector=True)
    (cold,) = running.engine.generate(turn)
    assert cold["cached"] == 0
    assert warm["logprobs"][0] == pytest.approx(cold["logprobs"][0], abs=running.kind.tolerance)


@pytest.mark.slow
def test_ranks_store_latent_kv_once(tmp_path: Path) -> None:
    """All ranks hold the same: stored by one engine of one rank, loaded by one of two."""
    model = make_latent(tmp_path / "model")
    prompts = [prompt(i, n) for i, n in enumerate(LENGTHS)]
    one = Engine("one", tmp_path, model).load(shared_storage(tmp_path, "kv_both", num_cpu_blocks=800), **LATENT)
    cold = one.generate(*prompts)
    one.settle()
    one.stop()
    environ = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    two = Engine("two", tmp_path, model, environ)
    try:
        two.load(shared_storage(tmp_path, "kv_both", num_cpu_blocks=800), tensor_parallel_size=2, **LATENT)
        warm = two.generate(*prompts)
        assert [answer["cached"] for answer in warm] == [(n - 1) // 16 * 16 for n in LENGTHS]
        for a, b in zip(warm, cold, strict=True):
            assert a["logprobs"][0] == pytest.approx(b["logprobs"][0], abs=0.3)
    finally:
        two.stop()


def test_scales_found_at_run_time_stop_the_start(tmp_path: Path) -> None:
    engine = Engine("refused", tmp_path, make_llama(tmp_path / "model"))
    with pytest.raises(ChildError, match="calculate_kv_scales"):
        engine.load(offloading(tmp_path), kv_cache_dtype="fp8", calculate_kv_scales=True)
    engine._child.kill()


def test_recurrent_state_stops_the_start(tmp_path: Path) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 32}
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, expand=2, state_size=16, n_groups=1))
    engine = Engine("refused", tmp_path, save_scaled(model, tmp_path / "model"))
    with pytest.raises(ChildError, match="MambaSpec"):
        engine.load(offloading(tmp_path))
    engine._child.kill()
