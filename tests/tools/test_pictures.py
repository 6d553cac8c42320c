"""What commands draw: files are never overwritten unasked, and no journal, however hostile, ends in a traceback."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import msgspec
import numpy as np
import pytest
import torch

from kvstore import TieredStore
from kvstore.journal import Sample, frame
from kvstore.journal_view import JournalView
from tests.hostile.cases import JOURNALS
from tests.journals import SYSTEM, serve
from tests.small import small_blocks, small_config, small_keys
from tests.test_journal import ASKED, GOOD, segment_with
from tests.tools.test_cli import kvstore, kvstore_json
from tools.figures import byte_ticks, round_size
from tools.plan.chart import draw as draw_plan
from tools.plan.plan import Question, plan_of
from tools.plan.trace import read_trace
from tools.timeline import draw, span, timeline


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``kv`` and ``journal`` of a store, a trace, and a dump."""
    path = tmp_path_factory.mktemp("served")
    serve(path / "kv", path / "journal", 20)
    (path / "trace").write_text(json.dumps({"hash_ids": [1, 2, 3]}) + "\n" + json.dumps({"hash_ids": [1, 2, 4]}))
    (path / "prompt.json").write_text(json.dumps(SYSTEM))
    kvstore_json("dump", path / "kv", "--tokens", path / "prompt.json", "--out", path / "block.safetensors")
    return path


WRITERS = {
    "plot of a dump": ("plot", "block.safetensors", "--out"),
    "plot of a journal": ("plot", "journal", "--out"),
    "report": ("report", "kv", "--out"),
    "chart": ("plan", "trace", "--chart"),
}


@pytest.mark.parametrize("arguments", WRITERS.values(), ids=WRITERS)
def test_no_file_is_overwritten_unasked(served: Path, tmp_path: Path, arguments: tuple[str, str, str]) -> None:
    command, what, option = arguments
    out, link, dangling, target = (tmp_path / name for name in ("out", "link", "dangling", "target"))
    for path in (out, target):
        path.write_text("precious")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (out, link, dangling):
        code, _, err = kvstore(command, served / what, option, path)
        assert code == 2 and f"{option}: " in err and "--force" in err
    assert out.read_text() == target.read_text() == "precious" and not (tmp_path / "nowhere").exists()
    for path in (out, link):
        kvstore_json(command, served / what, option, path, "--force")
        assert path.stat().st_size > 1000 and not path.is_symlink()
    assert target.read_text() == "precious"  # what a link leads to is not written
    code, _, err = kvstore(command, served / what, option, tmp_path / "no" / "folder")
    assert code == 2 and f"{option}: " in err and "cannot be written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "out", "target"]


@pytest.mark.parametrize("case", ["formulas", "letters", "sizes", "numbers", "times", "tiers' names"])
@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_journal_can_not_break_a_picture(served: Path, tmp_path: Path, case: str, command: str) -> None:
    (tmp_path / "case").mkdir()
    JOURNALS[case](tmp_path / "case")
    journal, out = tmp_path / "case/journal", tmp_path / "out"
    what = ["plot", journal] if command == "plot" else ["report", served / "kv", "--journal", journal]
    code, printed, err = kvstore(*what, "--out", out)
    assert (code, out.exists()) in ((0, True), (2, False)), err
    assert not {"\x1b", "\x07", "\u202e"} & set(printed + err) and "Warning" not in err and "Traceback" not in err
    if case in ("formulas", "sizes") and command == "plot":
        assert code == 0 and "are left out" in printed


def test_what_cannot_be_is_left_out_and_the_rest_is_drawn(tmp_path: Path) -> None:
    now = time.time_ns()
    good = {"used_nbytes": 2.0**20, "capacity_nbytes": 2.0**22}
    bad: list[dict[str, Any]] = [{**good, "used_nbytes": n} for n in (float("nan"), 1e308, -1.0)]
    samples = [Sample(t_ns=now + i * 10**9, tiers={"host": numbers}) for i, numbers in enumerate([good, *bad, good])]
    samples += [Sample(t_ns=1 << 62, tiers={"host": good}), Sample(t_ns=now, tiers={"$x$": good})]
    asked = [msgspec.structs.replace(ASKED, t_ns=now + i * 10**9) for i in range(5)]
    records = sorted((*samples, *asked), key=lambda record: record.t_ns)
    journal = segment_with(tmp_path / "j", GOOD + b"".join(map(frame, records)))
    found = timeline(JournalView.of(journal))
    assert [len(of_one) for of_one in found.fill.values()] == [2]
    assert found.end_s - found.start_s == pytest.approx(4.0)
    assert found.notes == ["5 samples are left out: their tier, time or sizes cannot be"]
    figure = draw(found)
    full = figure.axes[0]
    assert list(full.lines[0].get_ydata()) == [25.0, 25.0] and full.get_xlim() == (0.0, 4.0)
    assert figure.axes[2].get_xlabel().startswith("seconds since")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1, "0.1 seconds"), (1, "1 second"), (90, "1.5 minutes"), (86400, "1 day")]
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_byte_ticks_are_round() -> None:
    gib = float(1 << 30)
    assert byte_ticks(0.3 * gib, 400 * gib) == [gib, 10 * gib, 100 * gib]
    assert [round_size(n) for n in byte_ticks(0.3 * gib, 4000 * gib)] == ["1 GiB", "10 GiB", "100 GiB", "1 TiB"]
    assert [round_size(n) for n in byte_ticks(1.5 * gib, 30 * gib)] == ["2 GiB", "5 GiB", "10 GiB", "20 GiB"]
    assert byte_ticks(5 * gib + 1, 5 * gib + 2) == []


def test_legends_cover_nothing(served: Path) -> None:
    plan = plan_of(read_trace(served / "trace"), Question(block_nbytes=1 << 20, target=0.3, host_blocks=2))
    for figure in (draw_plan(plan), draw(timeline(JournalView.of(served / "journal")))):
        figure.draw_without_rendering()
        for axes in figure.axes:
            if (legend := axes.get_legend()) is not None:
                assert legend.get_window_extent().x0 >= axes.get_window_extent().x1


def test_nan_is_red_and_counted(tmp_path: Path) -> None:
    blocks = small_blocks()
    blocks[1, 1, 0, 1, 2, 5] = float("nan")  # K of layer 1, head 1
    blocks[2, 0, 1, 0, 0, 0] = float("-inf")
    with TieredStore(small_config(disk=tmp_path / "kv")) as store:
        store.put(small_keys(), blocks)
        assert store.flush()
    (tmp_path / "tokens").write_text(json.dumps(list(range(48))))
    found = kvstore_json("plot", tmp_path / "kv", "--tokens", tmp_path / "tokens", "--out", tmp_path / "bad.png")
    assert found["bad_vectors"] == 2
    assert found["norm_by_head"][1][0][1] is None and found["norm_by_head"][0][1][0] is None
    assert sum(norm is None for layer in found["norm_by_head"] for part in layer for norm in part) == 2
    picture = matplotlib.image.imread(tmp_path / "bad.png")[..., :3]
    assert np.count_nonzero((picture == (1.0, 0.0, 0.0)).all(-1)) > 2000  # two heads, and two tokens
    out = kvstore("plot", tmp_path / "kv", "--tokens", tmp_path / "tokens", "--out", tmp_path / "again.png")[1]
    assert "2 vectors have NaN or infinite numbers: red" in out
    assert torch.isfinite(small_blocks()).all()


def test_a_large_number_is_finite(tmp_path: Path) -> None:
    blocks = small_blocks()
    blocks[0, 0, 0, 0, 0, 0] = 3e38  # whose square float32 cannot hold
    with TieredStore(small_config(disk=tmp_path / "kv")) as store:
        store.put(small_keys(), blocks)
        assert store.flush()
    found = kvstore_json("plot", tmp_path / "kv", "--key", str(small_keys()[0]), "--out", tmp_path / "large.png")
    assert found["bad_vectors"] == 0
