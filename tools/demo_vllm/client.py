"""The demo's client: streams completions from a server and notes when each token came. Knows no processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import KVStoreError, MissingExtraError

try:
    import aiohttp
except ImportError as e:
    raise MissingExtraError("aiohttp", "proxy") from e

_DATA = b"data: "
_DONE = b"[DONE]"


class AnswerError(KVStoreError):
    """A server did not answer a request as it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of the load.

    Args:
        is_long: a long prompt with a short answer, or else a short prompt with a long answer.
        at_s: when it is sent, from the start of the load.
    """

    name: str
    is_long: bool
    at_s: float
    prompt: str
    max_tokens: int

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came, and when.

    Attributes:
        sent_s: when it was sent.
        came_s: when each token came, on the same clock.
        cached_tokens: of the prompt, not computed by the server that answered.
    """

    request: Request
    sent_s: float = 0.0
    came_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.came_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between each token and the next."""
        return [later - earlier for earlier, later in zip(self.came_s, self.came_s[1:], strict=False)]

    def add(self, event: dict[str, Any], now_s: float) -> None:
        """Take one event of the stream."""
        if "error" in event:
            raise AnswerError(f"{self.request.name}: {event['error']}")
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids") or []
            self.token_ids += ids
            self.came_s += [now_s] * len(ids)
            self.text += choice.get("text") or ""
        usage = event.get("usage")
        if usage:
            self.prompt_tokens = usage["prompt_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


async def play(
    url: str, model: str, requests: Sequence[Request], *, timeout_s: float, done: Callable[[Request], None]
) -> list[Answer]:
    """Send each request at its time, whether others are answered or not; the answers, in the same order.

    Raises:
        AnswerError: one was not answered in full within ``timeout_s``.
    """
    start_s = time.monotonic()
    limits = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, timeout=limits, connector=connector) as session:

        async def one(request: Request) -> Answer:
            await asyncio.sleep(start_s + request.at_s - time.monotonic())
            answer = await _stream(session, model, request)
            done(request)
            return answer

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(request)) for request in requests]
        except* AnswerError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]


async def _stream(session: aiohttp.ClientSession, model: str, request: Request) -> Answer:
    answer = Answer(request=request, sent_s=time.monotonic())
    try:
        async with session.post("/v1/completions", json=request.body(model)) as response:
            if response.status != 200:
                raise AnswerError(f"{request.name}: status {response.status}: {(await response.text())[:500]}")
            async for event in _events(response):
                answer.add(event, time.monotonic())
    except (aiohttp.ClientError, TimeoutError, ValueError) as e:
        raise AnswerError(f"{request.name}: {type(e).__name__}: {e}") from e
    if len(answer.token_ids) != request.max_tokens:
        raise AnswerError(f"{request.name}: {len(answer.token_ids)} tokens came, not {request.max_tokens}")
    return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; it ends with ``[DONE]``."""
    async for line in response.content:
        data = line.strip().removeprefix(_DATA)
        if data == _DONE:
            return
        if data:
            yield json.loads(data)
    raise aiohttp.ClientPayloadError("the stream ended without [DONE]")
