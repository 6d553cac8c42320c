"""A server says to a proxy that it is there, again and again: who says nothing for a lease has left.

    POST   /servers  {"role", "url", "lease_s", "peer": {"address", "key"} or null}
    DELETE /servers  {"url"}

Both with ``Authorization: Bearer`` and a secret that the proxy and its servers share. A proxy that is
away disturbs nothing: it is told again with the next renewal.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from connectors.curve_keys import check_only_ours_to_read
from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

PATH: Final = "/servers"
MAX_NBYTES: Final = 64 << 10
MIN_SECRET_NBYTES: Final = 16
LEASE_S: Final = 15.0
_MOST_SECRET_NBYTES: Final = 4096
_RENEWALS: Final = 3  # in a lease
_TIMEOUT_S: Final = 3.0
_LEAVE_S: Final = 1.0

Role = Literal["prefill", "decode", "both"]
Url = Annotated[str, msgspec.Meta(max_length=1024)]


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a server's control channel is, and its public key; see `connectors.hand_over`."""

    address: Annotated[str, msgspec.Meta(max_length=256)]
    key: Annotated[str, msgspec.Meta(max_length=64)]


class Joins(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server is there for ``lease_s`` more seconds."""

    role: Role
    url: Url
    lease_s: Annotated[float, msgspec.Meta(ge=1, le=300)]
    peer: PeerAddress | None = None


class Leaves(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: Url


def read_secret(path: str | Path) -> bytes:
    """The secret in a file, surrounding white space taken off.

    Raises:
        ConfigError: there is none of at least 16 bytes, or others can read it.
    """
    path = Path(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang the start
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror}); write a secret of 16 bytes or more there") from e
    with open(fd, "rb") as f:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is no file; write a secret of 16 bytes or more to one")
        check_only_ours_to_read(path, status)
        secret = f.read(_MOST_SECRET_NBYTES).strip()
    if len(secret) < MIN_SECRET_NBYTES or not secret.isascii() or not secret.decode().isprintable():
        raise ConfigError(f"{path} holds no secret; give one line of at least {MIN_SECRET_NBYTES} printable characters")
    return secret


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The secret goes to the proxy that was named, and nowhere else."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class Registration:
    """Renews a registration until it is closed, in a thread of its own.

    Args:
        proxy_url: of the proxy, http or https.
        joins: what is told.
    Raises:
        ConfigError: that is no URL.
    """

    def __init__(self, proxy_url: str, secret: bytes, joins: Joins) -> None:
        parts = urlsplit(proxy_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"register_at: {proxy_url!r}; give the proxy's URL, like http://127.0.0.1:8000")
        self._url, self._joins = proxy_url.rstrip("/") + PATH, joins
        self._headers = {"Authorization": f"Bearer {secret.decode()}", "Content-Type": "application/json"}
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
        self._stop = threading.Event()
        self._problem: str | None = ""  # None: the last renewal went well
        self._thread = threading.Thread(target=self._run, name="kvstore-registration", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave, if that is quickly done."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(_TIMEOUT_S + _LEAVE_S)
        if self._problem is None:
            self._ask("DELETE", Leaves(url=self._joins.url), _LEAVE_S)

    def _run(self) -> None:
        while True:
            self._note(self._ask("POST", self._joins, _TIMEOUT_S))
            if self._stop.wait(self._joins.lease_s / _RENEWALS):
                return

    def _note(self, problem: str | None) -> None:
        """Say once what has changed."""
        if problem is not None and not self._problem:
            logger.warning("not registered at %s: %s; trying again", self._url, problem)
        elif problem is None and self._problem is not None:
            logger.info("registered at %s as %s server %s", self._url, self._joins.role, self._joins.url)
        self._problem = problem

    def _ask(self, method: str, told: msgspec.Struct, timeout_s: float) -> str | None:
        """What went wrong."""
        request = urllib.request.Request(
            self._url, data=msgspec.json.encode(told), headers=self._headers, method=method
        )
        try:
            with self._opener.open(request, timeout=timeout_s):
                return None
        except (OSError, ValueError) as e:  # URLError and HTTPError are OSErrors
            return f"{type(e).__name__}: {e}"
