"""vLLM's connector interface over the halves in `connectors.offloading`: an adapter, nothing else.

Loads are synchronous: what is promised lies verified in pinned host memory, so the workers
copy it at the start of the step that computes on (on CUDA: enqueued before it). Stores are
copied when the step has been computed, before its blocks can be reused.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from connectors.base import Asker, SchedulerHalf, Stripe, WorkerHalf
from connectors.offloading import OffloadingScheduler
from connectors.offloading_worker import OffloadingWorker
from connectors.shared_storage import SharedStorageScheduler
from connectors.tier_sampler import TierSampler
from connectors.vllm.events import EVENT_LOG_BLOCKS, kv_events
from connectors.vllm.groups import CacheGroups, UnsupportedEngineError
from connectors.vllm.hosts import check_one_host
from connectors.vllm.identity import identity_of
from connectors.vllm.metrics import TierPromMetrics, TierStatsSample
from connectors.vllm.request_keys import AdapterDigests, RequestKeys
from connectors.vllm.settings import EXTRA_CONFIG, Settings, named_in
from kvstore.identity import KVIdentity

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_GIB: Final = 1 << 30
_IDLE_WAIT_S: Final = 0.002
_HIT_SOURCES: Final = {"host": CacheHitSource.HOST, "disk": CacheHitSource.DISK, "shared": CacheHitSource.DISK}
_NULL_BLOCK: Final = 0  # vLLM's placeholder for a block that a sliding window has left


@dataclass
class StepMetadata(KVConnectorMetadata):
    step: Any  # what the scheduler half tells the worker half


@dataclass
class Reports(KVConnectorWorkerMetadata):
    """How many workers have done each job, and which jobs have failed at one."""

    reports: dict[int, int]
    failed: list[int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Reports:
        assert isinstance(other, Reports)
        total = dict(self.reports)
        for number, n in other.reports.items():
            total[number] = total.get(number, 0) + n
        return Reports(total, [*self.failed, *other.failed])


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's interface over a scheduler half and worker halves, which a subclass makes.

    ``kv_role`` says whether it stores (``kv_producer``), loads (``kv_consumer``) or both.
    """

    blocks_per_chunk = 1  # stores begin and end where so many blocks do

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config or {}
        events = vllm_config.kv_events_config
        self._event_log_blocks = EVENT_LOG_BLOCKS if events is not None and events.enable_kv_cache_events else 0
        self._groups = CacheGroups.of(vllm_config, kv_cache_config)
        self._num_workers = vllm_config.parallel_config.tensor_parallel_size
        self._block_size = self._groups.layout.block_size
        self._worker: WorkerHalf | None = None
        self._scheduler: SchedulerHalf | None = None
        self._sampler: TierSampler | None = None
        self._requests: dict[str, _Request] = {}
        self._adapters = AdapterDigests()
        self.configure(identity_of(vllm_config, kv_cache_config, self._groups, extra.get("model_revision")), extra)
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self.make_scheduler(self._num_workers, self._groups.windows)
            self._sampler = TierSampler(self._scheduler.stats, self._scheduler.take_events, EVENT_LOG_BLOCKS)

    # -- what a subclass says

    def configure(self, identity: KVIdentity, extra: Mapping[str, Any]) -> None:
        """Read ``kv_connector_extra_config``; raises ConfigError for what is wrong in it.

        Args:
            identity: of this engine's KV: what is stored must never be loaded under another.
        """

    @abstractmethod
    def make_scheduler(self, num_workers: int, windows: Sequence[int | None]) -> SchedulerHalf:
        """Once, beside the engine's scheduler. ``windows``: see `OffloadingScheduler`."""

    @abstractmethod
    def make_worker(self, stripe: Stripe, groups: Sequence[Sequence[torch.Tensor]]) -> WorkerHalf:
        """Once in every worker. ``groups``: see `OffloadingWorker`."""

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: what is not stored is computed again

    # -- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_tp_group

        groups, num_blocks = self._groups, self._kv_cache_config.num_blocks
        page_nbytes = groups.layout.layer_nbytes // groups.num_stripes
        planes = [
            [plane for name in group.layer_names for plane in planes_of(name, kv_caches[name], num_blocks, page_nbytes)]
            for group in self._kv_cache_config.kv_cache_groups
        ]
        ranks = get_tp_group()
        check_one_host(ranks)
        stripe = Stripe.of_rank(ranks.rank_in_group, ranks.world_size, groups.num_replicas)
        self._worker = self.make_worker(stripe, planes)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.load(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # loaded before the first layer

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        return  # stored once the step is computed

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.store(self._step())

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed = self._worker.take_failed_blocks() if self._worker is not None else []
        if failed and len(self._groups.windows) > 1:
            # of several groups vLLM cannot be told which blocks: better no answer than a wrong one
            raise RuntimeError(
                "KV could not be copied from host memory to the engine's cache, and with several KV cache groups "
                "vLLM cannot be told which; the log says why"
            )
        return {block for _, block in failed}

    def build_connector_worker_meta(self) -> Reports | None:
        if self._worker is None:
            return None
        failed, reports = self._worker.take_failed_jobs(), self._worker.take_reports()
        return Reports(reports, failed) if reports or failed else None

    def _step(self) -> Any:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.step

    # -- scheduler

    @property
    def scheduler(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler

    def on_new_request(self, request: Request) -> None:
        state = self._state(request)
        asker = Asker(
            request_id=request.request_id, tenant=request.cache_salt or "", adapter=state.keys.adapter or b"",
            num_tokens=request.num_prompt_tokens,
        )  # fmt: skip
        self.scheduler.asked(asker, state.keys.of_blocks(0, len(state.keys)))
        keys = state.keys.loadable(0)
        if self._kv_transfer_config.is_kv_consumer and keys[0]:
            state.expected = self.scheduler.expect(request.request_id, keys, self._told(request.kv_transfer_params))
            self.scheduler.begin(request.request_id, keys)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not self._kv_transfer_config.is_kv_consumer or request.skip_reading_prefix_cache:
            return 0, False
        state = self._state(request)
        state.first = num_computed_tokens // self._block_size
        keys = state.keys.loadable(state.first)
        if not keys[0]:
            self.scheduler.not_needed(request.request_id)
            return 0, False
        found = self.scheduler.lookup(request.request_id, keys, expected=state.expected - state.first)
        return (None if found is None else found * self._block_size), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        n = num_external_tokens // self._block_size
        if n:
            first = self._state(request).first
            ids = [_held(of_group[first : first + n]) for of_group in blocks.get_block_ids()]
            self.scheduler.load(request.request_id, ids)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self._kv_transfer_config.is_kv_producer:
            cached = scheduler_output.scheduled_cached_reqs
            computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
            computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
                if request_id in computed and request_id in self._requests:
                    self._store(request_id, computed[request_id] + num_tokens)
        wait_s = 0.0 if scheduler_output.total_num_scheduled_tokens else _IDLE_WAIT_S
        return StepMetadata(self.scheduler.end_step(wait_s=wait_s))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        reports = connector_output.kv_connector_worker_meta
        if not isinstance(reports, Reports):
            return
        if reports.failed:
            self.scheduler.failed(reports.failed)
            for state in self._requests.values():  # what is there already is not stored again
                state.stored = 0
        self.scheduler.reported(reports.reports)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A producer that was asked to (``do_remote_decode``) hands over what it has stored of the prompt."""
        state = self._requests.pop(request.request_id, None)
        if state is not None and state.stored:
            self.scheduler.ended(request.request_id, state.keys.of_blocks(0, state.stored))
        self.scheduler.forget(request.request_id)
        params = request.kv_transfer_params
        is_asked = (params or {}).get("do_remote_decode") is True
        if not is_asked or state is None or not state.stored:
            return False, None
        told = self.scheduler.hand_over(state.keys.of_blocks(0, state.stored), params)
        return False, None if told is None else {f"{name}@{type(self).__name__}": value for name, value in told.items()}

    def has_pending_push_work(self) -> bool:
        return self.scheduler.has_open_jobs()

    def reset_cache(self) -> bool | None:
        self.scheduler.reset()
        return True

    def take_events(self) -> Iterable[KVCacheEvent]:
        events = self._sampler.take_events() if self._sampler is not None else []
        return list(kv_events(events, self._block_size))

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        sources: Counter[CacheHitSource] = Counter()
        for tier, n in self.scheduler.sources(request.request_id, num_external_tokens // self._block_size).items():
            sources[_HIT_SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)] += n * self._block_size
        return dict(sources)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        sample = self._sampler.take() if self._sampler is not None else None
        return TierStatsSample(data=sample) if sample else None

    # -- either process

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return TierStatsSample(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return TierPromMetrics(cls.__name__, vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._scheduler is not None:
            self._scheduler.close()
            self._scheduler = None
        self._adapters.close()

    def _told(self, params: dict[str, Any] | None) -> dict[str, Any]:
        """What was handed over, under the names of the scheduler half. Children of a MultiConnector tell
        theirs apart; that of a connector like this one comes first."""
        told: dict[str, Any] = {}
        for key, value in (params or {}).items():
            name, _, of = key.partition("@")
            if name not in told or of == type(self).__name__:
                told[name] = value
        return told

    def _state(self, request: Request) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            adapter = self._adapters.of(request.lora_request)
            keys = RequestKeys(request, self._block_size, len(self._groups.windows), adapter)
            state = self._requests[request.request_id] = _Request(request, keys)
        return state

    def _store(self, request_id: str, num_computed_tokens: int) -> None:
        """Store the blocks that this step fills with tokens that are known: drafts may be rejected."""
        state, per_chunk = self._requests[request_id], self.blocks_per_chunk
        full = min(num_computed_tokens, state.request.num_tokens) // self._block_size
        full = min(full, len(state.keys))
        full -= full % per_chunk
        if full <= state.stored:
            return
        assert self._kv_cache_manager is not None
        blocks = self._kv_cache_manager.get_block_ids(request_id)
        self.scheduler.store(
            state.keys.of_blocks(state.stored, full), [_held(ids[state.stored : full]) for ids in blocks]
        )
        state.stored = full


class KVStoreOffloadingConnector(KVStoreConnector):
    """KV in host memory, and below it on disk and on a shared path.

    ``kv_connector_extra_config``: see `connectors.vllm.settings.Settings`.
    """

    _required: ClassVar[tuple[str, ...]] = ()
    _default_host_nbytes: ClassVar[int] = 4 * _GIB

    def configure(self, identity: KVIdentity, extra: Mapping[str, Any]) -> None:
        with named_in(EXTRA_CONFIG):
            self._store_config = Settings.of(extra, self._required).store_config(
                identity, default_host_nbytes=self._default_host_nbytes, event_log_blocks=self._event_log_blocks
            )
        self.blocks_per_chunk = self._store_config.blocks_per_chunk

    def make_scheduler(self, num_workers: int, windows: Sequence[int | None]) -> SchedulerHalf:
        half = OffloadingScheduler if self._store_config.shared is None else SharedStorageScheduler
        return half(self._store_config, num_workers, windows)

    def make_worker(self, stripe: Stripe, groups: Sequence[Sequence[torch.Tensor]]) -> WorkerHalf:
        return OffloadingWorker(stripe, groups, self.blocks_per_chunk)


class KVStoreSharedStorageConnector(KVStoreOffloadingConnector):
    """KV on a path that hosts share, written by one engine and read by others; host memory is its way there."""

    _required = ("shared_storage_path", "shared_capacity_bytes")
    _default_host_nbytes = _GIB


@dataclass
class _Request:
    """What the scheduler side knows of a request."""

    request: Request
    keys: RequestKeys
    first: int = 0  # block that the engine's own cache does not have
    stored: int = 0  # blocks
    expected: int = 0  # blocks that another engine has handed over


def _held(ids: list[int]) -> list[int | None]:
    return [None if block == _NULL_BLOCK else block for block in ids]


def planes_of(name: str, tensor: torch.Tensor, num_blocks: int, page_nbytes: int) -> list[torch.Tensor]:
    """A layer's cache as bytes: one (num_blocks, page_nbytes), or two of half a page for K and V apart.

    Raises:
        UnsupportedEngineError: a block's bytes do not lie together.
    """
    if tensor.shape[0] == num_blocks:
        planes = [tensor]
    elif tensor.ndim > 1 and tensor.shape[0] == 2 and tensor.shape[1] == num_blocks:
        planes = [tensor[0], tensor[1]]
    else:
        raise UnsupportedEngineError(f"{name}: a cache of shape {tuple(tensor.shape)} is not supported")
    views = []
    for plane in planes:
        nbytes = plane[0].numel() * plane.element_size()
        extent = sum((n - 1) * stride for n, stride in zip(plane.shape[1:], plane.stride()[1:], strict=True)) + 1
        if extent * plane.element_size() != nbytes or nbytes * len(planes) != page_nbytes:
            raise UnsupportedEngineError(f"{name}: pages of strides {plane.stride()} are not supported")
        size = plane.element_size()
        flat = torch.as_strided(plane, (num_blocks, nbytes // size), (plane.stride(0), 1), plane.storage_offset())
        views.append(flat.view(torch.uint8))
    return views
