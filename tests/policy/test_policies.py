"""Every policy runs the conformance suite; what sets each apart has a test of its own."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from kvstore.errors import ConfigError
from kvstore.policy import ARCPolicy, EvictionPolicy, LRUPolicy, S3FIFOPolicy, make_policy
from kvstore.testing.policy import PolicyTests

NOTHING = np.zeros(1 << 16, dtype=np.bool_)


class TestLRU(PolicyTests):
    def make_policy(self, num_slots: int) -> EvictionPolicy:
        return make_policy("lru", num_slots)

    def test_a_tail_leaves_before_its_head(self) -> None:
        policy = self.make_policy(10)
        policy.insert(np.arange(5), np.arange(5, dtype=np.uint64))
        policy.insert(np.arange(5, 8), np.arange(5, 8, dtype=np.uint64))
        policy.touch(np.array([0, 1]))
        assert policy.evict(10, NOTHING[:10]).tolist() == [4, 3, 2, 7, 6, 5, 1, 0]

    def test_agrees_with_an_ordered_dict(self) -> None:
        policy, model = self.make_policy(2000), OrderedDict[int, None]()
        rng = np.random.default_rng(1)
        for _ in range(3000):
            if len(model) == 2000 or (model and rng.random() < 0.2):
                victims = policy.evict(3, NOTHING[:2000]).tolist()
                assert victims == [model.popitem(last=False)[0] for _ in range(min(3, len(model)))]
            elif model and rng.random() < 0.5:
                slot = int(rng.choice(list(model)))
                policy.touch(np.array([slot]))
                model.move_to_end(slot)
            else:
                slot = int(next(s for s in rng.permutation(2000) if s not in model))
                policy.insert(np.array([slot]), np.array([slot], dtype=np.uint64))
                model[slot] = None


class TestARC(PolicyTests):
    def make_policy(self, num_slots: int) -> EvictionPolicy:
        return make_policy("arc", num_slots)

    def test_what_is_put_in_parts_was_used_once(self) -> None:
        """It makes room for itself; what a request came back for stays, though it is older."""
        policy = self.make_policy(8)
        policy.insert(np.arange(4), np.arange(4, dtype=np.uint64))
        policy.touch(np.arange(4))
        policy.insert(np.array([4, 5]), np.array([4, 5], dtype=np.uint64))
        policy.insert(np.array([6, 7]), np.array([6, 7], dtype=np.uint64))
        policy.arrange(np.arange(4, 8))
        assert policy.evict(8, NOTHING[:8]).tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


class TestS3FIFO(PolicyTests):
    def make_policy(self, num_slots: int) -> EvictionPolicy:
        return make_policy("s3fifo", num_slots)


class Own(LRUPolicy):
    """A user's own policy, found by name."""


class TestOwn(PolicyTests):
    def make_policy(self, num_slots: int) -> EvictionPolicy:
        policy = make_policy(f"{Own.__module__}:Own", num_slots)
        assert type(policy).__name__ == "Own"
        return policy


@pytest.mark.parametrize("name", ["", "lfu", "nowhere:Mine", "kvstore.policy:Nope", "kvstore.keys:BlockKey", ":"])
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"eviction_policy: .*allowed: lru, arc, s3fifo, or package.module:Class"):
        make_policy(name, 4)


def hits(policy: EvictionPolicy, trace: list[int]) -> int:
    """Hits of a trace of single blocks."""
    slot_of: dict[int, int] = {}
    content: dict[int, int] = {}
    free = list(range(policy.num_slots))
    num_hits = 0
    for block in trace:
        if block in slot_of:
            num_hits += 1
            policy.touch(np.array([slot_of[block]]))
            continue
        if not free:
            free = policy.evict(1, NOTHING[: policy.num_slots]).tolist()
            for slot in free:
                del slot_of[content.pop(slot)]
        slot = free.pop()
        slot_of[block], content[slot] = slot, block
        policy.insert(np.array([slot]), np.array([block], dtype=np.uint64))
    return num_hits


def best_possible(trace: list[int], num_slots: int) -> int:
    """Belady's MIN: evict what is used last from now."""
    following = [len(trace)] * len(trace)
    seen: dict[int, int] = {}
    for i in range(len(trace) - 1, -1, -1):
        following[i] = seen.get(trace[i], len(trace) + i)
        seen[trace[i]] = i
    held: dict[int, int] = {}
    num_hits = 0
    for i, block in enumerate(trace):
        if block in held:
            num_hits += 1
        elif len(held) == num_slots:
            del held[max(held, key=lambda b: held[b])]
        held[block] = following[i]
    return num_hits


def test_scans_do_not_wash_out_arc_and_s3fifo() -> None:
    """A hot set used again and again, with scans of new blocks larger than the cache between."""
    rng = np.random.default_rng(0)
    trace: list[int] = []
    for round_ in range(30):
        trace += (rng.zipf(1.3, 300) % 60).tolist()
        trace += list(range(10_000 + round_ * 120, 10_000 + round_ * 120 + 120))
    score = {p.__name__: hits(p(100), trace) for p in (LRUPolicy, ARCPolicy, S3FIFOPolicy)}
    best = best_possible(trace, 100)
    assert score["LRUPolicy"] < score["ARCPolicy"] <= best
    assert score["LRUPolicy"] < score["S3FIFOPolicy"] <= best
