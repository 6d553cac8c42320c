"""Bad days of a real vLLM engine: whatever happens to storage and servers, tokens are those that computing gives."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError
from tests.engines.engine import NEEDS_VLLM, Engine, blocks, make_llama, offloading, prompt, same, shared_storage
from tests.stores import IDENTITY

pytestmark = NEEDS_VLLM
LENGTHS = (6000, 1500, 700, 130)
PROMPTS = [prompt(i, n) for i, n in enumerate(LENGTHS)]
SETTINGS: dict[str, Any] = {"max_model_len": 8192, "max_num_batched_tokens": 2048}
ALL = [blocks(n) for n in LENGTHS]
NONE = [0] * len(LENGTHS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Engine]:
    """No connector."""
    engine = Engine("plain", tmp_path_factory.mktemp("plain"), model)
    yield engine.load(None, **SETTINGS)
    engine.stop()


@pytest.fixture(scope="module")
def wanted(plain: Engine) -> list[dict[str, Any]]:
    return plain.generate(*PROMPTS, max_tokens=16)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own, so that it can be filled."""
    path = tmp_path_factory.mktemp("storage")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640m,mode=0700", "kv", str(path)], check=False)
    yield path
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", str(path)], check=False)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, model: Path, storage: Path) -> Iterator[Engine]:
    """Disk and shared path, and host memory for one long prompt."""
    shared = {"shared_storage_path": str(storage / "shared"), "shared_capacity_bytes": 512 << 20}
    engine = Engine("engine", tmp_path_factory.mktemp("engine"), model)
    yield engine.load(offloading(storage, **shared, load_timeout_s=20.0), **SETTINGS)
    engine.stop()


def from_storage(engine: Engine) -> list[dict[str, Any]]:
    """With neither the engine's cache nor host memory."""
    engine.settle(must_store=False)
    engine.ask("forget_host")
    assert engine.ask("reset", connector=False)
    return engine.generate(*PROMPTS, max_tokens=16)


def heals(engine: Engine, wanted: list[dict[str, Any]], timeout_s: float = 90.0) -> None:
    """All comes from storage again, and is right at any time until then."""
    deadline = time.monotonic() + timeout_s
    while True:
        answers = from_storage(engine)
        same(answers, wanted)
        if cached(answers) == ALL:
            return
        assert time.monotonic() < deadline, f"storage did not come back: {cached(answers)}"


def cached(answers: list[dict[str, Any]]) -> list[int]:
    return [answer["cached"] for answer in answers]


def test_long_prompts_in_chunks(engine: Engine, wanted: list[dict[str, Any]]) -> None:
    same(engine.generate(*PROMPTS, max_tokens=16), wanted)
    warm = from_storage(engine)
    assert cached(warm) == ALL
    same(warm, wanted)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100::4096] = bytes(byte ^ 1 for byte in content[100::4096])
    with file.open("r+b") as f:
        f.write(content)


def truncate(file: Path) -> None:
    with file.open("r+b") as f:
        f.truncate(min(file.stat().st_size // 2, 4 << 20))


@pytest.mark.parametrize("spoil", [flip, truncate, Path.unlink], ids=["flipped", "truncated", "deleted"])
def test_spoiled_files(
    engine: Engine, storage: Path, wanted: list[dict[str, Any]], spoil: Callable[[Path], None]
) -> None:
    heals(engine, wanted)
    for file in (storage / "disk" / "data", *(storage / "shared").rglob("*.safetensors")):
        spoil(file)
    met = from_storage(engine)
    same(met, wanted)
    assert cached(met) != ALL
    heals(engine, wanted)


def test_a_full_disk(engine: Engine, storage: Path, wanted: list[dict[str, Any]]) -> None:
    filler = storage / "filler"
    try:
        with filler.open("wb") as f:
            try:
                while f.write(bytes(1 << 20)):
                    f.flush()
            except OSError:
                assert shutil.disk_usage(storage).free < 1 << 20
            else:
                raise AssertionError("it never filled up")
    finally:
        assert filler.exists()
    others = [prompt(100 + i, 1500) for i in range(3)]
    first = engine.generate(*others)
    engine.settle(must_store=False)
    engine.ask("forget_host")
    assert engine.ask("reset", connector=False)
    same(engine.generate(*others), first)
    same(engine.generate(*PROMPTS, max_tokens=16), wanted)
    filler.unlink()
    heals(engine, wanted)


def test_storage_removed_and_put_back(engine: Engine, storage: Path, wanted: list[dict[str, Any]]) -> None:
    heals(engine, wanted)
    engine.settle(must_store=False)
    for name in ("disk", "shared"):
        (storage / name).rename(storage / f"{name}-away")
    same(from_storage(engine), wanted)
    engine.settle(must_store=False)
    for name in ("disk", "shared"):
        shutil.rmtree(storage / name, ignore_errors=True)
        (storage / f"{name}-away").rename(storage / name)
    heals(engine, wanted)


def test_fifty_random_aborts(engine: Engine, wanted: list[dict[str, Any]]) -> None:
    rng = random.Random(0)
    for i in range(50):
        if i % 10 == 0:
            engine.settle(must_store=False)
            engine.ask("forget_host")
        engine.ask("reset", connector=False)
        chosen = rng.sample(PROMPTS, rng.randint(1, 4))
        engine.ask("abort", prompts=[ids[: rng.randint(1, len(ids))] for ids in chosen], steps=rng.randint(0, 4))
    assert engine.settle(must_store=False)["host"]["pinned_blocks"] == 0  # write-behind drops what comes too fast
    same(from_storage(engine), wanted)


def test_servers_killed(wanted: list[dict[str, Any]], tmp_path: Path, model: Path) -> None:
    """The prefill server dies while it stores, the decode server while it answers; another one answers."""
    files = set(Path("/dev/shm").iterdir())
    transfer = shared_storage(tmp_path, "kv_producer")
    producer = Engine("producer", tmp_path, model).load(transfer, **SETTINGS)
    consumer = Engine("consumer", tmp_path, model).load(shared_storage(tmp_path, "kv_consumer"), **SETTINGS)
    hand_over = producer.hand_over(PROMPTS[1])
    producer._child.send("generate", prompts=[PROMPTS[0]], max_tokens=64)
    time.sleep(0.2)
    producer._child.kill()
    promised = {"kvstore": {**hand_over["kvstore@KVStoreSharedStorageConnector"], "num_blocks": ALL[0] // 128}}
    start = time.monotonic()
    (answer,) = consumer.generate(PROMPTS[0], max_tokens=16, transfer_params=promised)
    same([answer], wanted[:1])
    assert time.monotonic() - start < 60
    (answer,) = consumer.generate(PROMPTS[1], max_tokens=16, transfer_params=hand_over)
    assert answer["cached"] == ALL[1]
    same([answer], wanted[1:2])
    consumer._child.send("generate", prompts=PROMPTS, max_tokens=64)
    time.sleep(0.3)
    consumer._child.kill()
    again = Engine("again", tmp_path, model).load(shared_storage(tmp_path, "kv_both"), **SETTINGS)
    same(again.generate(*PROMPTS, max_tokens=16), wanted)
    assert again.settle()["host"]["pinned_blocks"] == 0
    again.stop()
    left = set(Path("/dev/shm").iterdir()) - files
    assert not [file for file in left if "kvstore" in file.name]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"shared_storage_path": None}, "shared_storage_path: not set"),
        ({"shared_capacity_bytes": None}, "shared_capacity_bytes: not set"),
        ({"shared_capacity_bytes": "much"}, "shared_capacity_bytes: 'much'"),
        ({"eviction_policy": "best"}, "eviction_policy: 'best'"),
        ({"load_timeout_s": -1}, "load_timeout_s: -1"),
        ({"disk_path": "/x"}, "disk_path: give it and disk_capacity_bytes"),
        ({"disk_path": "/x", "disk_capacity_bytes": 1 << 30, "disk_on_mismatch": "merge"}, "disk_on_mismatch: 'merge'"),
        ({"num_cpu_blocks": 0}, "num_cpu_blocks: 0"),
        ({"num_cpu_blocks": True}, "num_cpu_blocks: True"),
        ({"cpu_bytes_to_use": 5}, "num_cpu_blocks: give it or cpu_bytes_to_use"),
        ({"integrity_key_file": "/nowhere/key"}, "integrity_key_file"),
        ({"path": "/x"}, "path: not known"),
    ],
)
def test_a_wrong_setting_names_the_key(change: dict[str, Any], key: str, tmp_path: Path) -> None:
    """As a connector reads them at the start; `test_vllm` has a start that they stop."""
    from connectors.shared_storage import SharedStorageScheduler
    from connectors.vllm.settings import Settings

    given = {**shared_storage(tmp_path, "kv_both")["kv_connector_extra_config"], **change}
    extra = {name: value for name, value in given.items() if value is not None}

    def start() -> None:
        settings = Settings.of(extra, ("shared_storage_path", "shared_capacity_bytes"))
        config = settings.store_config(IDENTITY, default_host_nbytes=1 << 20, event_log_blocks=0)
        SharedStorageScheduler(config, 1).close()

    with pytest.raises(ConfigError, match=key):
        start()
