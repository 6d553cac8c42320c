"""What the benchmarks share: rows of results, interleaved rounds, stores of a given slot size."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from rich.table import Table

from kvstore import BlockKey, DiskTierConfig, HostTierConfig, KVIdentity, KVLayout, StoreConfig, TieredStore
from kvstore.keys import KEY_NBYTES
from kvstore.slot import FOOTER

SLOT_SIZES: Final = (64 << 10, 368_640, 2 << 20)
ScaleName = Literal["small", "full"]
Measure = Callable[[], float]  # runs once; returns GB/s, or another rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much a run moves.

    Args:
        nbytes: bytes of a data set; host memory takes up to six times as much.
        num_keys: keys of the index.
        rounds: interleaved rounds, of which the median counts.
    """

    nbytes: int = 1 << 30
    num_keys: int = 1_000_000
    rounds: int = 7

    @classmethod
    def named(cls, name: ScaleName, rounds: int | None = None) -> Self:
        """ "full" is what figures are quoted from, "small" shows in some seconds that all runs."""
        chosen = {"full": cls(), "small": cls(nbytes=64 << 20, num_keys=20_000, rounds=1)}[name]
        return chosen if rounds is None else cls(nbytes=chosen.nbytes, num_keys=chosen.num_keys, rounds=rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: a rate, what it is held against in the same rounds, and their ratio.

    ``spread`` is the lowest and the highest ratio of a round; ``floor`` is what the ratio
    should be at least.
    """

    name: str
    slot_nbytes: int
    rate: float
    raw_rate: float
    unit: str
    ratio: float
    spread: tuple[float, float]
    floor: float
    raw_is: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a benchmark prints."""

    what: str
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "rows": [asdict(row) for row in self.rows]}

    def parts(self) -> list[Table]:
        table = Table(title=f"kvstore bench {self.what}", title_justify="left")
        for column in ("what", "slot", "rate", "raw", "ratio", "spread", "floor", "raw is"):
            table.add_column(column, justify="left" if column in ("what", "raw is") else "right")
        for r in self.rows:
            mark = "" if r.ratio >= r.floor else " [red]below[/red]"
            table.add_row(
                r.name, f"{r.slot_nbytes / 1024:g} KiB" if r.slot_nbytes else "", f"{r.rate:.3g} {r.unit}",
                f"{r.raw_rate:.3g}", f"{r.ratio:.2f}{mark}", f"{r.spread[0]:.2f}-{r.spread[1]:.2f}",
                f"{r.floor:g}", r.raw_is,
            )  # fmt: skip
        return [table]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a row is to say, but for the numbers."""

    name: str
    slot_nbytes: int
    floor: float
    raw_is: str
    unit: str = "GB/s"

    def row(self, pairs: list[tuple[float, float]]) -> Row:
        """Medians of (ours, raw), one pair a round; the ratio is the median of ratios."""
        ratios = [ours / raw for ours, raw in pairs]
        return Row(
            name=self.name, slot_nbytes=self.slot_nbytes, unit=self.unit, floor=self.floor, raw_is=self.raw_is,
            rate=statistics.median(ours for ours, _ in pairs), raw_rate=statistics.median(raw for _, raw in pairs),
            ratio=statistics.median(ratios), spread=(min(ratios), max(ratios)),
        )  # fmt: skip

    def compare(self, rounds: int, *, ours: Measure, raw: Measure) -> Row:
        """Run both in turn, each first in every other round, after one round that does not count."""
        pairs = interleaved(rounds, {"ours": ours, "raw": raw})
        return self.row([(rates["ours"], rates["raw"]) for rates in pairs])


def interleaved(rounds: int, measures: Mapping[str, Measure]) -> list[dict[str, float]]:
    """Rates of each round, after one that does not count; the order turns round each time."""
    found: list[dict[str, float]] = []
    names = list(measures)
    for round_ in range(rounds + 1):
        gc.collect()
        found.append({name: measures[name]() for name in (names if round_ % 2 else names[::-1])})
    return found[1:]


def rate_of(nbytes: int, work: Callable[[], object]) -> float:
    """GB/s of moving ``nbytes`` by ``work``."""
    start = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - start) / 1e9


def layout_of(slot_nbytes: int) -> KVLayout:
    """A layout whose slot has just this size."""
    head_size = (slot_nbytes - KEY_NBYTES - FOOTER.itemsize) // 2
    return KVLayout(num_layers=1, num_kv_heads=1, head_size=head_size, block_size=1, dtype=torch.uint8)


def open_store(slot_nbytes: int, num_blocks: int, disk: Path | None = None, **settings: Any) -> TieredStore:
    """A store with room for ``num_blocks`` in host memory, and on disk, unless ``disk_blocks`` says so, for as many."""
    identity = KVIdentity(model="bench", revision=f"slots of {slot_nbytes}", layout=layout_of(slot_nbytes))
    disk_blocks = settings.pop("disk_blocks", num_blocks)
    if disk is not None:
        settings["disk"] = DiskTierConfig(path=str(disk), num_blocks=disk_blocks)
    return TieredStore(StoreConfig(identity=identity, host=HostTierConfig(num_blocks=num_blocks), **settings))


def forget_host(store: TieredStore) -> None:
    """Empty the host tier and leave the lower ones as they are, so that the next get reads from them."""
    store._planes.forget_host()


def put_durably(store: TieredStore, keys: list[BlockKey], blocks: torch.Tensor) -> None:
    expect(store.put(keys, blocks), len(keys))
    if not store.flush(120):
        raise RuntimeError("not every block was stored: the figure would mean nothing")


def expect(got: int, wanted: int) -> None:
    if got != wanted:
        raise RuntimeError(f"{wanted - got} of {wanted} blocks were missing: the figure would mean nothing")


def random_keys(n: int) -> list[BlockKey]:
    data = os.urandom(32 * n)
    return [BlockKey.of(data[i : i + 32]) for i in range(0, len(data), 32)]


def random_blocks(layout: KVLayout, n: int) -> torch.Tensor:
    """n blocks of bytes that do not compress, each its own memory, which is there already."""
    data = np.random.default_rng(0).integers(0, 256, layout.block_nbytes, dtype=np.uint8)
    blocks = torch.empty((n, *layout.block_shape), dtype=layout.dtype)
    blocks.view(n, -1)[:] = torch.from_numpy(data)
    return blocks
