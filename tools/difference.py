"""What `kvstore diff` has found, as data and as a story for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from rich.console import RenderableType

from tools.layer_sums import LayerDifference
from tools.output import lines, table

COLUMNS: Final = ("layer", "part", "apart", "from token", "max |a-b|", "relative", "cosine", "NaN a", "NaN b")
MOST_LISTED: Final = 1000
_SHOWN: Final = 5
_TOLD: Final = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where the numbers are apart for the first time; where blocks have no order, in one of them.

    Attributes:
        token: within its block; ``position``: within the prompt, or the file; None: blocks have no order.
    """

    key: str
    position: int | None
    token: int
    layer: int
    part: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A block that the other side lacks; ``token``: its first, None where blocks have no order."""

    key: str
    token: int | None


@dataclass(slots=True)
class Counted(Generic[T]):
    """What may be millions: the first of them, and how many blocks there are."""

    first: list[T] = field(default_factory=list)
    blocks: int = 0

    def add(self, blocks: int, some: Iterable[T]) -> None:
        """So many more; of ``some`` no more is taken than is kept."""
        self.blocks += blocks
        self.first += islice(some, MOST_LISTED - len(self.first))


@dataclass(slots=True)
class Difference:
    """Attributes:
    common: blocks that were compared; ``blocks_apart`` of them are.
    unreadable: keys of those that are damaged, or of which it cannot be told what K and V are.
    is_exact: there was no tolerance.
    """

    only_a: Counted[Missing] = field(default_factory=Counted)
    only_b: Counted[Missing] = field(default_factory=Counted)
    common: int = 0
    blocks_apart: int = 0
    unreadable: Counted[str] = field(default_factory=Counted)
    layers: list[LayerDifference] = field(default_factory=list)
    first: Divergence | None = None
    is_exact: bool = True

    @property
    def is_equal(self) -> bool:
        return bool(self.common) and not (self.num_not_compared or self.first)

    @property
    def num_not_compared(self) -> int:
        return self.only_a.blocks + self.only_b.blocks + self.unreadable.blocks

    @property
    def apart(self) -> list[LayerDifference]:
        return [one for one in self.layers if one.apart]

    @property
    def first_layer(self) -> int | None:
        """The lowest in which a number is apart anywhere."""
        return min((one.layer for one in self.apart), default=None)

    def to_dict(self) -> dict[str, Any]:
        found = {"equal": self.is_equal, "summary": self.summary(), "first_layer": self.first_layer, **asdict(self)}
        for name in ("only_a", "only_b", "unreadable"):
            counted = found[name]
            found |= {name: counted["first"], f"{name}_blocks": counted["blocks"]}
        return found

    def summary(self) -> str:
        """What differs, in a sentence."""
        told = [self._told()] if self.common else []
        for side, missing in (("a", self.only_a), ("b", self.only_b)):
            if missing.blocks:
                told.append(f"only {side} has {_blocks(missing.blocks)}")
        if self.unreadable.blocks:
            told.append(f"{_blocks(self.unreadable.blocks)} cannot be read")
        return "; ".join(told if self.common else ["nothing was compared", *told])

    def parts(self, *, everything: bool) -> Iterator[RenderableType]:
        """For people; ``everything``: layers too that are equal."""
        yield from lines(self.summary())
        if self.first is not None:
            yield from lines(self._where(self.first))
        for what, missing in (("only a has", self.only_a), ("only b has", self.only_b)):
            yield from _listed(what, [_name(one) for one in missing.first[:_SHOWN]], missing.blocks)
        yield from _listed(
            "cannot be read", [key[:16] for key in self.unreadable.first[:_SHOWN]], self.unreadable.blocks
        )
        shown = self.layers if everything else self.apart
        if shown:
            title = f"{_blocks(self.common)} that both have"
            has_nan = any(one.nan_a or one.nan_b for one in shown)
            columns = COLUMNS if has_nan else COLUMNS[:-2]
            yield table(title, columns, (_cells(one)[: len(columns)] for one in shown), left=2)

    def _told(self) -> str:
        apart = self.apart
        if not apart:
            return f"{_count(self.common, 'block')} equal" + ("" if self.is_exact else ", within the tolerance")
        worst = sorted(apart, key=_weight)
        told = [_story(one) for one in worst[: len(apart) if len(apart) <= _TOLD else 1]]
        layers, all_layers = {one.layer for one in apart}, {one.layer for one in self.layers}
        if len(apart) > _TOLD:
            told.append(f"{len(layers)} of {len(all_layers)} layers are apart")
        equal = len(all_layers) - len(layers)
        return "; ".join([*told, "no layer is equal" if not equal else f"{_count(equal, 'layer')} equal"])

    def _where(self, at: Divergence) -> str:
        block = f"token {at.token} of block {at.key[:16]}"
        where = f"layer {at.layer}, {at.part}; the lowest layer that is apart anywhere: {self.first_layer}"
        if at.position is None:
            return f"{self.blocks_apart} of {_blocks(self.common)} apart, such as {block}: {where}"
        return f"first apart: token {at.position}, which is {block}: {where}"


def _weight(one: LayerDifference) -> tuple[int, int, int]:
    """What is told first: what is no number, then what is zero, then what is apart at the first token."""
    kind = 0 if one.nan_a != one.nan_b else 1 if one.inf_a != one.inf_b else 2 if not (one.norm_a and one.norm_b) else 3
    return kind, one.token or 0, one.layer


def _story(one: LayerDifference) -> str:
    """``in b, K of layer 12 has 1 NaN from token 37 on``."""
    what = f"{'the latent' if one.part == 'L' else one.part} of layer {one.layer}"
    since = "" if one.token is None else f" from token {one.token} on"
    for name, in_a, in_b in (("NaN", one.nan_a, one.nan_b), ("infinite", one.inf_a, one.inf_b)):
        if in_a != in_b:
            side, n, other = ("a", in_a, in_b) if in_a > in_b else ("b", in_b, in_a)
            return f"in {side}, {what} has {n} {name}" + (f", not {other}," if other else "") + since
    for side, norm in (("a", one.norm_a), ("b", one.norm_b)):
        if norm == 0:
            return f"in {side}, {what} is all zero"
    numbers = f"{one.apart} number{'' if one.apart == 1 else 's'}"
    return f"{what} is apart by up to {one.max_abs:.3g}, in {numbers}{since}"


def _cells(one: LayerDifference) -> tuple[object, ...]:
    token = "" if one.token is None else one.token
    numbers = (f"{one.max_abs:.3g}", f"{one.relative:.3g}", f"{one.cosine:.6f}")
    return (one.layer, one.part, one.apart, token, *numbers, one.nan_a, one.nan_b)


def _listed(what: str, names: Sequence[str], total: int) -> Iterator[RenderableType]:
    if names:
        more = f" and {total - len(names)} more" if total > len(names) else ""
        yield from lines(f"{what}: {', '.join(names)}{more}")


def _name(one: Missing) -> str:
    return one.key[:16] + ("" if one.token is None else f" (from token {one.token})")


def _blocks(n: int) -> str:
    return f"{n} block{'' if n == 1 else 's'}"


def _count(n: int, what: str) -> str:
    return f"1 {what} is" if n == 1 else f"{n} {what}s are"
