"""The event journal: what is written is what is read, within bounds, whatever happens to it."""

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
from hypothesis import given
from hypothesis import strategies as st

from kvstore import BlockKey, JournalConfig, TieredStore
from kvstore.errors import ConfigError
from kvstore.events import TierEvent
from kvstore.journal import (
    MAGIC,
    MAX_PAYLOAD_NBYTES,
    Asked,
    JournalReader,
    Lost,
    Moved,
    Opened,
    Sample,
    frame,
    move_ids,
    segments,
)
from kvstore.journal_entries import NO_NODE
from kvstore.journal_view import JournalView
from kvstore.journal_writer import JournalWriter, PromptLookup, tenant_digest
from tests.small import IDENTITY, small_blocks, small_config, small_keys

OPENED = Opened(
    t_ns=1, pid=1, who="test", namespace=b"n" * 16, content=dict(IDENTITY.content()), placed=dict(IDENTITY.placed(2)),
    num_groups=1, capacity_nbytes={"host": 1},
)  # fmt: skip


def writer(path: Path, events: list[TierEvent] | None = None, **settings: Any) -> JournalWriter:
    def take() -> list[TierEvent]:
        taken = list(events or ())
        (events or []).clear()
        return taken

    return JournalWriter(JournalConfig(path=str(path), **settings), lambda: OPENED, take, list)


def keys(*numbers: int) -> list[BlockKey]:
    return [BlockKey.of(n.to_bytes(32, "big")) for n in numbers]


def read(path: Path) -> list[Any]:
    reader = JournalReader(path)
    found = [record for _, record in reader.records()]
    assert reader.problems == []
    return found


def test_prompts_share_their_heads(tmp_path: Path) -> None:
    made = writer(tmp_path)
    made.asked(PromptLookup(keys=keys(1, 2, 3), request_id="a", hits={"host": 1}, num_tokens=13))
    made.asked(PromptLookup(keys=keys(1, 2, 3, 4, 5), request_id="b", tenant=tenant_digest("x"), hits={"disk": 3}))
    made.asked(PromptLookup(keys=keys(1, 9), request_id="c"))
    made.asked(PromptLookup(keys=keys(1, 2), request_id="d", hits={"host": 2}))
    made.asked(PromptLookup(keys=[], request_id="e"))
    made.close()
    asked = [record for record in read(tmp_path) if isinstance(record, Asked)]
    assert [len(record.hashes) // 32 for record in asked] == [3, 2, 1, 1, 0]  # what is shared is written once
    view = JournalView.of(tmp_path)
    assert view.problems == []
    assert [[int.from_bytes(h, "big") for h in view.path_to(r.last)] for r in view.requests] == [
        [1, 2, 3], [1, 2, 3, 4, 5], [1, 9], [1, 2], []
    ]  # fmt: skip
    by_hash = dict(zip((int.from_bytes(h, "big") for h in view.hashes), view.hits_by_node(), strict=True))
    assert by_hash == {1: 3, 2: 2, 3: 1, 4: 0, 5: 0, 9: 0}
    by_hash = dict(zip((int.from_bytes(h, "big") for h in view.hashes), view.asked_by_node(), strict=True))
    assert by_hash == {1: 4, 2: 3, 3: 2, 4: 1, 5: 1, 9: 1}
    assert view.requests[1].tenant == tenant_digest("x") != tenant_digest("y")
    assert view.requests[4].last == NO_NODE
    assert list(view.prompts())[2] == [view.node_of(keys(1)[0][:32]), view.node_of(keys(9)[0][:32])]


def test_what_comes_and_goes_in_a_store(tmp_path: Path) -> None:
    config = small_config(disk=tmp_path / "disk", shared=tmp_path / "shared")
    config = type(config).from_dict(
        config.to_dict() | {"host": {"num_blocks": 4}, "journal": {"path": str(tmp_path / "j"), "sample_s": 0.2}}
    )
    prompt, blocks = small_keys(), small_blocks()
    with TieredStore(config) as store:
        assert store.put(prompt, blocks) == len(prompt)
        assert store.flush()
        out, sources = blocks.clone(), dict[str, int]()
        assert store.get(prompt, out, sources=sources) == len(prompt)
        store.asked(prompt, sources, request_id="one", tenant="salt", num_tokens=50)
        assert store.purge(prompt[2:4])
        time.sleep(0.5)
        store.reset()
        assert store.put(prompt[:2], blocks[:2]) == 2
    view = JournalView.of(tmp_path / "j")
    assert view.problems == []
    assert view.tiers() == ["host", "disk", "shared"]
    (request,) = view.requests
    assert request.hits == sources
    assert sum(sources.values()) == len(prompt)
    assert set(sources) <= {"host", "disk", "shared"}
    assert request.tenant == tenant_digest("salt")
    assert [view.path_to(request.last)[i] for i in range(12)] == [key.block_hash for key in prompt]
    whys = {(tier, move.why) for tier in view.tiers() for key in prompt if (move := view.move_of(tier, key))}
    assert {("disk", "purged"), ("shared", "purged"), ("disk", "reset")} <= whys
    every = {(r.tier, r.why) for r in read(tmp_path / "j") if isinstance(r, Moved)}
    assert ("host", "evicted") in every
    assert len(view.samples) >= 2
    assert {s.tier: s.numbers["capacity_blocks"] for s in view.samples if s.tier == "host"} == {"host": 4}
    assert view.opened[0].content == IDENTITY.content()
    assert view.opened[0].who == "TieredStore"
    (reset,) = view.resets
    assert reset[1] != IDENTITY.namespace()
    assert b"salt" not in b"".join(s.path.read_bytes() for s in segments(tmp_path / "j"))


def test_a_damaged_chunk_is_told(tmp_path: Path) -> None:
    config = small_config(disk=tmp_path / "disk")
    config = type(config).from_dict(config.to_dict() | {"journal": {"path": str(tmp_path / "j")}})
    with TieredStore(config) as store:
        store.put(small_keys(), small_blocks())
    with (tmp_path / "disk/data").open("r+b") as f:
        f.seek(10)
        f.write(b"\xff\x00\xff")
    with TieredStore(config) as store:
        assert store.get(small_keys(), small_blocks()) < 12
    view = JournalView.of(tmp_path / "j")
    moves = [view.move_of("disk", key) for key in small_keys()]
    assert [move.why for move in moves if move is not None] == ["corrupt"] * 2 + [""] * 10


@pytest.mark.parametrize("io", ["thread", "process"])
def test_others_take_events_too(tmp_path: Path, io: str) -> None:
    config = small_config(disk=tmp_path / "disk")
    config = type(config).from_dict(
        config.to_dict() | {"journal": {"path": str(tmp_path / "j")}, "event_log_blocks": 1000, "io": io}
    )
    with TieredStore(config) as store:
        store.put(small_keys(), small_blocks())
        assert store.flush()
        events = store.take_events()
        assert {event.tier for event in events} == {"host", "disk"}
        assert store.take_events() == []
    view = JournalView.of(tmp_path / "j")
    assert all(view.move_of(tier, key) for tier in ("host", "disk") for key in small_keys())
    with TieredStore(type(config).from_dict(config.to_dict() | {"event_log_blocks": 0})) as store:
        store.put(small_keys(), small_blocks())
        assert store.take_events() == []


def test_the_directory_is_bounded_and_the_newest_stays(tmp_path: Path) -> None:
    made = writer(tmp_path, capacity_nbytes=1 << 20)
    for i in range(300):
        made.asked(PromptLookup(keys=keys(*range(i * 1000, i * 1000 + 400)), request_id=f"r{i}"))
        made.flush()
        assert sum(s.nbytes for s in segments(tmp_path)) <= 1 << 20
    made.close()
    view = JournalView.of(tmp_path)
    assert view.requests[-1].request_id == "r299"
    assert 20 < len(view.requests) < 100
    assert all(request.num_blocks == 400 for request in view.requests)
    assert all(s.path.stat().st_mode & 0o777 == 0o600 for s in segments(tmp_path))


def test_what_segments_that_are_gone_said_is_said_again(tmp_path: Path) -> None:
    """One long conversation, which every request goes on with: its head is written once in a while."""
    made = writer(tmp_path, capacity_nbytes=1 << 20)
    for i in range(200):
        made.asked(PromptLookup(keys=keys(*range(1000 + 100 * i)), request_id=f"r{i}"))
        made.flush()
    made.close()
    view = JournalView.of(tmp_path)
    assert len(segments(tmp_path)) > 4
    assert view.requests[-1].request_id == "r199"
    whole = [request for request in view.requests if len(view.nodes_to(request.last)) == request.num_blocks]
    assert all(request.num_blocks == 1000 + 100 * int(request.request_id[1:]) for request in view.requests)
    assert len(view.requests) > 100  # a tenth of this if each segment told the whole conversation
    assert len(whole) >= 1
    counts = view.asked_by_node()
    assert counts[view.requests[-1].last] == 1
    assert max(counts) == len(view.requests)


def test_parents_in_a_circle(tmp_path: Path) -> None:
    def asked(depth: int, parent: bytes, *hashes: bytes) -> bytes:
        return frame(msgspec.structs.replace(ASKED, depth=depth, parent=parent, hashes=b"".join(hashes)))

    r, x, y = (bytes([n]) * 32 for n in range(3))
    data = GOOD + asked(99, b"", r, x) + asked(0, x, y) + asked(99, y, r, x)
    view = JournalView.of(segment_with(tmp_path / "j", data))
    assert [len(view.path_to(request.last)) for request in view.requests] == [2, 3, 2]
    assert view.asked_by_node() == [2, 2, 0]


def test_who_cannot_keep_up_says_so(tmp_path: Path) -> None:
    made = writer(tmp_path)
    with made._writing:
        assert not made.flush(0.05)
        for i in range(30):
            made.asked(PromptLookup(keys=keys(*range(i * 20000, i * 20000 + 10000))))
    made.close()
    (lost,) = [record for record in read(tmp_path) if isinstance(record, Lost)]
    assert lost.records == 30 - (1 << 18) // 10000
    assert lost.blocks == lost.records * 10000
    assert "lost" in JournalView.of(tmp_path).problems[0]


WRITES = """
import sys, time
from kvstore.journal_writer import PromptLookup
from pathlib import Path
from tests.test_journal import keys, writer
made = writer(Path(sys.argv[1]))
for i in range(1 << 30):
    made.asked(PromptLookup(keys=keys(*range(i * 100, i * 100 + 50)), request_id=f"{sys.argv[2]}-{i}"))
    if i == 20:
        print("on", flush=True)
    time.sleep(0.0005)
"""


def test_several_write_and_are_killed(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path), name], stdout=subprocess.PIPE) for name in "ab"
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
    time.sleep(1.5)
    for child in children:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    reader = JournalReader(tmp_path)
    asked = [record for _, record in reader.records() if isinstance(record, Asked)]
    assert reader.problems == []
    assert {record.request[0] for record in asked} == {"a", "b"}
    times = [record.t_ns for record in asked]
    assert times == sorted(times)
    for name in "ab":
        numbers = [int(r.request[2:]) for r in asked if r.request[0] == name]
        assert numbers == list(range(len(numbers)))


def test_cut_off_at_any_byte(tmp_path: Path) -> None:
    made = writer(tmp_path)
    for i in range(3):
        made.asked(PromptLookup(keys=keys(i), request_id=f"r{i}"))
    made.close()
    (segment,) = segments(tmp_path)
    whole, seen = segment.path.read_bytes(), set()
    for n in range(len(whole)):
        segment.path.write_bytes(whole[:n])
        reader = JournalReader(tmp_path)
        seen.add(len([record for _, record in reader.records()]))
        assert reader.problems == []
    assert seen == set(range(len(read_all(segment.path, whole))))


def read_all(path: Path, whole: bytes) -> list[Any]:
    path.write_bytes(whole)
    return read(path.parent)


def test_a_full_disk_turns_it_off_and_the_store_goes_on(tmp_path: Path) -> None:
    made = writer(tmp_path / "j")
    made.asked(PromptLookup(keys=keys(1), request_id="before"))
    made.flush()
    os.close(made._segment if made._segment is not None else -1)  # writing fails from here on
    made.asked(PromptLookup(keys=keys(2), request_id="lost"))
    made.flush()
    assert not made._health.on
    time.sleep(1.2)
    made.asked(PromptLookup(keys=keys(3), request_id="after"))
    made.close()
    view = JournalView.of(tmp_path / "j")
    assert [request.request_id for request in view.requests] == ["before", "after"]
    assert view.num_lost == 1


def test_a_journal_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """Its thread is stuck in a write: events still come, requests are taken, and the store closes."""
    config = type(small_config()).from_dict(
        small_config(disk=tmp_path / "disk").to_dict()
        | {"journal": {"path": str(tmp_path / "j")}, "event_log_blocks": 1000}
    )
    store = TieredStore(config)
    journal = store._planes.journal
    assert journal is not None
    journal._writing.acquire()
    try:
        store.put(small_keys(), small_blocks())
        store.asked(small_keys(), {})
        start = time.monotonic()
        assert {event.tier for event in store.take_events()} >= {"host"}
        assert time.monotonic() - start < 5
    finally:
        journal._writing.release()
    store.close()


def test_processes_tell_of_the_same_block(tmp_path: Path) -> None:
    """In host memory of one that runs: it is there. On disk: who removed it says why."""
    key = keys(1)[0]
    id_ = int(move_ids(key)[0]).to_bytes(8, "little")

    def segment(pid: int, *records: Any) -> None:
        data = MAGIC + b"".join(frame(record) for record in (msgspec.structs.replace(OPENED, pid=pid), *records))
        (tmp_path / f"{pid:020d}-{pid}-00000000.kvj").write_bytes(data)

    def moved(t_ns: int, tier: str, why: str) -> Moved:
        return Moved(t_ns=t_ns, tier=tier, why=why, ids=id_)

    segment(1, moved(10, "host", ""), moved(11, "disk", ""), moved(20, "disk", "evicted"))
    segment(
        2, moved(12, "host", ""), moved(13, "disk", ""), moved(21, "disk", "by_other"), moved(22, "host", "evicted")
    )
    view = JournalView.of(tmp_path, at_its_end=True)
    host, disk = view.move_of("host", key), view.move_of("disk", key)
    assert host is not None and (host.why, host.pid) == ("", 1)
    assert disk is not None and (disk.why, disk.pid) == ("evicted", 1)


def test_one_id_of_two_requests(tmp_path: Path) -> None:
    made = writer(tmp_path)
    for first in (10, 20):
        made.asked(PromptLookup(keys=keys(first, first + 1), request_id="same"))
        made.ended(keys(first, first + 1, first + 2), "same", "")
    made.asked(PromptLookup(keys=keys(30), request_id="same"))
    made.close()
    view = JournalView.of(tmp_path)
    found = [[h[-1] for h in view.hashes_of(request)] for request in view.requests]
    assert found == [[10, 11, 12], [20, 21, 22], [30]]


def test_a_path_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    config = small_config()
    with pytest.raises(ConfigError, match=r"journal\.path"):
        TieredStore(type(config).from_dict(config.to_dict() | {"journal": {"path": str(tmp_path / "file")}}))
    with pytest.raises(ConfigError, match=r"journal\.capacity_nbytes: 5 is not allowed"):
        JournalConfig(path="x", capacity_nbytes=5)
    with pytest.raises(ConfigError, match="holds no journal"):
        JournalView.of(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        JournalView.of(tmp_path / "none")


# -- what anybody may have written


def segment_with(path: Path, data: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / f"{1:020d}-1-00000000.kvj").write_bytes(data)
    return path


GOOD = MAGIC + frame(OPENED)
ASKED = Asked(
    t_ns=2, request="r", tenant="", adapter="", num_tokens=4, depth=0, parent=b"", hashes=b"h" * 32, hits={"host": 1},
    waited_s=0.0, is_late=False,
)  # fmt: skip


def packed(payload: bytes) -> bytes:
    import xxhash

    return len(payload).to_bytes(4, "little") + xxhash.xxh3_64_digest(payload) + payload


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"KVSJNL99" + frame(OPENED), "no journal of this version"),
        (GOOD + (1 << 31).to_bytes(4, "little") + bytes(8), "says that it has"),
        (GOOD + packed(b"\xdd" + b"\xff\xff\xff\xff"), "a record is none"),
        (GOOD + packed(b"\x91" * 100_000), "a record is none"),
        (GOOD + packed(msgspec.msgpack.encode(["a", 2, "r", "", "", 1, b"", b"", {}, float("nan"), False])), "is none"),
        (GOOD + packed(msgspec.msgpack.encode(["a", 2, "r" * 300, "", "", 1, b"", b"", {}, 0.0, False])), "is none"),
        (GOOD + packed(msgspec.msgpack.encode(["zz", 2])), "a record is none"),
        (GOOD + frame(ASKED)[:-1] + b"\xee", "does not verify"),
    ],
    ids=["version", "length", "array", "nesting", "nan", "text", "kind", "checksum"],
)
def test_what_is_wrong_is_told_and_what_was_before_is_kept(tmp_path: Path, data: bytes, problem: str) -> None:
    view = JournalView.of(segment_with(tmp_path / "j", data))
    assert problem in view.problems[0]
    assert len(view.opened) == int(data.startswith(GOOD))


def test_links_and_other_files_are_passed_over(tmp_path: Path) -> None:
    path = segment_with(tmp_path / "j", GOOD + frame(ASKED))
    (path / f"{2:020d}-1-00000000.kvj").symlink_to("/etc/passwd")
    (path / "notes.txt").write_text("x")
    os.mkfifo(path / f"{3:020d}-1-00000000.kvj")
    view = JournalView.of(path)
    assert view.problems == []
    assert len(view.requests) == 1


def test_a_request_before_any_opening_is_nobodys(tmp_path: Path) -> None:
    assert JournalView.of(segment_with(tmp_path / "j", MAGIC + frame(ASKED))).requests == []


def test_too_large_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        frame(Moved(t_ns=1, tier="host", why="", ids=bytes(MAX_PAYLOAD_NBYTES)))


@given(st.binary(max_size=2000), st.integers(0, 2000), st.booleans())
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, is_framed: bool) -> None:
    good = GOOD + frame(ASKED) + frame(Sample(t_ns=3, tiers={"host": {"used_nbytes": 1.0}}))
    data = good + packed(junk) if is_framed else good[:at] + junk + good[at + len(junk) :]
    path = segment_with(tmp_path_factory.mktemp("any") / "j", data)
    JournalView.of(path)
