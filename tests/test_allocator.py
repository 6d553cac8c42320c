"""The run allocator against a set of free slots."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.allocator import RunAllocator, runs


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.lists(st.tuples(st.sampled_from("aftg"), st.integers(0, 2**20)), max_size=40))
def test_agrees_with_a_set(num_slots: int, steps: list[tuple[str, int]]) -> None:
    allocator, free = RunAllocator(num_slots), set(range(num_slots))
    for kind, seed in steps:
        rng = np.random.default_rng(seed)
        if kind == "a":
            n = seed % 9
            got = allocator.allocate(n).tolist()
            assert len(got) == min(n, len(free)) and len(set(got)) == len(got) and set(got) <= free
            free -= set(got)
        elif kind == "f":
            taken = sorted(set(range(allocator.num_slots)) - free)
            back = rng.permutation(taken)[: seed % 7].astype(np.int64)
            allocator.free(back)
            free |= set(back.tolist())
        elif kind == "t":
            wanted = rng.permutation(allocator.num_slots)[: seed % 7].astype(np.int64)
            assert set(allocator.take(wanted).tolist()) == free & set(wanted.tolist())
            free -= set(wanted.tolist())
        else:
            before = allocator.num_slots
            allocator.grow(before + seed % 4)
            free |= set(range(before, before + seed % 4))
        assert allocator.num_free == len(free)
        assert allocator.num_runs() == len(runs(np.array(sorted(free), dtype=np.int64)))


def test_smallest_run_that_holds_the_request_is_used() -> None:
    allocator = RunAllocator(100)
    allocator.allocate(100)
    for start, end in ((0, 10), (20, 24), (50, 90)):
        allocator.free(np.arange(start, end, dtype=np.int64))
    assert allocator.allocate(4).tolist() == [20, 21, 22, 23]
    assert allocator.allocate(5).tolist() == [0, 1, 2, 3, 4]
    assert allocator.allocate(6).tolist() == list(range(50, 56))
