"""Our connectors hold what every connector must; and so does the example that users start from."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from connectors.base import SchedulerHalf, Stripe, WorkerHalf
from connectors.multi import MultiScheduler, MultiWorker
from connectors.offloading import OffloadingScheduler
from connectors.offloading_worker import OffloadingWorker
from connectors.shared_storage import SharedStorageScheduler
from connectors.testing import IDENTITY, Caches, ConnectorTests
from kvstore import DiskTierConfig, HostTierConfig, SharedTierConfig, StoreConfig

PAGE = Path(__file__).resolve().parents[1] / "docs/custom-connector.md"


def workers_of(caches: Caches, per_chunk: int = 1) -> list[OffloadingWorker]:
    return [OffloadingWorker(Stripe(i, len(caches)), groups, per_chunk) for i, groups in enumerate(caches)]


def config(
    host_blocks: int, *, disk: Path | None = None, shared: Path | None = None, per_chunk: int = 1
) -> StoreConfig:
    return StoreConfig(
        identity=IDENTITY,
        host=HostTierConfig(num_blocks=host_blocks),
        disk=DiskTierConfig(path=str(disk / "disk"), capacity_nbytes=1 << 20) if disk else None,
        shared=SharedTierConfig(path=str(shared / "shared"), capacity_nbytes=64 << 20) if shared else None,
        blocks_per_chunk=per_chunk,
        put_timeout_s=0.0,
    )


class TestOffloadingInMemory(ConnectorTests):
    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        return OffloadingScheduler(config(24), len(caches)), workers_of(caches)


class TestOffloadingOfTwoWorkersAndGroups(ConnectorTests):
    num_workers = 2
    num_groups = 2

    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        return OffloadingScheduler(config(48), len(caches), (None, None)), workers_of(caches)


class TestOffloadingInChunks(ConnectorTests):
    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        return OffloadingScheduler(config(24, per_chunk=4), len(caches)), workers_of(caches, 4)


class TestOffloadingToDisk(ConnectorTests):
    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        return OffloadingScheduler(config(24, disk=tmp_path), len(caches)), workers_of(caches)


class TestSharedStorage(ConnectorTests):
    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        return SharedStorageScheduler(config(24, shared=tmp_path), len(caches)), workers_of(caches)


class TestSeveralAsOne(ConnectorTests):
    num_workers = 2

    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        halves = [OffloadingScheduler(config(24), 2), SharedStorageScheduler(config(24, shared=tmp_path), 2)]
        workers = [MultiWorker(children) for children in zip(workers_of(caches), workers_of(caches), strict=True)]
        return MultiScheduler(halves), workers


def examples() -> list[str]:
    """The page's Python: a connector, the same in vLLM, and its tests."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def module_of(name: str, source: str) -> ModuleType:
    """Source as a module that others may import."""
    module = sys.modules[name] = ModuleType(name)
    exec(compile(source, str(PAGE), "exec"), vars(module))
    return module


example = module_of("memory_connector", examples()[0])
TestExample = module_of("test_memory_connector", examples()[2]).TestMemory


class TestExampleAmongOthers(ConnectorTests):
    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        halves = [example.MemoryScheduler(24, len(caches)), OffloadingScheduler(config(24, per_chunk=4), len(caches))]
        mine = [example.MemoryWorker(groups) for groups in caches]
        return MultiScheduler(halves, blocks_per_chunk=4), [
            MultiWorker(children) for children in zip(mine, workers_of(caches, 4), strict=True)
        ]


def test_the_example_is_small() -> None:
    assert examples()[0].count("\n") < 60
