"""The proxy's HTTP server: paths, bounds, start and stop."""

from __future__ import annotations

import asyncio
import resource
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from kvstore.errors import ConfigError, MissingExtraError

try:
    import aiohttp
    from aiohttp import web
except ImportError as e:
    raise MissingExtraError("aiohttp", "proxy") from e

from connectors.registration import MAX_NBYTES as REGISTER_MAX_NBYTES
from connectors.registration import PATH as REGISTER_PATH
from connectors.registration import read_secret
from tools.proxy.messages import CHAT_PATH, error_answer, parse_body, request_headers
from tools.proxy.registry import MAX_SERVERS, RefusedError, Registry
from tools.proxy.relay import Call, Relay
from tools.proxy.servers import HealthWatch, Pool
from tools.proxy.settings import ProxySettings

GRACE_S: Final = 10.0
_CLOSE_S: Final = 1.0
_POLL_S: Final = 0.02
_OWN_FILES: Final = 64
_MODELS_PATH: Final = "/v1/models"
Work = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Proxy:
    """Handlers of all paths."""

    def __init__(self, settings: ProxySettings, session: aiohttp.ClientSession) -> None:
        self._settings = settings
        self._prefill, self._decode = Pool("prefill", settings.prefill), Pool("decode", settings.decode)
        self._relay = Relay(settings, session, self._prefill, self._decode)
        self.watch = HealthWatch(settings, session, [*self._prefill.servers, *self._decode.servers])
        key_file = settings.register_key_file
        self.registry = (
            None if key_file is None else Registry(read_secret(key_file), (self._prefill, self._decode), self.watch)
        )
        self._in_flight = 0
        self._closing = False

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self._bounded(self._complete))
        app.router.add_post(CHAT_PATH, self._bounded(self._complete))
        app.router.add_get(_MODELS_PATH, self._bounded(self._models), allow_head=False)
        app.router.add_get("/health", self._health)
        app.router.add_get("/status", self._status)
        if self.registry is not None:
            app.router.add_post(REGISTER_PATH, self._register)
            app.router.add_delete(REGISTER_PATH, self._register)
        app.router.add_route("*", "/{path:.*}", self._unknown)
        return app

    async def drain(self, timeout_s: float) -> None:
        """Refuse what is new; return when all that is in flight has ended, or when the time is up."""
        self._closing = True
        deadline = time.monotonic() + timeout_s
        while self._in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)

    def _bounded(self, work: Work) -> Work:
        """``work``, unless there is too much of it."""

        async def handler(request: web.Request) -> web.StreamResponse:
            if self._closing:
                return error_answer(503, "the proxy is shutting down")
            if self._in_flight >= self._settings.max_in_flight:
                return error_answer(429, f"{self._in_flight} requests are in flight already; try again later")
            self._in_flight += 1
            try:
                return await work(request)
            finally:
                self._in_flight -= 1

        return handler

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            data = await self._read(request, self._settings.max_body_nbytes)
            body = parse_body(data)
        except _TooLargeError:
            return error_answer(413, f"the body is larger than {self._settings.max_body_mib} MiB")
        except TimeoutError:
            return error_answer(408, "the body did not arrive in time")
        except (ValueError, web.RequestPayloadError) as e:
            return error_answer(400, str(e))
        return await self._relay.complete(request, data, body)

    async def _read(self, request: web.Request, limit: int) -> bytes:
        if (request.content_length or 0) > limit:
            raise _TooLargeError
        data = bytearray()
        while True:
            async with asyncio.timeout(self._settings.idle_timeout_s):
                chunk = await request.content.readany()
            if not chunk:
                return bytes(data)
            data += chunk
            if len(data) > limit:
                raise _TooLargeError

    async def _register(self, request: web.Request) -> web.StreamResponse:
        """A server joins, renews, or leaves."""
        registry = self.registry
        if registry is None or not registry.may(request.headers.get("Authorization")):
            return error_answer(401, "not let in")
        try:
            data = await self._read(request, REGISTER_MAX_NBYTES)
            if request.method == "DELETE":
                await registry.leave(data)
                return web.json_response({})
            joined = registry.join(data)
            return web.json_response({"lease_s": joined.lease_s})
        except _TooLargeError:
            return error_answer(413, f"the body is larger than {REGISTER_MAX_NBYTES} bytes")
        except TimeoutError:
            return error_answer(408, "the body did not arrive in time")
        except (RefusedError, web.RequestPayloadError) as e:
            return error_answer(400, str(e))

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return await self._relay.answer(request, Call("GET", _MODELS_PATH, None, request_headers(request.headers)))

    async def _health(self, _: web.Request) -> web.StreamResponse:
        if self._decode.healthy:
            return web.json_response({"status": "ok"})
        return error_answer(503, "no decode server is healthy")

    async def _status(self, _: web.Request) -> web.StreamResponse:
        servers = [*self._prefill.servers, *self._decode.servers]
        return web.json_response({"in_flight": self._in_flight, "servers": [server.status() for server in servers]})

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        return error_answer(404, f"{request.method} {request.path} is not served here")


class _TooLargeError(Exception):
    """A body is over the bound."""


@asynccontextmanager
async def running(settings: ProxySettings) -> AsyncIterator[str]:
    """Serve while the context is open; gives the URL. At its end requests in flight have `GRACE_S` to end.

    Raises:
        ConfigError: it cannot listen there, or may not open as many files as that needs.
    """
    _allow_files(settings)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # no server closes a connection that waits for work
    async with aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
    ) as session:
        proxy = Proxy(settings, session)
        runner = web.AppRunner(proxy.app(), access_log=None, handler_cancellation=True, shutdown_timeout=_CLOSE_S)
        await runner.setup()
        try:
            await proxy.watch.start()
            if proxy.registry is not None:
                proxy.registry.start()
            site = web.TCPSite(runner, settings.host, settings.port)
            try:
                await site.start()
            except OSError as e:
                raise ConfigError(f"--host {settings.host} --port {settings.port}: cannot listen there: {e}") from e
            yield _url(settings.host, runner.addresses[0][1])
            await site.stop()
            await proxy.drain(GRACE_S)
        finally:
            await runner.cleanup()
            if proxy.registry is not None:
                await proxy.registry.stop()
            await proxy.watch.stop()


def run(settings: ProxySettings, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``listening`` gets the URL once it does."""
    asyncio.run(_run(settings, listening))


async def _run(settings: ProxySettings, listening: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with running(settings) as url:
        listening(url)
        await stop.wait()


def _allow_files(settings: ProxySettings) -> None:
    """Raise the limit on open files as far as it goes; a request takes two."""
    num_servers = MAX_SERVERS if settings.register_key_file is not None else len(settings.prefill + settings.decode)
    needed = 2 * settings.max_in_flight + 4 * num_servers + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed and hard != soft:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < needed:
        fits = max(1, settings.max_in_flight - (needed - soft + 1) // 2)
        raise ConfigError(
            f"--max-in-flight: {settings.max_in_flight} needs {needed} open files, and {soft} are allowed here; "
            f"give {fits}, or raise the limit (ulimit -n)"
        )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
