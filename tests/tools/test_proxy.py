"""The proxy between real servers on loopback: who is asked what, and what a client sees when one fails."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from connectors.registration import Joins, PeerAddress, Registration, read_secret
from kvstore.errors import ConfigError
from tests.waiting import wait_until

aiohttp = pytest.importorskip("aiohttp")
web = pytest.importorskip("aiohttp.web")

from tools.proxy import app as proxy_app  # noqa: E402
from tools.proxy.app import running  # noqa: E402
from tools.proxy.messages import (  # noqa: E402
    ASK_FOR_HAND_OVER,
    CHAT_PATH,
    MAX_EVENT_NBYTES,
    prefill_copy,
    prompt_chars,
    request_headers,
    whole_events,
)
from tools.proxy.relay import MAX_PREFILL_ANSWER_NBYTES  # noqa: E402
from tools.proxy.servers import Pool  # noqa: E402
from tools.proxy.settings import ProxySettings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COMPLETIONS = "/v1/completions"
LONG, SHORT = "long " * 200, "short"
DOWN = "http://127.0.0.1:1"
PARAMS = {"remote_block_ids": [1, 2], "remote_host": "a"}
Answer = Callable[["Fake", Any, dict[str, Any]], Awaitable[Any]]


class Fake:
    """An OpenAI-compatible server that notes what it is asked and answers as told."""

    def __init__(self, name: str, answer: Answer | None = None) -> None:
        self.name, self.answer = name, answer or say
        self.asked: list[tuple[str, Any, Any]] = []
        self.health = 200
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        self.url = ""

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.asked]

    async def handle(self, request: Any) -> Any:
        if request.path == "/health":
            return web.Response(status=self.health)
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, request.headers, body))
        try:
            return await self.answer(self, request, body)
        except asyncio.CancelledError:
            self.left.set()
            raise

    @asynccontextmanager
    async def at(self, port: int = 0) -> AsyncIterator[Fake]:
        application = web.Application(client_max_size=8 << 20)
        application.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()


# -- ways to answer


async def say(fake: Fake, request: Any, body: Any) -> Any:
    return web.json_response({"from": fake.name})


async def say_params(fake: Fake, request: Any, body: Any) -> Any:
    return web.json_response({"choices": [], "kv_transfer_params": PARAMS})


async def hang(fake: Fake, request: Any, body: Any) -> Any:
    await asyncio.sleep(60)


async def close_at_once(fake: Fake, request: Any, body: Any) -> Any:
    request.transport.abort()
    return web.Response()


def status(code: int) -> Answer:
    async def answer(fake: Fake, request: Any, body: Any) -> Any:
        return web.json_response({"error": {"message": f"{fake.name} says {code}"}}, status=code)

    return answer


def text(content: str) -> Answer:
    async def answer(fake: Fake, request: Any, body: Any) -> Any:
        return web.Response(text=content)

    return answer


def stream(end: str) -> Answer:
    """Two events; the second and what follows wait for ``go_on``."""

    async def answer(fake: Fake, request: Any, body: Any) -> Any:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(b'data: {"n": 1}\n\n')
        await fake.go_on.wait()
        await response.write(b'data: {"n": 2}\n\n')
        if end == "done":
            await response.write(b"data: [DONE]\n\n")
        elif end in ("die", "die within an event"):
            if end != "die":
                await response.write(b'data: {"choices":[{"te')
            await asyncio.sleep(0.05)
            request.transport.abort()
        elif end == "hang":
            await asyncio.sleep(60)
        return response

    return answer


# -- the proxy


def settings(prefill: list[str], decode: list[str], **changes: Any) -> ProxySettings:
    given: dict[str, Any] = {
        "port": 0, "prefill_timeout_s": 5.0, "connect_timeout_s": 5.0, "idle_timeout_s": 5.0, "health_interval_s": 0.05,
    }  # fmt: skip
    return ProxySettings(prefill=tuple(prefill), decode=tuple(decode), **{**given, **changes})


class Client:
    """What a client of the proxy does."""

    def __init__(self, url: str, session: Any) -> None:
        self.url, self.session = url, session

    def post(self, prompt: str = SHORT, path: str = COMPLETIONS, headers: Any = None, **fields: Any) -> Any:
        body = {"model": "m", "prompt": prompt, **fields}
        data = io.BytesIO(json.dumps(body).encode())
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self.session.post(self.url + path, data=data, headers=headers)

    async def ask(self, prompt: str = SHORT, **fields: Any) -> tuple[int, Any]:
        async with self.post(prompt, **fields) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as answer:
            return answer.status, await answer.json()

    async def server(self, url: str, role: str = "decode") -> Any:
        _, shown = await self.get("/status")
        return next(s for s in shown["servers"] if (s["url"], s["role"]) == (url, role))


Test = Callable[..., Coroutine[Any, Any, None]]


def play(test: Test, *fakes: Fake, prefill: Any = None, decode: Any = None, **changes: Any) -> None:
    """Run a test with a client of a proxy in front of servers; the first prefills unless lists are given."""

    async def main() -> None:
        async with asyncio.timeout(10), contexts(fakes):
            before = [u if isinstance(u, str) else u.url for u in (prefill or fakes[:1])]
            behind = [u if isinstance(u, str) else u.url for u in (decode or fakes[1:])]
            async with running(settings(before, behind, **changes)) as url, aiohttp.ClientSession() as session:
                await test(Client(url, session))

    asyncio.run(main())


@asynccontextmanager
async def contexts(fakes: Any) -> AsyncIterator[None]:
    if not fakes:
        yield
        return
    async with fakes[0].at(), contexts(fakes[1:]):
        yield


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():
        await asyncio.sleep(0.01)


# -- prefill, then decode


def test_prefill_then_decode_with_its_params() -> None:
    a, b = Fake("a", say_params), Fake("b")

    async def test(client: Client) -> None:
        headers = {"X-Request-Id": "id-7", "Authorization": "Bearer key", "TE": "trailers"}
        fields = {"max_tokens": 50, "min_tokens": 5, "stream": False, "n": 2, "logprobs": 3, "temperature": 0.5}
        async with client.post(LONG, headers=headers, **fields) as answer:
            assert (answer.status, await answer.json()) == (200, {"from": "b"})
            assert answer.headers["X-Request-Id"] == "id-7"
        kept = {"model": "m", "prompt": LONG, "temperature": 0.5}
        assert a.bodies == [{**kept, "max_tokens": 1, "stream": False, "n": 1, "kv_transfer_params": ASK_FOR_HAND_OVER}]
        assert b.bodies == [{"model": "m", "prompt": LONG, **fields, "kv_transfer_params": PARAMS}]
        for _, got, _ in (*a.asked, *b.asked):
            assert (got["X-Request-Id"], got["Authorization"]) == ("id-7", "Bearer key")
            assert "TE" not in got

    play(test, a, b)


def test_chat_is_prefilled_by_the_length_of_its_messages() -> None:
    a, b = Fake("a", say_params), Fake("b")

    async def test(client: Client) -> None:
        messages = [{"role": "user", "content": LONG}]
        await client.ask(path=CHAT_PATH, messages=messages, prompt=None, max_completion_tokens=9, stream_options={})
        ((path, _, body),) = a.asked
        assert (path, body["max_tokens"], body["max_completion_tokens"]) == (CHAT_PATH, 1, 1)
        assert "stream_options" not in body
        assert b.bodies[0]["kv_transfer_params"] == PARAMS

    play(test, a, b)


def test_one_id_for_both_where_the_client_has_none() -> None:
    a, b = Fake("a"), Fake("b")

    async def test(client: Client) -> None:
        await client.ask(LONG)
        ((_, of_a, _),), ((_, of_b, _),) = a.asked, b.asked
        assert of_a["X-Request-Id"] == of_b["X-Request-Id"] != ""
        assert "kv_transfer_params" not in b.bodies[0]

    play(test, a, b)


def test_short_prompt_skips_prefill() -> None:
    a, b = Fake("a", say_params), Fake("b")

    async def test(client: Client) -> None:
        assert await client.ask(SHORT, seed=1) == (200, {"from": "b"})
        assert a.asked == []
        assert b.bodies == [{"model": "m", "prompt": SHORT, "seed": 1}]

    play(test, a, b)


def test_many_large_requests_at_once() -> None:
    a, b1, b2 = Fake("a", say_params), Fake("b1"), Fake("b2")

    async def test(client: Client) -> None:
        prompt = "x" * (3 << 19)
        answers = await asyncio.gather(*(client.ask(prompt, seed=i) for i in range(8)))
        assert [code for code, _ in answers] == [200] * 8
        assert sorted(body["seed"] for body in b1.bodies + b2.bodies) == list(range(8))
        assert len(b1.asked) == len(b2.asked) == 4
        assert all(body["kv_transfer_params"] == PARAMS for body in b1.bodies + b2.bodies)

    play(test, a, b1, b2)


def test_lengths_of_prompts() -> None:
    parts = [{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": None}]
    messages = [{"content": "ab"}, {"content": parts}, {"content": None}, 7]
    assert prompt_chars({"prompt": "abc"}) == prompt_chars({"prompt": ["abc"]}) == 3
    assert prompt_chars({"prompt": [5, 6]}) == prompt_chars({"prompt": [[5, 6]]}) == 8
    assert prompt_chars({"messages": messages}) == 5
    assert prompt_chars({"prompt": ["abc", "abc"]}) is prompt_chars({"prompt": [[1], [2]]}) is None
    for odd in ({}, {"prompt": 7}, {"prompt": []}, {"prompt": [None]}, {"messages": "abc"}):
        assert prompt_chars(odd) == 0


def test_prefill_copy_leaves_the_request_alone() -> None:
    body = {"prompt": "a", "logprobs": 1, "stream": True}
    copy = {"prompt": "a", "max_tokens": 1, "stream": False, "n": 1, "kv_transfer_params": ASK_FOR_HAND_OVER}
    assert json.loads(prefill_copy(COMPLETIONS, body)) == copy
    assert body == {"prompt": "a", "logprobs": 1, "stream": True}


def test_a_clients_own_transfer_params_reach_no_server() -> None:
    a, b = Fake("a"), Fake("b")

    async def test(client: Client) -> None:
        async with client.post(LONG, kv_transfer_params={"remote_host": "10.0.0.1"}) as answer:
            assert answer.status == 200
        async with client.post("short", kv_transfer_params={"remote_host": "10.0.0.1"}) as answer:
            assert answer.status == 200
        assert a.bodies[0]["kv_transfer_params"] == ASK_FOR_HAND_OVER
        assert ["kv_transfer_params" in body for body in b.bodies] == [False, False]

    play(test, a, b, prefill=[a], decode=[b])


def test_headers_named_by_connection_are_not_forwarded() -> None:
    kept = request_headers({"Connection": "close, X-Mine", "X-Mine": "1", "X-Other": "2", "Host": "h"})
    assert set(kept) == {"X-Other", "X-Request-Id", "Accept-Encoding"}


# -- prefill fails


@pytest.mark.parametrize(
    "answer",
    [status(500), status(503), status(302), text("no json"), text("[]"), text("[" * 100_000), close_at_once, hang,
     text(" " * (MAX_PREFILL_ANSWER_NBYTES + 1))],
    ids=["500", "503", "302", "no-json", "no-object", "nested", "closed", "hanging", "oversized"],
)  # fmt: skip
def test_failed_prefill_is_tried_once_elsewhere(answer: Answer) -> None:
    a1, a2, b = Fake("a1", answer), Fake("a2", say_params), Fake("b")

    async def test(client: Client) -> None:
        for _ in range(2):  # in turn, so one of them begins at the bad one
            assert await client.ask(LONG) == (200, {"from": "b"})
        assert [body["kv_transfer_params"] for body in b.bodies] == [PARAMS, PARAMS]
        assert (len(a1.asked), len(a2.asked)) == (1, 2)
        assert (await client.server(a1.url, "prefill"))["failures"] == 1

    play(test, a1, a2, b, prefill=[a1, a2], decode=[b], idle_timeout_s=1.0)


def test_prefill_down_decode_still_answers() -> None:
    b = Fake("b")

    async def test(client: Client) -> None:
        assert await client.ask(LONG) == (200, {"from": "b"})
        assert b.bodies == [{"model": "m", "prompt": LONG}]
        assert not (await client.server(DOWN, "prefill"))["healthy"]

    play(test, b, prefill=[DOWN], decode=[b])


def test_hanging_prefill_ends_by_its_deadline() -> None:
    a, b = Fake("a", hang), Fake("b")

    async def test(client: Client) -> None:
        begin = time.monotonic()
        assert await client.ask(LONG) == (200, {"from": "b"})
        assert 0.2 < time.monotonic() - begin < 3.0
        assert (await client.server(a.url, "prefill"))["last_error"] == "gave no answer in time"
        await a.left.wait()

    play(test, a, b, prefill_timeout_s=0.3)


def test_prefill_that_refuses_is_the_decode_servers_to_tell() -> None:
    a1, a2, b = Fake("a1", status(400)), Fake("a2", status(400)), Fake("b", status(400))

    async def test(client: Client) -> None:
        assert await client.ask(LONG) == (400, {"error": {"message": "b says 400"}})
        assert len(a1.asked) + len(a2.asked) == 1
        assert (await client.server(a1.url, "prefill"))["failures"] == 0

    play(test, a1, a2, b, prefill=[a1, a2], decode=[b])


# -- decode fails


@pytest.mark.parametrize("answer", [status(502), status(503), status(504), close_at_once])
def test_failed_decode_is_tried_elsewhere(answer: Answer) -> None:
    a, b1, b2 = Fake("a"), Fake("b1", answer), Fake("b2")

    async def test(client: Client) -> None:
        for _ in range(2):
            assert await client.ask() == (200, {"from": "b2"})
        assert len(b1.asked) == 1

    play(test, a, b1, b2)


def test_decode_that_refuses_connections_is_out_at_once() -> None:
    a, b1, b2 = Fake("a"), Fake("b1"), Fake("b2")

    async def main() -> None:
        async with a.at(), b2.at():
            async with b1.at():
                proxy = running(settings([a.url], [b1.url, b2.url], health_interval_s=60.0))
                url = await proxy.__aenter__()
            async with aiohttp.ClientSession() as session:
                client = Client(url, session)
                assert (await client.server(b1.url))["healthy"]
                for _ in range(3):
                    assert await client.ask() == (200, {"from": "b2"})
                shown = await client.server(b1.url)
                assert (shown["healthy"], shown["requests"], shown["failures"]) == (False, 1, 1)
            await proxy.__aexit__(None, None, None)

    asyncio.run(main())


def test_all_decode_servers_failing_is_a_503_that_names_them() -> None:
    a, b1, b2 = Fake("a"), Fake("b1", status(503)), Fake("b2", close_at_once)

    async def test(client: Client) -> None:
        code, body = await client.ask()
        assert (code, body["error"]["type"], body["error"]["code"]) == (503, "server_error", 503)
        assert f"{b1.url}: answered 503" in body["error"]["message"]
        assert f"{b2.url}: closed the connection" in body["error"]["message"]

    play(test, a, b1, b2)


def test_no_healthy_decode_server() -> None:
    a = Fake("a")

    async def test(client: Client) -> None:
        code, body = await client.ask(LONG)
        assert code == 503
        assert f"{DOWN}: out (health: " in body["error"]["message"]
        assert (await client.get("/health"))[0] == 503

    play(test, a, prefill=[a], decode=[DOWN])


def test_hanging_decode_ends_by_its_deadline() -> None:
    a, b1, b2 = Fake("a"), Fake("b1", hang), Fake("b2", hang)

    async def test(client: Client) -> None:
        begin = time.monotonic()
        code, body = await client.ask()
        assert 0.2 < time.monotonic() - begin < 3.0
        assert (code, body["error"]["code"]) == (504, 504)
        assert len(b1.asked) + len(b2.asked) == 1

    play(test, a, b1, b2, idle_timeout_s=0.3)


def test_answer_without_stream_that_breaks_is_cut_off() -> None:
    async def half(fake: Fake, request: Any, body: Any) -> Any:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"half": ')
        await asyncio.sleep(0.05)
        request.transport.abort()
        return response

    async def test(client: Client) -> None:
        with pytest.raises(aiohttp.ClientError):
            await client.ask()

    play(test, Fake("a"), Fake("b", half))


def test_server_error_is_relayed() -> None:
    a, b = Fake("a"), Fake("b", status(500))

    async def test(client: Client) -> None:
        assert await client.ask() == (500, {"error": {"message": "b says 500"}})
        assert (await client.server(b.url))["last_error"] == "answered 500"

    play(test, a, b)


# -- streams


def test_stream_is_relayed_chunk_by_chunk() -> None:
    b = Fake("b", stream("done"))

    async def test(client: Client) -> None:
        async with client.post(stream=True) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert await answer.content.readany() == b'data: {"n": 1}\n\n'  # the second waits for go_on
            b.go_on.set()
            assert await answer.content.read() == b'data: {"n": 2}\n\ndata: [DONE]\n\n'

    play(test, Fake("a"), b)


@pytest.mark.parametrize("end", ["die", "die within an event", "hang", "no done"])
def test_stream_that_breaks_ends_with_an_error_event(end: str) -> None:
    b = Fake("b", stream(end))

    async def test(client: Client) -> None:
        b.go_on.set()
        async with client.post(stream=True) as answer:
            events = [line for line in (await answer.text()).split("\n\n") if line]
        assert events[:2] == ['data: {"n": 1}', 'data: {"n": 2}']
        (last,) = events[2:]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert b.url in error["message"]
        assert (error["type"], error["code"]) == ("server_error", 502)
        assert (await client.server(b.url))["failures"] == 1

    play(test, Fake("a"), b, idle_timeout_s=0.5)


def test_client_that_leaves_a_stream_is_seen_by_the_server() -> None:
    b = Fake("b", stream("done"))

    async def test(client: Client) -> None:
        answer = await client.post(stream=True)
        await answer.content.readany()
        answer.close()
        await asyncio.wait_for(b.left.wait(), 2.0)  # before any deadline of the proxy
        assert (await client.server(b.url))["in_flight"] == 0

    play(test, Fake("a"), b)


def test_client_that_leaves_during_prefill_is_seen_by_the_server() -> None:
    a, b = Fake("a", hang), Fake("b")

    async def test(client: Client) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.ask(LONG), 0.2)
        await asyncio.wait_for(a.left.wait(), 2.0)
        assert b.asked == []

    play(test, a, b)


def test_client_that_does_not_read_is_left() -> None:
    async def flood(fake: Fake, request: Any, body: Any) -> Any:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b"data: " + b"x" * 100_000 + b"\n\n")

    b = Fake("b", flood)

    async def test(client: Client) -> None:
        answer = await client.post(stream=True)
        await until(partial(ended, client))
        answer.close()

    async def ended(client: Client) -> bool:
        return bool((await client.server(b.url))["in_flight"] == 0)

    play(test, Fake("a"), b, idle_timeout_s=0.2)


# -- bounds and paths


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000], ids=["empty", "cut", "list", "bytes", "nested"]
)
def test_bad_bodies_are_400(data: bytes) -> None:
    b = Fake("b")

    async def test(client: Client) -> None:
        async with client.session.post(client.url + COMPLETIONS, data=data) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["type"], error["code"]) == (400, "invalid_request_error", 400)
        assert b.asked == []

    play(test, Fake("a"), b)


@pytest.mark.parametrize("chunked", [False, True])
def test_oversized_bodies_are_413(chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 65536

    async def test(client: Client) -> None:
        data = chunks() if chunked else io.BytesIO(b" " * (2 << 20))
        async with client.session.post(client.url + COMPLETIONS, data=data) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (413, 413)

    play(test, Fake("a"), Fake("b"), max_body_mib=1)


def test_body_that_does_not_arrive_is_408() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def test(client: Client) -> None:
        async with client.session.post(client.url + COMPLETIONS, data=chunks()) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (408, 408)

    play(test, Fake("a"), Fake("b"), idle_timeout_s=0.2)


def test_more_than_allowed_in_flight_is_429() -> None:
    b = Fake("b", stream("done"))

    async def test(client: Client) -> None:
        async with client.post(stream=True) as answer:
            await answer.content.readany()
            code, body = await client.ask()
            assert (code, body["error"]["type"], body["error"]["code"]) == (429, "rate_limit_error", 429)
            assert (await client.get("/health"))[0] == 200
            b.go_on.set()
            await answer.read()
        assert len(b.asked) == 1
        async with client.post(stream=True) as answer:
            assert answer.status == 200
            await answer.read()

    play(test, Fake("a"), b, max_in_flight=1)


def test_models_is_relayed_and_other_paths_are_404() -> None:
    b = Fake("b")

    async def test(client: Client) -> None:
        assert await client.get("/v1/models") == (200, {"from": "b"})
        for path in ("/", "/v1/embeddings", COMPLETIONS):
            code, body = await client.get(path)
            assert (code, body["error"]["code"]) == (404, 404)
        assert [path for path, _, _ in b.asked] == ["/v1/models"]

    play(test, Fake("a"), b)


# -- which server, and how they do


def test_pick_takes_the_least_busy_and_ties_in_turn() -> None:
    pool = Pool("decode", ["a", "b", "c"])
    assert pool.pick(()) is None
    for server in pool.servers:
        server.probe_succeeded()
    a, b, c = pool.servers
    assert [pool.pick(()) for _ in range(4)] == [a, b, c, a]
    a.in_flight = b.in_flight = 2
    assert [pool.pick(()) for _ in range(2)] == [c, c]
    assert pool.pick((c,)) is a
    a.healthy = False
    assert pool.pick((c,)) is b


def test_two_failures_in_a_row_take_a_server_out_and_one_success_brings_it_back() -> None:
    (server,) = Pool("decode", ["a"]).servers
    server.probe_succeeded()
    for failed in (1, 0, 1, 1):
        assert server.healthy
        server.probe_failed("why") if failed else server.probe_succeeded()
    assert not server.healthy
    server.probe_succeeded()
    assert server.healthy
    server.request_failed("why")
    assert server.healthy
    server.request_failed("why", connect=True)
    assert not server.healthy


def test_health_goes_out_and_comes_back() -> None:
    b = Fake("b")

    async def test(client: Client) -> None:
        for health in (500, 200):
            b.health = health
            wanted = {500: 503, 200: 200}[health]
            await until(partial(shows, client, wanted))
        assert (await client.server(b.url))["last_error"] == "health: answered 500"

    async def shows(client: Client, wanted: int) -> bool:
        return (await client.get("/health"))[0] == wanted

    play(test, Fake("a"), b)


def test_status_names_each_server() -> None:
    a, b = Fake("a"), Fake("b")

    async def test(client: Client) -> None:
        await client.ask(LONG)
        _, shown = await client.get("/status")
        same = {"healthy": True, "in_flight": 0, "requests": 1, "failures": 0, "last_error": None, "lease_left_s": None}
        servers = [{"url": a.url, "role": "prefill", **same}, {"url": b.url, "role": "decode", **same}]
        assert shown == {"in_flight": 0, "servers": servers}

    play(test, a, b)


# -- start and stop


def test_requests_in_flight_end_before_it_stops() -> None:
    a, b = Fake("a"), Fake("b", stream("done"))

    async def main() -> None:
        async with a.at(), b.at(), aiohttp.ClientSession() as session:
            async with running(settings([a.url], [b.url])) as url:
                client = Client(url, session)
                answer = await client.post(stream=True)
                asyncio.get_running_loop().call_later(0.1, b.go_on.set)
            assert (await answer.text()).endswith("data: [DONE]\n\n")
            with pytest.raises(aiohttp.ClientConnectorError):
                await client.ask()

    asyncio.run(main())


def test_what_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_app, "GRACE_S", 0.1)
    monkeypatch.setattr(proxy_app, "_CLOSE_S", 0.1)
    a, b = Fake("a"), Fake("b", stream("done"))

    async def main() -> None:
        async with a.at(), b.at(), aiohttp.ClientSession() as session:
            begin = time.monotonic()
            async with running(settings([a.url], [b.url])) as url:
                answer = await Client(url, session).post(stream=True)
            assert time.monotonic() - begin < 3.0
            with pytest.raises(aiohttp.ClientError):
                await answer.read()
            await asyncio.wait_for(b.left.wait(), 1.0)

    asyncio.run(main())


def test_port_that_is_taken_is_named() -> None:
    a = Fake("a")

    async def test(client: Client) -> None:
        port = int(a.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen"):
            async with running(settings([a.url], [a.url], port=port)):
                pass

    play(test, a, prefill=[a], decode=[a])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prefill": []}, r"--prefill: \(\)"),
        ({"decode": ["b:80"]}, "--decode: 'b:80'"),
        ({"decode": ["http://b:80/v1"]}, "--decode: 'http://b:80/v1'"),
        ({"decode": ["http://b:x"]}, "--decode: 'http://b:x'"),
        ({"decode": ["ftp://b"]}, "--decode: 'ftp://b'"),
        ({"decode": ["http://b", "http://b/"]}, "--decode: 'http://b/' is given twice"),
        ({"host": ""}, "--host: ''"),
        ({"port": 65536}, "--port: 65536"),
        ({"min_prompt_chars": -1}, "--min-prompt-chars: -1"),
        ({"prefill_timeout_s": 0.0}, "--prefill-timeout-s: 0.0"),
        ({"connect_timeout_s": -1.0}, "--connect-timeout-s: -1.0"),
        ({"idle_timeout_s": float("nan")}, "--idle-timeout-s: nan"),
        ({"health_interval_s": float("inf")}, "--health-interval-s: inf"),
        ({"max_in_flight": 0}, "--max-in-flight: 0"),
        ({"max_body_mib": 0}, "--max-body-mib: 0"),
    ],
)
def test_settings_that_are_wrong_are_named(changes: dict[str, Any], named: str) -> None:
    given = {"prefill": ["http://a"], "decode": ["http://b"], **changes}
    with pytest.raises(ConfigError, match=named):
        settings(**given)


# -- servers that register

PROXY = [sys.executable, "-c", "from tools.cli import main; main()", "proxy", "--port", "0", "--json"]
SECRET = "a secret of the tests"
PEER = {"address": "tcp://127.0.0.1:5", "key": "k"}


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return str(path)


def register(client: Client, url: str, role: str = "decode", secret: str = SECRET, **told: Any) -> Any:
    told = {"role": role, "url": url, "lease_s": 5.0, **told}
    return client.session.post(f"{client.url}/servers", json=told, headers={"Authorization": f"Bearer {secret}"})


async def joined(client: Client, url: str, role: str = "decode", **told: Any) -> None:
    async with register(client, url, role, **told) as answer:
        assert answer.status == 200, await answer.text()
    for as_role in ("prefill", "decode") if role == "both" else (role,):
        await until(lambda as_role=as_role: is_healthy(client, url, as_role))  # type: ignore[misc]


async def is_healthy(client: Client, url: str, role: str) -> bool:
    return bool((await client.server(url, role))["healthy"])


async def listed(client: Client) -> list[tuple[str, str]]:
    _, shown = await client.get("/status")
    return [(server["role"], server["url"]) for server in shown["servers"]]


def alone(test: Test, key_file: str, *fakes: Fake, **changes: Any) -> None:
    """Run a test with a proxy that knows no server yet."""

    async def main() -> None:
        async with asyncio.timeout(20), contexts(fakes):
            given = settings([], [], register_key_file=key_file, **changes)
            async with running(given) as url, aiohttp.ClientSession() as session:
                await test(Client(url, session))

    asyncio.run(main())


def test_servers_register_and_leave(key_file: str) -> None:
    a, b = Fake("a", say_params), Fake("b")

    async def test(client: Client) -> None:
        assert (await client.ask())[0] == 503
        await joined(client, a.url, "prefill")
        await joined(client, b.url)
        assert await client.ask(LONG) == (200, {"from": "b"})
        assert b.bodies[-1]["kv_transfer_params"] == PARAMS
        assert 0 < (await client.server(b.url))["lease_left_s"] <= 5
        headers = {"Authorization": f"Bearer {SECRET}"}
        async with client.session.delete(f"{client.url}/servers", json={"url": b.url}, headers=headers) as answer:
            assert answer.status == 200
        assert await listed(client) == [("prefill", a.url)]
        assert (await client.ask())[0] == 503
        await joined(client, a.url, "both")
        assert await listed(client) == [("prefill", a.url), ("decode", a.url)]

    alone(test, key_file, a, b)


def test_who_does_not_renew_leaves(key_file: str) -> None:
    a, b = Fake("a"), Fake("b", stream("done"))

    async def test(client: Client) -> None:
        await joined(client, a.url, lease_s=5.0)
        await joined(client, b.url, lease_s=1.0)
        renewals = 0
        start = time.monotonic()
        while time.monotonic() - start < 1.5:  # longer than the lease
            await joined(client, b.url, lease_s=1.0)
            renewals += 1
            await asyncio.sleep(0.1)
        assert renewals > 3 and len(await listed(client)) == 2
        a.health = 500  # b is the one that answers
        await until(lambda: is_out(client, a.url))
        answer = await client.post(stream=True)
        await until(lambda: is_only(client, a.url))
        b.go_on.set()
        assert (await answer.text()).endswith("data: [DONE]\n\n")  # what was in flight goes on

    alone(test, key_file, a, b)


async def is_out(client: Client, url: str) -> bool:
    return not (await client.server(url))["healthy"]


async def is_only(client: Client, url: str) -> bool:
    return await listed(client) == [("decode", url)]


def test_a_listed_server_stays_and_tells_its_peer(key_file: str) -> None:
    a, b = Fake("a", say_params), Fake("b")

    async def test(client: Client) -> None:
        await joined(client, b.url, lease_s=1.0, peer=PEER)
        await joined(client, a.url, "prefill", lease_s=1.0)
        await asyncio.sleep(1.5)
        assert await listed(client) == [("prefill", a.url), ("decode", b.url)]
        assert (await client.server(b.url))["lease_left_s"] is None
        await client.ask(LONG)
        assert a.bodies[-1]["kv_transfer_params"] == {**ASK_FOR_HAND_OVER, "kvstore_push_to": PEER}

    play(test, a, b, register_key_file=key_file)


def test_kv_is_pushed_to_the_server_that_decodes(key_file: str) -> None:
    """Each request goes where its prefill was told it would; several at once are spread."""
    go_on = asyncio.Event()

    async def wait(fake: Fake, request: Any, body: Any) -> Any:
        await go_on.wait()
        return web.json_response({"kv_transfer_params": body["kv_transfer_params"]["kvstore_push_to"]})

    a, decoders = Fake("a", wait), [Fake(f"d{i}") for i in range(3)]

    async def test(client: Client) -> None:
        await joined(client, a.url, "prefill")
        for i, fake in enumerate(decoders):
            await joined(client, fake.url, peer={"address": f"tcp://127.0.0.1:{i + 1}", "key": ""})
        asked = [asyncio.create_task(client.ask(LONG)) for _ in range(6)]
        await until(lambda: has_come(a, 6))
        go_on.set()
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}
        for i, fake in enumerate(decoders):
            told = [body["kv_transfer_params"]["address"] for body in fake.bodies]
            assert told == [f"tcp://127.0.0.1:{i + 1}"] * 2
        _, shown = await client.get("/status")
        assert [server["in_flight"] for server in shown["servers"]] == [0] * 4

    alone(test, key_file, a, *decoders)


async def has_come(fake: Fake, n: int) -> bool:
    return len(fake.asked) == n


def test_the_server_that_was_to_decode_goes_out_meanwhile(key_file: str) -> None:
    go_on = asyncio.Event()

    async def wait(fake: Fake, request: Any, body: Any) -> Any:
        await go_on.wait()
        return web.json_response({"kv_transfer_params": PARAMS})

    a, b, c = Fake("a", wait), Fake("b"), Fake("c")

    async def test(client: Client) -> None:
        await joined(client, a.url, "prefill")
        await joined(client, b.url, peer=PEER)
        asked = asyncio.create_task(client.ask(LONG))
        await until(lambda: has_come(a, 1))
        await joined(client, c.url)
        b.health = 500
        await until(lambda: is_out(client, b.url))
        go_on.set()
        assert await asked == (200, {"from": "c"})

    alone(test, key_file, a, b, c)


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ({"secret": "another secret, as long"}, 401),
        ({"secret": ""}, 401),
        ({"role": "boss"}, 400),
        ({"lease_s": 0}, 400),
        ({"lease_s": 1e9}, 400),
        ({"lease_s": "5"}, 400),
        ({"url": "ftp://x"}, 400),
        ({"url": "http://x/\u00e9?q"}, 400),
        ({"url": "http://" + "x" * 2000}, 400),
        ({"peer": {"address": "x"}}, 400),
        ({"peer": {"address": "x" * 300, "key": ""}}, 400),
        ({"more": 1}, 400),
        ({"more": "x" * (70 << 10)}, 413),
    ],
    ids=lambda told: str(told)[:40],
)
def test_registrations_that_are_refused(key_file: str, told: dict[str, Any], status: int) -> None:
    async def test(client: Client) -> None:
        async with register(client, **{"url": "http://127.0.0.1:9", **told}) as answer:
            assert answer.status == status
            assert (await answer.json())["error"]["code"] == status
        assert await listed(client) == []

    alone(test, key_file)


def test_no_more_than_so_many_register(key_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.proxy.registry.MAX_SERVERS", 2)

    async def test(client: Client) -> None:
        for port, status in ((1, 200), (2, 200), (3, 400), (1, 200)):
            async with register(client, f"http://127.0.0.1:{port}") as answer:
                assert answer.status == status

    alone(test, key_file)


def test_without_a_secret_nobody_registers() -> None:
    a, b = Fake("a"), Fake("b")

    async def test(client: Client) -> None:
        async with register(client, a.url) as answer:
            assert answer.status == 404
        assert len(await listed(client)) == 2

    play(test, a, b)


@pytest.mark.parametrize(
    ("content", "mode", "named"), [("short", 0o600, "no secret"), (SECRET, 0o644, "read by others")]
)
def test_a_secret_that_is_none(tmp_path: Path, content: str, mode: int, named: str) -> None:
    path = tmp_path / "secret"
    path.write_text(content)
    path.chmod(mode)

    async def start() -> None:
        async with running(settings([], [], register_key_file=str(path))):
            pass

    with pytest.raises(ConfigError, match=named):
        asyncio.run(start())
    with pytest.raises(ConfigError, match="nowhere"):
        read_secret(tmp_path / "nowhere")


# -- what registers


def start_proxy(key_file: str, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    command = [
        *PROXY[:-3],
        "--port",
        str(port),
        "--json",
        "--register-key-file",
        key_file,
        "--health-interval-s",
        "0.2",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        return process, json.loads(out.readline())["url"]


def servers_of(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/status", timeout=10) as answer:
        servers: list[dict[str, Any]] = json.load(answer)["servers"]
        return servers


def test_a_proxy_that_is_started_again_is_told_again(key_file: str, caplog: pytest.LogCaptureFixture) -> None:
    """A real process, killed: who was registered is there again after a renewal, and leaves when it closes."""
    proxy, url = start_proxy(key_file)
    joins = Joins(role="both", url="http://127.0.0.1:9", lease_s=1.0, peer=PeerAddress(**PEER))
    registration = Registration(url, read_secret(key_file), joins)
    try:
        wait_until(lambda: len(servers_of(url)) == 2)
        proxy.kill()
        proxy.wait()
        wait_until(lambda: "not registered" in caplog.text)
        proxy, url = start_proxy(key_file, port=int(url.rpartition(":")[2]))
        wait_until(lambda: len(servers_of(url)) == 2)
        assert caplog.text.count("not registered") == 1
        registration.close()
        assert servers_of(url) == []
    finally:
        registration.close()
        proxy.kill()
        proxy.wait()


def test_who_is_killed_leaves_by_its_lease(key_file: str) -> None:
    proxy, url = start_proxy(key_file)
    code = (
        "import sys, time; from connectors.registration import *\n"
        "joins = Joins(role='decode', url='http://127.0.0.1:9', lease_s=1.0)\n"
        "Registration(sys.argv[1], read_secret(sys.argv[2]), joins)\n"
        "time.sleep(600)"
    )
    server = subprocess.Popen([sys.executable, "-c", code, url, key_file], cwd=ROOT)
    try:
        wait_until(lambda: len(servers_of(url)) == 1)
        server.kill()
        server.wait()
        assert len(servers_of(url)) == 1
        wait_until(lambda: servers_of(url) == [])
    finally:
        for process in (server, proxy):
            process.kill()
            process.wait()


def test_a_proxy_that_hangs_does_not_hold_a_server_up(key_file: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        joins = Joins(role="decode", url="http://127.0.0.1:9", lease_s=1.0)
        start = time.monotonic()
        registration = Registration(f"http://127.0.0.1:{hangs.getsockname()[1]}", read_secret(key_file), joins)
        registration.close()
        assert time.monotonic() - start < 10
    with pytest.raises(ConfigError, match="register_at: 'ftp://x'"):
        Registration("ftp://x", read_secret(key_file), joins)


# -- what the proxy itself lacks


def limited(soft: int, hard: int) -> Callable[[], None]:
    return partial(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))


def test_more_in_flight_than_files_is_refused() -> None:
    command = [*PROXY, "--prefill", DOWN, "--decode", "http://127.0.0.1:2"]
    done = subprocess.run(
        command, cwd=ROOT, preexec_fn=limited(256, 256), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert re.search(r"--max-in-flight: 1024 needs \d+ open files, and 256 are allowed here; give \d+", done.stderr)


def test_without_files_no_server_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that this process cannot open says nothing of the server."""

    async def test(client: Client) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, hard))
            spare = await client.session.get(f"{client.url}/health")  # keeps its connection
            spare.release()
            with suppress(OSError):
                while True:
                    opened.append(os.open("/dev/null", os.O_RDONLY))
            async with client.session.post(f"{client.url}{COMPLETIONS}", json={"prompt": SHORT}) as answer:
                assert answer.status == 503
                assert "the proxy itself" in (await answer.json())["error"]["message"]
            await asyncio.sleep(0.3)  # probes have gone by
        finally:
            for fd in opened:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        async with client.session.get(f"{client.url}/status") as answer:
            servers = (await answer.json())["servers"]
        assert [server["healthy"] for server in servers] == [True, True]
        assert [server["failures"] for server in servers] == [0, 0]

    play(test, Fake("prefill"), Fake("decode"), health_interval_s=0.05, max_in_flight=2)


def test_of_a_stream_that_breaks_no_part_of_an_event_is_passed_on() -> None:
    """A client would take it for an event, and choke on it."""
    for data, expected in (
        (b"", (b"", b"")),
        (b"data: {", (b"", b"data: {")),
        (b"data: 1\n\ndata: {", (b"data: 1\n\n", b"data: {")),
        (b"data: 1\r\n\r\ndata: 2\r\n\r\nda", (b"data: 1\r\n\r\ndata: 2\r\n\r\n", b"da")),
        (b"data: 1\n\n", (b"data: 1\n\n", b"")),
    ):
        assert whole_events(data) == expected
    long = b"x" * (MAX_EVENT_NBYTES + 1)
    assert whole_events(b"data: 1\n\n" + long) == (b"data: 1\n\n" + long, b"")
