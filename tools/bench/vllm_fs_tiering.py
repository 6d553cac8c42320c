"""vLLM's own tiering on a CPU, to be measured beside: its spec refuses that platform, so its copies are memmoves here.

Everything else is vLLM's: its primary tier, its fs tier, its lookups and promotions. For
models with one KV cache group, a chunk of one block, and one rank.
"""

from __future__ import annotations

import time

import numpy as np
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvstore.copier import move_each


class CpuTieringSpec(TieringOffloadingSpec):
    """``TieringOffloadingSpec`` with a worker that needs no GPU."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            if self.blocks_per_chunk != 1 or len(kv_caches.group_data_refs) != 1:
                raise ValueError("only one KV cache group, in chunks of one block, is measured")
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = MemmoveWorker(kv_caches, region)
        return self._worker


class MemmoveWorker(OffloadingWorker):
    """Copies at once, with the same memmoves as `connectors.pages`."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pairs = [
            (cache.tensor, cache.page_size_bytes, region.create_next_worker_view(cache.page_size_bytes))
            for cache in kv_caches.tensors
        ]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        assert isinstance(dst_spec, CPULoadStoreSpec)
        return self._copy(
            job_id, np.asarray(src_spec.block_ids, dtype=np.int64), dst_spec.chunk_ids.astype(np.int64), to_host=True
        )

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        return self._copy(
            job_id, np.asarray(dst_spec.block_ids, dtype=np.int64), src_spec.chunk_ids.astype(np.int64), to_host=False
        )

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        return  # all copies have ended

    def shutdown(self) -> None:
        self._pairs.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, blocks: np.ndarray, chunks: np.ndarray, *, to_host: bool) -> bool:
        start, nbytes = time.monotonic(), 0
        for cache, page_nbytes, host in self._pairs:
            in_cache = (cache.data_ptr() + blocks * cache.stride(0) * cache.element_size()).tolist()
            on_host = (host.data_ptr() + chunks * host.stride(0)).tolist()
            targets, sources = (on_host, in_cache) if to_host else (in_cache, on_host)
            move_each(targets, sources, page_nbytes)
            nbytes += len(blocks) * page_nbytes
        self._done.append(TransferResult(job_id, True, nbytes, time.monotonic() - start))
        return True
