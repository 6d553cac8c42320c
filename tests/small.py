"""A small store on disk and on a shared path: 12 blocks of 4 tokens, in chunks of 2."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from kvstore import (
    BlockKey,
    DiskTierConfig,
    HostTierConfig,
    KVIdentity,
    KVLayout,
    SharedTierConfig,
    StoreConfig,
    TieredStore,
    hash_blocks,
)

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY = KVIdentity(model="test-model", revision="r" * 40, layout=LAYOUT)
NUM_BLOCKS = 12


def small_keys(identity: KVIdentity = IDENTITY) -> list[BlockKey]:
    """Of the tokens 0 to 47."""
    return hash_blocks(range(NUM_BLOCKS * LAYOUT.block_size), LAYOUT.block_size, identity)


def small_blocks() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_BLOCKS, *LAYOUT.block_shape, generator=generator).to(LAYOUT.dtype)


def small_config(
    identity: KVIdentity = IDENTITY,
    *,
    disk: Path | None = None,
    shared: Path | None = None,
    integrity_key_file: Path | None = None,
) -> StoreConfig:
    return StoreConfig(
        identity=identity,
        host=HostTierConfig(num_blocks=64),
        disk=DiskTierConfig(path=str(disk), capacity_nbytes=8 << 20) if disk else None,
        shared=SharedTierConfig(path=str(shared), capacity_nbytes=8 << 20) if shared else None,
        blocks_per_chunk=2,
        integrity_key_file=str(integrity_key_file) if integrity_key_file else None,
    )


def fill(config: StoreConfig) -> None:
    """Store the blocks, and close the store."""
    with TieredStore(config) as store:
        assert store.put(small_keys(config.identity), small_blocks()) == NUM_BLOCKS
        assert store.flush()


def copy_store(source: Path, to: Path) -> Path:
    """A copy that keeps hard links: the names of one chunk's file."""
    subprocess.run(["cp", "-a", str(source), str(to)], check=True)
    return to
