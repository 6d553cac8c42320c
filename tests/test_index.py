"""The block index against a dict, with keys made to collide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.errors import ConfigError
from kvstore.index import BlockIndex
from kvstore.keys import KEY_NBYTES, BlockKey, array_to_keys

NUM_SLOTS, PER_CHUNK = 12, 2


def key(number: int) -> bytes:
    """Keys that differ in few bits, and some only in the group."""
    return bytes(30) + (number // 3).to_bytes(2, "little") + (number % 3).to_bytes(4, "little")


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(NUM_SLOTS, PER_CHUNK)
        self.model: dict[bytes, int] = {}
        self.held: dict[int, list[bytes]] = {}

    @rule(seed=st.integers(0, 2**32), n=st.integers(0, 5))
    def insert(self, seed: int, n: int) -> None:
        rng = np.random.default_rng(seed)
        free = [s for s in range(NUM_SLOTS) if s not in self.held]
        slots = rng.permutation(free)[:n].astype(np.int64)
        keys = [[key(int(k)) for k in rng.integers(0, 30, PER_CHUNK)] for _ in slots]
        array = np.frombuffer(b"".join(k for ks in keys for k in ks), dtype=np.uint8)
        self.index.insert(slots, array.reshape(len(slots), PER_CHUNK, KEY_NBYTES))
        for slot, chunk in zip(slots.tolist(), keys, strict=True):
            self.held[slot] = chunk
            self.model.update({k: slot * PER_CHUNK + i for i, k in enumerate(chunk)})

    @rule(seed=st.integers(0, 2**32), n=st.integers(0, 5))
    def remove(self, seed: int, n: int) -> None:
        slots = np.random.default_rng(seed).permutation(NUM_SLOTS)[:n].astype(np.int64)
        self.index.remove(slots)
        for slot in slots.tolist():
            for i, k in enumerate(self.held.pop(slot, [])):
                if self.model.get(k) == slot * PER_CHUNK + i:
                    del self.model[k]

    @invariant()
    def agrees(self) -> None:
        keys = [BlockKey(key(i)) for i in range(30)]
        assert self.index.contains(keys).tolist() == [bytes(k) in self.model for k in keys]
        for k in keys:
            expected = [self.model[bytes(k)]] if bytes(k) in self.model else []
            assert self.index.find_prefix([k]).tolist() == expected
        assert len(self.index) == len(self.model)
        assert self.index.slots().tolist() == sorted(self.held)
        for slot, chunk in self.held.items():
            assert array_to_keys(self.index.keys_of(np.array([slot])).reshape(-1, KEY_NBYTES)) == chunk


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.integers(0, 40))
def test_find_prefix_stops_at_the_first_absent_key(absent: int) -> None:
    index = BlockIndex(40, 1)
    keys = [BlockKey(key(i)) for i in range(40)]
    array = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(40, 1, KEY_NBYTES)
    index.insert(np.arange(40), array)
    index.remove(np.arange(absent, min(absent + 1, 40)))
    assert index.find_prefix(keys).tolist() == list(range(absent))
    assert index.find_prefix([]).tolist() == []


def test_stays_right_through_long_churn() -> None:
    rng, index = np.random.default_rng(0), BlockIndex(500, 1)
    keys = rng.integers(0, 256, (500, 1, KEY_NBYTES), dtype=np.uint8)
    index.insert(np.arange(500), keys)
    for _ in range(2000):
        slots = rng.permutation(500)[:20]
        index.remove(slots)
        keys[slots] = rng.integers(0, 256, (20, 1, KEY_NBYTES), dtype=np.uint8)
        index.insert(slots, keys[slots])
    assert index.find_prefix(array_to_keys(keys)).tolist() == list(range(500))


def test_memory_a_key_and_bounds() -> None:
    assert BlockIndex(100_000, 1).nbytes <= 100 * 100_000
    with pytest.raises(ConfigError, match="num_blocks"):
        BlockIndex(2**31, 4)
