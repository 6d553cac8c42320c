"""The slot table: whose a slot is, from free to free again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore.keys import KEY_NBYTES, BlockKey
from kvstore.slot_table import SlotTable


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(KEY_NBYTES, "little"))


def chunk(number: int, per_chunk: int) -> list[BlockKey]:
    return [key(number * per_chunk + i + 1) for i in range(per_chunk)]


def chunks(numbers: list[int], per_chunk: int) -> NDArray[np.uint8]:
    data = b"".join(b"".join(chunk(n, per_chunk)) for n in numbers)
    return np.frombuffer(data, dtype=np.uint8).reshape(len(numbers), per_chunk, KEY_NBYTES)


def store(table: SlotTable, numbers: list[int]) -> NDArray[np.int64]:
    slots = table.allocate(len(numbers))
    table.publish(slots, chunks(numbers, table.blocks_per_chunk))
    return slots


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_what_is_published_is_found_in_prefix_order(per_chunk: int) -> None:
    table = SlotTable(8, per_chunk, "lru")
    slots = store(table, [5, 6, 7])
    locations = table.find_prefix([*chunk(5, per_chunk), *chunk(6, per_chunk), *chunk(9, per_chunk)])
    assert len(locations) == 2 * per_chunk
    assert table.slots_of(locations).tolist() == slots[:2].tolist()
    assert table.num_ready == 3 and table.allocator.num_free == 5


def test_eviction_takes_the_tail_first_and_passes_pinned_slots_over() -> None:
    table = SlotTable(4, 1, "lru")
    slots = store(table, [0, 1, 2, 3])
    table.pin(slots[3:])
    assert table.evict(2).tolist() == [slots[2], slots[1]]
    assert table.evict(9).tolist() == [slots[0]]
    assert table.evict(1).tolist() == []
    assert table.evicted_slots == 3
    assert table.find_prefix([key(4)]).tolist() == [slots[3]]


def test_what_goes_while_it_is_pinned_is_in_limbo_until_its_last_pin() -> None:
    table = SlotTable(4, 1, "lru")
    slots = store(table, [0, 1])
    table.pin(slots)
    table.pin(slots[:1])
    assert table.drop(slots, "purged").tolist() == []
    assert table.find_prefix([key(1)]).tolist() == []
    assert table.drop(slots, "purged").tolist() == []  # it has gone already
    assert table.unpin(slots).tolist() == [slots[1]]
    assert table.unpin(slots[:1]).tolist() == [slots[0]]
    assert table.num_pinned == 0


def test_one_slot_pinned_twice_in_one_call() -> None:
    table = SlotTable(2, 3, "lru")
    (slot,) = store(table, [0])
    twice = np.array([slot, slot])
    table.pin(twice)
    table.drop(twice[:1], "purged")
    assert table.unpin(twice[:1]).tolist() == []
    assert table.unpin(twice[:1]).tolist() == [slot]


def test_hidden_slots_are_not_found_and_still_evicted() -> None:
    table = SlotTable(4, 1, "lru")
    slots = store(table, [0, 1])
    table.hide()
    assert table.find_prefix([key(1)]).tolist() == []
    assert table.num_ready == 2
    table.publish(table.allocate(1), chunks([2], 1), np.array([False]))
    assert table.find_prefix([key(3)]).tolist() == []
    assert sorted(table.evict(9).tolist()) == sorted([*slots.tolist(), 2])


@settings(max_examples=150)
@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from("sdepuh"), st.integers(0, 2**20)), max_size=40))
def test_every_slot_is_in_one_place(per_chunk: int, steps: list[tuple[str, int]]) -> None:
    """free + ready + limbo (dropped while pinned) is all there is."""
    num_slots, next_chunk = 12, 0
    table = SlotTable(num_slots, per_chunk, "lru")
    pinned: list[int] = []
    limbo: set[int] = set()
    for kind, seed in steps:
        rng = np.random.default_rng(seed)
        some = rng.permutation(table.ready_slots())[: seed % 4]
        if kind == "s":
            numbers = list(range(next_chunk, next_chunk + seed % 5))
            next_chunk += len(numbers)
            slots = table.allocate(len(numbers))
            table.publish(slots, chunks(numbers[: len(slots)], per_chunk))
        elif kind == "d":
            loose = table.drop(some, "purged")
            assert set(some.tolist()) - set(loose.tolist()) == set(some.tolist()) & set(pinned)
            limbo |= set(some.tolist()) - set(loose.tolist())
            table.release(loose)
        elif kind == "e":
            victims = table.evict(seed % 4)
            assert not set(victims.tolist()) & set(pinned)
            table.release(victims)
        elif kind == "p":
            table.pin(some)
            pinned += some.tolist()
        elif kind == "u" and pinned:
            slot = pinned.pop(seed % len(pinned))
            freed = table.unpin(np.array([slot]))
            assert freed.tolist() == ([slot] if slot in limbo and slot not in pinned else [])
            limbo -= set(freed.tolist())
            table.release(freed)
        elif kind == "h":
            table.hide()
        assert table.num_pinned == len(set(pinned))
        assert table.allocator.num_free + table.num_ready + len(limbo) == num_slots
