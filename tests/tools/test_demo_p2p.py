"""The demo of direct hand-over: what it says of what it measured; and the whole of it, which is slow."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("aiohttp")

from tools.demo_p2p.report import P2pDemoResult, TransportRow, print_result
from tools.demo_vllm.client import Answer, Request

ROOT = Path(__file__).resolve().parents[2]


def answer(i: int, *, cached: int = 0, text: str = "yes", ttft_s: float = 1.0) -> Answer:
    request = Request(name=f"prompt {i}", is_long=True, at_s=0.0, prompt="p", max_tokens=2)
    return Answer(
        request=request, sent_s=0.0, came_s=[ttft_s, ttft_s + 0.1], token_ids=[1, 2], text=text, prompt_tokens=100,
        cached_tokens=cached,
    )  # fmt: skip


ALONE = [answer(0), answer(1, ttft_s=3.0)]


def result(*rows: TransportRow, missing: tuple[str, ...] = ()) -> P2pDemoResult:
    alone = TransportRow.of("one server", ALONE, ALONE)
    return P2pDemoResult(model="m", prompt_tokens=[100, 100], rows=[alone, *rows], missing=list(missing), seconds=1.0)


def row(*, text: str = "yes", blocks: int = 6) -> TransportRow:
    answers = [answer(0, cached=96), answer(1, cached=96, text=text)]
    return TransportRow.of("TCP", answers, ALONE, blocks=blocks, nbytes=2_000_000_000 if blocks else 0, seconds=0.5)


def test_a_row_is_what_was_measured() -> None:
    found = row()
    assert (found.ttft_median_s, found.hand_over_s, found.gb_per_s) == (1.0, 0.25, 4.0)
    assert (found.prompt_tokens_handed_over, found.blocks, found.same_text) == (192, 6, True)
    assert result(found).ok


def test_other_texts_and_nothing_handed_over_are_not_ok() -> None:
    assert not result(row(text="no")).ok
    nothing = result(row(blocks=0))
    assert not nothing.ok
    shown = io.StringIO()
    print_result(nothing, Console(file=shown, width=200))
    assert "TCP: nothing was handed over" in shown.getvalue()


def test_a_transport_that_is_not_installed_is_named() -> None:
    found = result(row(), missing=("NIXL",))
    shown = io.StringIO()
    print_result(found, Console(file=shown, width=200))
    assert "NIXL is not installed" in shown.getvalue()
    assert "192 of 200" in shown.getvalue()
    assert found.to_dict()["missing"] == ["NIXL"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_every_transport_hands_over() -> None:
    pytest.importorskip("gguf")
    command = [sys.executable, "-c", "from tools.cli import main; main()", "demo-p2p", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    alone, *transports = found["transports"]
    assert alone["prompt_tokens_handed_over"] == 0
    assert {row["name"] for row in transports} >= {"gloo", "TCP"}
    for transport in transports:
        assert 0.9 * sum(found["prompt_tokens"]) < transport["prompt_tokens_handed_over"] < sum(found["prompt_tokens"])
