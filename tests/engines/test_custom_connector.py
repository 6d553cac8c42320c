"""The connector of `docs/custom-connector.md` in a real vLLM engine, as a user plugs it in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.engine import BLOCK, NEEDS_VLLM, Engine, blocks, make_llama, prompt, same
from tests.test_connectors import examples

pytestmark = NEEDS_VLLM
LENGTHS = (1500, 700, 130, 100, 1024)
PROMPTS = [prompt(i, n) for i, n in enumerate(LENGTHS)]
TRANSFER = {"kv_connector": "MemoryConnector", "kv_connector_module_path": "memory_vllm", "kv_role": "kv_both"}


def test_a_connector_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connector, plugged_in, _ = examples()
    (tmp_path / "memory_connector.py").write_text(connector)
    (tmp_path / "memory_vllm.py").write_text(plugged_in)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = Engine("engine", tmp_path, make_llama(tmp_path / "model"))
    try:
        engine.load(TRANSFER, max_num_batched_tokens=512)
        cold = engine.generate(*PROMPTS)
        assert [answer["cached"] for answer in cold] == [0] * len(LENGTHS)
        assert engine.ask("reset", connector=False)
        warm = engine.generate(*PROMPTS)
        assert [answer["cached"] for answer in warm] == [blocks(n) for n in LENGTHS]
        same(warm, cold)
        num_hits = sum(blocks(n) for n in LENGTHS) // BLOCK
        engine.metrics(lambda found: found.get("hit_blocks{MemoryConnector,memory}") == num_hits)
        assert engine.ask("reset", connector=True)
        again = engine.generate(*PROMPTS)
        assert [answer["cached"] for answer in again] == [0] * len(LENGTHS)
        same(again, cold)
    finally:
        engine.stop()
