"""Servers that register: they join with a lease, and leave when it has run out."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import msgspec

from connectors.registration import Joins, Leaves
from kvstore.errors import ConfigError
from tools.proxy.servers import HealthWatch, Pool, Server
from tools.proxy.settings import server_url

MAX_SERVERS: Final = 256
_EXPIRE_EVERY_S: Final = 0.2

logger = logging.getLogger(__name__)


class RefusedError(ValueError):
    """A registration is not taken; the message says why."""


class Registry:
    """Adds servers to pools and takes them out; for one event loop."""

    def __init__(self, secret: bytes, pools: tuple[Pool, Pool], watch: HealthWatch) -> None:
        self._secret, self._pools, self._watch = secret, pools, watch
        self._task: asyncio.Task[None] | None = None

    def may(self, authorization: str | None) -> bool:
        """Whether who shows this may register."""
        wanted = b"Bearer " + self._secret
        return hmac.compare_digest((authorization or "").encode("utf-8", "surrogateescape"), wanted)

    def join(self, data: bytes) -> Joins:
        """Raises RefusedError."""
        try:
            joins = msgspec.json.decode(data, type=Joins)
            url = server_url("url", joins.url)
        except (msgspec.MsgspecError, ConfigError, UnicodeError, RecursionError) as e:
            raise RefusedError(str(e)) from e
        for pool in self._pools:
            if joins.role in (pool.role, "both"):
                server = pool.find(url) or self._add(pool, url)
                server.peer = joins.peer
                if server.lease_until is not None:
                    server.lease_until = time.monotonic() + joins.lease_s
        return joins

    async def leave(self, data: bytes) -> None:
        """Raises RefusedError."""
        try:
            url = server_url("url", msgspec.json.decode(data, type=Leaves).url)
        except (msgspec.MsgspecError, ConfigError, UnicodeError, RecursionError) as e:
            raise RefusedError(str(e)) from e
        for pool in self._pools:
            server = pool.find(url)
            if server is not None and server.lease_until is not None:
                await self._remove(pool, server, "has left")

    def start(self) -> None:
        self._task = asyncio.create_task(self._expire())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def _add(self, pool: Pool, url: str) -> Server:
        if sum(len(pool.servers) for pool in self._pools) >= MAX_SERVERS:
            raise RefusedError(f"{MAX_SERVERS} servers are registered already")
        server = Server(url, pool.role, lease_until=time.monotonic())
        pool.servers.append(server)
        logger.info("%s server %s has registered", server.role, server.url)
        self._watch.add(server)
        return server

    async def _remove(self, pool: Pool, server: Server, why: str) -> None:
        if server in pool.servers:
            pool.servers.remove(server)
            logger.info("%s server %s %s", server.role, server.url, why)
            await self._watch.remove(server)

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_EVERY_S)
            for pool, server in [*self._expired()]:
                await self._remove(pool, server, "did not renew its registration: it has left")

    def _expired(self) -> Iterator[tuple[Pool, Server]]:
        now = time.monotonic()
        for pool in self._pools:
            for server in pool.servers:
                if server.lease_until is not None and server.lease_until <= now:
                    yield pool, server
