"""What a trace says of capacities: a table of hit rates, and what to configure for a target or a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import RenderableType

from kvstore.errors import ConfigError
from tools.output import lines, progress, size, table
from tools.plan.simulate import hits_at_best, hits_by_policy, hits_by_stack_distance
from tools.plan.trace import Trace, read_trace

BEST: Final = "best possible"
MOST_ACCESSES: Final = 300_000  # of more
SAMPLE_ACCESSES: Final = 30_000  # so many are simulated: each may be a request of its own
_POINTS: Final = 8
_MOST_CAPACITIES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        block_nbytes: of one block; None: budgets are in blocks only.
        capacities: in blocks; none: eight, spaced evenly on a log scale.
        target: hit rate that is wished for.
        host_blocks, disk_blocks: budgets.
    """

    policies: tuple[str, ...] = ("lru", "arc", "s3fifo")
    capacities: tuple[int, ...] = ()
    block_nbytes: int | None = None
    target: float | None = None
    host_blocks: int | None = None
    disk_blocks: int | None = None


@dataclass(slots=True)
class Advice:
    """Blocks that a policy needs for the target; None where it cannot be reached."""

    policy: str
    num_blocks: int | None
    nbytes: int | None
    hit_rate: float | None


@dataclass(slots=True)
class Plan:
    """Attributes:
    hit_rates: policy, or `BEST` -> by capacity: prefix hits as a share of all blocks that were asked for.
    most: what an unbounded store would hit; the rest are blocks that come for the first time.
    sampled: share of blocks that was simulated.
    budgets: tier -> policy -> hit rate at its budget.
    """

    requests: int
    blocks_asked: int
    distinct_blocks: int
    sampled: float
    most: float
    capacities: list[int]
    block_nbytes: int | None
    hit_rates: dict[str, list[float]]
    target: float | None = None
    advice: list[Advice] = field(default_factory=list)
    budgets: dict[str, dict[str, float]] = field(default_factory=dict)
    budget_blocks: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        sampled = "" if self.sampled == 1.0 else f"; {self.sampled:.1%} of the blocks are simulated"
        yield from lines(
            f"{self.requests:,} requests ask for {self.blocks_asked:,} blocks, {self.distinct_blocks:,} distinct ones; "
            f"at most {self.most:.1%} can be hits{sampled}"
        )
        yield table("hit rate by capacity of a tier", self.columns(), self.rows(), left=0)
        for advice in self.advice:
            yield from lines(self._said(advice))
        for tier, rates in self.budgets.items():
            option = "num_cpu_blocks" if tier == "host" else "disk blocks"
            found = ", ".join(f"{policy} {rate:.1%}" for policy, rate in rates.items())
            yield from lines(f"{tier} budget, {option} {self.budget_blocks[tier]:,}: {found}")

    def columns(self) -> tuple[str, ...]:
        return ("blocks", "bytes", *self.hit_rates)

    def rows(self) -> list[tuple[str, ...]]:
        """By capacity, for people."""
        return [
            (f"{n:,}", "" if self.block_nbytes is None else size(n * self.block_nbytes),
             *(f"{rates[i]:.1%}" for rates in self.hit_rates.values()))
            for i, n in enumerate(self.capacities)
        ]  # fmt: skip

    def _said(self, advice: Advice) -> str:
        if advice.num_blocks is None:
            return f"{self.target:.1%} cannot be reached with {advice.policy}: {self.most:.1%} of blocks come again"
        nbytes = "" if advice.nbytes is None else f" ({size(advice.nbytes)})"
        return (
            f"for {self.target:.1%} with {advice.policy}: {advice.num_blocks:,} blocks{nbytes}, {advice.hit_rate:.1%}"
        )


def plan(path: Path, question: Question) -> Plan:
    """Simulate a trace.

    Raises:
        ConfigError: the trace is none, a capacity or a target is not allowed, or there is no such policy.
    """
    whole = read_trace(path)
    return plan_of(whole, question)


def plan_of(whole: Trace, question: Question) -> Plan:
    """As `plan`, of a trace that was read."""
    _check(question)
    is_small = len(whole.ids) <= MOST_ACCESSES
    trace, distinct = whole if is_small else whole.sampled(SAMPLE_ACCESSES), len(np.unique(whole.ids))
    budgets = {tier: n for tier, n in (("host", question.host_blocks), ("disk", question.disk_blocks)) if n is not None}
    capacities = sorted(set(question.capacities or _spaced(distinct)))
    every = sorted({*capacities, *budgets.values()})
    rates: dict[str, dict[int, float]] = {}
    with progress("simulating", len(every) * (len(question.policies) + 1)) as advance:
        for name in (*question.policies, BEST):
            rates[name] = {}
            for n in every:
                scaled = max(1, round(n * trace.rate))
                hits = hits_at_best(trace, scaled) if name == BEST else hits_by_policy(trace, name, scaled)
                rates[name][n] = _rate(hits, trace, whole)
                advance(1)
    most = _rate(hits_by_stack_distance(trace, [len(trace.ids) + 1])[0], trace, whole)
    made = Plan(
        requests=whole.num_requests,
        blocks_asked=len(whole.ids),
        distinct_blocks=distinct,
        sampled=trace.rate,
        most=most,
        capacities=capacities,
        block_nbytes=question.block_nbytes,
        hit_rates={name: [of[n] for n in capacities] for name, of in rates.items()},
        target=question.target,
        budgets={tier: {name: of[n] for name, of in rates.items()} for tier, n in budgets.items()},
        budget_blocks=budgets,
    )
    if question.target is not None:
        made.advice = [_advise(trace, whole, question, policy, distinct) for policy in question.policies]
    return made


def _advise(trace: Trace, whole: Trace, question: Question, policy: str, distinct: int) -> Advice:
    """The smallest capacity, to 1 %, at which a policy reaches the target, simulated at each step."""
    assert question.target is not None

    def rate_at(n: int) -> float:
        return _rate(hits_by_policy(trace, policy, max(1, round(n * trace.rate))), trace, whole)

    low, high = 0, distinct + 1
    best = rate_at(high)
    if best < question.target:
        return Advice(policy, None, None, None)
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        found = rate_at(middle)
        if found >= question.target:
            high, best = middle, found
        else:
            low = middle
    return Advice(policy, high, None if question.block_nbytes is None else high * question.block_nbytes, best)


def _rate(hits: int, trace: Trace, whole: Trace) -> float:
    """Of the whole trace, where a sample was simulated."""
    rest = len(whole.ids) - trace.hot_accesses
    return float((hits / max(1, len(trace.ids)) * rest + trace.hot_hits) / len(whole.ids))


def _spaced(distinct: int) -> list[int]:
    smallest = max(1, distinct // 1000)
    return [int(n) for n in np.geomspace(smallest, max(distinct, smallest + 1), _POINTS).round()]


def _check(question: Question) -> None:
    if not question.policies:
        raise ConfigError("--policies: none given; give lru, arc or s3fifo")
    if len(question.capacities) > _MOST_CAPACITIES:
        raise ConfigError(f"--capacities: {len(question.capacities)}; give at most {_MOST_CAPACITIES}")
    budgets = [n for n in (question.host_blocks, question.disk_blocks) if n is not None]
    for n in (*question.capacities, *budgets):
        if not 1 <= n <= 1 << 40:
            raise ConfigError(f"a capacity of {n} blocks is not allowed; give 1 to 2**40")
    if question.target is not None and not 0 < question.target <= 1:
        raise ConfigError(f"--target-hit-rate: {question.target} is not allowed; give a share, above 0 and up to 1")


def numbers(option: str, text: str) -> tuple[int, ...]:
    """``1000,30000`` -> two numbers; raises ConfigError."""
    try:
        return tuple(int(part.replace("_", "")) for part in text.split(",") if part.strip())
    except ValueError as e:
        raise ConfigError(f"{option}: {text!r} is not allowed; give whole numbers, like 1000,10000") from e


def names(text: str) -> Sequence[str]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
