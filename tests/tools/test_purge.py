"""purge takes what meets all that was given, and nothing of another model's; it says beforehand what goes."""

from __future__ import annotations

import dataclasses
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvstore import HostTierConfig, JournalConfig, KVIdentity, SharedTierConfig, StoreConfig, TieredStore
from kvstore.journal_writer import tenant_digest
from kvstore.keys import BlockKey
from tests.journals import serve
from tests.small import IDENTITY, NUM_BLOCKS, copy_store, small_blocks, small_keys
from tests.tools.test_cli import kvstore, kvstore_json, tree

ROOT = Path(__file__).resolve().parents[2]
A = dataclasses.replace(IDENTITY, model="model-A")
B = dataclasses.replace(IDENTITY, model="model-B")


def run(path: Path, identity: KVIdentity, keys: list[BlockKey], request: str, tenant: str = "") -> None:
    """A server of a model that has served a request whose prompt has these keys, and stored them on the shared path."""
    config = StoreConfig(
        identity=identity,
        host=HostTierConfig(num_blocks=32),
        shared=SharedTierConfig(path=str(path / "kv"), capacity_nbytes=8 << 20),
        journal=JournalConfig(path=str(path / "journal")),
    )
    with TieredStore(config) as store:
        store.asked(keys, {}, request_id=request, tenant=tenant, num_tokens=4 * len(keys))
        assert store.put(keys, small_blocks()[: len(keys)]) == len(keys)
        store.ended(keys, request_id=request, tenant=tenant)
        assert store.flush()


def stored(path: Path) -> dict[str, int]:
    """Blocks by model."""
    return {row["model"]: row["blocks"] for row in kvstore_json("ls", path)["namespaces"]}


@pytest.fixture
def two_models(tmp_path: Path) -> Path:
    """Two models of one tokenizer: their keys are the same, as vLLM makes them of tokens, seed and salt."""
    run(tmp_path, A, small_keys(), "of-A", "alice")
    run(tmp_path, B, small_keys(), "of-B", "bob")
    return tmp_path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    serve(folder / "kv", folder / "journal")
    return folder


def test_a_requests_blocks_are_those_of_its_model(two_models: Path) -> None:
    said = kvstore_json(
        "purge", two_models / "kv", "--journal", two_models / "journal", "--request", "of-A", "--yes"
    )  # fmt: skip
    assert [(row["model"], row["blocks"]) for row in said["removed"]] == [("model-A", NUM_BLOCKS)]
    assert stored(two_models / "kv") == {"model-B": NUM_BLOCKS}


def test_a_tenants_blocks_are_those_of_the_models_it_asked(two_models: Path) -> None:
    kvstore_json("purge", two_models / "kv", "--journal", two_models / "journal", "--of-tenant", "bob", "--yes")
    assert stored(two_models / "kv") == {"model-A": NUM_BLOCKS}


def test_a_key_with_a_model(two_models: Path) -> None:
    key = small_keys()[3]
    said = kvstore_json("purge", two_models / "kv", "--key", key, "--dry-run")
    assert [(row["model"], row["blocks"]) for row in said["removed"]] == [("model-A", 1), ("model-B", 1)]
    kvstore_json("purge", two_models / "kv", "--key", key, "--model", "model-B", "--yes")
    assert stored(two_models / "kv") == {"model-A": NUM_BLOCKS, "model-B": NUM_BLOCKS - 1}


def test_all_groups_of_a_request(tmp_path: Path) -> None:
    """A block hash has a key for each KV cache group."""
    keys = small_keys()[:4]
    run(tmp_path, A, keys, "r")
    config = StoreConfig(
        identity=A,
        host=HostTierConfig(num_blocks=32),
        shared=SharedTierConfig(path=str(tmp_path / "kv"), capacity_nbytes=8 << 20),
    )
    with TieredStore(config) as store:
        assert store.put([BlockKey.of(key.block_hash, 1) for key in keys], small_blocks()[:4]) == 4
        assert store.flush()
    said = kvstore_json("purge", tmp_path / "kv", "--journal", tmp_path / "journal", "--request", "r", "--dry-run")
    assert sum(row["blocks"] for row in said["removed"]) == 8
    said = kvstore_json("purge", tmp_path / "kv", "--key", f"{keys[0].block_hash.hex()}.1", "--dry-run")
    assert sum(row["blocks"] for row in said["removed"]) == 1


def blocks_of(served: Path, *options: object) -> int:
    said = kvstore_json("purge", served / "kv", "--journal", served / "journal", *options, "--dry-run")
    return sum(row["blocks"] for row in said["removed"])


def test_options_only_narrow(served: Path) -> None:
    options: list[tuple[object, ...]] = [
        ("--request", "cmpl-39"), ("--of-tenant", "bob"), ("--of-tenant", "alice"), ("--model", IDENTITY.model),
        ("--tier", "disk"), ("--namespace", IDENTITY.namespace().hex()[:8]), ("--all",),
    ]  # fmt: skip
    alone = {option: blocks_of(served, *option, "--all") for option in options}
    assert alone["--tier", "disk"] < alone["--all",]
    for one in options:
        for other in options:
            if one[0] != other[0]:
                assert blocks_of(served, *one, *other, "--all") <= min(alone[one], alone[other])
    view = kvstore_json("top", served / "journal")
    (whose,) = (r["tenant"] for r in view["requests"] if r["request"] == "cmpl-39")
    for tenant in ("alice", "bob"):
        both = blocks_of(served, "--request", "cmpl-39", "--of-tenant", tenant)
        assert both == (alone["--request", "cmpl-39"] if whose == tenant_digest(tenant) else 0)


def test_the_table_says_what_goes_and_what_with_it(served: Path, tmp_path: Path) -> None:
    """The chunks hold two blocks."""
    view = kvstore_json("ls", served / "kv", "--journal", served / "journal", "--tree")
    assert view["block_size"] == 4
    said = kvstore_json("purge", served / "kv", "--journal", served / "journal", "--of-tenant", "bob", "--dry-run")
    for row in said["removed"]:
        assert (row["model"], row["tenant"]) == (IDENTITY.model, tenant_digest("bob"))
        assert row["namespace"] == IDENTITY.namespace().hex()
        assert row["blocks"] == 2 * row["chunks"]
    assert {row["tier"] for row in said["removed"]} == {"disk", "shared"}
    every = kvstore_json("purge", served / "kv", "--journal", served / "journal", "--all", "--dry-run")
    assert {row["tenant"] for row in every["removed"]} == {"", tenant_digest("alice"), tenant_digest("bob")}
    assert every["along"] == []
    assert all(row["tenant"] is None for row in kvstore_json("purge", served / "kv", "--all", "--dry-run")["removed"])
    _, out, _ = kvstore("purge", served / "kv", "--journal", served / "journal", "--all", "--dry-run")
    assert "no tenant" in out and tenant_digest("bob") in out and "in all" in out


def test_what_shares_a_chunk_is_said(small_store: Path) -> None:
    key, neighbour = small_keys()[5], small_keys()[4]
    said = kvstore_json("purge", small_store / "disk", "--key", key, "--dry-run")
    (row,) = said["removed"]
    assert (row["chunks"], row["blocks"], row["along_blocks"]) == (1, 2, 1)
    assert said["along"] == [str(neighbour)]
    _, out, _ = kvstore("purge", small_store / "disk", "--key", key, "--dry-run")
    assert "not named" in out and str(neighbour)[:16] in out
    said = kvstore_json("purge", small_store / "disk", "--key", key, "--key", neighbour, "--dry-run")
    assert (said["removed"][0]["along_blocks"], said["along"]) == (0, [])


ASKS = "import sys, tools.cli; sys.argv = ['kvstore', *sys.argv[1:]]; tools.cli.main()"


@pytest.mark.parametrize("answer", ["n", "y"])
def test_it_shows_that_and_asks(small_store: Path, tmp_path: Path, answer: str) -> None:
    """In a terminal."""
    kv = copy_store(small_store, tmp_path / "kv")
    me, other = pty.openpty()
    command = [sys.executable, "-c", ASKS, "purge", str(kv), "--key", str(small_keys()[5])]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    child = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environ, cwd=ROOT)
    os.close(other)
    try:
        seen, deadline = b"", time.monotonic() + 60
        while b"Delete these?" not in seen and time.monotonic() < deadline:
            if select.select([me], [], [], 1.0)[0]:
                seen += os.read(me, 1 << 16)
        assert IDENTITY.model.encode() in seen and b"not named" in seen and b"shared" in seen
        os.write(me, f"{answer}\n".encode())
        child.wait(60)
    finally:
        child.kill()
        os.close(me)
    left = NUM_BLOCKS - (2 if answer == "y" else 0)
    assert {row["blocks"] for row in kvstore_json("ls", kv)["namespaces"] if row["model"] == IDENTITY.model} == {left}


# -- names that are not there


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("purge", "--model", "nosuch", "--yes"), "no model 'nosuch' here; there are: other-model, test-model"),
        (("purge", "--model", "model", "--yes"), "'model' is in 2 names: other-model, test-model"),
        (("purge", "--namespace", "zz", "--yes"), "'zz' is not allowed; give up to 32 hex digits"),
        (("purge", "--namespace", "0123456789abcdef", "--yes"), "none here begins with '0123456789abcdef'"),
        (("purge", "--all", "--tier", "bogus", "--yes"), "'bogus' is not one of 'disk', 'shared'"),
        (("gc", "--older-than", "0s", "--tier", "bogus"), "'bogus' is not one of 'disk', 'shared'"),
        (("gc", "--older-than", "0s", "--namespace", "zz"), "'zz' is not allowed"),
        (("gc", "--namespace", "0123456789abcdef"), "none here begins with"),
        (("ls", "--tier", "bogus"), "'bogus' is not one of"),
        (("ls", "--namespace", "zz"), "'zz' is not allowed"),
        (("ls", "--namespace", "0123456789abcdef"), "none here begins with"),
        (("ls", "--model", "nosuch"), "no model 'nosuch' here; there are: other-model, test-model"),
        (("ls", "--blocks", "--tier", "bogus"), "'bogus' is not one of"),
        (("ls", "--blocks", "--namespace", "zz"), "'zz' is not allowed"),
        (("ls", "--blocks", "--namespace", "0123456789abcdef"), "none here begins with"),
        (("ls", "--blocks", "--model", "nosuch"), "no model 'nosuch' here"),
        (("explain", "--model", "nosuch", "--key", str(small_keys()[0])), "no model 'nosuch' here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_name_is_said(small_store: Path, arguments: tuple[Any, ...], said: str) -> None:
    before = tree(small_store)
    code, out, err = kvstore(arguments[0], small_store, *arguments[1:])
    assert (code, out) == (2, "")
    assert said in " ".join(err.replace("│", " ").split()), err
    assert tree(small_store) == before


def test_a_part_of_a_models_name_will_do(small_store: Path) -> None:
    said = kvstore_json("purge", small_store, "--model", "OTHER", "--dry-run")
    assert [row["model"] for row in said["removed"]] == ["other-model"]
    assert {row["model"] for row in kvstore_json("ls", small_store, "--model", "model")["namespaces"]} == {
        "other-model", "test-model",
    }  # fmt: skip
    assert kvstore_json("ls", small_store, "--tier", "vllm-fs")["namespaces"] == []
