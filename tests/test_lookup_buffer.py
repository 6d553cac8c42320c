"""`LookupBuffer`: who takes what, and that everything comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore import BlockKey, HostTierConfig, KVIdentity, KVLayout, StoreConfig, hash_blocks
from kvstore.copier import Copier
from kvstore.errors import ConfigError, NoRoomError, StoreClosedError
from kvstore.lookup_buffer import Item, LocalLookupBuffer
from kvstore.planes import Planes
from tests.waiting import wait_until

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY = KVIdentity(model="m", revision="r1", layout=LAYOUT)
NUM_BLOCKS = 32


@pytest.fixture
def buffer() -> Iterator[LocalLookupBuffer]:
    with LocalLookupBuffer.open(IDENTITY, num_blocks=NUM_BLOCKS) as buffer:
        yield buffer


def make_keys(n: int, seed: int = 0) -> list[BlockKey]:
    return hash_blocks([seed * 1000 + i for i in range(n * 4)], block_size=4, identity=IDENTITY)


def blocks_of(keys: list[BlockKey]) -> torch.Tensor:
    """What a block holds follows from its key."""
    numbers = [key[0] + key[1] / 256 for key in keys]
    return torch.tensor(numbers, dtype=torch.bfloat16).view(-1, 1, 1, 1, 1, 1).expand(-1, *LAYOUT.block_shape)


def take(buffer: LocalLookupBuffer, keys: list[BlockKey], timeout_s: float = 5.0) -> int:
    out = torch.full((len(keys), *LAYOUT.block_shape), -1, dtype=torch.bfloat16)
    n = buffer.drop_select(keys, out, timeout_s=timeout_s)
    assert torch.equal(out[:n], blocks_of(keys[:n]))
    assert (out[n:] == -1).all()
    return n


def insert(buffer: LocalLookupBuffer, keys: list[BlockKey], timeout_s: float = 0.0) -> bool:
    return buffer.insert(keys, blocks_of(keys), timeout_s=timeout_s)


def is_empty(buffer: LocalLookupBuffer) -> bool:
    ready, pinned, _ = buffer._planes.manager.usage()
    return (ready, pinned) == (0, 0) and buffer.usage() == (0, 0) and not buffer._claims and not buffer._items


def test_what_is_taken_is_gone(buffer: LocalLookupBuffer) -> None:
    keys = make_keys(10)
    assert take(buffer, keys) == 0
    assert insert(buffer, keys)
    assert take(buffer, keys) == 10
    assert take(buffer, keys) == 0
    assert is_empty(buffer)


def test_the_longest_prefix_is_selected(buffer: LocalLookupBuffer) -> None:
    keys = make_keys(10)
    assert insert(buffer, keys[:6])
    assert insert(buffer, keys[8:])
    assert take(buffer, keys[7:]) == 0
    assert take(buffer, keys) == 6
    assert take(buffer, keys[8:9]) == 1
    assert buffer.usage() == (1, 0)


def test_keys_are_exact(buffer: LocalLookupBuffer) -> None:
    """A neighbouring token id is another prefix."""
    near = hash_blocks([100_000 + i for i in range(4)], block_size=4, identity=IDENTITY)
    other = hash_blocks([100_001 + i for i in range(4)], block_size=4, identity=IDENTITY)
    assert insert(buffer, near)
    assert take(buffer, other) == 0
    assert take(buffer, near) == 1


def test_prompts_that_share_a_prefix_are_taken_once_each(buffer: LocalLookupBuffer) -> None:
    head = make_keys(4)
    first, second = [*head, *make_keys(3, seed=1)], [*head, *make_keys(3, seed=2)]
    assert insert(buffer, first)
    assert insert(buffer, second)
    assert buffer.usage() == (10, 0)  # the head is there once
    assert take(buffer, first) == 7
    assert take(buffer, second) == 7
    assert take(buffer, head) == 0
    assert is_empty(buffer)


@pytest.mark.parametrize("seed", range(5))
def test_of_two_who_ask_at_once_one_gets_it(buffer: LocalLookupBuffer, seed: int) -> None:
    prompts = [make_keys(4, seed=seed * 10 + i) for i in range(8)]
    for keys in prompts:
        assert insert(buffer, keys)
    barrier = threading.Barrier(8)

    def ask(_: int) -> list[int]:
        barrier.wait(10)
        return [take(buffer, keys) for keys in prompts]

    with ThreadPoolExecutor(8) as pool:
        answers = np.array(list(pool.map(ask, range(8))))
    assert (answers.sum(axis=0) == 4).all()
    assert is_empty(buffer)


def test_too_large_an_item_is_refused_at_once(buffer: LocalLookupBuffer) -> None:
    with pytest.raises(NoRoomError, match="33 blocks"):
        insert(buffer, make_keys(NUM_BLOCKS + 1), timeout_s=30.0)
    assert is_empty(buffer)


def test_an_insert_waits_for_room_up_to_its_deadline(buffer: LocalLookupBuffer) -> None:
    first, second = make_keys(20), make_keys(20, seed=1)
    assert insert(buffer, first)
    assert not insert(buffer, second, timeout_s=0.05)
    assert take(buffer, second) == 0  # nothing of it is left
    with ThreadPoolExecutor(1) as pool:
        inserted = pool.submit(insert, buffer, second, 30.0)
        time.sleep(0.1)
        assert not inserted.done()
        assert take(buffer, first) == 20
        assert inserted.result(30)
    assert take(buffer, second) == 20
    assert is_empty(buffer)


def test_two_inserts_do_not_wait_for_each_others_half(buffer: LocalLookupBuffer) -> None:
    prompts = [make_keys(20, seed=i) for i in range(6)]
    with ThreadPoolExecutor(7) as pool:
        inserted = [pool.submit(insert, buffer, keys, 30.0) for keys in prompts]
        left = list(prompts)
        deadline = time.monotonic() + 30
        while left and time.monotonic() < deadline:
            left = [keys for keys in left if take(buffer, keys) != 20]
        assert all(future.result(30) for future in inserted)
    assert is_empty(buffer)


def test_what_nobody_takes_leaves() -> None:
    with LocalLookupBuffer.open(IDENTITY, num_blocks=NUM_BLOCKS, lease_s=0.2) as buffer:
        keys = make_keys(30)
        assert insert(buffer, keys)
        assert not insert(buffer, make_keys(30, seed=1))
        assert insert(buffer, make_keys(30, seed=2), timeout_s=30.0)  # once the lease has run out
        assert take(buffer, keys) == 0
        wait_until(lambda: is_empty(buffer))


def test_what_is_taken_stays_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it is: leases end beside it, and who waits for room has none of these slots."""
    with LocalLookupBuffer.open(IDENTITY, num_blocks=NUM_BLOCKS, lease_s=0.2) as buffer:
        keys, others = make_keys(30), make_keys(30, seed=1)
        assert insert(buffer, keys)
        begun, load = threading.Event(), Copier.load

        def slow(self: Copier, *arguments: Any) -> None:
            begun.set()
            time.sleep(0.6)  # the reaper looks every 50 ms
            load(self, *arguments)

        monkeypatch.setattr(Copier, "load", slow)
        out = torch.empty_like(blocks_of(keys))
        taking = threading.Thread(target=buffer.drop_select, args=(keys, out), kwargs={"timeout_s": 0.0})
        taking.start()
        assert begun.wait(20)
        assert insert(buffer, others, timeout_s=30.0)
        taking.join(20)
        assert torch.equal(out, blocks_of(keys))


def hold(buffer: LocalLookupBuffer, keys: list[BlockKey], hand_over: int = 0) -> Item:
    """As an insert, whose claim can be named."""
    found = buffer.reserve(keys, time.monotonic(), hand_over=hand_over)
    assert found is not None
    item, absent, slots = found
    buffer._copier().store(blocks_of(keys)[absent], slots)
    buffer.publish([keys[i] for i in absent], slots, buffer._planes.current(), item)
    return item


def test_of_a_hand_over_its_own_claims_are_taken(buffer: LocalLookupBuffer) -> None:
    """Whatever the order: prompts that share a prefix can each be taken."""
    prompts = [[*make_keys(8), *make_keys(6, seed=i)] for i in (1, 2, 3)]
    items = [hold(buffer, keys) for keys in prompts]
    assert len(buffer.select(make_keys(3, seed=9), items[0].number)) == 0
    for item, keys in reversed(list(zip(items, prompts, strict=True))):
        assert buffer.is_open(item.number)
        selection = buffer.select(keys, item.number)
        assert len(selection) == 14
        assert len(buffer.select(keys, item.number)) == 0
        assert not buffer.is_open(item.number)
        buffer.release(selection)
    wait_until(lambda: is_empty(buffer))


def test_what_was_pushed_is_settled_by_its_number(buffer: LocalLookupBuffer) -> None:
    """It stays, evictable; what another pushed of the same prefix stays claimed."""
    keys = make_keys(8)
    hold(buffer, keys, hand_over=5)
    other = hold(buffer, keys, hand_over=6)
    buffer.settle(5)
    buffer.settle(0)
    assert buffer.usage() == (8, 0)
    assert list(buffer._items) == [other.number]
    buffer.settle(6)
    assert buffer.usage() == (0, 0)
    assert buffer._planes.manager.prefix_hit(keys) == 8
    assert insert(buffer, make_keys(NUM_BLOCKS, seed=1))


def test_a_small_insert_does_not_wait_behind_a_large_one(buffer: LocalLookupBuffer) -> None:
    assert insert(buffer, make_keys(20))
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(insert, buffer, make_keys(20, seed=1), 2.0)
        time.sleep(0.1)
        assert insert(buffer, make_keys(4, seed=2))
        assert not large.result()
    assert buffer.usage() == (24, 0)


def test_selected_slots_stay_until_they_are_released(buffer: LocalLookupBuffer) -> None:
    keys = make_keys(20)
    assert insert(buffer, keys)
    selection = buffer.select(keys)
    assert insert(buffer, make_keys(12, seed=1))
    assert not insert(buffer, make_keys(1, seed=2))
    buffer.release(selection)
    assert insert(buffer, make_keys(20, seed=3))


def test_a_claim_comes_before_what_it_is_for(buffer: LocalLookupBuffer) -> None:
    """An engine says what it will hand over before its workers have copied it."""
    keys = make_keys(6)
    item = buffer.hold(keys)
    assert take(buffer, keys) == 0
    assert insert(buffer, keys[:4])
    assert take(buffer, keys) == 4  # a claim of each
    assert take(buffer, keys) == 4
    buffer.cancel(item)
    assert is_empty(buffer)


def test_after_a_reset_nothing_old_is_found(buffer: LocalLookupBuffer) -> None:
    keys = make_keys(10)
    assert insert(buffer, keys)
    buffer.reset()
    assert take(buffer, keys) == 0
    assert is_empty(buffer)
    assert insert(buffer, keys)
    assert take(buffer, keys) == 10


def test_wrong_arguments(buffer: LocalLookupBuffer) -> None:
    keys = make_keys(3)
    with pytest.raises(ConfigError, match="blocks: 3, and 2 keys"):
        buffer.insert(keys[:2], blocks_of(keys), timeout_s=0)
    with pytest.raises(ConfigError, match="blocks: shape"):
        buffer.insert(keys, blocks_of(keys)[:, 0], timeout_s=0)
    with pytest.raises(ConfigError, match="keys: one is there twice"):
        buffer.insert([keys[0]] * 3, blocks_of(keys), timeout_s=0)
    assert insert(buffer, keys)
    assert len(buffer.select([keys[0], keys[0], keys[1]])) == 2
    with pytest.raises(ConfigError, match="not contiguous"):
        buffer.drop_select(keys, blocks_of(keys), timeout_s=0)
    config = StoreConfig(identity=IDENTITY, host=HostTierConfig(num_blocks=8), blocks_per_chunk=4)
    planes = Planes(config)
    with pytest.raises(ConfigError, match="blocks_per_chunk: 4"):
        LocalLookupBuffer(planes, lease_s=1.0)
    planes.close()
    with pytest.raises(ConfigError, match="lease_s"):
        LocalLookupBuffer.open(IDENTITY, num_blocks=8, lease_s=0)


def test_closed() -> None:
    before = set(threading.enumerate())
    buffer = LocalLookupBuffer.open(IDENTITY, num_blocks=8)
    buffer.close()
    buffer.close()
    with pytest.raises(StoreClosedError):
        insert(buffer, make_keys(1))
    assert set(threading.enumerate()) <= before


class BufferMachine(RuleBasedStateMachine):
    """Against a multiset of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = LocalLookupBuffer.open(IDENTITY, num_blocks=12)
        self.claims: dict[BlockKey, int] = {}
        self.prompts = [[*make_keys(3), *make_keys(5, seed=i + 1)] for i in range(3)]

    @rule(prompt=st.integers(0, 2), n=st.integers(0, 8))
    def insert(self, prompt: int, n: int) -> None:
        keys = self.prompts[prompt][:n]
        fits = len(set(self.claims) | set(keys)) <= 12
        assert insert(self.buffer, keys) == fits
        for key in keys if fits else ():
            self.claims[key] = self.claims.get(key, 0) + 1

    @rule(prompt=st.integers(0, 2), n=st.integers(0, 8))
    def take(self, prompt: int, n: int) -> None:
        keys = self.prompts[prompt][:n]
        expected = next((i for i, key in enumerate(keys) if key not in self.claims), len(keys))
        assert take(self.buffer, keys) == expected
        for key in keys[:expected]:
            self.claims[key] -= 1
            if not self.claims[key]:
                del self.claims[key]

    @invariant()
    def holds_what_is_claimed(self) -> None:
        assert self.buffer.usage() == (len(self.claims), 0)

    def teardown(self) -> None:
        self.buffer.close()


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
