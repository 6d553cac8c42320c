"""A store that has served some requests, and the journal of it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch

from kvstore import HostTierConfig, JournalConfig, TieredStore, hash_blocks
from tests.small import IDENTITY, LAYOUT, small_config

SYSTEM = list(range(16))  # four blocks that all prompts begin with


def serve(kv: Path, journal: Path, num_requests: int = 40, seed: int = 0) -> None:
    """Conversations of a few users, two of whom have tenants' salts; host memory is too small for all of them."""
    rng = random.Random(seed)
    config = dataclasses.replace(
        small_config(disk=kv / "disk", shared=kv / "shared"),
        host=HostTierConfig(num_blocks=48),
        journal=JournalConfig(path=str(journal), sample_s=0.05),
    )
    users = [list(SYSTEM) for _ in range(5)]
    with TieredStore(config) as store:
        for i in range(num_requests):
            user = rng.randrange(len(users))
            tenant = ("alice", "bob", "", "", "")[user]
            users[user] += [rng.randrange(1000) for _ in range(rng.randint(4, 20))]
            if len(users[user]) > 120:
                users[user] = list(SYSTEM)
            tokens = users[user]
            keys = hash_blocks(tokens, LAYOUT.block_size, IDENTITY, tenant=tenant)
            out, sources = torch.empty(len(keys), *LAYOUT.block_shape, dtype=LAYOUT.dtype), dict[str, int]()
            n = store.get(keys, out, sources=sources)
            store.asked(keys, sources, request_id=f"cmpl-{i}", tenant=tenant, num_tokens=len(tokens), waited_s=0.001)
            generator = torch.Generator().manual_seed(i)
            new = torch.randn(len(keys), *LAYOUT.block_shape, generator=generator).to(LAYOUT.dtype)
            new[:n] = out[:n]
            stored = store.put(keys, new)
            store.ended(keys[:stored], request_id=f"cmpl-{i}", tenant=tenant)
            if i % 5 == 0:
                store.take_events()  # what has happened until now is in the journal
        assert store.flush()
