"""What a trace says of capacities: a table of hit rates, what to configure for a target or a budget, and a setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from rich.console import RenderableType
from rich.text import Text

from kvstore.errors import ConfigError
from kvstore.journal_view import JournalView
from tools.output import lines, printable, progress, size, table
from tools.plan.rates import BEST, LRU, HitRates, spaced
from tools.plan.setting import NEARLY, Present, Setting, Wish, choose, present_of
from tools.plan.trace import Trace, format_of

_POINTS: Final = 8
_MOST_CAPACITIES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        block_nbytes: of one block; None: budgets are in blocks only.
        blocks_per_chunk: of the store; a disk holds whole chunks.
        capacities: in blocks; none: eight, spaced evenly on a log scale.
        target: hit rate that is wished for.
        host_blocks, disk_blocks: budgets.
        present: what is configured now, where a journal says so.
        exact: simulate all blocks, however long it takes.
    """

    policies: tuple[str, ...] = ("lru", "arc", "s3fifo")
    capacities: tuple[int, ...] = ()
    block_nbytes: int | None = None
    blocks_per_chunk: int = 1
    target: float | None = None
    host_blocks: int | None = None
    disk_blocks: int | None = None
    present: Present | None = None
    exact: bool = False


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
    sampled, sampled_lru: share of blocks that policies were run with; that LRU and the best possible are of.
    setting: what to configure; None where the target cannot be reached.
    budgets: tier -> policy -> hit rate at its budget.
    """

    requests: int
    blocks_asked: int
    distinct_blocks: int
    sampled: float
    sampled_lru: float
    most: float
    capacities: list[int]
    block_nbytes: int | None
    hit_rates: dict[str, list[float]]
    target: float | None = None
    advice: list[Advice] = field(default_factory=list)
    budgets: dict[str, dict[str, float]] = field(default_factory=dict)
    budget_blocks: dict[str, int] = field(default_factory=dict)
    setting: Setting | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        yield from lines(
            f"{self.requests:,} requests ask for {self.blocks_asked:,} blocks, {self.distinct_blocks:,} distinct ones; "
            f"at most {self.most:.1%} can be hits"
        )
        yield table("hit rate by capacity of a tier", self.columns(), self.rows(), left=0)
        yield from (Text(printable(text), no_wrap=True, overflow="ignore") for text in self.notes())  # to be copied

    def notes(self) -> Iterator[str]:
        """What is to be said below the table."""
        yield from self._samples()
        yield from map(self._said, self.advice)
        for tier, rates in self.budgets.items():
            found = ", ".join(f"{policy} {rate:.1%}" for policy, rate in rates.items())
            yield f"{tier} budget, {self.budget_blocks[tier]:,} blocks: {found}"
        yield from self.setting.said() if self.setting is not None else ()

    def _samples(self) -> Iterator[str]:
        if self.sampled < 1.0:
            rest = ", LRU's and the best possible of all" if self.sampled_lru == 1.0 else ""
            yield f"rates are of a sample, {self.sampled:.1%} of the blocks{rest}; --exact takes all"

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


def of_journal(question: Question, view: JournalView) -> Question:
    """With what the journal says of blocks, and of what is configured now."""
    fmt, nbytes, per_chunk = format_of(view), question.block_nbytes, 1
    if fmt is not None:
        nbytes, per_chunk = nbytes or fmt.layout.block_nbytes, fmt.slot.blocks_per_chunk
    return replace(question, block_nbytes=nbytes, blocks_per_chunk=per_chunk, present=present_of(view))


def plan_of(whole: Trace, question: Question) -> Plan:
    """Work it all out.

    Raises:
        ConfigError: a capacity or a target is not allowed, or there is no such policy.
    """
    _check(question)
    rates = HitRates(whole, exact=question.exact)
    budgets = {tier: n for tier, n in (("host", question.host_blocks), ("disk", question.disk_blocks)) if n is not None}
    capacities = sorted(set(question.capacities or spaced(rates.distinct, _POINTS)))
    names, every = (*question.policies, BEST), sorted({*capacities, *budgets.values()})
    with progress("simulating", len(every) * len(names)) as advance:
        for name in names:
            for n in every:
                rates.at(name, n)
                advance(1)
    runs = [name for name in question.policies if name != LRU]
    made = Plan(
        requests=whole.num_requests,
        blocks_asked=len(whole.ids),
        distinct_blocks=rates.distinct,
        sampled=min(map(rates.sampled, runs or (LRU,))),
        sampled_lru=rates.sampled(LRU),
        most=rates.most,
        capacities=capacities,
        block_nbytes=question.block_nbytes,
        hit_rates={name: [rates.at(name, n) for n in capacities] for name in names},
        target=question.target,
        budgets={tier: {name: rates.at(name, n) for name in names} for tier, n in budgets.items()},
        budget_blocks=budgets,
    )
    if question.target is not None:
        made.advice = [_advise(rates, question, policy) for policy in question.policies]
    made.setting = choose(rates, _wish(made, question))
    return made


def _advise(rates: HitRates, question: Question, policy: str) -> Advice:
    """The smallest capacity at which a policy reaches the target."""
    assert question.target is not None
    with progress(f"looking for {question.target:.1%} with {policy}", None) as advance:
        n = rates.least(policy, question.target, advance)
    if n is None:
        return Advice(policy, None, None, None)
    nbytes = None if question.block_nbytes is None else n * question.block_nbytes
    return Advice(policy, n, nbytes, rates.at(policy, n))


def _wish(made: Plan, question: Question) -> Wish:
    """What is to be reached: the target, by the policy that needs least for it; without one, most of what can be, by
    the smallest capacity of the table."""
    least = {advice.policy: advice.num_blocks for advice in made.advice if advice.num_blocks is not None}
    if question.target is None and not made.budgets:
        least = {
            policy: n
            for policy in question.policies
            for n, rate in zip(made.capacities[::-1], made.hit_rates[policy][::-1], strict=True)
            if rate >= NEARLY * made.most
        }  # the last that is met is the smallest
    return Wish(
        policies=question.policies, least=least, has_target=question.target is not None,
        host_blocks=question.host_blocks, disk_blocks=question.disk_blocks, block_nbytes=question.block_nbytes,
        blocks_per_chunk=question.blocks_per_chunk, present=question.present,
    )  # fmt: skip


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
