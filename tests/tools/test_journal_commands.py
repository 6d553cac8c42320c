"""What commands make of a journal: ls, stat, plan, plot, top and report; the page is looked at in a browser."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore import JournalConfig, TieredStore
from kvstore.journal import MAGIC, frame
from kvstore.journal_view import JournalView
from kvstore.journal_writer import tenant_digest
from tests.journals import SYSTEM, serve
from tests.small import IDENTITY, LAYOUT, NUM_BLOCKS, small_blocks, small_config, small_keys
from tests.test_journal import ASKED, OPENED, segment_with
from tests.tools.test_cli import kvstore, kvstore_json
from tools.journal_stats import TIERS

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with kv/disk, kv/shared and journal; not to be changed."""
    folder = tmp_path_factory.mktemp("served")
    serve(folder / "kv", folder / "journal")
    return folder


@pytest.fixture(scope="module")
def view(served: Path) -> JournalView:
    return JournalView.of(served / "journal")


def test_ls_tells_requests_hits_and_tenants(served: Path, view: JournalView) -> None:
    """Once for a namespace that two tiers have, and of each tier what was found there."""
    found = kvstore_json("ls", served / "kv", "--journal", served / "journal")
    assert [row["tier"] for row in found["namespaces"]] == ["disk", "shared"]
    (asked,) = found["asked"]
    assert {row["namespace"] for row in found["namespaces"]} == {asked["namespace"]}
    by_tier = sum((Counter(r.hits) for r in view.requests), Counter[str]())
    assert len(by_tier) > 1
    assert (asked["requests"], asked["hits"], asked["hit_blocks"]) == (40, by_tier, by_tier.total())
    assert asked["asked_blocks"] == sum(r.num_blocks for r in view.requests)
    assert asked["tenants"] == Counter(r.tenant for r in view.requests)
    assert set(asked["tenants"]) == {"", tenant_digest("alice"), tenant_digest("bob")}
    _, out, _ = kvstore("ls", served / "kv", "--journal", served / "journal", "--sort", "hits")
    assert f"no tenant {asked['tenants']['']}" in out
    cells = [line.replace("│", " ").split() for line in out.splitlines() if "test-model" in line]
    numbers = (40, 2, asked["asked_blocks"], by_tier.total(), *(n for tier in TIERS if (n := by_tier[tier])))
    assert [row[2:] for row in cells].count([str(n) for n in numbers]) == 1
    assert kvstore_json("ls", served / "kv")["asked"] is None


def test_ls_sorts_by_what_a_journal_tells(tmp_path: Path) -> None:
    """Two namespaces, of which the later one is asked for more."""
    other = replace(IDENTITY, model="another-model")
    for identity, num_requests in ((IDENTITY, 1), (other, 2)):
        config = replace(
            small_config(identity, shared=tmp_path / "shared"), journal=JournalConfig(path=str(tmp_path / "j"))
        )
        with TieredStore(config) as store:
            assert store.put(small_keys(identity), small_blocks()) == NUM_BLOCKS
            assert store.flush()
            for i in range(num_requests):
                store.asked(small_keys(identity), {"host": 2, "elsewhere": 1}, request_id=str(i))
            store.take_events()
    at = (tmp_path / "shared", "--journal", tmp_path / "j", "--sort", "hits")
    for options, models in (((), ["test-model", "another-model"]), (("--reverse",), ["another-model", "test-model"])):
        found = kvstore_json("ls", *at, *options)
        assert [row["model"] for row in found["namespaces"]] == models
        assert [one["namespace"] for one in found["asked"]] == [row["namespace"] for row in found["namespaces"]]
    assert found["asked"][0]["hits"] == {"host": 4, "elsewhere": 2}
    found = kvstore_json("ls", *at, "--model", "test-model")
    assert [one["requests"] for one in found["asked"]] == [1]
    assert re.search(r"hits .* host .* other", kvstore("ls", *at)[1])


def branches(tree: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for branch in tree:
        yield branch
        yield from branches(branch["branches"])


def test_hits_of_each_block(served: Path, view: JournalView) -> None:
    found = kvstore_json("ls", served / "kv", "--blocks", "--journal", served / "journal")["blocks"]
    wanted = Counter(h for r in view.requests for h in view.path_to(r.last)[: r.num_hits])
    assert {row["key"][:64]: row["hits"] for row in found} == {
        row["key"][:64]: wanted[bytes.fromhex(row["key"][:64])] for row in found
    }
    assert max(row["hits"] for row in found) == max(wanted.values()) > 5


def shared_head(prompts: list[list[bytes]]) -> int:
    """Leading blocks that all have."""
    return next(
        (i for i, blocks in enumerate(zip(*prompts, strict=False)) if len(set(blocks)) > 1), min(map(len, prompts))
    )


def test_the_tree_is_that_of_the_prompts(served: Path, view: JournalView) -> None:
    found = kvstore_json("ls", served / "kv", "--tree", "--journal", served / "journal", "--limit", "1000")
    assert found["block_size"] == LAYOUT.block_size
    every = list(branches(found["prefixes"]))
    assert not found["more"]
    assert not any(branch["more"] for branch in every)
    prompts = [view.path_to(request.last) for request in view.requests]
    assert sum(branch["blocks"] for branch in every) == len({h for prompt in prompts for h in prompt})
    for branch in every:
        key = bytes.fromhex(branch["key"])
        with_it = [prompt for prompt in prompts if key in prompt]
        assert branch["requests"] == len(with_it)
        assert all(prompt.index(key) == branch["first"] for prompt in with_it)
        if branch["requests"] > 1:
            assert shared_head(with_it) == branch["first"] + branch["blocks"]
        assert set(branch["stored"]) == {"disk", "shared"}
    assert found["prefixes"][0]["blocks"] == len(SYSTEM) // LAYOUT.block_size
    assert {branch["tenant"] for branch in found["prefixes"]} == {"", tenant_digest("alice"), tenant_digest("bob")}
    code, out, _ = kvstore("ls", served / "kv", "--tree", "--journal", served / "journal", "--limit", "3")
    assert code == 0
    assert "more" in out
    assert sum("requests" in line for line in out.splitlines()) == 3
    code, _, err = kvstore("ls", served / "kv", "--tree")
    assert (code, "give --journal too" in err) == (2, True)


def test_stat_tells_of_servers(served: Path, view: JournalView) -> None:
    found = kvstore_json("stat", served / "kv", "--journal", served / "journal")["servers"]
    assert [line["tier"] for line in found] == ["host", "disk", "shared"]
    host, disk, shared = found
    asked = sum(request.num_blocks for request in view.requests)
    hits = sum(request.hits.get("host", 0) for request in view.requests)
    assert host["hit_rate"] == pytest.approx(hits / asked)
    assert disk["asked_blocks"] == asked - hits
    assert host["used_nbytes"] == host["capacity_nbytes"] > 0
    assert host["pinned_blocks"] == 0
    assert host["evicted_blocks"] > 0
    assert 0 < host["reuse_age_s"] <= disk["reuse_age_s"] < 60
    assert shared["capacity_nbytes"] == 8 << 20
    assert {line["state"] for line in found} == {"ended"}
    _, out, _ = kvstore("stat", served / "kv", "--journal", served / "journal")
    assert "reuse age" in out


def test_plan_from_a_journal(served: Path, view: JournalView) -> None:
    found = kvstore_json("plan", served / "journal", "--capacities", "24,100000", "--policies", "lru")
    assert found["requests"] == 40
    assert found["blocks_asked"] == sum(request.num_blocks for request in view.requests)
    assert found["block_nbytes"] == LAYOUT.block_nbytes
    trace = served / "trace.jsonl"
    trace.write_text("".join(json.dumps({"hash_ids": nodes}) + "\n" for nodes in view.prompts()))
    same = kvstore_json("plan", trace, "--capacities", "24,100000", "--policies", "lru")
    assert found["hit_rates"] == same["hit_rates"]
    assert found["hit_rates"]["lru"][1] == pytest.approx(found["most"])


def test_a_journal_is_drawn_over_time(served: Path, tmp_path: Path) -> None:
    found = kvstore_json("plot", served / "journal", "--out", tmp_path / "time.png")
    assert found["requests"] == 40
    assert found["samples"] >= 6
    import matplotlib.image

    picture = torch.from_numpy(matplotlib.image.imread(tmp_path / "time.png").copy())
    assert picture.shape[0] > 500
    colors = {"host": (0x1F, 0x77, 0xB4), "disk": (0x2C, 0xA0, 0x2C)}
    for name, color in colors.items():
        there = ((picture[..., :3] * 255).round() == torch.tensor(color, dtype=torch.float32)).all(-1)
        assert there.sum() > 500, name  # bars of what was found there
    code, _, err = kvstore("plot", served / "journal", "--out", tmp_path / "none/x.png")
    assert (code, "cannot be written" in err) == (2, True)


def test_top_once(served: Path, view: JournalView) -> None:
    found = kvstore_json("top", served / "journal")
    assert [line["tier"] for line in found["tiers"]] == ["host", "disk", "shared"]
    assert [request["request"] for request in found["requests"]] == [f"cmpl-{i}" for i in range(39, 29, -1)]
    assert found["tiers"][1]["per_s"]["written_nbytes"] >= 0
    code, out, _ = kvstore("top", served / "journal", "--once")
    assert code == 0
    assert "cmpl-39" in out
    assert kvstore_json("top", served / "kv")["tiers"][0]["tier"] == "disk"
    code, _, err = kvstore("top", served / "journal")
    assert (code, "no terminal" in err) == (2, True)


TOP = """
import signal, sys, tools.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
sys.argv = ["kvstore", "top", sys.argv[1], "--interval", "0.3"]
tools.cli.main()
"""


def test_top_in_a_terminal_follows_a_running_store(tmp_path: Path) -> None:
    config = small_config(disk=tmp_path / "disk")
    config = type(config).from_dict(config.to_dict() | {"journal": {"path": str(tmp_path / "j"), "sample_s": 0.1}})
    with TieredStore(config) as store:
        store.asked([], {}, request_id="first")
        store.take_events()
        me, other = pty.openpty()
        command = [sys.executable, "-c", TOP, tmp_path / "j"]
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
        child = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environ, start_new_session=True)
        os.close(other)
        try:
            until(me, "first")
            store.asked([], {}, request_id="second")
            until(me, "second")
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 130
        finally:
            child.kill()
            os.close(me)


def until(terminal: int, text: str) -> None:
    """Read until a text has come."""
    seen, deadline = b"", time.monotonic() + 60
    while text.encode() not in seen:
        left = deadline - time.monotonic()
        assert left > 0, seen[-2000:]
        if select.select([terminal], [], [], min(left, 1.0))[0]:
            seen += os.read(terminal, 1 << 16)


# -- the page


class Page(HTMLParser):
    """What a page has in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page(served: Path) -> Path:
    out = served / "report.html"
    found = kvstore_json("report", served / "kv", "--journal", served / "journal", "--out", out)
    assert found["sections"] == [
        "Tiers", "What is stored", "Servers", "Over time", "Prompts", f"K and V of test-model@{'r' * 12}",
        "Plan, from the journal",
    ]  # fmt: skip
    assert found["problems"] == []
    assert found["nbytes"] == out.stat().st_size
    return out


def test_the_page_loads_nothing_and_has_it_all(page: Path, view: JournalView) -> None:
    found = Page(page.read_text())
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object", "form"})
    sources = [attrs["src"] or "" for _, attrs in found.tags if "src" in attrs]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all((attrs["href"] or "").startswith("#s") for _, attrs in found.tags if "href" in attrs)
    assert "default-src 'none'" in next(str(a["content"]) for t, a in found.tags if a.get("http-equiv"))
    text = " ".join(found.words)
    asked, hits = (sum(getattr(r, n) for r in view.requests) for n in ("num_blocks", "num_hits"))
    for wanted in (f"{hits / asked:.1%}", "best possible", tenant_digest("alice"), "248.0 KiB"):
        assert wanted in text


@pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed (apt-get install chromium): no browser looked at it"
)
def test_a_browser_shows_it(page: Path, tmp_path: Path) -> None:
    """Headless, with every host name cut off: it is whole, and its pictures are there."""
    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1240,4600",
    ]  # fmt: skip
    shot = tmp_path / "shot.png"
    subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    import matplotlib.image

    picture = torch.from_numpy(matplotlib.image.imread(shot).copy())[..., :3]
    assert picture.shape[:2] == (4600, 1240)
    pixels = (picture * 255).round().to(torch.int64)
    colors = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    counts = dict(zip(*(part.tolist() for part in torch.unique(colors, return_counts=True)), strict=True))
    assert counts[0xF4F6F8] > 100_000  # the page's ground
    assert counts[0x1F77B4] > 500  # bars of host memory, in the picture over time
    assert counts[0x440154] > 500  # the least of a heat map
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120, text=True
    )
    assert done.stdout.count("<section") == 7


def test_names_on_the_page_are_not_markup(served: Path, tmp_path: Path) -> None:
    """A journal in which all that anybody may choose is markup."""
    bad = "<script>alert(1)</script>"
    import msgspec

    opened = msgspec.structs.replace(OPENED, who=bad)
    asked = msgspec.structs.replace(ASKED, request=bad, hits={bad: 1, "host": 1})
    journal = segment_with(tmp_path / "j", MAGIC + frame(opened) + frame(asked))
    out = tmp_path / "r.html"
    code, _, err = kvstore("report", served / "kv", "--journal", journal, "--out", out)
    assert code == 0, err
    assert "<script" not in out.read_text()
    assert "&lt;script&gt;" in out.read_text()
    for command in (["top", journal, "--once"], ["stat", served / "kv", "--journal", journal]):
        code, printed, _ = kvstore(*command)
        assert (code, bad in re.sub(r"[│\s]", "", printed)) == (0, True)


@pytest.mark.parametrize("command", ["ls", "ls-tree", "stat", "plan", "plot", "top", "report", "explain"])
def test_a_damaged_journal_is_told_and_the_rest_shown(served: Path, tmp_path: Path, command: str) -> None:
    journal = shutil.copytree(served / "journal", tmp_path / "j")
    damaged = segment_with(tmp_path / "more", MAGIC + frame(OPENED) + (1 << 31).to_bytes(4, "little") + bytes(8))
    shutil.copy(next(damaged.iterdir()), journal)
    kv, at = served / "kv", ("--journal", journal)
    arguments = {
        "ls": ("ls", kv, *at), "ls-tree": ("ls", kv, "--tree", *at), "stat": ("stat", kv, *at),
        "plan": ("plan", journal), "plot": ("plot", journal, "--out", tmp_path / "x.png"),
        "top": ("top", journal, "--once"), "report": ("report", kv, *at, "--out", tmp_path / "x.html"),
        "explain": ("explain", kv, *at, "--request", "cmpl-39"),
    }[command]  # fmt: skip
    code, out, err = kvstore(*arguments)
    assert code == 0, err
    if command in ("ls", "ls-tree", "stat", "top", "explain"):
        assert "says that it has" in out
    if command == "report":
        assert "says that it has" in (tmp_path / "x.html").read_text()
