"""The tiers' counters as vLLM's connector stats: in its log, and on its ``/metrics``."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingGaugeMetadata, OffloadingMetricMetadata

from connectors.tier_sampler import COUNTERS, GAUGES, Sample

_COUNTER_NAMES: Final = {
    "hit_blocks": ("hit_blocks", "Blocks that were loaded from the tier."),
    "miss_blocks": ("miss_blocks", "Blocks that were asked for and not in the tier."),
    "read_nbytes": ("read_bytes", "Bytes read from the tier and verified."),
    "written_nbytes": ("written_bytes", "Bytes written to the tier."),
    "read_s": ("read_seconds", "Seconds in which reads were under way."),
    "write_s": ("write_seconds", "Seconds in which writes were under way."),
    "evicted_blocks": ("evicted_blocks", "Blocks evicted to make room."),
    "corrupt_chunks": ("corrupt_chunks", "Chunks that failed to verify and were dropped."),
    "failed_chunks": ("failed_chunks", "Chunks that the storage raised an error for."),
    "late_chunks": ("late_chunks", "Chunks that came after the deadline."),
    "dropped_blocks": ("dropped_blocks", "Blocks not stored: no room, or the tier was off."),
}
_GAUGE_NAMES: Final = {
    "used_nbytes": ("used_bytes", "Bytes in use."),
    "capacity_nbytes": ("capacity_bytes", "Bytes that may be used."),
    "pinned_blocks": ("pinned_blocks", "Blocks held by loads and writes."),
    "is_on": ("on", "Whether the tier is on (1) or off or read-only (0)."),
}
assert set(_COUNTER_NAMES) == set(COUNTERS)
assert set(_GAUGE_NAMES) == set(GAUGES)


_SECONDARY: Final = "vllm:kvstore_secondary_tier_{}"


def offloading_metrics() -> dict[str, OffloadingMetricMetadata]:
    """What `KVStoreTier` exports by way of vLLM's OffloadingConnector; label ``tier``."""
    counters = {
        _SECONDARY.format(name): OffloadingCounterMetadata(text, ("tier",)) for name, text in _COUNTER_NAMES.values()
    }
    gauges = {_SECONDARY.format(name): OffloadingGaugeMetadata(text, ("tier",)) for name, text in _GAUGE_NAMES.values()}
    return {**counters, **gauges}


def offloading_stats(sample: Sample) -> OffloadingConnectorStats:
    """A sample as vLLM's OffloadingConnector takes it."""
    stats = OffloadingConnectorStats()
    for tier, values in sample.items():
        for name, value in values.items():
            if name in GAUGES:
                stats.set_gauge(_SECONDARY.format(_GAUGE_NAMES[name][0]), value, (tier,))
            elif name in COUNTERS and value:
                stats.increase_counter(_SECONDARY.format(_COUNTER_NAMES[name][0]), value, (tier,))
    return stats


class TierStatsSample(KVConnectorStats):
    """``data``: see `connectors.tier_sampler.Sample`."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for tier, values in other.data.items():
            mine = self.data.setdefault(tier, {})
            for name, value in values.items():
                mine[name] = value if name in GAUGES else mine.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log: what has happened in the interval, and how full the tiers are."""
        return {
            f"{tier}.{name}": value
            for tier, values in self.data.items()
            for name, value in values.items()
            if value and name not in ("capacity_nbytes", "is_on")
        }

    def is_empty(self) -> bool:
        return not self.data


class TierPromMetrics(KVConnectorPromMetrics):
    """``vllm:kvstore_tier_*`` with the labels ``connector`` and ``tier``, beside vLLM's own.

    Args:
        connector: the connector's name; several of them share the metrics.
    """

    _shared: ClassVar[dict[str, Any]] = {}  # by name: the registry takes each one once

    def __init__(
        self, connector: str, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._connector = connector
        self._counters = {field: self._counter(*about) for field, about in _COUNTER_NAMES.items()}
        self._gauges = {field: self._gauge(*about) for field, about in _GAUGE_NAMES.items()}
        self._misses = self._counter("miss_chunks", "Chunks that could not be had, by reason.", "reason")

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for tier, values in transfer_stats_data.items():
            labels = (*engine, self._connector, tier)
            for name, value in values.items():
                if name in self._gauges:
                    self._gauges[name].labels(*labels).set(value)
                elif name in self._counters:
                    self._counters[name].labels(*labels).inc(value)
                elif name.startswith("miss_chunks."):
                    self._misses.labels(*labels, name.partition(".")[2]).inc(value)

    def _counter(self, name: str, text: str, *labels: str) -> Any:
        return self._made(self._counter_cls, f"vllm:kvstore_tier_{name}_total", text, labels)

    def _gauge(self, name: str, text: str) -> Any:
        return self._made(self._gauge_cls, f"vllm:kvstore_tier_{name}", text, (), multiprocess_mode="mostrecent")

    def _made(self, kind: Any, name: str, text: str, labels: tuple[str, ...], **settings: str) -> Any:
        names = [*self._labelnames, "connector", "tier", *labels]
        if name not in self._shared:
            self._shared[name] = kind(name=name, documentation=text, labelnames=names, **settings)
        return self._shared[name]
