"""The contract of an eviction policy, as tests that every policy runs.

class TestMine(PolicyTests):
    def make_policy(self, num_slots):
        return MyPolicy(num_slots)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policy.base import EvictionPolicy, Slots


def _slots(*numbers: int) -> Slots:
    return np.array(numbers, dtype=np.int64)


def _tags(slots: Slots) -> np.ndarray:
    return slots.astype(np.uint64) + np.uint64(1000)


class PolicyTests(ABC):
    """Subclass it, name the subclass ``Test…``, and give `make_policy`."""

    @abstractmethod
    def make_policy(self, num_slots: int) -> EvictionPolicy:
        """A fresh policy."""

    def test_evicts_all_that_is_in_and_nothing_else(self) -> None:
        policy, nothing = self.make_policy(8), np.zeros(8, dtype=np.bool_)
        assert len(policy.evict(3, nothing)) == 0
        policy.insert(_slots(1, 4, 6), _tags(_slots(1, 4, 6)))
        assert sorted(policy.evict(5, nothing).tolist()) == [1, 4, 6]
        assert len(policy.evict(1, nothing)) == 0

    def test_never_evicts_what_is_pinned(self) -> None:
        policy, pinned = self.make_policy(8), np.zeros(8, dtype=np.bool_)
        policy.insert(np.arange(8), _tags(np.arange(8)))
        pinned[[0, 3, 7]] = True
        assert sorted(policy.evict(8, pinned).tolist()) == [1, 2, 4, 5, 6]
        pinned[3] = False
        assert policy.evict(8, pinned).tolist() == [3]

    def test_what_was_removed_is_not_evicted_and_may_come_back(self) -> None:
        policy, nothing = self.make_policy(4), np.zeros(4, dtype=np.bool_)
        policy.insert(np.arange(4), _tags(np.arange(4)))
        policy.touch(_slots(1))
        policy.remove(_slots(1, 2))
        assert sorted(policy.evict(4, nothing).tolist()) == [0, 3]
        policy.insert(_slots(2, 0), _tags(_slots(2, 0)))
        assert sorted(policy.evict(4, nothing).tolist()) == [0, 2]

    def test_a_tail_leaves_before_its_head(self) -> None:
        nothing = np.zeros(8, dtype=np.bool_)
        at_once, in_parts, grown = (self.make_policy(8) for _ in range(3))
        at_once.insert(_slots(3, 1, 6, 2), _tags(_slots(3, 1, 6, 2)))
        for policy in (in_parts, grown):
            policy.insert(_slots(3, 1), _tags(_slots(3, 1)))
        grown.touch(_slots(3, 1))
        for policy in (in_parts, grown):
            policy.insert(_slots(6, 2), _tags(_slots(6, 2)))
            policy.arrange(_slots(3, 1, 6, 2))
        for policy in (at_once, in_parts, grown):
            assert [int(slot) for _ in range(4) for slot in policy.evict(1, nothing)] == [2, 6, 1, 3]

    def test_grows(self) -> None:
        policy = self.make_policy(2)
        policy.insert(_slots(0, 1), _tags(_slots(0, 1)))
        policy.grow(5)
        policy.insert(_slots(4), _tags(_slots(4)))
        assert sorted(policy.evict(9, np.zeros(5, dtype=np.bool_)).tolist()) == [0, 1, 4]

    def test_memory_is_bounded_under_a_stream_of_new_content(self) -> None:
        policy, nothing = self.make_policy(16), np.zeros(16, dtype=np.bool_)
        policy.insert(np.arange(16), _tags(np.arange(16)))
        for start in range(0, 4000, 4):
            slots = policy.evict(4, nothing)
            policy.insert(slots, np.arange(start, start + 4, dtype=np.uint64) + np.uint64(10**6))
        remembered = [len(v) for v in vars(policy).values() if hasattr(v, "__len__")]
        assert max(remembered, default=0) <= 2 * 16

    def test_agrees_with_a_set(self) -> None:
        steps = st.lists(st.tuples(st.sampled_from("itaerp"), st.integers(0, 2**32)), max_size=60)
        settings(max_examples=150, deadline=None)(given(steps)(self._agrees_with_a_set))()

    def _agrees_with_a_set(self, steps: list[tuple[str, int]]) -> None:
        num_slots = 12
        policy, again = self.make_policy(num_slots), self.make_policy(num_slots)
        held: set[int] = set()
        pinned = np.zeros(num_slots, dtype=np.bool_)
        for kind, seed in steps:
            rng = np.random.default_rng(seed)
            inside, outside = sorted(held), sorted(set(range(num_slots)) - held)
            some = rng.permutation(outside if kind == "i" else inside)[: seed % 5].astype(np.int64)
            if kind == "i":
                tags = rng.integers(0, 20, len(some)).astype(np.uint64)
                policy.insert(some, tags)
                again.insert(some, tags)
                held |= set(some.tolist())
            elif kind == "t":
                policy.touch(some)
                again.touch(some)
            elif kind == "a":
                policy.arrange(some)
                again.arrange(some)
            elif kind == "r":
                policy.remove(some)
                again.remove(some)
                held -= set(some.tolist())
            elif kind == "p":
                pinned[:] = rng.random(num_slots) < 0.3
            else:
                n = seed % 6
                victims = policy.evict(n, pinned).tolist()
                assert victims == again.evict(n, pinned).tolist(), "the same history gives the same victims"
                evictable = {s for s in held if not pinned[s]}
                assert len(victims) == len(set(victims)) == min(n, len(evictable)) and set(victims) <= evictable
                held -= set(victims)
