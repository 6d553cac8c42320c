"""Small stores over one directory, and blocks whose bytes follow from a seed, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from kvstore import (
    BlockKey,
    DeviceTierConfig,
    DiskTierConfig,
    HostTierConfig,
    KVIdentity,
    KVLayout,
    SharedTierConfig,
    StoreConfig,
    TieredStore,
    hash_blocks,
)

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY = KVIdentity(model="m", revision="r1", layout=LAYOUT)
MIB = 1 << 20


def make_keys(n: int, seed: int = 0, identity: KVIdentity = IDENTITY) -> list[BlockKey]:
    return hash_blocks([seed * 100_000 + i for i in range(n * 4)], block_size=4, identity=identity)


def make_blocks(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, *LAYOUT.block_shape), generator=generator).to(LAYOUT.dtype)


class Stores:
    """Opens stores over one disk directory and one shared path."""

    def __init__(self, path: Path, blocks_per_chunk: int, io: str) -> None:
        self.path, self.blocks_per_chunk, self.io = path, blocks_per_chunk, io

    def open(self, tiers: str = "disk shared", host_blocks: int = 64, **settings: object) -> TieredStore:
        config: dict[str, object] = {
            "identity": IDENTITY,
            "host": HostTierConfig(num_blocks=host_blocks),
            "blocks_per_chunk": self.blocks_per_chunk,
            "io": self.io,
        }
        if "disk" in tiers:
            config["disk"] = DiskTierConfig(path=str(self.path / "disk"), capacity_nbytes=8 * MIB)
        if "shared" in tiers:
            config["shared"] = SharedTierConfig(path=str(self.path / "shared"), capacity_nbytes=8 * MIB)
        if "device" in tiers:
            config["device"] = DeviceTierConfig(num_blocks=8, device="cpu")
        return TieredStore(StoreConfig(**{**config, **settings}))  # type: ignore[arg-type]


def check_get(store: TieredStore, keys: list[BlockKey], blocks: torch.Tensor, expected: int) -> None:
    out = torch.full_like(blocks, -1)
    assert store.get(keys, out) == expected
    assert torch.equal(out[:expected].view(torch.uint8), blocks[:expected].view(torch.uint8))
