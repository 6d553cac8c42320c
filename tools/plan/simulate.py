"""Hit rates of a trace, against capacity: for each policy, and the best that any could have.

What is simulated: a request hits its leading blocks that are there; then all of its blocks are there, and were
just used, tail first and head last, as in the host tier and on disk. A prefix hit is what counts: blocks behind one
that is missing are of no use. With write-behind a lower tier holds what the upper one does (inclusive), so
a tier's line is read at its own capacity.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.policy import make_policy
from tools.output import progress
from tools.plan.trace import Trace

_BATCH: Final = 4096


def stack_distances(trace: Trace) -> NDArray[np.int64]:
    """Of each access: how many other blocks were used since that block's last use, when its request begins;
    -1: it never was. LRU, leaf first, hits it at every capacity above (Mattson et al., 1970), if a prompt fits in.

    Of LRU what is there is a prefix's head, always: an ancestor is used whenever its child is. So a block is hit
    if fewer than ``capacity`` others were used since.
    """
    total = len(trace.ids)
    tree, last, distances = [0] * (total + 1), dict[int, int](), np.full(total, -1, dtype=np.int64)
    now = num_seen = at = 0
    for ids in with_progress("LRU at all capacities", trace):
        for block in ids:
            used = last.get(block)
            if used is not None:  # blocks at or before `used`, from the tree
                before, i = 0, used + 1
                while i:
                    before += tree[i]
                    i &= i - 1
                distances[at] = num_seen - before
            at += 1
        for block in reversed(ids):
            used = last.get(block)
            if used is not None:
                _add(tree, used + 1, -1)
            else:
                num_seen += 1
            last[block] = now
            _add(tree, now + 1, 1)
            now += 1
    return distances


def with_progress(what: str, trace: Trace) -> Iterator[list[int]]:
    """A trace's requests, and how far they are."""
    with progress(what, trace.num_requests) as advance:
        for i, ids in enumerate(trace.requests(), 1):
            yield ids
            if i % _BATCH == 0:
                advance(_BATCH)


def _add(tree: list[int], i: int, amount: int) -> None:
    """A Fenwick tree's update."""
    n = len(tree)
    while i < n:
        tree[i] += amount
        i += i & -i


def hits_by_policy(trace: Trace, policy_name: str, capacity: int) -> int:
    """Blocks that are hit, by the store's own policy, driven as `kvstore.manager` drives it."""
    policy, not_pinned = make_policy(policy_name, capacity), np.zeros(capacity, dtype=np.bool_)
    slot_of: dict[int, int] = {}
    held = [-1] * capacity
    free = list(range(capacity - 1, -1, -1))
    hits = 0
    for ids in trace.requests():
        leading: list[int] = []
        for block in ids:
            slot = slot_of.get(block)
            if slot is None:
                break
            leading.append(slot)
        hits += len(leading)
        present = np.array(leading, dtype=np.int64)
        if leading:
            policy.touch(present)
        absent = [block for block in ids[len(leading) :] if block not in slot_of]
        if len(free) < len(absent):
            for slot in policy.evict(len(absent) - len(free), not_pinned).tolist():
                del slot_of[held[slot]]
                free.append(slot)
        absent = absent[: len(free)]
        if absent:
            slots = [free.pop() for _ in absent]
            for block, slot in zip(absent, slots, strict=True):
                slot_of[block], held[slot] = slot, block
            policy.insert(np.array(slots, dtype=np.int64), np.array(absent, dtype=np.uint64))
            whole = [slot_of[block] for block in ids if block in slot_of]
            policy.arrange(np.array(whole, dtype=np.int64))  # so that the tail leaves before the head
    return hits


def hits_at_best(trace: Trace, capacity: int) -> int:
    """Blocks that could be hit at most, by who knows what comes: Belady's MIN, which may leave a block out.

    It counts single blocks: no policy's prefix hits can be more.
    """
    next_use = _next_uses(trace)
    held: dict[int, int] = {}  # block -> its next use
    furthest: list[tuple[int, int]] = []  # (-next use, block), some of them old
    never = len(trace.ids)
    hits = at = 0
    for ids in trace.requests():
        for block in ids:
            hits += block in held
            use = next_use[at]
            at += 1
            if use == never:
                held.pop(block, None)
                continue
            held[block] = use
            heapq.heappush(furthest, (-use, block))
            while len(held) > capacity:
                use, block = heapq.heappop(furthest)
                if held.get(block) == -use:
                    del held[block]
    return hits


def _next_uses(trace: Trace) -> list[int]:
    """Where each access's block is used next; the number of accesses: never."""
    total = len(trace.ids)
    order = np.argsort(trace.ids, kind="stable")
    following = np.full(total, total, dtype=np.int64)
    same = trace.ids[order[1:]] == trace.ids[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return list(following.tolist())
