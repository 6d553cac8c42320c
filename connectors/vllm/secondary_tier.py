"""`KVStoreTier`: our disk and shared tiers below vLLM's own OffloadingConnector.

vLLM's primary tier is host memory; a `SecondaryTierManager` takes chunks of it and brings them
back. Whatever waits runs in threads: one looks up (vLLM's own `AsyncLookupManager`), one
stores, some load. What cannot be loaded, verified and in time, is reported as failed, and
vLLM computes it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import vllm
from numpy.typing import NDArray
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
    make_offload_key,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobId, JobResult, SecondaryTierManager, TransferJob

from connectors.staged_tiers import StagedTiers
from connectors.tier_sampler import TierSampler
from connectors.vllm.events import EVENT_LOG_BLOCKS
from connectors.vllm.identity import device_text, revision_of_name
from connectors.vllm.metrics import offloading_metrics, offloading_stats
from connectors.vllm.settings import Settings, named_in
from kvstore.identity import KVIdentity, Placement
from kvstore.keys import BLOCK_HASH_NBYTES, BlockKey
from kvstore.layout import DTYPES, KVLayout

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.config import OffloadingConfig
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

logger = logging.getLogger(__name__)

_WHERE: Final = "secondary_tiers"
_EXCLUDED: Final = ("block_size", "num_cpu_blocks")  # vLLM's chunks are what is stored
_STAGING_NBYTES: Final = 1 << 30
_LOADERS: Final = 2
_Transfer = Callable[[list[BlockKey], list[int], float], NDArray[np.bool_]]
_LOCALITY: Final = {"disk": Locality.LOCAL, "shared": Locality.REMOTE}


class KVStoreTier(SecondaryTierManager):
    """Chunks of vLLM's host memory on disk and on a shared path.

    Settings are those of our connectors (`connectors.vllm.settings.Settings`) that are about
    lower tiers; ``cpu_bytes_to_use`` is the staging memory that chunks pass through.

    Raises:
        ConfigError: a setting is wrong, or a directory holds another identity.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        enable_kv_events: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._has_events = enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events
        with named_in(_WHERE):
            settings = Settings.of(extra, (), _EXCLUDED)
            config = settings.store_config(
                _identity(offloading_spec.config, settings.model_revision),
                default_host_nbytes=_STAGING_NBYTES,
                event_log_blocks=EVENT_LOG_BLOCKS if self._has_events else 0,
            )
            self._tiers = StagedTiers(config, np.asarray(primary_kv_view).view(np.uint8))
        self._timeout_s = config.load_timeout_s
        self._lookups = _Lookups(tier_type, self._tiers, self._timeout_s)
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="kvstore-tier-load")
        self._storer = ThreadPoolExecutor(1, thread_name_prefix="kvstore-tier-store")
        self._jobs: dict[JobId, Future[_Done]] = {}
        self._sampler = TierSampler(self._tiers.stats, self._tiers.take_events, EVENT_LOG_BLOCKS)

    # -- what vLLM asks; its scheduler's thread, which must not wait

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._lookups.lookup(key, req_context)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(self._storer, job_metadata, self._tiers.store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(self._loaders, job_metadata, self._tiers.load)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        ended = [number for number, future in self._jobs.items() if future.done()]
        return [self._result(number, self._jobs.pop(number).result()) for number in ended]

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._lookups.flush()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.cleanup(req_context.req_id)

    def take_events(self) -> Iterable[OffloadingEvent]:
        for event in self._sampler.take_events() if self._has_events else ():
            keys = [make_offload_key(key.block_hash, key.group) for key in event.keys]
            yield OffloadingEvent(
                keys=keys,
                medium=Medium.STORAGE,
                removed=event.kind != "stored",
                locality=_LOCALITY[event.tier],
                ownership=f"kvstore.{event.tier}",
            )

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return offloading_metrics()

    def get_stats(self) -> OffloadingConnectorStats | None:
        changed = self._sampler.take()
        return None if changed is None else offloading_stats(changed)

    # -- control

    def drain_jobs(self) -> None:
        """Wait for what is under way, which has deadlines; and as vLLM does this when its caches are
        reset, for instance for new weights, never again find what was stored before."""
        for future in list(self._jobs.values()):
            future.exception()
        self._tiers.reset()

    def shutdown(self) -> None:
        self._sampler.close()
        for pool in (self._loaders, self._storer):
            pool.shutdown(wait=True, cancel_futures=True)
        self._lookups.shutdown()
        self._tiers.close()

    # -- inside

    def _submit(self, pool: ThreadPoolExecutor, job: TransferJob, run: _Transfer) -> None:
        keys = [_block_key(key) for key in job.keys]
        rows, deadline = job.chunk_ids.tolist(), time.monotonic() + self._timeout_s

        def done() -> _Done:
            start = time.monotonic()
            try:
                ok = run(keys, rows, deadline).tolist()
            except Exception:  # what was to be loaded is computed instead
                logger.exception("%s: a transfer of %d chunks failed", self.tier_type, len(keys))
                ok = [False] * len(keys)
            return _Done(list(job.keys), ok, time.monotonic() - start, job.is_promotion)

        self._has_events &= all(map(_is_sha256, job.keys))  # vLLM would not know other hashes again
        self._jobs[job.job_id] = pool.submit(done)

    def _result(self, number: JobId, done: _Done) -> JobResult:
        good = [key for key, ok in zip(done.keys, done.ok, strict=True) if ok]
        if done.is_promotion and len(good) < len(done.keys):
            self._lookups.mark_miss([key for key, ok in zip(done.keys, done.ok, strict=True) if not ok])
        return JobResult(
            job_id=number,
            success=len(good) == len(done.keys),
            successful_keys=tuple(good) if done.is_promotion else None,
            transfer_time=done.seconds,
            transfer_bytes=len(good) * self._tiers.config.identity.layout.block_nbytes,
        )


@dataclass(frozen=True, slots=True)
class _Done:
    """A transfer that has ended: which of its chunks were stored, or loaded."""

    keys: list[OffloadKey]
    ok: list[bool]
    seconds: float
    is_promotion: bool


class _Lookups(AsyncLookupManager):
    """Which chunks are there; asked by a thread, and remembered as long as a request wants to know."""

    def __init__(self, tier_type: str, tiers: StagedTiers, timeout_s: float) -> None:
        super().__init__(tier_type)
        self._tiers, self._timeout_s = tiers, timeout_s

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        found: list[bool] = self._tiers.contains(
            [_block_key(key) for key in keys], time.monotonic() + self._timeout_s
        ).tolist()
        return found


def _is_sha256(key: OffloadKey) -> bool:
    return len(get_offload_block_hash(key)) == BLOCK_HASH_NBYTES


def _block_key(key: OffloadKey) -> BlockKey:
    """vLLM's key of a chunk as ours; of hashes that are not SHA-256 (``prefix_caching_hash_algo``), a digest."""
    block_hash = get_offload_block_hash(key)
    if not _is_sha256(key):
        block_hash = hashlib.sha256(block_hash).digest()
    return BlockKey.of(block_hash, get_offload_group_idx(key))


def _identity(config: OffloadingConfig, revision: str | None) -> KVIdentity:
    """What a tier is told of its engine. A chunk is one block, of which all layers and ranks are one piece."""
    name, parallel = config.model.name, config.parallel
    tokens = config.groups[0].tokens_per_block * config.cache.blocks_per_chunk
    ranks = 1 if config.replicated_layout else parallel.world_size
    nbytes = config.worker_kv_bytes_per_block * config.cache.blocks_per_chunk * ranks
    dtype = DTYPES.get(config.model.dtype, DTYPES["uint8"])
    if nbytes % (tokens * dtype.itemsize):
        tokens, dtype = 1, DTYPES["uint8"]
    return KVIdentity(
        model=Path(name).name if Path(name).is_dir() else name,
        revision=revision or revision_of_name(name),
        layout=KVLayout(
            num_layers=1, kv_dim=1, num_kv_heads=1, block_size=tokens, dtype=dtype,
            head_size=nbytes // (tokens * dtype.itemsize),
        ),
        kv_scales=config.model.dtype if config.model.dtype.startswith("fp8") else "",
        group_kind="; ".join(
            f"{group.group_id}: {len(group.layer_names)} layers, {group.tokens_per_block} tokens a block"
            for group in config.groups
        ),
        placement=Placement(
            tp_size=parallel.tp_size,
            pp_size=parallel.pp_size,
            byte_layout=f"vllm {'.'.join(vllm.__version__.split('.')[:2])} {device_text()} "
            f"{config.kv_cache_layout} {'canonical' if config.canonical_layout else 'by rank'}, "
            f"{config.cache.blocks_per_chunk} blocks, {ranks} ranks, dcp {parallel.dcp_size}, pcp {parallel.pcp_size}",
        ),
    )  # fmt: skip
