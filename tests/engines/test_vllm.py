"""The connectors in a real vLLM engine: what is loaded gives the tokens that computing gives."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvstore.journal_entries import Request
from kvstore.journal_view import JournalView
from kvstore.journal_writer import tenant_digest
from kvstore.keys import BlockKey
from tests.engines.engine import (
    BLOCK,
    NEEDS_VLLM,
    Engine,
    blocks,
    make_llama,
    offloading,
    prompt,
    same,
    shared_storage,
)
from tests.foreign import tensors_of
from tests.tools.test_cli import kvstore_json
from tests.waiting import wait_until
from tools.demo_process import ChildError

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Iterator[Engine]:
    """Host memory and disk; prompts are prefilled in chunks of 512 tokens."""
    engine = Engine("engine", tmp_path_factory.mktemp("engine"), model)
    shared = {"shared_storage_path": str(data / "shared"), "shared_capacity_bytes": 256 << 20}
    journal = {"journal_path": str(data / "journal")}
    yield engine.load(offloading(data, **shared, **journal), max_num_batched_tokens=512)
    engine.stop()


LENGTHS = (1500, 700, 130, 100, 2049, 129, 256)


@pytest.fixture(scope="module")
def cold(engine: Engine) -> list[dict[str, Any]]:
    """What computing gives."""
    answers = engine.generate(*(prompt(i, n) for i, n in enumerate(LENGTHS)))
    assert [answer["cached"] for answer in answers] == [0] * len(LENGTHS)
    return answers


def test_host_memory_answers(engine: Engine, cold: list[dict[str, Any]]) -> None:
    warm = engine.from_store(*(prompt(i, n) for i, n in enumerate(LENGTHS)))
    assert [answer["cached"] for answer in warm] == [blocks(n) for n in LENGTHS]
    same(warm, cold)
    assert engine.settle()["host"]["pinned_blocks"] == 0


def test_a_hit_begins_in_the_engines_own_cache_and_goes_on_in_ours(engine: Engine, cold: list[dict[str, Any]]) -> None:
    engine.settle()
    assert engine.ask("reset", connector=False)
    engine.generate(prompt(4, 2049)[:700])  # the engine has five blocks of it now
    before = engine.settle()["host"]["hit_blocks"]
    (warm,) = engine.generate(prompt(4, 2049))
    assert warm["cached"] == 2048
    assert engine.settle()["host"]["hit_blocks"] - before == 16 - 5
    same([warm], cold[4:5])


def test_requests_in_one_batch_share_a_prefix(engine: Engine) -> None:
    head = prompt(50, 1000)
    prompts = [[*head, *prompt(51 + i, 300)] for i in range(4)]
    wanted = engine.generate(*prompts)
    warm = engine.from_store(*prompts)
    assert [answer["cached"] for answer in warm] == [blocks(1300)] * 4
    same(warm, wanted)


def test_an_answer_is_stored_too(engine: Engine) -> None:
    """What was generated is a prefix of the next turn."""
    first = prompt(60, 120)
    (answer,) = engine.generate(first, max_tokens=150)
    (turn,) = engine.from_store([*first, *answer["tokens"], 7])
    assert turn["cached"] == 256


def test_another_salt_is_another_prefix(engine: Engine) -> None:
    (cold,) = engine.generate(prompt(70, 600), cache_salt="a")
    (other,) = engine.from_store(prompt(70, 600), cache_salt="b")
    (warm,) = engine.from_store(prompt(70, 600), cache_salt="a")
    assert (other["cached"], warm["cached"]) == (0, blocks(600))
    same([warm], [cold])


def test_the_journal_tells_who_asked_and_what_was_found(engine: Engine, data: Path) -> None:
    def requests(salt: str) -> list[Request]:
        return [r for r in JournalView.of(data / "journal").requests if r.tenant == tenant_digest(salt)]

    ids = prompt(71, 600)
    engine.generate(ids, cache_salt="journal")
    engine.generate(ids, cache_salt="journal")
    engine.from_store(ids, cache_salt="journal")
    wait_until(lambda: len(requests("journal")) == 3)
    first, second, third = requests("journal")
    assert first.num_blocks == second.num_blocks == third.num_blocks == 4
    assert (first.num_tokens, first.hits) == (600, {})
    assert second.hits == {"device": 4}
    assert third.hits == {"host": 4}
    view = JournalView.of(data / "journal")
    keys = [BlockKey.of(block_hash) for block_hash in view.path_to(third.last)]
    assert [move.why for key in keys if (move := view.move_of("host", key))] == [""] * 4
    assert view.opened[0].who == "SharedStorageScheduler"
    assert not view.problems


def test_the_command_sees_what_the_engine_has_stored(
    engine: Engine, cold: list[dict[str, Any]], data: Path, tmp_path: Path, model: Path
) -> None:
    """Beside the running engine: a prompt's KV is what Hugging Face computes, and everything is told of it."""
    ids, journal = prompt(72, 700), ("--journal", data / "journal")
    engine.generate(ids)
    engine.from_store(ids)
    wait_until(lambda: JournalView.of(data / "journal").requests[-1].hits == {"host": 5})
    (tmp_path / "ids").write_text(json.dumps(ids))
    found = kvstore_json("ls", data / "disk", *journal)
    asked = next(one for one in found["asked"] if one["namespace"] == found["namespaces"][0]["namespace"])
    assert found["namespaces"][0]["blocks"] >= 5 and asked["requests"] > 2 and asked["hit_blocks"] >= 5
    dumped = kvstore_json("dump", data / "disk", "--tokens", tmp_path / "ids", "--out", tmp_path / "out")
    assert dumped["blocks"] == 5
    with torch.no_grad():
        llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        layers = llama(input_ids=torch.tensor([ids])).past_key_values.layers
    found, _ = tensors_of(tmp_path / "out")
    for i, layer in enumerate(layers):
        for name, wanted in (("key", layer.keys), ("value", layer.values)):
            wanted_thd = wanted[0].transpose(0, 1)[: 5 * BLOCK]
            torch.testing.assert_close(found[f"layers.{i}.{name}"], wanted_thd, rtol=1e-3, atol=1e-4)
    explained = kvstore_json("explain", data, "--tokens", tmp_path / "ids", *journal)
    assert [block["tiers"]["disk"]["why"] for block in explained["blocks"]] == ["stored"] * 5
    assert [block["tiers"]["host"]["why"] for block in explained["blocks"]] == ["stored"] * 5
    tree = kvstore_json("ls", data / "disk", "--tree", *journal, "--limit", "100")["prefixes"]
    assert any(branch["key"] == explained["blocks"][0]["key"][:64] for branch in tree)
    last = JournalView.of(data / "journal").requests[-1]
    then = kvstore_json("explain", data, "--request", last.request_id, *journal)["blocks"]
    assert [block["then"] for block in then] == ["host"] * 5
    (shown, *_) = kvstore_json("inspect", data / "disk", explained["blocks"][0]["key"])["blocks"]
    assert shown["ok"] and shown["statistics"][0]["nan"] == 0
    assert kvstore_json("report", data, *journal, "--out", tmp_path / "r.html")["problems"] == []
    assert kvstore_json("top", data / "journal")["tiers"][0]["state"] == "on"
    assert kvstore_json("plan", data / "journal")["requests"] > 2


def test_metrics_say_what_each_tier_did(engine: Engine, cold: list[dict[str, Any]]) -> None:
    """Counters come by a thread, and with a step of the engine."""
    engine.from_store(prompt(0, 1500))
    name = "{KVStoreOffloadingConnector,%s}"
    found = engine.metrics(lambda found: found.get(f"hit_blocks{name % 'host'}", 0) > 0)
    assert found[f"on{name % 'disk'}"] == 1
    assert found[f"written_bytes{name % 'disk'}"] > 0
    assert found[f"capacity_bytes{name % 'shared'}"] == 256 << 20
    assert found[f"corrupt_chunks{name % 'disk'}"] == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_aborted_requests_leave_nothing_pinned(engine: Engine, cold: list[dict[str, Any]], steps: int) -> None:
    engine.settle()
    engine.ask("reset", connector=False)
    engine.ask("abort", prompts=[prompt(i, n) for i, n in enumerate(LENGTHS)], steps=steps)
    assert engine.settle()["host"]["pinned_blocks"] == 0
    same(engine.from_store(prompt(0, 1500)), cold[:1])


def test_disk_answers_after_a_restart(
    engine: Engine, cold: list[dict[str, Any]], data: Path, tmp_path: Path, model: Path
) -> None:
    engine.settle()
    endpoint = f"ipc://{tmp_path}/events"
    journal = tmp_path / "journal"
    transfer = offloading(data, journal_path=str(journal))
    other = Engine("restarted", tmp_path, model).load(transfer, events_endpoint=endpoint)
    other.ask("follow_events", endpoint=endpoint)
    try:
        warm = other.generate(*(prompt(i, n) for i, n in enumerate(LENGTHS)))
        assert [answer["cached"] for answer in warm] == [blocks(n) for n in LENGTHS]
        same(warm, cold)
        stats = other.settle()
        assert stats["host"]["pinned_blocks"] == 0
        assert stats["disk"]["hit_blocks"] >= sum(blocks(n) // BLOCK for n in LENGTHS)
        sources = {source: n for source, n in other.ask("hit_sources").items() if n}
        assert sources == {"disk": sum(blocks(n) for n in LENGTHS)}
        wait_until(lambda: len(JournalView.of(journal).requests) == len(LENGTHS))
        asked = sorted(JournalView.of(journal).requests, key=lambda request: int(request.request_id.partition("-")[0]))
        assert [request.hits for request in asked] == [
            {"disk": n} if (n := blocks(m) // BLOCK) else {} for m in LENGTHS
        ]
        events: list[list[Any]] = []
        other.generate(prompt(98, 300))

        def told() -> bool:
            other.generate([5, 6, 7], max_tokens=1)
            events.extend(other.ask("events"))
            return (
                sum(e[3] for e in events if e[:3] == ["BlockStored", "CPU", "kvstore.host"])
                >= stats["host"]["used_blocks"] + 2
            )

        wait_until(told)
        on_disk = sum(e[3] for e in events if e[:3] == ["BlockStored", "STORAGE", "kvstore.disk"])
        assert on_disk >= stats["disk"]["used_blocks"]
        other.settle()  # two servers, as data-parallel ranks do, share one directory all the while
        assert engine.generate(prompt(98, 300))[0]["cached"] == blocks(300)
    finally:
        other.stop()


def test_a_shared_path_answers_another_engine(
    engine: Engine, cold: list[dict[str, Any]], data: Path, tmp_path: Path, model: Path
) -> None:
    engine.settle()
    consumer = Engine("consumer", tmp_path, model).load(shared_storage(data, "kv_consumer"))
    try:
        prompts = [prompt(i, n) for i, n in enumerate(LENGTHS)]
        warm = consumer.generate(*prompts)
        assert [answer["cached"] for answer in warm] == [blocks(n) for n in LENGTHS]
        same(warm, cold)
        consumer.generate(prompt(99, 500))
        assert consumer.settle()["shared"]["written_nbytes"] == 0  # it only loads
    finally:
        consumer.stop()


def test_two_ranks_miss_what_one_has_stored_and_hit_their_own(
    engine: Engine, cold: list[dict[str, Any]], data: Path, tmp_path: Path, model: Path
) -> None:
    """Half of the heads each: a block of one rank's would be garbage."""
    engine.settle()
    two = Engine("two-ranks", tmp_path, model, {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    transfer = shared_storage(data, "kv_both", disk_path=str(tmp_path / "disk"), disk_capacity_bytes=256 << 20)
    two.load(transfer, tensor_parallel_size=2)
    try:
        prompts = [prompt(i, n) for i, n in enumerate(LENGTHS)]
        first = two.generate(*prompts)
        assert [answer["cached"] for answer in first] == [0] * len(LENGTHS)
        same(first, cold)
        same(two.from_store(*prompts), first)
        two.settle()
        two.ask("forget_host")
        warm = two.from_store(*prompts)
        assert [answer["cached"] for answer in warm] == [blocks(n) for n in LENGTHS]
        same(warm, first)
        assert two.settle()["host"]["pinned_blocks"] == 0
    finally:
        two.stop()


@pytest.mark.parametrize("first", ["offloading", "shared"])
def test_as_children_of_vllms_multi_connector(
    first: str, cold: list[dict[str, Any]], tmp_path: Path, model: Path
) -> None:
    """Both store; the first that has tokens loads."""
    children = [offloading(tmp_path), shared_storage(tmp_path, "kv_both")]
    children = children if first == "offloading" else children[::-1]
    multi = {"kv_connector": "MultiConnector", "kv_role": "kv_both"}
    engine = Engine("multi", tmp_path, model).load({**multi, "kv_connector_extra_config": {"connectors": children}})
    try:
        prompts = [prompt(i, n) for i, n in enumerate(LENGTHS)]
        same(engine.generate(*prompts), cold)
        warm = engine.from_store(*prompts)
        assert [answer["cached"] for answer in warm] == [blocks(n) for n in LENGTHS]
        same(warm, cold)
        tiers = engine.ask("settle")["stats"]
        assert [stats["host"]["hit_blocks"] > 0 for stats in tiers] == [True, False]
        assert [stats["host"]["pinned_blocks"] for stats in tiers] == [0, 0]
        assert all(stats[name]["written_nbytes"] > 0 for stats in tiers for name in stats if name != "host")
        found = engine.metrics(lambda found: len([name for name in found if name.startswith("on{")]) == 4)
        assert found["on{KVStoreSharedStorageConnector,shared}"] == found["on{KVStoreOffloadingConnector,disk}"] == 1
    finally:
        engine.stop()


def test_what_was_damaged_is_computed_and_healed_by_the_request_that_met_it(
    engine: Engine, cold: list[dict[str, Any]], data: Path
) -> None:
    engine.settle()
    damage([data / "disk" / "data", *(data / "shared").rglob("*.safetensors")])
    engine.ask("forget_host")
    met = engine.from_store(prompt(0, 1500), prompt(1, 700))
    assert [answer["cached"] for answer in met] == [0, 0]
    same(met, cold[:2])
    assert engine.settle()["disk"]["corrupt_chunks"] > 0
    engine.ask("forget_host")
    healed = engine.from_store(prompt(0, 1500), prompt(1, 700))
    assert [answer["cached"] for answer in healed] == [blocks(1500), blocks(700)]
    same(healed, cold[:2])


def damage(files: list[Path]) -> None:
    """Flip a byte in every 4 KiB."""
    assert len(files) > 1
    for file in files:
        content = bytearray(file.read_bytes())
        content[100::4096] = bytes(byte ^ 1 for byte in content[100::4096])
        with file.open("r+b") as f:
            f.write(content)


def test_the_epoch_ends_when_weights_change_in_place(engine: Engine, model: Path) -> None:
    """Must run after the tests that reuse what was stored: it is gone then."""
    (before,) = engine.generate(prompt(80, 1000))
    engine.settle()
    engine.ask("change_weights")
    assert engine.ask("reset", connector=True)
    (after,) = engine.generate(prompt(80, 1000))
    assert after["cached"] == 0
    assert after["logprobs"] != pytest.approx(before["logprobs"], abs=1e-2)
    (warm,) = engine.from_store(prompt(80, 1000))
    assert warm["cached"] == blocks(1000)
    same([warm], [after])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"num_cpu_block": 10}, "num_cpu_block: not known; allowed: block_size, num_cpu_blocks"),
        ({"block_size": 100}, "give a multiple of the engine's block size, 128 tokens"),
    ],
)
def test_a_wrong_setting_stops_the_start(extra: dict[str, Any], message: str, tmp_path: Path, model: Path) -> None:
    engine = Engine("refused", tmp_path, model)
    try:
        with pytest.raises(ChildError):
            engine.load(offloading(tmp_path, **extra))
        assert message in (tmp_path / "refused.stderr").read_text()
    finally:
        engine._child.kill()


@pytest.mark.parametrize("page", ["README.md", "docs/vllm.md"])
def test_the_settings_in_the_docs_are_taken(page: str) -> None:
    from vllm.config import KVTransferConfig

    import connectors.vllm
    from connectors.vllm.settings import Settings

    text = (Path(__file__).parents[2] / page).read_text()
    found = [KVTransferConfig(**json.loads(part)) for part in re.findall(r"'(\{\"kv_connector.*?\})'", text, re.DOTALL)]
    assert found
    for config in found:
        connector = getattr(connectors.vllm, str(config.kv_connector))
        Settings.of(config.kv_connector_extra_config, connector._required)


def test_every_setting_is_in_the_docs() -> None:
    from connectors.vllm.settings import Settings

    text = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    rows = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))))
    assert {f.name for f in dataclasses.fields(Settings)} <= rows
