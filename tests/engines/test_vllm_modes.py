"""How a real vLLM engine may be run: adapters, schedulers that look ahead, too little memory, loads that fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engines.engine import NEEDS_VLLM, Engine, blocks, make_llama, offloading, prompt, same

pytestmark = NEEDS_VLLM
LENGTHS = (1500, 700, 130, 100)
PROMPTS = [prompt(i, n) for i, n in enumerate(LENGTHS)]
ALL = [blocks(n) for n in LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("vllm") / "model")


def make_adapter(path: Path, seed: int) -> Path:
    """A LoRA adapter of random weights for the Llama of these tests."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(4):
        for name, num_out in (("q_proj", 256), ("v_proj", 128)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{base}.lora_A.weight"] = torch.randn(8, 256, generator=generator)
            weights[f"{base}.lora_B.weight"] = torch.randn(num_out, 8, generator=generator) * 0.05
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("adapting")
    engine = Engine("adapting", folder, model)
    yield engine.load(offloading(folder), enable_lora=True, max_lora_rank=8, max_loras=4)
    engine.stop()


def test_an_adapter_counts_by_its_content(adapting: Engine, tmp_path: Path) -> None:
    one, other = make_adapter(tmp_path / "one", 1), make_adapter(tmp_path / "other", 2)
    copy = make_adapter(tmp_path / "copy", 1)

    def ask(path: Path, name: str) -> dict[str, Any]:
        adapting.settle()
        assert adapting.ask("reset", connector=False)
        (answer,) = adapting.ask("adapted", prompts=[PROMPTS[0]], name=name, path=str(path))
        return dict(answer)

    (bare,) = adapting.generate(PROMPTS[0])
    first = ask(one, "tuned")
    assert (bare["cached"], first["cached"]) == (0, 0)
    assert first["logprobs"] != pytest.approx(bare["logprobs"], abs=1e-3)
    again = ask(one, "tuned")
    assert again["cached"] == ALL[0]
    same([again], [first])
    named_alike = ask(other, "tuned")  # the same name, other weights
    assert named_alike["cached"] == 0
    assert named_alike["logprobs"] != pytest.approx(first["logprobs"], abs=1e-3)
    assert ask(other, "tuned")["cached"] == ALL[0]
    moved = ask(copy, "renamed")  # the same weights under another name, elsewhere
    assert moved["cached"] == ALL[0]
    same([moved], [first])
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 64'))
    same([ask(copy, "renamed")], [first])  # the engine goes on with what it has loaded
    shutil.copytree(copy, tmp_path / "stronger")
    assert ask(tmp_path / "stronger", "stronger")["cached"] == 0


def test_an_adapter_without_a_digest_is_left_alone(adapting: Engine, tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "odd", 3)
    (path / "adapter_model.safetensors").chmod(0o600)
    (path / "extra.bin").symlink_to(tmp_path / "nowhere")  # a weight file that cannot be read
    for _ in range(2):
        adapting.settle()
        assert adapting.ask("reset", connector=False)
        (answer,) = adapting.ask("adapted", prompts=[PROMPTS[1]], name="odd", path=str(path))
        assert answer["cached"] == 0


def test_a_scheduler_that_looks_ahead(tmp_path: Path, model: Path) -> None:
    """vLLM's AsyncScheduler counts tokens that it does not know yet; those are not stored."""
    engine = Engine("ahead", tmp_path, model)
    scheduler = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    try:
        engine.load(offloading(tmp_path), max_num_batched_tokens=512, scheduler_cls=scheduler)
        assert engine.ask("scheduler_name") == "AsyncScheduler"
        cold = engine.generate(*PROMPTS, max_tokens=200)
        warm = engine.from_store(*PROMPTS, max_tokens=200)
        assert [answer["cached"] for answer in warm] == ALL
        same(warm, cold)
        turns = [[*ids, *answer["tokens"], 7] for ids, answer in zip(PROMPTS, cold, strict=True)]
        warm = engine.from_store(*turns)
        assert [answer["cached"] for answer in warm] == [(len(ids) - 2) // 128 * 128 for ids in turns]
        engine.settle()
        assert engine.ask("reset", connector=True)
        same(warm, engine.generate(*turns))
    finally:
        engine.stop()


def test_preempted_requests(tmp_path: Path, model: Path) -> None:
    """Memory for half of what is asked at once: requests lose their blocks and come back."""
    engine = Engine("tight", tmp_path, model)
    prompts = [prompt(200 + i, 500) for i in range(4)]
    try:
        engine.load(offloading(tmp_path), num_gpu_blocks_override=16, max_model_len=1024)
        wanted = [engine.generate(ids, max_tokens=150)[0] for ids in prompts]
        engine.settle()
        assert engine.ask("reset", connector=True)
        for _ in range(2):
            same(engine.generate(*prompts, max_tokens=150), wanted)
            assert engine.ask("preemptions") > 0
            assert engine.settle()["host"]["pinned_blocks"] == 0
            assert engine.ask("reset", connector=False)
    finally:
        engine.stop()


def test_what_was_computed_from_blocks_that_were_not_copied_is_not_stored(tmp_path: Path, model: Path) -> None:
    """The engine learns of them once it has computed the step."""
    engine = Engine("half-broken", tmp_path, model)
    head = prompt(1, 257)
    longer = [*head[:256], *prompt(2, 257)]
    longest = [*longer[:512], *prompt(3, 40)]
    try:
        engine.load({**offloading(tmp_path), "kv_load_failure_policy": "recompute"})
        (cold,) = engine.generate(longest)
        engine.settle()
        assert engine.ask("reset", connector=True)
        engine.generate(head)
        engine.settle()
        engine.ask("break_load")
        engine.from_store(longer)
        (warm,) = engine.from_store(longest)
        same([warm], [cold])
        assert warm["cached"] == 512  # it was stored once it was computed right
        assert engine.settle()["host"]["pinned_blocks"] == 0
    finally:
        engine.stop()


def test_blocks_that_could_not_be_copied_are_computed(tmp_path: Path, model: Path) -> None:
    engine = Engine("broken", tmp_path, model)
    transfer = {**offloading(tmp_path), "kv_load_failure_policy": "recompute"}
    try:
        engine.load(transfer)
        cold = engine.generate(*PROMPTS)
        engine.settle()
        engine.ask("break_load")
        same(engine.from_store(*PROMPTS), cold)
        warm = engine.from_store(*PROMPTS)
        assert [answer["cached"] for answer in warm] == ALL
        same(warm, cold)
        assert engine.settle()["host"]["pinned_blocks"] == 0
    finally:
        engine.stop()
