"""`kvstore explain`: each reason for a miss, made to happen in a real store, is named."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore import HostTierConfig, JournalConfig, StoreConfig, TieredStore, hash_blocks
from kvstore.journal_view import JournalView
from tests.small import IDENTITY, LAYOUT, NUM_BLOCKS, small_blocks, small_config, small_keys
from tests.tools.test_cli import kvstore, kvstore_json


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    (tmp_path / "prompt.json").write_text(json.dumps(list(range(NUM_BLOCKS * LAYOUT.block_size + 1))))
    config = small_config(disk=tmp_path / "kv/disk", shared=tmp_path / "kv/shared")
    return dataclasses.replace(config, journal=JournalConfig(path=str(tmp_path / "journal")))


def why(tmp_path: Path, *arguments: object, journal: bool = True) -> dict[str, list[str]]:
    """By tier, block after block."""
    chosen = arguments or ("--tokens", tmp_path / "prompt.json")
    known = ("--journal", tmp_path / "journal") if journal else ()
    found = kvstore_json("explain", tmp_path / "kv", *chosen, *known)
    return {tier: [block["tiers"][tier]["why"] for block in found["blocks"]] for tier in found["blocks"][0]["tiers"]}


def put(config: StoreConfig, act: Callable[[TieredStore], object] | None = None) -> None:
    with TieredStore(config) as store:
        assert store.put(small_keys(config.identity), small_blocks()) == NUM_BLOCKS
        assert store.flush()
        if act is not None:
            act(store)


def test_stored(config: StoreConfig, tmp_path: Path) -> None:
    put(config)
    assert why(tmp_path) == {"host": ["ended"] * 12, "disk": ["stored"] * 12, "shared": ["stored"] * 12}
    assert why(tmp_path, journal=False) == {"disk": ["stored"] * 12, "shared": ["stored"] * 12}
    code, out, _ = kvstore("explain", tmp_path / "kv", "--tokens", tmp_path / "prompt.json")
    assert code == 0
    assert "12 of 12 blocks would be a hit now" in out
    assert "0 to 11" in out
    assert "without --journal" in out


def test_in_memory_of_a_running_store(config: StoreConfig, tmp_path: Path) -> None:
    with TieredStore(config) as store:
        store.put(small_keys(), small_blocks())
        store.take_events()  # what has happened is in the journal now
        assert why(tmp_path)["host"] == ["stored"] * 12


def test_never_stored(config: StoreConfig, tmp_path: Path) -> None:
    put(config, lambda store: store.asked(small_keys(), {}, request_id="r1", num_tokens=49))
    other = tmp_path / "other.json"
    other.write_text(json.dumps([*range(16), *range(900, 932)]))
    found = why(tmp_path, "--tokens", other)
    assert (
        found["disk"] == ["stored"] * 4 + ["unknown"] * 8
    )  # nobody asked for these: they may be older than the journal
    assert found["host"] == ["ended"] * 4 + ["never stored"] * 8
    with TieredStore(config) as store:
        keys = hash_blocks([*range(16), *range(900, 932)], LAYOUT.block_size, IDENTITY)
        store.asked(keys, {"disk": 4}, request_id="r2", num_tokens=48)
    assert why(tmp_path, "--tokens", other)["disk"] == ["stored"] * 4 + ["never stored"] * 8


def test_evicted(config: StoreConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, host=HostTierConfig(num_blocks=4))
    with TieredStore(config) as store:
        store.put(small_keys(), small_blocks())
        assert store.flush()
        store.take_events()
        found = why(tmp_path)
        assert sorted(found["host"]) == ["evicted"] * 8 + ["stored"] * 4
    code, out, _ = kvstore(
        "explain", tmp_path / "kv", "--tokens", tmp_path / "prompt.json", "--journal", tmp_path / "journal"
    )
    assert code == 0
    assert "evicted" in out
    assert "its tier was full" in out


def test_purged_and_reset(config: StoreConfig, tmp_path: Path) -> None:
    put(config, lambda store: store.purge(small_keys()[2:4]))
    found = why(tmp_path)
    assert found["disk"] == ["stored"] * 2 + ["purged"] * 2 + ["stored"] * 8
    assert found["shared"] == ["stored"] * 2 + ["purged"] * 2 + ["stored"] * 8
    blocks = kvstore_json("explain", tmp_path / "kv", "--tokens", tmp_path / "prompt.json")["blocks"]
    assert [block["is_usable"] for block in blocks] == [True] * 2 + [False] * 10

    def reset(store: TieredStore) -> None:
        store.reset()
        time.sleep(0.6)

    put(config, reset)
    found = why(tmp_path)
    assert set(found["disk"]) <= {"reset", "epoch"}
    assert set(found["shared"]) == {"epoch"}


def test_damaged(config: StoreConfig, tmp_path: Path) -> None:
    put(config)
    with (tmp_path / "kv/disk/data").open("r+b") as f:
        f.seek(10)
        f.write(b"\xff\x00\xff")
    found = why(tmp_path)
    assert found["disk"].count("corrupt") == 2
    assert found["disk"].count("stored") == 10
    with TieredStore(dataclasses.replace(config, shared=None)) as store:
        store.get(small_keys(), small_blocks())
    assert why(tmp_path)["disk"].count("corrupt") == 2  # dropped by the store, which has told its journal


def test_gone_without_a_word(config: StoreConfig, tmp_path: Path) -> None:
    put(config)
    for file in (tmp_path / "kv/shared").rglob("*.safetensors"):
        file.unlink()
    assert why(tmp_path)["shared"] == ["gone"] * 12


def test_another_identity(config: StoreConfig, tmp_path: Path) -> None:
    old = dataclasses.replace(IDENTITY, revision="0" * 40)
    put(dataclasses.replace(config, identity=old, disk=None))
    with TieredStore(dataclasses.replace(config, disk=None)) as store:
        store.asked(small_keys(), {}, num_tokens=48)
    assert why(tmp_path)["shared"] == ["identity"] * 12
    _, out, _ = kvstore(
        "explain", tmp_path / "kv", "--tokens", tmp_path / "prompt.json", "--journal", tmp_path / "journal"
    )
    assert f"revision '{'0' * 40}', not '{'r' * 40}'" in " ".join(out.split())


def test_another_tenant(config: StoreConfig, tmp_path: Path) -> None:
    keys = hash_blocks(range(48), LAYOUT.block_size, IDENTITY, tenant="alice")
    with TieredStore(config) as store:
        store.put(keys, small_blocks())
        assert store.flush()
    prompt = ("--tokens", tmp_path / "prompt.json")
    assert set(why(tmp_path, *prompt)["disk"]) == {"unknown"}
    assert why(tmp_path, *prompt, "--other-tenant", "alice")["disk"] == ["tenant"] * 12
    assert why(tmp_path, *prompt, "--tenant", "alice")["disk"] == ["stored"] * 12
    assert b"alice" not in b"".join(p.read_bytes() for p in (tmp_path / "journal").iterdir())


def test_a_request_then_and_now(config: StoreConfig, tmp_path: Path) -> None:
    keys = small_keys()

    def ask(store: TieredStore) -> None:
        store.asked(keys, {"host": 3, "disk": 4}, request_id="cmpl-7-abc", num_tokens=49, waited_s=0.25)

    put(config, ask)
    found = kvstore_json("explain", tmp_path / "kv", "--request", "cmpl-7", "--journal", tmp_path / "journal")
    assert [block["then"] for block in found["blocks"]] == ["host"] * 3 + ["disk"] * 4 + ["computed"] * 5
    assert found["asked"]["request"] == "cmpl-7-abc"
    assert found["asked"]["hits"] == {"host": 3, "disk": 4}
    assert found["usable_blocks"] == 12
    assert found["notes"] == ["the last 1 tokens fill no block, and are always computed"]
    _, out, _ = kvstore("explain", tmp_path / "kv", "--request", "cmpl-7", "--journal", tmp_path / "journal")
    assert "waited 250 ms" in out


def test_a_key(config: StoreConfig, tmp_path: Path) -> None:
    def ask_and_purge(store: TieredStore) -> None:
        store.asked(small_keys()[:1], {})
        store.purge(small_keys()[:1])

    put(config, ask_and_purge)
    assert why(tmp_path, "--key", str(small_keys()[0])[:12])["disk"] == ["purged"]
    assert why(tmp_path, "--key", str(small_keys()[1]))["disk"] == ["purged"]  # of the same chunk
    assert why(tmp_path, "--key", str(small_keys()[5]))["disk"] == ["stored"]


def test_a_key_is_explained_by_the_identities_that_have_it(config: StoreConfig, tmp_path: Path) -> None:
    """Not by whichever is described first."""
    names = ("model-A", "model-B")
    for name in names:
        put(dataclasses.replace(config, identity=dataclasses.replace(IDENTITY, model=name), disk=None))
    for name in names:
        key = small_keys(dataclasses.replace(IDENTITY, model=name))[0]
        found = kvstore_json("explain", tmp_path / "kv", "--key", key)
        assert (found["model"], found["blocks"][0]["tiers"]["shared"]["why"]) == (name, "stored")
        assert found["usable_blocks"] == 1
        other = next(n for n in names if n != name)
        found = kvstore_json("explain", tmp_path / "kv", "--key", key, "--model", other)
        assert (found["model"], found["blocks"][0]["tiers"]["shared"]["why"]) == (other, "identity")
        assert f"model '{name}', not '{other}'" in found["blocks"][0]["tiers"]["shared"]["detail"]


def test_a_key_of_several_models(config: StoreConfig, tmp_path: Path) -> None:
    """As vLLM makes them of one tokenizer: all are told, or the one that is asked for."""
    for name in ("model-A", "model-B"):
        other = dataclasses.replace(config, identity=dataclasses.replace(IDENTITY, model=name), disk=None, journal=None)
        with TieredStore(other) as store:
            assert store.put(small_keys(), small_blocks()) == NUM_BLOCKS
            assert store.flush()
    found = kvstore_json("explain", tmp_path / "kv", "--key", small_keys()[3])
    assert set(found["model"].split(", ")) == {"model-A", "model-B"}
    (detail,) = (block["tiers"]["shared"]["detail"] for block in found["blocks"])
    assert detail == f"stored for model-A@{'r' * 12}, model-B@{'r' * 12}"
    found = kvstore_json("explain", tmp_path / "kv", "--key", small_keys()[3], "--model", "model-b")
    assert found["model"] == "model-B"
    assert found["blocks"][0]["tiers"]["shared"] == {"why": "stored", "detail": "stored"}


def test_keys_are_no_prompt(config: StoreConfig, tmp_path: Path) -> None:
    """One is of use whatever becomes of another."""
    put(config, lambda store: store.purge(small_keys()[:2]))
    options = [part for i in (0, 5) for part in ("--key", small_keys()[i])]
    found = kvstore_json("explain", tmp_path / "kv", *options)
    assert [block["is_usable"] for block in found["blocks"]] == [False, True]
    _, out, _ = kvstore("explain", tmp_path / "kv", *options)
    assert "behind a miss" not in out and "tokens" not in out


def test_late_is_only_what_a_tier_had(config: StoreConfig, tmp_path: Path) -> None:
    keys = small_keys()
    with TieredStore(config) as store:
        assert store.put(keys[:6], small_blocks()[:6]) == 6
        assert store.flush()
        store.take_events()
        time.sleep(0.01)
        store.asked(keys, {"host": 2}, request_id="late", num_tokens=48, waited_s=0.25, is_late=True)
        store.asked(keys, {"host": 2}, request_id="in time", num_tokens=48)
        assert store.put(keys, small_blocks()) == NUM_BLOCKS  # what was computed then: it was not there before
        assert store.flush()
    at = ("--journal", tmp_path / "journal")
    found = kvstore_json("explain", tmp_path / "kv", "--request", "late", *at)
    assert [block["then"] for block in found["blocks"]] == ["host"] * 2 + ["late"] * 4 + ["computed"] * 6
    found = kvstore_json("explain", tmp_path / "kv", "--request", "in time", *at)
    assert [block["then"] for block in found["blocks"]] == ["host"] * 2 + ["computed"] * 10


def test_a_salt_is_asked_for_once(config: StoreConfig, tmp_path: Path) -> None:
    put(config, lambda store: store.asked(small_keys(), {}, request_id="r1", num_tokens=49))
    other = tmp_path / "other.json"
    other.write_text(json.dumps([*range(16), *range(900, 932)]))
    asked = ("explain", tmp_path / "kv", "--tokens", other, "--journal", tmp_path / "journal")
    assert any("--other-tenant" in note for note in kvstore_json(*asked)["notes"])
    assert not any("--other-tenant" in note for note in kvstore_json(*asked, "--other-tenant", "alice")["notes"])


def test_a_request_of_another_model(config: StoreConfig, tmp_path: Path) -> None:
    put(config, lambda store: store.asked(small_keys(), {}, request_id="r1", num_tokens=49))
    asked = ("explain", tmp_path / "kv", "--request", "r1", "--journal", tmp_path / "journal", "--model")
    assert kvstore(*asked, "test")[0] == 0
    code, _, err = kvstore(*asked, "gpt")
    assert (code, "no model 'gpt' here" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --key"),
        (["--request", "x"], "give --journal too"),
        (["--request", "nobody", "--journal", "journal"], "is not in the journal"),
        (["--request", "", "--journal", "journal"], "2 requests begin with"),
        (["--key", "abcdef", "--journal", "journal"], "is stored here, or in the journal"),
        (["--tokens", "prompt.json", "--journal", "kv"], "holds no journal"),
        (["--tokens", "prompt.json", "--model", "gpt"], "no model 'gpt' here; there are: test-model"),
    ],
)
def test_what_is_wrong_is_said(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    def ask(store: TieredStore) -> None:
        for name in ("a", "b"):
            store.asked(small_keys(), {}, request_id=name)

    put(config, ask)
    monkeypatch.chdir(tmp_path)
    code, _, err = kvstore("explain", tmp_path / "kv", *arguments)
    assert (code, said in err) == (2, True), err


# -- the other commands by request and by tenant


def requests(config: StoreConfig) -> None:
    """Two tenants have each stored a prompt; one's answer is a block longer."""
    with TieredStore(config) as store:
        for salt in ("alice", "bob"):
            keys = hash_blocks(range(48), LAYOUT.block_size, IDENTITY, tenant=salt)
            assert store.put(keys, small_blocks()) == 12
            store.asked(keys[:10], {}, request_id=f"of-{salt}", tenant=salt, num_tokens=41)
            store.ended(keys, request_id=f"of-{salt}", tenant=salt)
        assert store.flush()


def test_dump_and_purge_by_request(config: StoreConfig, tmp_path: Path) -> None:
    requests(config)
    journal: tuple[Any, ...] = ("--journal", tmp_path / "journal")
    dumped = kvstore_json("dump", tmp_path / "kv", "--request", "of-bob", *journal, "--out", tmp_path / "x.safetensors")
    assert dumped["blocks"] == 12
    removed = kvstore_json("purge", tmp_path / "kv", "--request", "of-bob", *journal, "--yes")
    assert sum(row["blocks"] for row in removed["removed"]) == 24
    code, _, err = kvstore(
        "dump", tmp_path / "kv", "--request", "of-bob", *journal, "--out", tmp_path / "y.safetensors"
    )
    assert (code, "nothing of this prompt" in err) == (2, True)


@pytest.mark.parametrize("by_digest", [False, True])
def test_purge_a_tenant(config: StoreConfig, tmp_path: Path, by_digest: bool) -> None:
    requests(config)
    journal: tuple[Any, ...] = ("--journal", tmp_path / "journal")
    tenant = "alice"
    if by_digest:
        tenant = next(r.tenant for r in JournalView.of(tmp_path / "journal").requests if r.request_id == "of-alice")
    kvstore_json("purge", tmp_path / "kv", "--of-tenant", tenant, *journal, "--yes")
    prompt = ("--tokens", tmp_path / "prompt.json")
    assert "stored" not in why(tmp_path, *prompt, "--tenant", "alice")["disk"]  # the answer's blocks are gone too
    assert why(tmp_path, *prompt, "--tenant", "bob")["disk"] == ["stored"] * 12
    code, _, err = kvstore("purge", tmp_path / "kv", "--of-tenant", "carol", *journal, "--yes")
    assert (code, "no requests of 'carol'" in err) == (2, True)
    code, _, err = kvstore("purge", tmp_path / "kv", "--of-tenant", "alice", "--yes")
    assert (code, "give a salt, and --journal too" in err) == (2, True)
