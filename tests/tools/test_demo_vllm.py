"""The demo of prefill and decode apart: its statistics and words, its processes, and once the whole of it."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

aiohttp = pytest.importorskip("aiohttp")
web = pytest.importorskip("aiohttp.web")

from tools.demo_process import ChildError  # noqa: E402
from tools.demo_vllm.client import Answer, AnswerError, Request, play  # noqa: E402
from tools.demo_vllm.load import Load, warm_up  # noqa: E402
from tools.demo_vllm.report import SetUpRow, VllmDemoResult, print_result, shows  # noqa: E402
from tools.demo_vllm.servers import ServerProcess, _members, two_cores  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


# -- statistics and report


def answer(came_s: list[float], *, is_long: bool = False, text: str = "a", cached: int = 0) -> Answer:
    request = Request(name="one", is_long=is_long, at_s=0.0, prompt="p", max_tokens=len(came_s))
    ids = list(range(len(came_s)))
    return Answer(
        request=request, sent_s=10.0, came_s=came_s, token_ids=ids, text=text, prompt_tokens=100, cached_tokens=cached
    )


SHORT = [answer([10.5, 10.6, 10.7, 12.7]), answer([11.0, 11.1, 11.2, 11.3])]
LONG = [answer([13.0, 19.0], is_long=True, cached=96), answer([14.0, 19.5], is_long=True, cached=64)]


def test_row_takes_gaps_from_streams_and_first_tokens_by_kind() -> None:
    row = SetUpRow.of("apart", "1 + 1", SHORT + LONG, SHORT + LONG, shared_blocks=5)
    assert row.itl_median_s == pytest.approx(0.1)
    assert row.itl_max_s == pytest.approx(2.0)
    assert 1.8 < row.itl_p99_s < 2.0
    assert (row.ttft_long_median_s, row.ttft_short_median_s) == (3.5, 0.75)
    assert row.ttft_long_p99_s == pytest.approx(3.99)
    assert row.tokens_per_s == pytest.approx(12 / 9.5)
    assert (row.prompt_tokens_loaded, row.blocks_from_shared_path, row.same_text) == (160, 5, True)


def test_another_text_or_another_token_is_not_the_same() -> None:
    other = [answer(a.came_s, text="b") for a in SHORT]
    assert not SetUpRow.of("x", "2", [*other, *LONG], [*SHORT, *LONG]).same_text
    other = [dataclasses.replace(a, token_ids=[7, *a.token_ids[1:]]) for a in SHORT]
    assert not SetUpRow.of("x", "2", [*other, *LONG], [*SHORT, *LONG]).same_text


def rows(alone_p99_s: float, apart_p99_s: float, **changes: Any) -> list[SetUpRow]:
    alone = dataclasses.replace(SetUpRow.of("alone", "2", SHORT + LONG, SHORT + LONG), itl_p99_s=alone_p99_s)
    apart = dataclasses.replace(alone, name="apart", itl_p99_s=apart_p99_s, blocks_from_shared_path=5)
    return [alone, dataclasses.replace(alone, name="chunked", itl_p99_s=0.5), dataclasses.replace(apart, **changes)]


@pytest.mark.parametrize(
    ("alone_p99_s", "apart_p99_s", "words"),
    [
        (2.0, 0.1, "is 20.0 times shorter with prefill apart (100 ms against 2,000 ms; chunked: 500 ms)"),
        (0.1, 0.3, "is 3.0 times longer with prefill apart: splitting did not help here (300 ms against 100 ms"),
        (0.1, 0.105, "is the same with prefill apart: splitting did not help here (105 ms against 100 ms"),
    ],
)
def test_sentence_says_what_the_numbers_say(alone_p99_s: float, apart_p99_s: float, words: str) -> None:
    assert words in shows(rows(alone_p99_s, apart_p99_s))
    assert shows(rows(1, 1, ttft_long_median_s=9.0)).endswith("after 9,000 ms in the median instead of 3,500 ms.")


def result(set_ups: list[SetUpRow]) -> VllmDemoResult:
    return VllmDemoResult(model="m", load="much", prompt_tokens=400, set_ups=set_ups, seconds=1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"prompt_tokens_loaded": 0}, "The decode server loaded nothing"),
        ({"blocks_from_shared_path": 0}, "The decode server loaded nothing"),
        ({"same_text": False}, "Other text than from alone: apart"),
    ],
)
def test_report_says_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    made = result(rows(2.0, 0.1, **changes))
    console = Console(file=io.StringIO(), width=200)
    print_result(made, console)
    assert words in console.file.getvalue()  # type: ignore[attr-defined]
    assert made.ok is not bool(words)
    assert {"name", "cores", "itl_p99_s", "same_text"} <= set(made.to_dict()["set_ups"][0])


# -- load


def test_load_comes_in_order_and_no_prompt_is_another_ones_beginning() -> None:
    load = Load()
    requests = load.requests()
    assert [r.at_s for r in requests] == sorted(r.at_s for r in requests)
    long = [r.prompt for r in [*requests, *warm_up(load)] if r.is_long]
    assert len({prompt[:60] for prompt in long}) == len(long)
    assert all(abs(len(prompt) - load.long_chars) < 100 for prompt in long)
    assert all(len(r.prompt) < 100 for r in requests if not r.is_long)
    assert {r.name for r in requests if r.is_long} == {f"long prompt {i}" for i in range(8)}


# -- client


def event(text: str, *ids: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "token_ids": ids}]}).encode() + b"\n\n"


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}
END = b"data: " + json.dumps(USAGE).encode() + b"\n\ndata: [DONE]\n\n"


def ask(handler: Callable[[Any], Awaitable[Any]], max_tokens: int = 3) -> Answer:
    """One request to a server that has just this handler."""

    async def main() -> Answer:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        request = Request(name="one", is_long=False, at_s=0.0, prompt="p", max_tokens=max_tokens)
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            (answer,) = await play(url, "m", [request], timeout_s=20, done=lambda r: None)
            return answer
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def streaming(*parts: bytes, pause_s: float = 0.0) -> Callable[[Any], Awaitable[Any]]:
    async def handler(request: Any) -> Any:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(pause_s)
        return response

    return handler


def test_client_notes_when_each_token_came() -> None:
    got = ask(streaming(event("a", 1), event("bc", 2, 3), END, pause_s=0.2))
    assert (got.text, got.token_ids, got.prompt_tokens, got.cached_tokens) == ("abc", [1, 2, 3], 9, 4)
    assert got.ttft_s > 0
    assert got.gaps_s[0] > 0.1
    assert got.gaps_s[1] == 0.0  # both came at once


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((event("a", 1), END), "1 tokens came, not 3"),
        ((event("a", 1, 2, 3),), r"without \[DONE\]"),
        ((b'data: {"error": "gone"}\n\n',), "gone"),
        ((b"data: nonsense\n\n",), "JSONDecodeError"),
    ],
)
def test_client_refuses_what_is_not_a_whole_answer(parts: tuple[bytes, ...], words: str) -> None:
    with pytest.raises(AnswerError, match=words):
        ask(streaming(*parts))


def test_client_says_what_a_server_said() -> None:
    async def handler(_: Any) -> Any:
        return web.Response(status=400, text="no such model")

    with pytest.raises(AnswerError, match="status 400: no such model"):
        ask(handler)


# -- processes

SERVE = """
import http.server, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("cores", os.sched_getaffinity(0), os.environ["FROM_PARENT"], flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"hello")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_server_is_pinned_and_nothing_of_it_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even where it does not listen to SIGTERM, and has children."""
    monkeypatch.setattr("tools.demo_vllm.servers._LEAVE_S", 0.5)
    core, _ = two_cores()
    with ServerProcess("tester", ["-c", SERVE], {"FROM_PARENT": "yes"}, [core], tmp_path) as server:
        server.wait(time.monotonic() + 30)
        assert server.get("/")[1] == "hello"
        group = server._process.pid
        assert len(_members(group)) == 2
    assert _members(group) == {}
    assert f"cores {{{core}}} yes" in (tmp_path / "tester.log").read_text()


def test_server_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    command = ["-c", "import sys; sys.exit('no luck today')"]
    told = r"the tester died \(exit code 1\)\n  \| no luck today"
    server = ServerProcess("tester", command, {}, two_cores(), tmp_path)
    with server, pytest.raises(ChildError, match=told):
        server.wait(time.monotonic() + 30)


def test_server_that_is_late_is_reported(tmp_path: Path) -> None:
    command = ["-c", "import time; time.sleep(600)"]
    told = r"the tester was not ready in time \(still running\)"
    server = ServerProcess("tester", command, {}, two_cores(), tmp_path)
    with server, pytest.raises(ChildError, match=told):
        server.wait(time.monotonic() + 0.5)


# -- all of it


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_tail_is_shorter_with_prefill_apart() -> None:
    pytest.importorskip("gguf")
    command = [sys.executable, "-c", "from tools.cli import main; main()", "demo-vllm", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    alone, *_, apart = found["set_ups"]
    assert all(row["same_text"] for row in found["set_ups"])
    assert (alone["prompt_tokens_loaded"], alone["blocks_from_shared_path"]) == (0, 0)
    assert 0.9 * found["prompt_tokens"] < apart["prompt_tokens_loaded"] < found["prompt_tokens"]
    assert apart["blocks_from_shared_path"] * 32 >= apart["prompt_tokens_loaded"]
    assert apart["itl_p99_s"] < alone["itl_p99_s"]
    assert found["shows"]
