"""Fixtures for all tests. Small layouts: what is tested doesn't depend on the size of a block."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from kvstore import (
    DiskTierConfig,
    HostTierConfig,
    KVIdentity,
    KVLayout,
    SharedTierConfig,
    StoreConfig,
    TieredStore,
    hash_blocks,
)

# No deadlines: two cores that are busy with other things make no test fail.
settings.register_profile("kvstore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstore")

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY = KVIdentity(model="test-model", revision="r" * 40, layout=LAYOUT)


@pytest.fixture
def layout() -> KVLayout:
    return LAYOUT


@pytest.fixture
def identity() -> KVIdentity:
    return IDENTITY


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a disk directory and a shared path in it: 12 blocks of one model in both,
    and of another model in the shared path. Copy it before changing anything."""
    path = tmp_path_factory.mktemp("small") / "kv"
    path.mkdir(mode=0o700)
    fill(IDENTITY, disk=path / "disk", shared=path / "shared")
    fill(dataclasses.replace(IDENTITY, model="other-model"), shared=path / "shared")
    return path


def fill(identity: KVIdentity, *, disk: Path | None = None, shared: Path | None = None) -> None:
    """Store 12 blocks, the tokens 0 to 47, with blocks_per_chunk=2."""
    config = StoreConfig(
        identity=identity,
        host=HostTierConfig(num_blocks=64),
        disk=DiskTierConfig(path=str(disk), capacity_nbytes=8 << 20) if disk else None,
        shared=SharedTierConfig(path=str(shared), capacity_nbytes=8 << 20) if shared else None,
        blocks_per_chunk=2,
    )
    generator = torch.Generator().manual_seed(0)
    with TieredStore(config) as store:
        keys = hash_blocks(range(48), 4, identity)
        blocks = torch.randn(len(keys), *identity.layout.block_shape, generator=generator)
        assert store.put(keys, blocks.to(identity.layout.dtype)) == len(keys)
        assert store.flush()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("small") / "model"
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(path)
    return path
