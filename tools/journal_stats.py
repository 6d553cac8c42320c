"""Figures of a journal: how full each server's tiers are, what they hit, how old what they hit is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.journal_entries import NO_NODE, Request
from kvstore.journal_view import JournalView
from tools.output import age, size

TIERS: Final = ("device", "host", "disk", "shared")
_MOST_WINDOWS: Final = 60
_WIDTHS_S: Final = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 21600, 43200,
    86400, 172800, 604800,
)  # fmt: skip
_MOST_BLOCKS: Final = 4_000_000  # of the newest prompts, for ages of reuse
COLUMNS: Final = (
    "server", "process", "tier", "state", "used", "capacity", "full", "pinned", "hit rate", "reuse age", "evicted"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """One tier of one process.

    Attributes:
        state: "on", "off" or read-only ("not on"), or its process's: "silent" or "ended".
        silent_s: how long ago its process has written last.
        used_nbytes, capacity_nbytes, pinned_blocks, evicted_blocks: of its last sample; the engine's own memory
            ("device") has none.
        hit_blocks, asked_blocks: of its requests: found here; and asked for and not found in a tier above.
        reuse_age_s: median time since what was hit here had been asked for before; None: nothing was.
        t_ns: of the sample.
    """

    who: str
    pid: int
    tier: str
    state: str
    silent_s: float
    used_nbytes: float | None
    capacity_nbytes: float | None
    pinned_blocks: float | None
    evicted_blocks: float | None
    hit_blocks: int
    asked_blocks: int
    reuse_age_s: float | None
    t_ns: int

    @property
    def hit_rate(self) -> float | None:
        return self.hit_blocks / self.asked_blocks if self.asked_blocks else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "hit_rate": self.hit_rate}

    def cells(self) -> tuple[object, ...]:
        """For people; see `COLUMNS`."""
        used, capacity, rate = self.used_nbytes, self.capacity_nbytes, self.hit_rate
        state = f"silent for {age(self.silent_s)}" if self.state == "silent" else self.state
        return (
            self.who, self.pid, self.tier, state, "-" if used is None else size(used),
            size(capacity) if capacity else "-", f"{used / capacity:.0%}" if used is not None and capacity else "-",
            "-" if self.pinned_blocks is None else f"{self.pinned_blocks:.0f}",
            "-" if rate is None else f"{rate:.1%}", "-" if self.reuse_age_s is None else age(self.reuse_age_s),
            "-" if self.evicted_blocks is None else f"{self.evicted_blocks:.0f}",
        )  # fmt: skip


def tier_uses(view: JournalView) -> list[TierUse]:
    """Of every process that the journal knows, the newest first; tiers from the top."""
    last = {(sample.pid, sample.tier): sample for sample in view.samples}
    hits, asked = _hits(view.requests)
    ages = _reuse_ages(view)
    opened = {one.pid: one for one in view.opened}
    found = []
    for pid, one in sorted(opened.items(), key=lambda item: -item[1].t_ns):
        known = {tier for p, tier in (*last, *+hits) if p == pid}
        for tier in (tier for tier in TIERS if tier in known):
            sample = last.get((pid, tier))
            numbers = sample.numbers if sample is not None else {}
            life = view.life_of(pid)
            state = life if life != "on" else "on" if numbers.get("is_on", 1.0) else "not on"
            found.append(
                TierUse(
                    who=one.who, pid=pid, tier=tier, state=state, silent_s=view.silent_s(pid),
                    used_nbytes=numbers.get("used_nbytes"),
                    capacity_nbytes=numbers.get("capacity_nbytes"), pinned_blocks=numbers.get("pinned_blocks"),
                    evicted_blocks=numbers.get("evicted_blocks"), hit_blocks=hits[pid, tier],
                    asked_blocks=asked[pid, tier], t_ns=sample.t_ns if sample is not None else one.t_ns,
                    reuse_age_s=median(of_tier) if (of_tier := ages.get((pid, tier))) else None,
                )
            )  # fmt: skip
    return found


def hits_by_tier(request: Request) -> dict[str, int]:
    """Leading blocks by the tier that had them, from the top; together no more than the prompt has."""
    left, found = request.num_blocks, {}
    for tier in (*TIERS, *sorted(request.hits.keys() - set(TIERS))):
        if n := min(left, request.hits.get(tier, 0)):
            found[tier] = n
            left -= n
    return found


def _hits(requests: Sequence[Request]) -> tuple[Counter[tuple[int, str]], Counter[tuple[int, str]]]:
    """By (process, tier): blocks that were found there, and blocks that no tier above had."""
    hits, asked = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    for request in requests:
        left, by_tier = request.num_blocks, hits_by_tier(request)
        for tier in TIERS:
            n = by_tier.get(tier, 0)
            hits[request.pid, tier] += n
            asked[request.pid, tier] += left
            left -= n
    return hits, asked


def _reuse_ages(view: JournalView) -> dict[tuple[int, str], list[float]]:
    """By (process, tier): for each request, the time since the last block that it hit there was asked for before."""
    chosen, total = [], 0
    for request in reversed(view.requests):
        total += request.num_blocks
        if total > _MOST_BLOCKS:
            break
        chosen.append(request)
    seen: dict[int, int] = {}
    ages: dict[tuple[int, str], list[float]] = defaultdict(list)
    for request in reversed(chosen):
        nodes = view.nodes_to(request.last)
        first = request.num_blocks - len(nodes)  # what was before it is not known any more
        end = 0
        for tier in TIERS:
            if n := request.hits.get(tier, 0):
                end += n
                at = end - 1 - first
                before = seen.get(nodes[at]) if 0 <= at < len(nodes) else None
                if before is not None:
                    ages[request.pid, tier].append((request.t_ns - before) / 1e9)
        seen |= dict.fromkeys(nodes, request.t_ns)
    return ages


@dataclass(frozen=True, slots=True)
class Windows:
    """Requests in time windows of one length.

    Attributes:
        ends_s: of each window, seconds since 1970; shape (n,).
        found: tier, or "computed" -> blocks in each window; shape (n,).
    """

    ends_s: NDArray[np.float64]
    found: dict[str, NDArray[np.float64]]
    width_s: float

    def hit_rate(self) -> NDArray[np.float64]:
        """Share of blocks that were found anywhere; NaN where nothing was asked."""
        total = np.sum(list(self.found.values()), axis=0)
        with np.errstate(invalid="ignore"):
            rate: NDArray[np.float64] = 1.0 - self.found["computed"] / total
        return rate


def windows(requests: Sequence[Request], start_s: float, end_s: float) -> Windows:
    """What was found from start to end, in windows of a round length."""
    width = next((w for w in _WIDTHS_S if (end_s - start_s) / w <= _MOST_WINDOWS), _WIDTHS_S[-1])
    width = max(width, (end_s - start_s) / _MOST_WINDOWS / 100)  # of years
    n = max(1, math.ceil((end_s - start_s) / width))
    tiers = [tier for tier in TIERS if any(tier in request.hits for request in requests)]
    found = {name: np.zeros(n) for name in (*tiers, "computed")}
    for request in requests:
        at = min(n - 1, max(0, int((request.t_ns / 1e9 - start_s) / width)))
        left, by_tier = request.num_blocks, hits_by_tier(request)
        for tier in tiers:
            hit = by_tier.get(tier, 0)
            found[tier][at] += hit
            left -= hit
        found["computed"][at] += left
    ends: NDArray[np.float64] = start_s + width * np.arange(1, n + 1, dtype=np.float64)
    return Windows(ends, found, width)


def last_used(view: JournalView) -> list[int]:
    """By node: when it was asked for last, nanoseconds; 0: never."""
    times = [0] * len(view.hashes)
    for request in view.requests:
        if request.last != NO_NODE:
            times[request.last] = max(times[request.last], request.t_ns)
    for node in np.argsort(np.array(view.depths, dtype=np.int64), kind="stable")[::-1].tolist():
        parent = view.parents[node]
        if parent != NO_NODE and times[node] > times[parent]:
            times[parent] = times[node]
    return times
