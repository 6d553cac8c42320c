"""Which servers there are, how they do, and which one is next.

A server is out after one connection that failed or two failures in a row of ``GET /health``;
one success brings it back. What requests meet otherwise is counted and shown, and takes none out.
Where the proxy itself has no file descriptors left that says nothing of any server.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import aiohttp

from connectors.registration import PeerAddress
from tools.proxy.settings import ProxySettings

logger = logging.getLogger(__name__)

MAX_FAILED_PROBES: Final = 2
NETWORK_ERRORS: Final = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
CONNECT_ERRORS: Final = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL)
OWN_ERRNOS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM))
Role = Literal["prefill", "decode"]


@dataclass(slots=True, eq=False)
class Server:
    """One server; out until its first answer to ``GET /health``."""

    url: str
    role: Role
    healthy: bool = False
    in_flight: int = 0
    requests: int = 0
    failures: int = 0
    last_error: str | None = None
    failed_probes: int = 0
    lease_until: float | None = None  # on the clock of time.monotonic; None where it is listed
    peer: PeerAddress | None = None  # who can push to it

    @contextmanager
    def serving(self) -> Iterator[None]:
        """While a request is there."""
        self.requests += 1
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While a request that will go there is prefilled."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def request_failed(self, why: str, *, connect: bool = False) -> None:
        """Count it; a connection that failed takes the server out."""
        self.failures += 1
        self.last_error = why
        if connect:
            self._set_healthy(False)

    def probe_failed(self, why: str, *, connect: bool = False) -> None:
        self.failed_probes += 1
        self.last_error = why
        if connect or self.failed_probes >= MAX_FAILED_PROBES:
            self._set_healthy(False)

    def probe_succeeded(self) -> None:
        self.failed_probes = 0
        self._set_healthy(True)

    def status(self) -> dict[str, Any]:
        """What `/status` shows."""
        names = ("url", "role", "healthy", "in_flight", "requests", "failures", "last_error")
        left_s = None if self.lease_until is None else round(max(0.0, self.lease_until - time.monotonic()), 1)
        return {**{name: getattr(self, name) for name in names}, "lease_left_s": left_s}

    def _set_healthy(self, healthy: bool) -> None:
        if healthy != self.healthy:
            self.healthy = healthy
            logger.info("%s server %s is %s", self.role, self.url, "back" if healthy else f"out: {self.last_error}")


class Pool:
    """The servers of one role."""

    def __init__(self, role: Role, urls: Sequence[str]) -> None:
        self.role = role
        self.servers = [Server(url, role) for url in urls]
        self._next = 0

    @property
    def healthy(self) -> bool:
        """Whether any server is."""
        return any(server.healthy for server in self.servers)

    def find(self, url: str) -> Server | None:
        return next((server for server in self.servers if server.url == url), None)

    def pick(self, without: Collection[Server]) -> Server | None:
        """The healthy server with the least requests in flight, in turn where several have; None if none is left.

        A second try takes no turn: else all requests would begin at the server beside the one that fails.
        """
        turn = self.servers[self._next :] + self.servers[: self._next]
        left = [server for server in turn if server.healthy and server not in without]
        if not left:
            return None
        server = min(left, key=lambda server: server.in_flight)
        if not without:
            self._next = (self.servers.index(server) + 1) % len(self.servers)
        return server


class HealthWatch:
    """Asks each server for its health, again and again, in tasks of its own."""

    def __init__(self, settings: ProxySettings, session: aiohttp.ClientSession, servers: Sequence[Server]) -> None:
        self._interval_s, self._session, self._servers = settings.health_interval_s, session, servers
        self._timeout = aiohttp.ClientTimeout(total=settings.connect_timeout_s)
        self._tasks: dict[Server, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Ask each once, then go on in the background."""
        await asyncio.gather(*map(self._probe, self._servers))
        for server in self._servers:
            self.add(server, self._interval_s)

    def add(self, server: Server, delay_s: float = 0.0) -> None:
        """Ask it in the background, again and again."""
        self._tasks[server] = asyncio.create_task(self._watch(server, delay_s))

    async def remove(self, server: Server) -> None:
        task = self._tasks.pop(server, None)
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def stop(self) -> None:
        for server in list(self._tasks):
            await self.remove(server)

    async def _watch(self, server: Server, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            await self._probe(server)
            await asyncio.sleep(self._interval_s)

    async def _probe(self, server: Server) -> None:
        try:
            async with self._session.get(
                f"{server.url}/health", timeout=self._timeout, allow_redirects=False
            ) as answer:
                status = answer.status
        except NETWORK_ERRORS as e:
            if is_own(e):
                return
            server.probe_failed(f"health: {describe(e)}", connect=isinstance(e, CONNECT_ERRORS))
        except Exception as e:  # a watch that died would never bring a server back
            logger.exception("asking %s for its health failed", server.url)
            server.probe_failed(f"health: {describe(e)}")
        else:
            if status == 200:
                server.probe_succeeded()
            else:
                server.probe_failed(f"health: answered {status}")


def is_own(error: BaseException) -> bool:
    """Whether it is this process that lacks what a connection needs."""
    return isinstance(error, OSError) and error.errno in OWN_ERRNOS


def describe(error: BaseException) -> str:
    """An error in one line, for people."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "connecting took too long"
    if isinstance(error, TimeoutError):
        return "gave no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "closed the connection without an answer"
    return " ".join(str(error).split()) or type(error).__name__
