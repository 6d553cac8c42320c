"""What to configure, ready to be pasted, and how much more it hits than what is configured now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvstore.journal_view import JournalView
from kvstore.slot import DIGEST_NBYTES, SlotFormat
from kvstore.tiers.disk import capacity_for
from tools.plan.rates import HitRates

NEARLY: Final = 0.9  # of what can be hits: what is aimed at where nobody says it
_MIB: Final = 1 << 20
_MOST: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Present:
    """What a server has now, as its journal says.

    Attributes:
        measured: its requests' hit rate; None: they asked for nothing.
    """

    host_blocks: int | None
    disk_blocks: int | None
    measured: float | None

    @property
    def blocks(self) -> int:
        """With write-behind the disk has what host memory has."""
        return max(self.host_blocks or 0, self.disk_blocks or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a setting is to reach.

    Attributes:
        least: policy -> blocks that it needs.
        has_target: someone has said what is to be reached.
        host_blocks, disk_blocks: budgets.
    """

    policies: tuple[str, ...]
    least: dict[str, int]
    has_target: bool
    host_blocks: int | None
    disk_blocks: int | None
    block_nbytes: int | None
    blocks_per_chunk: int
    present: Present | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Attributes:
    num_cpu_blocks: chunks of host memory, as vLLM's setting counts; None: as many as there are.
    disk_blocks, disk_capacity_bytes: None: no disk is needed; or how large a block is is not known.
    hit_rate, host_hit_rate: of both tiers; and of host memory alone.
    now_hit_rate: simulated, with LRU, at the present sizes; None: they are not known.
    """

    eviction_policy: str
    num_cpu_blocks: int | None
    host_blocks: int | None
    disk_blocks: int | None
    disk_capacity_bytes: int | None
    hit_rate: float
    host_hit_rate: float | None
    present: Present | None
    now_hit_rate: float | None
    is_nearly: bool

    def said(self) -> Iterator[str]:
        """For people."""
        why = f", {NEARLY:.0%} of what can be hits" if self.is_nearly else ""
        of_host = f", {self.host_hit_rate:.1%} from host memory" if self.host_hit_rate and self.disk_blocks else ""
        yield f"setting{why}: {self.eviction_policy} hits {self.hit_rate:.1%}{of_host}{self._gain()}"
        yield f"  for vLLM, in kv_connector_extra_config: {json.dumps(self.of_vllm())}"
        yield f"  for a store, in its environment: {' '.join(f'{k}={v}' for k, v in self.of_store().items())}"
        if self.disk_blocks is not None and self.disk_capacity_bytes is None:
            yield f"  and a disk of {self.disk_blocks:,} blocks; with --block-bytes it is said in bytes"

    def of_vllm(self) -> dict[str, int | str]:
        found = {"num_cpu_blocks": self.num_cpu_blocks, "disk_capacity_bytes": self.disk_capacity_bytes}
        return {**{k: v for k, v in found.items() if v is not None}, "eviction_policy": self.eviction_policy}

    def of_store(self) -> dict[str, int | str]:
        found: dict[str, int | str] = {}
        if self.host_blocks is not None:
            found |= {"KVSTORE_HOST_NUM_BLOCKS": self.host_blocks}
            found |= {"KVSTORE_HOST_EVICTION_POLICY": self.eviction_policy}
        if self.disk_capacity_bytes is not None:
            found |= {"KVSTORE_DISK_CAPACITY_NBYTES": self.disk_capacity_bytes}
            found |= {"KVSTORE_DISK_EVICTION_POLICY": self.eviction_policy}
        return found

    def _gain(self) -> str:
        if self.present is None or self.now_hit_rate is None:
            return ""
        sizes = [("host", self.present.host_blocks), ("disk", self.present.disk_blocks)]
        now = ", ".join(f"{tier} {n:,}" for tier, n in sizes if n)
        measured = "" if self.present.measured is None else f", {self.present.measured:.1%} were measured"
        gain = 100 * (self.hit_rate - self.now_hit_rate)
        return (
            f"; {gain:+.1f} points over the present sizes (blocks: {now}; lru hits {self.now_hit_rate:.1%}{measured})"
        )


def choose(rates: HitRates, wish: Wish) -> Setting | None:
    """The policy that needs least, or hits most within the budgets; what host memory has no budget for goes to disk.
    None where no policy reaches what is wished for."""
    host, disk, policy = wish.host_blocks, wish.disk_blocks, ""
    if wish.least:
        policy = min(wish.least, key=lambda name: wish.least[name])
        needed = wish.least[policy]
        room = host if host is not None else wish.present.host_blocks if wish.present is not None else None
        is_in_memory = room is None or needed <= room
        host, disk = (needed, None) if is_in_memory else (room, needed if disk is None else min(needed, disk))
    elif wish.has_target or (host is None and disk is None):
        return None
    else:
        both = max(host or 0, disk or 0)
        policy = max(wish.policies, key=lambda name: rates.at(name, both))
    present = wish.present if wish.present is not None and wish.present.blocks else None
    return Setting(
        eviction_policy=policy,
        num_cpu_blocks=None if host is None else -(-host // wish.blocks_per_chunk),
        host_blocks=host,
        disk_blocks=disk,
        disk_capacity_bytes=_disk_nbytes(disk, wish),
        hit_rate=rates.at(policy, max(host or 0, disk or 0)),
        host_hit_rate=None if host is None else rates.at(policy, host),
        present=present,
        now_hit_rate=None if present is None else rates.at("lru", present.blocks),
        is_nearly=not (wish.has_target or wish.host_blocks or wish.disk_blocks),
    )


def present_of(view: JournalView) -> Present:
    """What the server that wrote last has configured."""
    blocks: dict[str, int] = {}
    for sample in reversed(view.samples):
        if sample.tier in ("host", "disk") and sample.pid == view.samples[-1].pid:
            capacity = sample.numbers.get("capacity_blocks", 0.0)
            blocks.setdefault(sample.tier, int(capacity) if 1 <= capacity <= _MOST else 0)
    asked = sum(request.num_blocks for request in view.requests)
    hits = sum(request.num_hits for request in view.requests)
    return Present(blocks.get("host") or None, blocks.get("disk") or None, hits / asked if asked else None)


def _disk_nbytes(disk: int | None, wish: Wish) -> int | None:
    """In whole MiB."""
    if disk is None or wish.block_nbytes is None:
        return None
    fmt = SlotFormat(wish.block_nbytes * wish.blocks_per_chunk, wish.blocks_per_chunk, bytes(DIGEST_NBYTES))
    return -(-capacity_for(-(-disk // wish.blocks_per_chunk), fmt) // _MIB) * _MIB
