"""`KVStoreTier` below vLLM's own tiering: driven by its real `TieringOffloadingManager`, and in an engine."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.errors import ConfigError
from tests.engines.engine import NEEDS_VLLM, Engine, blocks, make_llama, prompt, same
from tests.waiting import wait_until

pytestmark = NEEDS_VLLM
WHERE = {"type": "KVStoreTier", "module_path": "connectors.vllm.secondary_tier"}
BLOCK_NBYTES = 8 * 4096 - 512  # so that rows are padded
PRIMARY_BLOCKS = 64
GROUPS = 2


def tier(path: Path, **settings: Any) -> dict[str, Any]:
    lower = {
        "disk_path": str(path / "disk"),
        "disk_capacity_bytes": 64 << 20,
        "shared_storage_path": str(path / "shared"),
        "shared_capacity_bytes": 64 << 20,
        "cpu_bytes_to_use": 4 << 20,
        "model_revision": "r1",
    }
    return {**WHERE, **lower, **settings}


class Tiering:
    """vLLM's scheduler side; rows of its primary tier are filled and read here instead of by its workers."""

    def __init__(self, name: str, *tiers: dict[str, Any]) -> None:
        from vllm.v1.kv_offload.config import (
            OffloadingCacheConfig,
            OffloadingConfig,
            OffloadingGroupConfig,
            OffloadingModelConfig,
            OffloadingParallelConfig,
        )
        from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

        parallel = OffloadingParallelConfig(
            rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
            data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False,
        )  # fmt: skip
        self.spec = TieringOffloadingSpec(
            OffloadingConfig(
                groups=tuple(OffloadingGroupConfig(16, (f"layer.{i}",), i) for i in range(GROUPS)),
                worker_kv_bytes_per_block=BLOCK_NBYTES,
                enable_kv_cache_events=True,
                extra_config={"cpu_bytes_to_use": PRIMARY_BLOCKS * 8 * 4096, "secondary_tiers": list(tiers)},
                engine_id=f"kvstore-test-{name}",
                model=OffloadingModelConfig("model", "bfloat16"),
                cache=OffloadingCacheConfig(16, 1),
                parallel=parallel,
            )
        )
        self.manager: Any = self.spec.get_manager()
        self.rows = np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)
        assert self.rows.shape == (PRIMARY_BLOCKS, 8 * 4096)
        self.requests: dict[str, Any] = {}
        self.num_steps = 0

    @property
    def tier(self) -> Any:
        return self.manager.secondary_tiers[0]

    def begin(self, name: str) -> Any:
        from vllm.v1.kv_offload.base import ReqContext

        context = self.requests[name] = ReqContext(name)
        self.manager.on_new_request(context)
        return context

    def end(self, name: str) -> None:
        self.manager.on_request_finished(self.requests.pop(name))

    def step(self) -> None:
        from vllm.v1.kv_offload.base import ScheduleEndContext

        self.manager.on_schedule_end(ScheduleEndContext((), ()))
        self.num_steps += 1

    def store(self, name: str, keys: Sequence[bytes]) -> None:
        """Compute chunks, in a request of its own; done when all tiers are through with them."""
        context = self.begin(name)
        output = self.manager.prepare_store(keys, context)
        for key, row in zip(output.keys_to_store, output.store_spec.chunk_ids.tolist(), strict=True):
            self.rows[row] = content(key)
        if output.keys_to_store:
            self.manager.complete_store(output.keys_to_store, context)
        wait_until(lambda: self.step() or not self.manager.has_pending_work())
        self.end(name)

    def find(self, name: str, keys: Sequence[bytes], *, backwards: bool = False) -> list[bool]:
        """Which are hits in the end, asked as vLLM's scheduler asks: again and again, up to the first miss."""
        from vllm.v1.kv_offload.base import LookupResult

        context = self.requests.get(name) or self.begin(name)
        deadline = time.monotonic() + 20
        while True:
            results = []
            for key in keys[::-1] if backwards else keys:
                results.append(self.manager.lookup(key, context))
                if results[-1] is LookupResult.MISS and not backwards:
                    break
            if not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(results):
                break
            assert time.monotonic() < deadline, results
            self.step()
            time.sleep(0.002)
        self.step()
        hits = [result is LookupResult.HIT for result in results] + [False] * (len(keys) - len(results))
        return hits[::-1] if backwards else hits

    def load(self, name: str, keys: Sequence[bytes]) -> int:
        """Find a prefix and read it from the primary tier; how many chunks, all of which were right."""
        hits = self.find(name, keys)
        n = hits.index(False) if False in hits else len(hits)
        context = self.requests[name]
        rows = self.manager.prepare_load(keys[:n], context).chunk_ids.tolist()
        for key, row in zip(keys[:n], rows, strict=True):
            assert (self.rows[row, :BLOCK_NBYTES] == content(key)).all(), key
        self.manager.complete_load(keys[:n], context)
        self.end(name)
        return n

    def forget_primary(self) -> None:
        """Have it evict all that it holds, with nothing left below."""
        self.manager.primary_tier.reset_cache()
        self.rows[:] = 0xEE

    def durable(self, *, must_be: bool = True) -> None:
        assert self.tier._tiers.flush(20) or not must_be

    def close(self) -> None:
        del self.rows
        self.manager.shutdown()
        gc.collect()


@contextmanager
def tiering(name: str, *tiers: dict[str, Any]) -> Iterator[Tiering]:
    made = Tiering(name, *tiers)
    try:
        yield made
        wait_until(lambda: made.tier._tiers.stats()["staging"]["pinned_blocks"] == 0)  # written behind
    finally:
        made.close()


def keys_of(n: int, seed: int = 0, group: int = 0) -> list[bytes]:
    from vllm.v1.kv_offload.base import make_offload_key

    rng = np.random.default_rng(seed)
    return [make_offload_key(rng.bytes(32), group) for _ in range(n)]


def content(key: bytes) -> int:
    return key[0] ^ key[7] ^ key[-1]


def spoil(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[100::4096] = bytes(byte ^ 1 for byte in whole[100::4096])
    with file.open("r+b") as f:
        f.write(whole)


@pytest.mark.parametrize("below", ["disk", "shared"])
def test_a_new_engine_loads_what_an_earlier_one_stored(tmp_path: Path, below: str) -> None:
    keys = keys_of(40)
    with tiering("first", tier(tmp_path)) as first:
        first.store("a", keys)
        first.durable()
    other = "shared" if below == "disk" else "disk"
    (tmp_path / other).rename(tmp_path / "away")
    with tiering("second", tier(tmp_path)) as second:
        assert second.load("a", keys_of(1, seed=1)) == 0
        assert second.load("b", [*keys, *keys_of(3, seed=2)]) == 40
        stats = second.tier._tiers.stats()
        assert (stats[below]["hit_blocks"], stats[other]["hit_blocks"]) == (40, 0)


def test_more_than_staging_has_room_for(tmp_path: Path) -> None:
    keys = keys_of(60)
    with tiering("engine", tier(tmp_path, cpu_bytes_to_use=8 * 32768)) as engine:
        for i in range(0, 60, 6):
            engine.store(f"store {i}", keys[i : i + 6])
            engine.durable()
        engine.forget_primary()
        assert engine.load("a", keys) == 60
        assert engine.tier._tiers.stats()["staging"]["capacity_blocks"] < 10


def test_many_requests_at_once(tmp_path: Path) -> None:
    """Some of which end before what they asked for has come."""
    prompts = [keys_of(6, seed) for seed in range(10)]
    with tiering("engine", tier(tmp_path)) as engine:
        for i, keys in enumerate(prompts):
            engine.store(f"store {i}", keys)
        engine.durable()
        for round_ in range(20):
            engine.forget_primary()
            engine.tier._tiers._planes.forget_host()
            for i, keys in enumerate(prompts):
                context = engine.begin(f"{round_} {i}")
                for key in keys:
                    engine.manager.lookup(key, context)
            for _ in range(round_ % 4):
                engine.step()
            for i in range(0, 10, 2):
                engine.end(f"{round_} {i}")
            for i in range(1, 10, 2):
                assert engine.load(f"{round_} {i}", prompts[i]) == 6
            wait_until(lambda: engine.step() or not engine.manager.has_pending_work())
        assert not engine.tier._jobs
        assert not engine.tier._lookups._lookup_state


def test_a_sliding_window_is_found_from_its_end(tmp_path: Path) -> None:
    full, window = keys_of(20), keys_of(20, seed=1, group=1)
    with tiering("engine", tier(tmp_path)) as engine:
        engine.store("a", [*full, *window[12:16]])
        engine.durable()
        engine.forget_primary()
        engine.tier._tiers._planes.forget_host()
        context = engine.begin("b")
        for key in [*full, *window[::-1]]:
            engine.manager.lookup(key, context)
        assert engine.find("b", window, backwards=True) == [12 <= i < 16 for i in range(20)]
        assert engine.load("b", full) == 20


@pytest.mark.parametrize("change", [spoil, Path.unlink], ids=["flipped", "deleted"])
def test_what_is_damaged_is_computed_again_and_healed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    keys = keys_of(20)
    with tiering("engine", tier(tmp_path)) as engine:
        engine.store("a", keys)
        engine.durable()
        for file in (tmp_path / "disk" / "data", *(tmp_path / "shared").rglob("*.safetensors")):
            change(file)
        engine.forget_primary()
        engine.tier._tiers._planes.forget_host()
        num_left = engine.load("b", keys)
        assert num_left < 20 or change is Path.unlink  # an open file can still be read

        def is_healed() -> bool:
            engine.store("c", keys)  # what was not loaded is computed
            engine.durable(must_be=False)
            engine.forget_primary()
            engine.tier._tiers._planes.forget_host()
            return engine.load("d", keys) == 20

        wait_until(is_healed, timeout_s=60)


def test_half_of_it_is_damaged(tmp_path: Path) -> None:
    keys = keys_of(20)
    with tiering("engine", tier(tmp_path, shared_storage_path=None, shared_capacity_bytes=None)) as engine:
        engine.store("a", keys)
        engine.durable()
        data = bytearray((tmp_path / "disk" / "data").read_bytes())
        hurt = bytes([content(keys[9])]) * 4096
        at = data.find(hurt)
        with (tmp_path / "disk" / "data").open("r+b") as f:
            f.seek(at + 5)
            f.write(bytes([hurt[0] ^ 1]))
        engine.forget_primary()
        engine.tier._tiers._planes.forget_host()
        assert engine.load("b", keys) == 9
        assert engine.tier._tiers.stats()["disk"]["corrupt_chunks"] == 1


def test_a_reset_is_for_good(tmp_path: Path) -> None:
    keys = keys_of(20)
    with tiering("engine", tier(tmp_path)) as engine:
        engine.store("a", keys)
        engine.manager.reset_cache()
        engine.rows[:] = 0xEE
        assert engine.load("b", keys) == 0
        engine.store("c", keys)
        engine.durable()
        engine.forget_primary()
        assert engine.load("d", keys) == 20


def test_storage_that_is_gone_is_a_miss(tmp_path: Path) -> None:
    keys = keys_of(8)
    with tiering("engine", tier(tmp_path)) as engine:
        engine.store("a", keys)
        engine.durable()
        engine.forget_primary()
        engine.tier._tiers._planes.forget_host()
        for name in ("disk", "shared"):
            (tmp_path / name).rename(tmp_path / f"{name}-away")
        assert engine.load("b", keys) in range(9)  # open files can still be read
        engine.store("c", keys_of(8, seed=1))


def test_kv_of_another_model_is_no_hit(tmp_path: Path) -> None:
    keys = keys_of(5)
    with tiering("first", tier(tmp_path)) as first:
        first.store("a", keys)
        first.durable()
    with pytest.raises(ConfigError, match="revision"):
        Tiering("second", tier(tmp_path, model_revision="r2"))
    with tiering("third", tier(tmp_path, model_revision="r2", disk_path=str(tmp_path / "own"))) as third:
        assert third.load("a", keys) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"disk_path": 5}, "secondary_tiers.disk_path"),
        ({"disk_capacity_bytes": None}, "secondary_tiers.disk_path: give it and disk_capacity_bytes"),
        ({"root_dir": "/x"}, "secondary_tiers.root_dir: not known"),
        ({"block_size": 16}, "secondary_tiers.block_size: not known"),
        ({"eviction_policy": "best"}, "secondary_tiers.eviction_policy: 'best'"),
        ({"cpu_bytes_to_use": 10}, "secondary_tiers.cpu_bytes_to_use: 10"),
        ({"model_revision": None}, "secondary_tiers.model_revision: not set"),
    ],
    ids=str,
)
def test_a_wrong_setting_stops_the_start(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    settings = {name: value for name, value in tier(tmp_path, **change).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        Tiering("engine", settings)


def test_no_tier_at_all_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="secondary_tiers.disk"):
        Tiering("engine", {**WHERE, "model_revision": "r1"})


def test_events_and_metrics(tmp_path: Path) -> None:
    keys = keys_of(5, group=1)
    with tiering("engine", tier(tmp_path, enable_kv_events=True)) as engine:
        engine.store("a", keys)
        engine.durable()
        events: list[Any] = []
        wait_until(lambda: events.extend(engine.tier.take_events()) or len(events) >= 2)
        assert {event.ownership for event in events} == {"kvstore.disk", "kvstore.shared"}
        assert {key for event in events for key in event.keys} == set(keys)
        assert not any(event.removed for event in events)
        written: dict[tuple[str, ...], float] = {}

        def come() -> bool:
            stats = engine.tier.get_stats()
            values = {} if stats is None else stats.data["data"]
            for labels, value in values.get("vllm:kvstore_secondary_tier_written_bytes", {}).items():
                written[labels] = written.get(labels, 0) + value
            return len(written) == 3

        wait_until(come)
        assert written[("staging",)] == 5 * BLOCK_NBYTES
    definitions = type(engine.tier).build_metric_definitions({})
    assert "vllm:kvstore_secondary_tier_used_bytes" in definitions


def test_hashes_that_are_not_sha256(tmp_path: Path) -> None:
    from vllm.v1.kv_offload.base import make_offload_key

    keys = [bytes(make_offload_key(bytes([i]) * 16, 0)) for i in range(5)]
    with tiering("engine", tier(tmp_path, enable_kv_events=True)) as engine:
        engine.store("a", keys)
        engine.forget_primary()
        assert engine.load("b", keys) == 5
        assert list(engine.tier.take_events()) == []


def test_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    before, files = set(threading.enumerate()), set(Path("/dev/shm").iterdir())
    with tiering("engine", tier(tmp_path)) as engine:
        engine.store("a", keys_of(5))
    assert set(threading.enumerate()) <= before
    assert set(Path("/dev/shm").iterdir()) <= files


def test_in_an_engine(tmp_path: Path) -> None:
    """Stored by one engine, loaded by the next; the tokens are those that were computed."""
    model = make_llama(tmp_path / "model")
    prompts = [prompt(i, n) for i, n in enumerate((1500, 700, 130, 100))]
    settings = tier(tmp_path, cpu_bytes_to_use=64 << 20)
    del settings["model_revision"]
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "tools.bench.vllm_fs_tiering",
            "cpu_bytes_to_use": 256 << 20,
            "secondary_tiers": [settings],
        },
    }
    engine = Engine("first", tmp_path, model).load(transfer, max_num_batched_tokens=512)
    cold = engine.generate(*prompts)
    assert [answer["cached"] for answer in cold] == [0] * 4
    engine.ask("settle_own", seconds=3.0)
    engine.stop()
    engine = Engine("second", tmp_path, model).load(transfer, max_num_batched_tokens=512)
    warm = engine.generate(*prompts)
    assert [answer["cached"] for answer in warm] == [blocks(len(ids)) for ids in prompts]
    same(warm, cold)
    engine.stop()
