"""A request's way: to a prefill server, then to a decode server, then back to the client.

Every wait has a deadline, and a handler that is cancelled (its client went away) closes its
connections to servers at once, so that they stop computing.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from tools.proxy.messages import (
    REQUEST_ID,
    answer_headers,
    error_answer,
    error_event,
    prefill_copy,
    prompt_chars,
    request_headers,
    whole_events,
)
from tools.proxy.servers import CONNECT_ERRORS, NETWORK_ERRORS, Pool, Server, describe, is_own
from tools.proxy.settings import ProxySettings

logger = logging.getLogger(__name__)

MAX_PREFILL_ANSWER_NBYTES: Final = 8 << 20
NEXT_SERVER_STATUSES: Final = frozenset((502, 503, 504))
_DONE: Final = b"data: [DONE]"
_TAIL_NBYTES: Final = 64
_TELL_EVERY_S: Final = 10.0


class AnswerError(ValueError):
    """A server answered with what is of no use."""


@dataclass(frozen=True, slots=True)
class Call:
    """What is sent to a server."""

    method: str
    path: str
    data: bytes | None
    headers: CIMultiDict[str]


class Relay:
    """Sends requests on and answers back; made once, serves all."""

    def __init__(self, settings: ProxySettings, session: aiohttp.ClientSession, prefill: Pool, decode: Pool) -> None:
        self._settings, self._session = settings, session
        self._prefill, self._decode = prefill, decode
        self._told_short_at = -_TELL_EVERY_S

    async def complete(self, request: web.Request, data: bytes, body: dict[str, Any]) -> web.StreamResponse:
        """Prefill if the prompt is long enough, then have a decode server answer."""
        headers = request_headers(request.headers)
        if body.pop("kv_transfer_params", None) is not None:  # servers tell each other, clients do not
            data = json.dumps(body).encode()
        length = prompt_chars(body)
        first: Server | None = None
        if length is not None and length >= self._settings.min_prompt_chars and self._prefill.healthy:
            first = self._decode.pick(())  # before the prefill, so that KV can be pushed there meanwhile
            with first.expecting() if first is not None else nullcontext():
                peer = first.peer if first is not None else None
                copy = Call("POST", request.path, prefill_copy(request.path, body, peer), headers)
                params = await self._kv_transfer_params(copy)
            if params is not None:
                data = json.dumps({**body, "kv_transfer_params": params}).encode()
        return await self.answer(request, Call("POST", request.path, data, headers), first)

    async def answer(self, request: web.Request, call: Call, first: Server | None = None) -> web.StreamResponse:
        """The answer of a decode server, whose first bytes decide which; an error if none has one.

        Args:
            first: which is tried first, unless it has gone out meanwhile.
        """
        tried: dict[Server, str] = {}
        while (server := self._next(first, tried)) is not None:
            with server.serving():
                try:
                    answer = await self._open(server, call, None)
                except NETWORK_ERRORS as e:
                    if is_own(e):
                        return error_answer(503, self._short_of(e))
                    tried[server] = _count(server, e)
                    if isinstance(e, TimeoutError) and not isinstance(e, CONNECT_ERRORS):
                        # It may still be at work on a long answer: another one would only take longer.
                        return error_answer(504, f"decode server {server.url} {tried[server]}")
                    continue
                try:
                    if answer.status not in NEXT_SERVER_STATUSES:
                        return await self._pass_on(request, server, answer, call.headers[REQUEST_ID])
                    tried[server] = _count(server, AnswerError(f"answered {answer.status}"))
                finally:
                    answer.close()
        return error_answer(503, self._nobody(tried))

    def _next(self, first: Server | None, tried: dict[Server, str]) -> Server | None:
        if first is not None and first.healthy and not tried and first in self._decode.servers:
            return first
        return self._decode.pick(tried)

    async def _kv_transfer_params(self, call: Call) -> dict[str, Any] | None:
        """Compute the prompt's KV; what the decode server needs to find it, or None."""
        deadline = time.monotonic() + self._settings.prefill_timeout_s
        tried: list[Server] = []
        while (left_s := deadline - time.monotonic()) > 0 and (server := self._prefill.pick(tried)) is not None:
            tried.append(server)
            with server.serving():
                try:
                    return await self._ask_prefill(server, call, left_s)
                except (*NETWORK_ERRORS, RecursionError) as e:
                    if is_own(e):
                        logger.debug("no prefill: %s", self._short_of(e))
                        return None
                    logger.debug("prefill server %s: %s", server.url, _count(server, e))
        return None

    async def _ask_prefill(self, server: Server, call: Call, timeout_s: float) -> dict[str, Any] | None:
        answer = await self._open(server, call, timeout_s)
        try:
            if 400 <= answer.status < 500:  # the client's error, which the decode server will tell
                server.last_error = f"answered {answer.status}"
                return None
            if answer.status != 200:
                raise AnswerError(f"answered {answer.status}")
            body = json.loads(await _read(answer, MAX_PREFILL_ANSWER_NBYTES))
        finally:
            answer.close()
        if not isinstance(body, dict):
            raise AnswerError("answered with JSON that is no object")
        params = body.get("kv_transfer_params")
        return params if isinstance(params, dict) else None

    async def _open(self, server: Server, call: Call, total_s: float | None) -> aiohttp.ClientResponse:
        """Send a request and wait for the head of its answer."""
        connect_s = self._settings.connect_timeout_s
        return await self._session.request(
            call.method,
            server.url + call.path,
            data=None if call.data is None else io.BytesIO(call.data),
            headers=call.headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=total_s, connect=connect_s, sock_connect=connect_s, sock_read=self._settings.idle_timeout_s
            ),
        )

    async def _pass_on(
        self, request: web.Request, server: Server, answer: aiohttp.ClientResponse, request_id: str
    ) -> web.StreamResponse:
        """Each chunk as it comes, of a stream each event; what breaks is told in a stream, and cuts off
        anything else."""
        if answer.status >= 500:
            _count(server, AnswerError(f"answered {answer.status}"))
        response = web.StreamResponse(status=answer.status, headers=answer_headers(answer.headers))
        response.headers.setdefault(REQUEST_ID, request_id)
        is_stream = answer.content_type == "text/event-stream" and answer.content_length is None
        await response.prepare(request)
        tail, held = b"", b""
        try:
            while chunk := await answer.content.readany():
                tail = (tail + chunk)[-_TAIL_NBYTES:]
                ready, held = whole_events(held + chunk) if is_stream else (chunk, b"")
                if ready and not await self._write(request, response, ready):
                    return response
            if held and not await self._write(request, response, held):
                return response
            if is_stream and answer.status == 200 and _DONE not in tail:
                raise AnswerError("ended its stream too early")
        except NETWORK_ERRORS as e:
            why = _count(server, e)
            logger.info("decode server %s broke off: %s", server.url, why)
            if not is_stream:
                _abort(request)
                return response
            await self._write(request, response, error_event(502, f"decode server {server.url} broke off: {why}"))
        await response.write_eof()
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> bool:
        """Whether the client took it."""
        try:
            async with asyncio.timeout(self._settings.idle_timeout_s):
                await response.write(data)
        except (OSError, TimeoutError):
            _abort(request)
            return False
        return True

    def _short_of(self, error: BaseException) -> str:
        """For the client; the log says it now and then."""
        why = f"the proxy itself cannot open another connection: {describe(error)}"
        now = time.monotonic()
        if now - self._told_short_at > _TELL_EVERY_S:
            self._told_short_at = now
            logger.warning("%s", why)
        return why

    def _nobody(self, tried: dict[Server, str]) -> str:
        whys = tried or {server: f"out ({server.last_error})" for server in self._decode.servers}
        return "no decode server could answer: " + "; ".join(f"{server.url}: {why}" for server, why in whys.items())


async def _read(answer: aiohttp.ClientResponse, max_nbytes: int) -> bytes:
    data = bytearray()
    while chunk := await answer.content.readany():
        data += chunk
        if len(data) > max_nbytes:
            raise AnswerError(f"answered with more than {max_nbytes} bytes")
    return bytes(data)


def _count(server: Server, error: BaseException) -> str:
    why = describe(error)
    server.request_failed(why, connect=isinstance(error, CONNECT_ERRORS))
    return why


def _abort(request: web.Request) -> None:
    """Close the client's connection so that it sees an answer cut off, not one that ended."""
    if request.transport is not None:
        request.transport.abort()
