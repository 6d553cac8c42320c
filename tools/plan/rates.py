"""Hit rates of one trace at any capacity: of all of its blocks where that is quick, else of a sample.

LRU takes one pass for all capacities that a prompt fits in, and the best possible takes little; the other policies are
run at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from tools.plan.simulate import hits_at_best, hits_by_policy, stack_distances
from tools.plan.trace import Trace

BEST: Final = "best possible"
LRU: Final = "lru"
MOST_ACCESSES: Final = 1_000_000  # that LRU and the best possible are worked out of
RUN_ACCESSES: Final = 40_000  # that the other policies are run with


class HitRates:
    """By policy, or `BEST`, and capacity in blocks; each is worked out once.

    Args:
        exact: of all blocks, however long it takes.
    Attributes:
        distinct: at this capacity nothing is evicted.
    """

    def __init__(self, whole: Trace, *, exact: bool = False) -> None:
        self._whole = whole
        self._fine = whole if exact else whole.sampled(MOST_ACCESSES)
        self._coarse = whole if exact or len(whole.ids) <= 2 * RUN_ACCESSES else whole.sampled(RUN_ACCESSES)
        distances = stack_distances(self._fine)
        self._distances = np.sort(distances[distances >= 0])
        self._longest = int(np.diff(self._fine.starts).max(initial=0))  # prompt
        self._known: dict[tuple[str, int], float] = {}
        self.distinct = len(np.unique(whole.ids))

    @property
    def most(self) -> float:
        """Of an unbounded store: the rest are blocks that come for the first time."""
        return self._rate(len(self._distances), self._fine)

    def sampled(self, policy: str) -> float:
        """The share of blocks that a policy's rates are of."""
        return self._trace_of(policy).rate

    def at(self, policy: str, capacity: int) -> float:
        found = self._known.get((policy, capacity))
        if found is None:
            found = self._known[policy, capacity] = self._work_out(policy, capacity)
        return found

    def least(self, policy: str, target: float, advance: Callable[[int], None]) -> int | None:
        """The smallest capacity that reaches a target, to 1 %; None: none does."""
        if self.at(policy, self.distinct) < target:
            return None
        if policy == LRU and (n := self._least_of_lru(target)) * self._fine.rate >= self._longest:
            return n
        known = sorted(n for name, n in self._known if name == policy)
        high = next(n for n in known if self.at(policy, n) >= target)
        low = max((n for n in known if n < high), default=0)
        while high - low > max(1, high // 100):
            middle = self._between(policy, low, high, target)
            advance(1)
            if self.at(policy, middle) >= target:
                high = middle
            else:
                low = middle
        return high

    def _between(self, policy: str, low: int, high: int, target: float) -> int:
        """Where the target would be on a straight line over the capacity's logarithm, not too near to either end."""
        if low == 0:
            return high // 2
        below, above = self.at(policy, low), self.at(policy, high)
        share = min(0.85, max(0.15, (target - below) / (above - below)))
        return min(high - 1, max(low + 1, int(low * (high / low) ** share)))

    def _least_of_lru(self, target: float) -> int:
        rest = len(self._whole.ids) - self._fine.hot_accesses
        share = (target * len(self._whole.ids) - self._fine.hot_hits) / max(1, rest)
        hits = min(len(self._distances), max(1, int(np.ceil(share * len(self._fine.ids) - 1e-9))))
        return min(self.distinct, int(np.ceil((int(self._distances[hits - 1]) + 1) / self._fine.rate)))

    def _work_out(self, policy: str, capacity: int) -> float:
        trace = self._trace_of(policy)
        scaled = max(1, round(capacity * trace.rate))
        if policy == BEST:
            return self._rate(hits_at_best(trace, scaled), trace)
        if policy == LRU and scaled >= self._longest:
            return self._rate(int(np.searchsorted(self._distances, scaled, side="left")), trace)
        trace = self._coarse  # of LRU: prompts that are larger than the cache push themselves out
        scaled = max(1, round(capacity * trace.rate))
        return min(self.most, self._rate(hits_by_policy(trace, policy, scaled), trace))  # a sample may say more

    def _trace_of(self, policy: str) -> Trace:
        return self._fine if policy in (BEST, LRU) else self._coarse

    def _rate(self, hits: int, trace: Trace) -> float:
        """Of the whole trace, where a sample was simulated."""
        rest = len(self._whole.ids) - trace.hot_accesses
        return float((hits / max(1, len(trace.ids)) * rest + trace.hot_hits) / len(self._whole.ids))


def spaced(distinct: int, n: int) -> Sequence[int]:
    """So many capacities, evenly on a log scale, up to that of all blocks."""
    smallest = max(1, distinct // 1000)
    return [int(n) for n in np.geomspace(smallest, max(distinct, smallest + 1), n).round()]
