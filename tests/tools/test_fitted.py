"""Tables in narrow terminals: whole numbers, whole headings, and what is left out is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.journals import serve
from tests.tools.test_cli import kvstore, kvstore_json
from tools.output import size

WIDTHS = (60, 80, 120, 200)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    serve(path / "kv", path / "journal")
    return path


def shown(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: object) -> tuple[list[str], list[list[str]], str]:
    """Headings and rows of the first table, its cells put together again, and all that was printed."""
    monkeypatch.setattr("tools.output._PIPE_WIDTH", width)
    code, out, err = kvstore(*arguments)
    assert code == 0, err
    lines = out.splitlines()
    assert max(len(line) for line in lines if line[:1] in "┏┃│└┡") <= width
    (heading,) = [line for line in lines[: lines.index(next(x for x in lines if x.startswith("└")))] if line[0] == "┃"]
    rows: list[list[str]] = []
    for line in lines[: lines.index(next(x for x in lines if x.startswith("└")))]:
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[-1] or not rows:
                rows.append(cells)
            else:
                rows[-1] = [a + b for a, b in zip(rows[-1], cells, strict=True)]
    return [name.strip() for name in heading.strip("┃").split("┃")], rows, out


def left_out(out: str) -> set[str]:
    found = re.search(r"not shown, for want of room: (.*?); --json has all", out.replace("\n", " "), re.DOTALL)
    return set() if found is None else {" ".join(name.split()) for name in found[1].split(",")}


@pytest.mark.parametrize("width", WIDTHS)
def test_stat(served: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    names, rows, out = shown(monkeypatch, width, "stat", served / "kv")
    every = {"tier", "path", "state", "used", "capacity", "full", "on disk", "chunks", "blocks", "oldest", "newest"}
    assert set(names) | left_out(out) == every and not set(names) & left_out(out)
    assert {"tier", "path", "state", "full", "blocks"} <= set(names)
    assert bool(left_out(out)) == (width < 120)
    for row, line in zip(rows, kvstore_json("stat", served / "kv")["tiers"], strict=True):
        cells = dict(zip(names, row, strict=True))
        assert (cells["tier"], cells["path"]) == (line["tier"], line["path"])
        assert cells["blocks"] == str(line["blocks"])
        assert cells.get("used", size(line["used_nbytes"])) == size(line["used_nbytes"])


@pytest.mark.parametrize("width", WIDTHS)
def test_ls(served: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    names, rows, out = shown(monkeypatch, width, "ls", served / "kv", "--journal", served / "journal")
    assert {"model", "tier", "path", "blocks", "bytes"} <= set(names)
    for row, line in zip(
        rows, kvstore_json("ls", served / "kv", "--journal", served / "journal")["namespaces"], strict=True
    ):
        cells = dict(zip(names, row, strict=True))
        assert (cells["path"], cells["bytes"]) == (line["path"], size(line["nbytes"]))
    assert ("namespace" in left_out(out)) == (width < 120)


@pytest.mark.parametrize("width", WIDTHS)
def test_top_keeps_the_state(served: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    names, rows, _ = shown(monkeypatch, width, "top", served / "journal", "--once")
    assert {"process", "tier", "state", "full", "hit rate"} <= set(names)
    assert {dict(zip(names, row, strict=True))["state"] for row in rows} == {"ended"}


@pytest.mark.parametrize("width", WIDTHS)
def test_explain_keeps_what_it_says(served: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    arguments = ("explain", served / "kv", "--journal", served / "journal", "--request", "cmpl-39")
    names, rows, _ = shown(monkeypatch, width, *arguments)
    assert {"blocks", "host", "disk", "shared", "now"} <= set(names)
    assert re.fullmatch(r"\d+( to \d+)?", rows[0][0])
    assert any("hasended" in cell.replace(" ", "") or "evicted" in cell for row in rows for cell in row)


def test_a_setting_is_one_line_to_be_copied(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, out = shown(monkeypatch, 60, "plan", served / "journal")
    assert any(line.endswith('"eviction_policy": "lru"}') and "num_cpu_blocks" in line for line in out.splitlines())
