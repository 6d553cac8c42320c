"""Whether a server is there: killed, silent, another of its number, or an old copy of its journal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.journal import MAGIC, Moved, Opened, Sample, frame, move_ids
from kvstore.journal_view import JournalView
from kvstore.process import is_running, process_place, started_ticks
from tests.small import IDENTITY, fill, small_config, small_keys
from tests.test_journal import ASKED, OPENED, segment_with
from tests.tools.test_cli import kvstore, kvstore_json
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import dataclasses, sys, time
from pathlib import Path
from kvstore import JournalConfig, TieredStore
from tests.small import small_blocks, small_config, small_keys

kv, journal = map(Path, sys.argv[1:])
config = dataclasses.replace(small_config(shared=kv), journal=JournalConfig(path=str(journal), sample_s=0.1))
with TieredStore(config) as store:
    store.put(small_keys(), small_blocks())
    store.flush()
    store.asked(small_keys(), {}, request_id="r", num_tokens=48)
    store.take_events()
    time.sleep(120)
"""


def test_a_killed_server_has_ended_at_once(tmp_path: Path) -> None:
    kv, journal = tmp_path / "kv", tmp_path / "journal"
    child = subprocess.Popen([sys.executable, "-c", SERVER, kv, journal], cwd=ROOT)
    try:
        wait_until(lambda: journal.is_dir() and _has_asked(journal), 60)
        assert states(kv, journal) == {"on"}
        assert said_of_memory(kv, journal) == {("stored", True)}
        os.kill(child.pid, signal.SIGSTOP)  # it is there, and its last word is young
        assert states(kv, journal) == {"on"}
        child.kill()
        child.wait(20)
        assert states(kv, journal) == {"ended"}
        for file in kv.rglob("*.safetensors"):
            file.unlink()
        assert said_of_memory(kv, journal) == {("ended", False)}
        assert states(kv, journal, "--at-its-end") == {"on"}
    finally:
        child.kill()
        child.wait(20)


def _has_asked(journal: Path) -> bool:
    return any(journal.iterdir()) and bool(JournalView.of(journal).requests)


def states(kv: Path, journal: Path, *options: object) -> set[str]:
    """Of a server's tiers, as `stat` and `top` say."""
    found = kvstore_json("stat", kv, "--journal", journal, *options)["servers"]
    assert found
    top = kvstore_json("top", journal, "--once", *options)["tiers"]
    assert {use["state"] for use in top} == {use["state"] for use in found}
    return {use["state"] for use in found}


def said_of_memory(kv: Path, journal: Path, *options: object) -> set[tuple[str, bool]]:
    """Why each block of a request is in host memory, or not, and whether it would be a hit."""
    found = kvstore_json("explain", kv, "--journal", journal, "--request", "r", *options)["blocks"]
    assert found
    return {(block["tiers"]["host"]["why"], block["is_usable"]) for block in found}


def journal_of(path: Path, age_s: float, **opened: Any) -> Path:
    """Of a server that had a prompt in memory, and wrote last some time ago."""
    t_ns = time.time_ns() - int(age_s * 1e9)
    keys = small_keys()
    numbers = {"used_nbytes": 1.0, "capacity_nbytes": 2.0}
    records = [
        msgspec.structs.replace(OPENED, t_ns=t_ns, namespace=IDENTITY.namespace(), **opened),
        Moved(t_ns=t_ns, tier="host", why="", ids=move_ids(b"".join(keys)).tobytes()),
        msgspec.structs.replace(ASKED, t_ns=t_ns, request="r", hashes=b"".join(key.block_hash for key in keys)),
        Sample(t_ns=t_ns, tiers={"host": numbers}),
    ]
    return segment_with(path, MAGIC + b"".join(map(frame, records)))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A shared path that holds nothing of the prompt."""
    fill(small_config(shared=tmp_path / "kv"))
    for file in (tmp_path / "kv").rglob("*.safetensors"):
        file.unlink()
    return tmp_path / "kv"


HERE = {"pid": os.getpid(), "place": process_place(), "started": started_ticks(os.getpid())}
CASES: dict[str, tuple[float, dict[str, Any], str]] = {
    "writes": (5, HERE, "on"),
    "writes, nothing else is known": (5, {"pid": 1}, "on"),
    "silent": (180, HERE, "silent"),
    "silent elsewhere": (180, {**HERE, "place": "another boot 4026531836"}, "silent"),
    "writes seldom": (180, {**HERE, "sample_s": 100.0}, "on"),
    "another process of its number": (5, {**HERE, "started": 1}, "ended"),
    "no process of its number": (5, {**HERE, "pid": 2**31 - 1}, "ended"),
    "a number that none can have": (5, {**HERE, "pid": 1 << 61}, "on"),
}


@pytest.mark.parametrize(("age_s", "opened", "state"), CASES.values(), ids=CASES)
def test_what_is_said_of_a_server(
    empty: Path, tmp_path: Path, age_s: float, opened: dict[str, Any], state: str
) -> None:
    journal = journal_of(tmp_path / "journal", age_s, **opened)
    assert states(empty, journal) == {state}
    is_there = state == "on"
    assert said_of_memory(empty, journal) == {("stored" if is_there else state, is_there)}
    assert states(empty, journal, "--at-its-end") == {"on"}  # as it was then
    assert said_of_memory(empty, journal, "--at-its-end") == {("stored", True)}
    if state == "silent":
        for command in (("stat", empty, "--journal", journal), ("top", journal, "--once")):
            assert "silent for 3 min" in kvstore(*command)[1]
        out = kvstore("explain", empty, "--journal", journal, "--request", "r")[1]
        assert "which is silent for 3 min" in out and "0 of 12 blocks would be a hit now" in out


def test_a_process_is_told_by_number_and_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started, place = started_ticks(child.pid), process_place()
        assert started and place and is_running(child.pid, started, place) is True
        assert is_running(child.pid, started + 1, place) is False
        assert is_running(child.pid, started, place + "0") is None
        assert is_running(child.pid, 0, place) is is_running(child.pid, started, "") is None
        child.kill()
        wait_until(lambda: is_running(child.pid, started, place) is False, 20)  # a zombie
        child.wait(20)
        assert is_running(child.pid, started, place) is False
    finally:
        child.kill()
        child.wait(20)
    assert started_ticks(child.pid) == 0


def test_a_journal_of_before_is_read() -> None:
    """Who wrote without saying where it runs."""
    old = msgspec.msgpack.encode(msgspec.msgpack.decode(msgspec.msgpack.encode(OPENED))[:-3])
    assert msgspec.msgpack.decode(old, type=Opened) == OPENED
