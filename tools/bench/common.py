"""What the benchmarks share: rows of results, interleaved rounds, stores of a given slot size."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.table import Table

from kvstore import BlockKey, DiskTierConfig, HostTierConfig, KVIdentity, KVLayout, StoreConfig, TieredStore
from kvstore.arena import HostArena
from kvstore.keys import KEY_NBYTES
from kvstore.slot import FOOTER

SLOT_SIZES: Final = (64 << 10, 368_640, 2 << 20)
Measure = Callable[[], float]  # runs once; returns GB/s, or another rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much a run moves.

    Args:
        nbytes: bytes of a data set; host memory takes up to four times as much.
        num_keys: keys of the index.
        rounds: interleaved rounds, of which the median counts.
    """

    nbytes: int = 256 << 20
    num_keys: int = 1_000_000
    rounds: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: a rate, the bare hardware's in the same rounds, and their ratio.

    ``spread`` is the lowest and the highest ratio of a round.
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


def compare(
    name: str, slot_nbytes: int, measures: Mapping[str, Measure], rounds: int, floor: float, raw_is: str
) -> Row:
    """Run ``ours`` and ``raw`` in turn, after one round that does not count; medians."""
    rates: dict[str, list[float]] = {side: [] for side in measures}
    for round_ in range(rounds + 1):
        order = list(measures) if round_ % 2 else list(measures)[::-1]
        for side in order:
            rate = measures[side]()
            if round_:
                rates[side].append(rate)
    ratios = [ours / raw for ours, raw in zip(rates["ours"], rates["raw"], strict=True)]
    return Row(
        name=name, slot_nbytes=slot_nbytes, rate=statistics.median(rates["ours"]),
        raw_rate=statistics.median(rates["raw"]), unit="GB/s", ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)), floor=floor, raw_is=raw_is,
    )  # fmt: skip


def rate_of(nbytes: int, work: Callable[[], object]) -> float:
    """GB/s of moving ``nbytes`` by ``work``."""
    start = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - start) / 1e9


def layout_of(slot_nbytes: int) -> KVLayout:
    """A layout whose slot has just this size."""
    head_size = (slot_nbytes - KEY_NBYTES - FOOTER.itemsize) // 2
    return KVLayout(num_layers=1, num_kv_heads=1, head_size=head_size, block_size=1, dtype=torch.uint8)


def config_of(slot_nbytes: int, num_blocks: int, disk: Path | None = None, **settings: Any) -> StoreConfig:
    """Settings of a store with room for ``num_blocks`` in host memory, and as many again on disk."""
    identity = KVIdentity(model="bench", revision=f"slots of {slot_nbytes}", layout=layout_of(slot_nbytes))
    if disk is not None:
        settings.setdefault("disk", DiskTierConfig(path=str(disk), num_blocks=settings.pop("disk_blocks", num_blocks)))
    return StoreConfig(identity=identity, host=HostTierConfig(num_blocks=num_blocks), **settings)


def open_store(slot_nbytes: int, num_blocks: int, disk: Path | None = None, **settings: Any) -> TieredStore:
    return TieredStore(config_of(slot_nbytes, num_blocks, disk, **settings))


def random_keys(n: int) -> list[BlockKey]:
    data = os.urandom(32 * n)
    return [BlockKey.of(data[i : i + 32]) for i in range(0, len(data), 32)]


def random_blocks(layout: KVLayout, n: int) -> torch.Tensor:
    """n blocks of bytes that do not compress, in memory that is there already."""
    data = np.frombuffer(np.random.default_rng(0).bytes(layout.block_nbytes), dtype=np.uint8)
    blocks = torch.empty((n, *layout.block_shape), dtype=layout.dtype)
    blocks.view(n, -1)[:] = torch.from_numpy(data.copy())
    return blocks


def warm_rows(n: int, nbytes: int) -> np.ndarray:
    """A buffer of n rows in memory like a store's own, its pages there already."""
    return HostArena(n, nbytes).rows
