"""`TieredStore` against a plain dict: whatever happens to it, what it returns is right."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore import BlockKey, hash_blocks
from tests.stores import IDENTITY, LAYOUT, Stores, make_blocks

MAX_BLOCKS = 10


class StoreMachine(RuleBasedStateMachine):
    """Prefixes that share heads; contents change with every reset, as weights would.

    The model is what was put since: key -> bytes. Nothing that is not in it may be a hit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="kvstore-machine-"))
        self.model: dict[BlockKey, bytes] = {}
        self.weights = 0
        self.complete = True  # nothing was damaged, so what is flushed must be there

    @initialize(per_chunk=st.sampled_from([1, 3]), tiers=st.sampled_from(["disk", "shared", "device disk shared"]))
    def open(self, per_chunk: int, tiers: str) -> None:
        self.stores, self.tiers = Stores(self.path, per_chunk, "thread"), tiers
        self.store = self.stores.open(tiers, host_blocks=9)

    def keys(self, branch: int, n: int) -> list[BlockKey]:
        """Branches are alike for their first 4 blocks, and then not."""
        return hash_blocks([*range(16), *[branch] * 4 * MAX_BLOCKS][: n * 4], 4, IDENTITY)

    def blocks(self, keys: list[BlockKey]) -> torch.Tensor:
        seeds = [int.from_bytes(k[:4], "little") + self.weights for k in keys]
        return torch.cat([make_blocks(1, seed) for seed in seeds]) if keys else make_blocks(0)

    @rule(branch=st.integers(1, 3), n=st.integers(0, MAX_BLOCKS), first=st.integers(0, MAX_BLOCKS))
    def put(self, branch: int, n: int, first: int) -> None:
        keys, first = self.keys(branch, n), min(first, n)
        blocks = self.blocks(keys)
        taken = self.store.put(keys, blocks[first:], first_block=first)
        assert 0 <= taken <= n - first
        for key, block in zip(keys[first : first + taken], blocks[first:], strict=False):
            self.model[key] = block.view(torch.uint8).numpy().tobytes()

    @rule(branch=st.integers(1, 3), n=st.integers(0, MAX_BLOCKS), first=st.integers(0, MAX_BLOCKS))
    def get(self, branch: int, n: int, first: int) -> None:
        keys, first = self.keys(branch, n), min(first, n)
        out = torch.full((n - first, *LAYOUT.block_shape), -1, dtype=LAYOUT.dtype)
        loaded = self.store.get(keys, out, first_block=first)
        for key, block in zip(keys[first : first + loaded], out, strict=False):
            assert self.model.get(key) == block.view(torch.uint8).numpy().tobytes()

    @rule(branch=st.integers(1, 3))
    def flush_then_all_is_there(self, branch: int) -> None:
        assert self.store.flush(30)
        keys = self.keys(branch, MAX_BLOCKS)
        expected = next((i for i, key in enumerate(keys) if key not in self.model), len(keys))
        if self.complete:
            assert self.store.prefix_hit(keys) == expected

    @rule()
    def reset(self) -> None:
        self.store.reset()
        self.model.clear()
        self.weights += 1

    @rule(branch=st.integers(1, 3), at=st.integers(0, MAX_BLOCKS - 1))
    def purge(self, branch: int, at: int) -> None:
        if "shared" in self.tiers and self.stores.blocks_per_chunk > 1:
            return  # chunks cut differently that hold one key: the shared path finds the newest only
        key = self.keys(branch, MAX_BLOCKS)[at]
        self.store.flush(30)
        self.store.purge([key])
        assert self.store.prefix_hit([key]) == 0
        self.model.pop(key, None)
        self.complete = self.complete and self.stores.blocks_per_chunk == 1  # its chunk's other blocks went too

    @rule()
    def reopen(self) -> None:
        self.store.close()
        if self.weights:  # the shared path still has what the identity's own weights made
            shutil.rmtree(self.path / "shared", ignore_errors=True)
            self.model.clear()
            self.weights = 0
        self.store = self.stores.open(self.tiers, host_blocks=9)

    @rule(seed=st.integers(0, 2**32))
    def damage(self, seed: int) -> None:
        self.store.flush(30)
        rng = np.random.default_rng(seed)
        files = [self.path / "disk" / "data", *sorted((self.path / "shared").rglob("*.safetensors"))]
        file = files[int(rng.integers(len(files)))]
        if file.exists() and file.stat().st_size:
            with open(file, "r+b") as f:
                f.seek(int(rng.integers(min(file.stat().st_size, 40 * 4096))))
                f.write(rng.bytes(1))
            self.complete = False

    @invariant()
    def a_hit_was_put(self) -> None:
        for branch in (1, 2, 3):
            keys = self.keys(branch, MAX_BLOCKS)
            assert all(key in self.model for key in keys[: self.store.prefix_hit(keys)])

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.path)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
