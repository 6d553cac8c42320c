"""`kvstore plan`: known answers, the store's own policies, traces that are none, and a million requests."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import BlockKey, HostTierConfig, KVIdentity, StoreConfig, TieredStore
from kvstore.errors import ConfigError
from kvstore.slot import SlotFormat
from kvstore.tiers.disk import num_disk_slots
from tests.journals import serve
from tests.small import IDENTITY, LAYOUT, small_config
from tests.tools.test_cli import kvstore, kvstore_json
from tools.plan.plan import Question, plan_of
from tools.plan.rates import BEST, HitRates
from tools.plan.simulate import hits_at_best, hits_by_policy
from tools.plan.trace import Trace, read_source, read_trace

ROOT = Path(__file__).resolve().parents[2]


def trace_of(requests: Iterable[list[int]]) -> Trace:
    requests = list(requests)
    ids = np.array([block for ids in requests for block in ids], dtype=np.int64)
    return Trace(ids, np.concatenate(([0], np.cumsum([len(ids) for ids in requests]))).astype(np.int64))


def write(path: Path, requests: Iterable[list[int]]) -> Path:
    path.write_text("\n".join(json.dumps({"timestamp": 0, "hash_ids": ids}) for ids in requests))
    return path


def conversations(num_requests: int, seed: int = 0) -> list[list[int]]:
    """Prompts that grow turn by turn, of several users; all begin with one block."""
    rng = np.random.default_rng(seed)
    users: list[list[int]] = [[0] for _ in range(40)]
    requests, following = [], 1
    for user in rng.zipf(1.3, num_requests) % len(users):
        if len(users[user]) > 30:
            users[user] = [0]
        n = int(rng.integers(1, 5))
        users[user] = [*users[user], *range(following, following + n)]
        following += n
        requests.append(users[user])
    return requests


def hits_by_stack_distance(trace: Trace, capacities: Iterable[int]) -> list[int]:
    rates = HitRates(trace)
    return [round(rates.at("lru", n) * len(trace.ids)) for n in capacities]


def naive_lru(trace: Trace, capacity: int) -> int:
    """A list, most recent first; a request's head is more recent than its tail."""
    stack: list[int] = []
    hits = 0
    for ids in trace.requests():
        there = set(stack[:capacity])
        hits += next((i for i, block in enumerate(ids) if block not in there), len(ids))
        stack = [*ids, *(block for block in stack if block not in ids)]
    return hits


def test_answers_by_hand() -> None:
    trace = trace_of([[1, 2, 3], [1, 2, 4], [5, 6], [1, 2, 3]])
    assert hits_by_stack_distance(trace, [1, 2, 4, 6, 9]) == [1, 2, 4, 5, 5]
    assert [hits_by_policy(trace, "lru", n) for n in (6, 9)] == [5, 5]
    assert [hits_at_best(trace, n) for n in (1, 2, 3, 9)] == [2, 4, 5, 5]


def prefix(path: list[int]) -> list[int]:
    """A node of a tree, and all above it."""
    return [int("1" + "".join(map(str, path[:i]))) for i in range(1, len(path) + 1)]


prefixes = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(prefix), min_size=1, max_size=30)


@settings(deadline=None)
@given(prefixes, st.integers(6, 40))
def test_lru_three_ways(requests: list[list[int]], capacity: int) -> None:
    """By stack distances, by the store's own policy, and by a list; no policy beats the best."""
    trace = trace_of(requests)
    (by_distance,) = hits_by_stack_distance(trace, [capacity])
    assert by_distance == naive_lru(trace, capacity) == hits_by_policy(trace, "lru", capacity)
    best = hits_at_best(trace, capacity)
    assert all(hits_by_policy(trace, name, capacity) <= best for name in ("lru", "arc", "s3fifo"))


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_the_store_hits_what_was_simulated(policy: str) -> None:
    requests = conversations(300)
    config = dataclasses.replace(small_config(), host=HostTierConfig(num_blocks=60, eviction_policy=policy))
    with TieredStore(dataclasses.replace(config, blocks_per_chunk=1)) as store:
        hits = 0
        for ids in requests:
            keys = [BlockKey.of(block.to_bytes(32, "little")) for block in ids]
            blocks = torch.zeros(len(keys), *LAYOUT.block_shape, dtype=LAYOUT.dtype)
            n = store.get(keys, blocks)
            store.put(keys, blocks[n:], first_block=n)
            hits += n
    assert hits == hits_by_policy(trace_of(requests), policy, 60)


def test_arc_is_not_lru() -> None:
    """What a prompt brings behind a head that was there is used once, and does not push out what was used again."""
    requests, following = [], 100
    for round_ in range(60):
        requests += [[0, *range(1, 10)]] * (2 if round_ == 0 else 1)
        for _ in range(6):
            requests.append([0, *range(following, following + 6)])
            following += 6
    trace = trace_of(requests)
    assert hits_by_policy(trace, "arc", 30) > 1.5 * hits_by_policy(trace, "lru", 30)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(1, 4))
def test_the_best_is_the_best(blocks: list[int], capacity: int) -> None:
    """Against trying everything: after each use, any set of so many blocks may be kept."""
    trace = trace_of([[block] for block in blocks])
    reach = {frozenset[int](): 0}
    for block in blocks:
        following: dict[frozenset[int], int] = {}
        for held, hits in reach.items():
            hits += block in held
            for kept in [held | {block}, held, *(held - {one} | {block} for one in held)]:
                if len(kept) <= capacity:
                    following[kept] = max(following.get(kept, -1), hits)
        reach = following
    assert hits_at_best(trace, capacity) == max(reach.values())


def test_a_sample_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trace_of(conversations(6000))
    question = Question(capacities=(100, 400, 1000), policies=("lru", "arc"))
    exact = plan_of(whole, question)
    monkeypatch.setattr("tools.plan.rates.MOST_ACCESSES", len(whole.ids) // 4)
    monkeypatch.setattr("tools.plan.rates.RUN_ACCESSES", len(whole.ids) // 5)
    sample = plan_of(whole, question)
    assert sample.sampled < 0.25 and sample.distinct_blocks == exact.distinct_blocks
    for name in ("lru", "arc", BEST):
        assert sample.hit_rates[name] == pytest.approx(exact.hit_rates[name], abs=0.06)
    assert sample.most == pytest.approx(exact.most, abs=0.03)


def test_target_and_budgets(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", conversations(800))
    found = kvstore_json("plan", path, "--target-hit-rate", 0.5, "--block-bytes", "1KiB", "--host-budget", "64KiB",
                         "--disk-budget", "1MiB")  # fmt: skip
    assert found["budget_blocks"] == {"host": 64, "disk": 1024}
    trace = read_trace(path)
    total = len(trace.ids)
    assert found["budgets"]["host"]["arc"] == pytest.approx(hits_by_policy(trace, "arc", 64) / total)
    for advice in found["advice"]:
        n = advice["num_blocks"]
        assert hits_by_policy(trace, advice["policy"], n) / total >= 0.5
        assert advice["nbytes"] == n * 1024
        assert hits_by_policy(trace, advice["policy"], n * 97 // 100 - 1) / total < 0.5 or advice["policy"] != "lru"
    assert found["hit_rates"][BEST] == sorted(found["hit_rates"][BEST])
    out = kvstore("plan", path, "--target-hit-rate", 0.999)[1]
    assert "cannot be reached" in out


def test_the_setting_is_what_a_store_and_vllm_take(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", conversations(800))
    found = kvstore_json("plan", path, "--target-hit-rate", 0.5, "--block-bytes", "1KiB", "--host-budget", "64KiB")
    setting, least = found["setting"], min(found["advice"], key=lambda advice: advice["num_blocks"])
    assert (setting["eviction_policy"], setting["disk_blocks"]) == (least["policy"], least["num_blocks"])
    assert setting["num_cpu_blocks"] == 64 and setting["hit_rate"] >= 0.5 > setting["host_hit_rate"]
    out = kvstore("plan", path, "--target-hit-rate", 0.5, "--block-bytes", "1KiB", "--host-budget", "64KiB")[1]
    for_vllm, for_store = (line.partition(": ")[2] for line in out.splitlines()[-2:])
    taken, known = json.loads(for_vllm), (ROOT / "connectors/vllm/settings.py").read_text()
    assert all(f"\n    {name}: " in known for name in taken)
    assert (taken["num_cpu_blocks"], taken["eviction_policy"]) == (64, least["policy"])
    variables = dict(part.split("=") for part in for_store.split())
    identity = {f"KVSTORE_{k}": v for k, v in from_identity(IDENTITY)}
    config = StoreConfig.from_env({**variables, **identity, "KVSTORE_DISK_PATH": "/d"})
    assert config.disk is not None and config.host.num_blocks == 64
    assert config.disk.capacity_nbytes == setting["disk_capacity_bytes"] == taken["disk_capacity_bytes"]
    fmt = SlotFormat(1024, 1, bytes(16))
    assert num_disk_slots(config.disk, fmt) >= least["num_blocks"]


def from_identity(identity: KVIdentity) -> Iterable[tuple[str, str]]:
    yield from (("IDENTITY_MODEL", identity.model), ("IDENTITY_REVISION", identity.revision))
    for name in ("num_layers", "num_kv_heads", "head_size", "block_size"):
        yield f"IDENTITY_LAYOUT_{name.upper()}", str(getattr(identity.layout, name))
    yield "IDENTITY_LAYOUT_DTYPE", identity.layout.stored_dtype.name


def test_a_setting_says_what_it_gains_over_the_present_one(tmp_path: Path) -> None:
    serve(tmp_path / "kv", tmp_path / "journal")
    found = kvstore_json("plan", tmp_path / "journal", "--target-hit-rate", 0.7)
    present, setting = found["setting"]["present"], found["setting"]
    assert present["host_blocks"] == 48 and present["disk_blocks"] > 1000 and 0 < present["measured"] < 1
    trace, _ = read_source(tmp_path / "journal")
    assert setting["now_hit_rate"] == pytest.approx(HitRates(trace).at("lru", present["disk_blocks"]))
    assert setting["num_cpu_blocks"] * 2 == setting["host_blocks"]  # chunks of two blocks
    out = kvstore("plan", tmp_path / "journal")[1]
    assert "points over the present sizes (blocks: host 48, disk" in out and "90% of what can be hits" in out


def test_lru_reaches_its_target_with_not_a_block_less(tmp_path: Path) -> None:
    trace = trace_of(conversations(800))
    for target in (0.2, 0.4, 0.6):
        n = HitRates(trace).least("lru", target, lambda _: None)
        assert n is not None
        assert hits_by_policy(trace, "lru", n) >= target * len(trace.ids) > hits_by_policy(trace, "lru", n - 1)


def test_chart(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", conversations(200))
    kvstore_json("plan", path, "--chart", tmp_path / "plan.png", "--block-bytes", "1MiB", "--host-budget", "100MiB")
    data = (tmp_path / "plan.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n") and int.from_bytes(data[16:20], "big") == 1320


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"hash_ids": [-1]}',
        '{"hash_ids": [NaN]}',
        '{"hash_ids": [1.5]}',
        '{"hash_ids": ["1"]}',
        '{"hash_ids": [99999999999999999999999]}',
        '{"hash_ids": null}',
        '{"hash_ids": [1]}\n{"hash_ids": [1',
        '{"hash_ids": ' + "[" * 100_000,
        '{"hash_ids": [' + "1," * (1 << 20) + "1]}",
        '{"hash_ids": [1], "more": ' + '{"a":' * 5000,
        "\x00\xff",
    ],
    ids=range(14),
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    code, _, err = kvstore("plan", path)
    assert code == 2 and "TRACE" in err and "Traceback" not in err


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.plan.trace.MAX_LINE_NBYTES", 1000)
    path = tmp_path / "trace"
    path.write_text('{"hash_ids": [1]}\n' + " " * 2000)
    with pytest.raises(ConfigError, match="line 2 .* is longer"):
        read_trace(path)
    with pytest.raises(ConfigError, match="nowhere"):
        read_trace(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--capacities", "0"),
        ("--capacities", "x"),
        ("--capacities", ",".join(str(i + 1) for i in range(70))),
        ("--policies", "none"),
        ("--policies", ""),
        ("--target-hit-rate", "2"),
        ("--host-budget", "-1"),
        ("--block-bytes", "many"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, option: str, value: str) -> None:
    path = write(tmp_path / "trace", [[1], [2]])
    code, _, err = kvstore("plan", path, f"{option}={value}")
    assert code == 2 and ("--" in err or "eviction_policy" in err or "capacity" in err)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_requests(tmp_path: Path) -> None:
    requests = conversations(20_000)
    with (tmp_path / "trace").open("w") as file:
        for i in range(50):  # one day after the other; all begin with one block
            for ids in requests:
                file.write(json.dumps({"hash_ids": [0, *(block + i * 10_000_000 for block in ids[1:])]}) + "\n")
    start = time.process_time()
    found = kvstore_json("plan", tmp_path / "trace", "--target-hit-rate", 0.5)
    seconds = time.process_time() - start
    print(f"{found['requests']} requests, {found['blocks_asked']} blocks: {seconds:.0f} s")
    assert found["requests"] == 1_000_000 and found["sampled"] < 0.1
    assert seconds < 240  # 120 on an idle machine
