"""What makes KV of a vLLM engine another's: everything that changes it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstore import KVLayout
from kvstore.identity import KVIdentity
from tests.engines.engine import NEEDS_VLLM, make_llama

pytestmark = NEEDS_VLLM
LAYOUT = KVLayout(num_layers=4, num_kv_heads=4, head_size=32, block_size=128, dtype=torch.bfloat16)


def identity(model: Path, **settings: Any) -> KVIdentity:
    from vllm.engine.arg_utils import EngineArgs

    from connectors.vllm.identity import identity_of

    args = {"dtype": "bfloat16", "max_model_len": 1024, **settings}
    config = EngineArgs(model=str(model), skip_tokenizer_init=True, enforce_eager=True, **args).create_engine_config()
    groups: Any = SimpleNamespace(layout=LAYOUT, kind="full_attention", num_stripes=1, num_replicas=1)
    cache: Any = SimpleNamespace(kv_cache_layout="LBHNC")
    return identity_of(config, cache, groups, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("vllm") / "model")


@pytest.mark.parametrize(
    "settings",
    [
        {"load_format": "dummy"},
        {"hf_overrides": {"rms_norm_eps": 0.5}},
        {"hf_overrides": {"hidden_act": "gelu"}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}},
        {"quantization": "fp8"},
        {"dtype": "float32"},
        {"prefix_caching_hash_algo": "sha256_cbor"},
    ],
    ids=str,
)
def test_what_changes_kv_changes_the_identity(model: Path, settings: dict[str, Any]) -> None:
    assert identity(model, **settings).digest() != identity(model).digest()


@pytest.mark.parametrize("settings", [{"max_num_seqs": 3}, {"max_model_len": 512}, {"served_model_name": "x"}], ids=str)
def test_what_does_not_change_kv_does_not(model: Path, settings: dict[str, Any]) -> None:
    assert identity(model, **settings) == identity(model)


def test_files_that_change(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    before = identity(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    assert identity(model).digest() != before.digest()


def test_how_this_processor_packs_pages_is_part_of_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import cpu_attn

    before = identity(model)
    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_: "another")
    after = identity(model)
    assert (after.digest(), after.placement_digest(1)) != (before.digest(), before.placement_digest(1))
    assert after.digest() == before.digest()


def test_ranks_on_several_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from connectors.vllm.groups import UnsupportedEngineError
    from connectors.vllm.hosts import check_one_host

    def all_gather(every: list[torch.Tensor], mine: torch.Tensor, group: object) -> None:
        every[0], every[1] = mine, mine + 1

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    with pytest.raises(UnsupportedEngineError, match="tensor parallelism over hosts"):
        check_one_host(SimpleNamespace(world_size=2, cpu_group=None))
