"""What has changed in a store's tiers since one last looked: counters, and what came and went.

For engines that export them. Lower tiers may be slow to answer, so a thread asks them now and
then; taking what it has found waits for nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from kvstore.events import EventLog, TierEvent
from kvstore.tiers.base import TierStats

logger = logging.getLogger(__name__)

COUNTERS: Final = (
    "hit_blocks", "miss_blocks", "read_nbytes", "written_nbytes", "read_s", "write_s", "evicted_blocks",
    "corrupt_chunks", "failed_chunks", "late_chunks", "dropped_blocks",
)  # fmt: skip
GAUGES: Final = ("used_nbytes", "capacity_nbytes", "pinned_blocks", "is_on")
_JOIN_S: Final = 5.0

Sample = dict[str, dict[str, float]]
"""By tier: what counters of `COUNTERS` have grown by, and what gauges of `GAUGES` are now.
Misses by reason are counters ``miss_chunks.REASON``."""


class TierSampler:
    """Args:
    read: all tiers' stats as dicts of `TierStats`; called by a thread of this object.
    take_events: of all tiers; called likewise.
    max_event_blocks: see `EventLog`.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Mapping[str, Any]]],
        take_events: Callable[[], Iterable[TierEvent]],
        max_event_blocks: int,
        interval_s: float = 0.5,
    ) -> None:
        self._read, self._take_events, self._interval_s = read, take_events, interval_s
        self._events = EventLog(max_event_blocks)
        self._seen: dict[str, dict[str, float]] = {}
        self._latest: dict[str, dict[str, float]] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-stats", daemon=True)
        self._thread.start()

    def take(self) -> Sample | None:
        """What has changed since the last call; None where nothing new is known."""
        latest, self._latest = self._latest, None
        if latest is None:
            return None
        changed = {tier: _change(self._seen.get(tier, {}), values) for tier, values in latest.items()}
        self._seen = latest
        return changed

    def take_events(self) -> list[TierEvent]:
        """What came into tiers and left them since the last call."""
        return self._events.take()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self._latest = {tier: _values(TierStats(**stats)) for tier, stats in self._read().items()}
                for event in self._take_events():
                    self._events.add(event)
            except Exception:  # figures are not worth a server
                logger.exception("the tiers' counters could not be read")


def _values(stats: TierStats) -> dict[str, float]:
    values = {name: getattr(stats, name) for name in (*COUNTERS, *GAUGES[:-1])}
    values |= {f"miss_chunks.{reason}": n for reason, n in stats.misses_by_reason.items()}
    return {**values, "is_on": float(stats.state == "on")}


def _change(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """A counter that has fallen was started again: all of it is new."""
    change = {}
    for name, value in now.items():
        old = before.get(name, 0.0)
        change[name] = value if name in GAUGES or value < old else value - old
    return change
