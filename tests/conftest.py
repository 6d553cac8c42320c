"""Fixtures for all tests. Small layouts: what is tested doesn't depend on the size of a block."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvstore import KVIdentity, KVLayout
from tests.small import IDENTITY, LAYOUT, fill, small_config

# No deadlines: two cores that are busy with other things make no test fail.
settings.register_profile("kvstore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstore")


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
    fill(small_config(disk=path / "disk", shared=path / "shared"))
    fill(small_config(dataclasses.replace(IDENTITY, model="other-model"), shared=path / "shared"))
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("small") / "model"
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(path)
    return path
