"""What can be set of the proxy, checked when made. Knows no network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from kvstore.errors import ConfigError

MAX_WAIT_S: Final = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """All settings; each is named after its option.

    Args:
        prefill: URLs of the servers that prefill.
        decode: URLs of the servers that answer.
        port: 0 takes a free one.
        min_prompt_chars: prompts shorter than this go to a decode server only.
        prefill_timeout_s: for all tries of one prefill together.
        idle_timeout_s: longest wait for the next bytes of a server or a client.
        register_key_file: a secret; servers that know it may register.

    Raises:
        ConfigError: a value is not allowed; the message names the option and the value.
    """

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    min_prompt_chars: int = 512
    prefill_timeout_s: float = 60.0
    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 300.0
    health_interval_s: float = 2.0
    max_in_flight: int = 1024
    max_body_mib: int = 32
    register_key_file: str | None = None

    def __post_init__(self) -> None:
        may_register = self.register_key_file is not None
        object.__setattr__(self, "prefill", _urls("--prefill", self.prefill, may_be_none=may_register))
        object.__setattr__(self, "decode", _urls("--decode", self.decode, may_be_none=may_register))
        if not self.host or any(c.isspace() for c in self.host):
            raise ConfigError(f"--host: {self.host!r} is not allowed; give an address or a name to listen at")
        _whole("--port", self.port, 0, 65535)
        _whole("--min-prompt-chars", self.min_prompt_chars, 0)
        _seconds("--prefill-timeout-s", self.prefill_timeout_s)
        _seconds("--connect-timeout-s", self.connect_timeout_s)
        _seconds("--idle-timeout-s", self.idle_timeout_s)
        _seconds("--health-interval-s", self.health_interval_s)
        _whole("--max-in-flight", self.max_in_flight, 1)
        _whole("--max-body-mib", self.max_body_mib, 1, 4096)

    @property
    def max_body_nbytes(self) -> int:
        return self.max_body_mib << 20


def _urls(option: str, given: tuple[str, ...], *, may_be_none: bool) -> tuple[str, ...]:
    if not given and not may_be_none:
        raise ConfigError(
            f"{option}: () is not allowed; give the URL of at least one server, or let servers register "
            "with --register-key-file"
        )
    urls = tuple(server_url(option, url) for url in given)
    for i, url in enumerate(urls):
        if url in urls[:i]:
            raise ConfigError(f"{option}: {given[i]!r} is given twice")
    return urls


def server_url(option: str, url: str) -> str:
    """A server's URL in one form; raises ConfigError, which names the option, where it is none."""
    wanted = f"{option}: {url!r} is not allowed; give scheme, host and port only, like http://127.0.0.1:8100"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise ConfigError(wanted) from e
    extra = parts.path.rstrip("/") or parts.query or parts.fragment or "@" in parts.netloc or url != url.strip()
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or extra:
        raise ConfigError(wanted)
    return f"{parts.scheme}://{parts.netloc}"


def _whole(option: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{option}: {value!r} is not allowed; give a whole number {allowed}")


def _seconds(option: str, value: float) -> None:
    if not math.isfinite(value) or not 0 < value <= MAX_WAIT_S:
        raise ConfigError(
            f"{option}: {value!r} is not allowed; give a number of seconds above 0, up to {MAX_WAIT_S:.0f}"
        )
