"""Settings: one frozen dataclass a component, nested, checked when made.

The same settings come from Python, a dict, JSON or the environment; whatever is wrong
raises `ConfigError` naming the key, what was given and what is allowed. Values are checked
in one place, where a settings object is made; from text they are only converted before.
"""

from __future__ import annotations

import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from kvstore.config_source import build, field_names, from_variables, plain
from kvstore.errors import ConfigError
from kvstore.identity import KVIdentity

ENV_PREFIX: Final = "KVSTORE_"
MIN_CAPACITY_NBYTES: Final = 4096
MAX_THREADS: Final = 256
MAX_EVENT_LOG_BLOCKS: Final = 1 << 20
MIN_JOURNAL_NBYTES: Final = 1 << 20
OnMismatch = Literal["refuse", "clear"]
Fsync = Literal["never", "flush", "always"]
Io = Literal["thread", "process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTierConfig:
    """Blocks kept in device memory, for stores without an engine."""

    num_blocks: int
    device: str = "cuda"
    eviction_policy: str = "lru"

    def __post_init__(self) -> None:
        _at_least("device.num_blocks", self.num_blocks, 1)
        _text("device.device", self.device)
        _text("device.eviction_policy", self.eviction_policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    """Host memory, allocated when the store is made and pinned where CUDA is.

    Args:
        num_blocks: blocks kept; at least one chunk of them.
        eviction_policy: "lru", "arc", "s3fifo", or ``package.module:Class``.
    """

    num_blocks: int
    eviction_policy: str = "lru"

    def __post_init__(self) -> None:
        _at_least("host.num_blocks", self.num_blocks, 1)
        _text("host.eviction_policy", self.eviction_policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskTierConfig:
    """A local directory, shared by the processes of one host under one bound.

    Args:
        capacity_nbytes: bound of everything in the directory. Give it or ``num_blocks``.
        num_blocks: bound in blocks.
        on_mismatch: what to do with a directory of another identity.
        num_threads: reads and writes in flight.
    """

    path: str
    capacity_nbytes: int | None = None
    num_blocks: int | None = None
    eviction_policy: str = "lru"
    on_mismatch: OnMismatch = "refuse"
    num_threads: int = 8

    def __post_init__(self) -> None:
        _text("disk.path", self.path)
        if (self.capacity_nbytes is None) == (self.num_blocks is None):
            raise ConfigError(
                f"disk.capacity_nbytes={self.capacity_nbytes!r} and disk.num_blocks={self.num_blocks!r}: "
                "give exactly one of them"
            )
        if self.capacity_nbytes is not None:
            _at_least("disk.capacity_nbytes", self.capacity_nbytes, MIN_CAPACITY_NBYTES)
        if self.num_blocks is not None:
            _at_least("disk.num_blocks", self.num_blocks, 1)
        _text("disk.eviction_policy", self.eviction_policy)
        _one_of("disk.on_mismatch", self.on_mismatch, OnMismatch)
        _at_least("disk.num_threads", self.num_threads, 1, MAX_THREADS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTierConfig:
    """A directory that several hosts mount; one safetensors file a chunk.

    Args:
        capacity_nbytes: bound of the files of all hosts, enforced by `gc` (soft between runs).
        max_age_s: files not read for longer are removed by gc; None keeps them.
        fsync: when files reach the disk: "never", on "flush", or "always" before rename.
        gc_interval_s: how often this process runs gc, in its background thread.
    """

    path: str
    capacity_nbytes: int
    max_age_s: float | None = None
    fsync: Fsync = "flush"
    num_threads: int = 8
    gc_interval_s: float = 60.0

    def __post_init__(self) -> None:
        _text("shared.path", self.path)
        _at_least("shared.capacity_nbytes", self.capacity_nbytes, MIN_CAPACITY_NBYTES)
        if self.max_age_s is not None:
            _seconds("shared.max_age_s", self.max_age_s)
        _one_of("shared.fsync", self.fsync, Fsync)
        _at_least("shared.num_threads", self.num_threads, 1, MAX_THREADS)
        _seconds("shared.gc_interval_s", self.gc_interval_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalConfig:
    """A journal of requests and of what comes and goes (`kvstore.journal`), for ``kvstore explain`` and others.

    Args:
        path: a directory of its own; several processes may write there.
        capacity_nbytes: bound of the directory; the oldest segments go.
        sample_s: how often the tiers' sizes and counters are written.
    """

    path: str
    capacity_nbytes: int = 64 << 20
    sample_s: float = 10.0

    def __post_init__(self) -> None:
        _text("journal.path", self.path)
        _at_least("journal.capacity_nbytes", self.capacity_nbytes, MIN_JOURNAL_NBYTES)
        _seconds("journal.sample_s", self.sample_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Everything a `TieredStore` needs.

    Args:
        blocks_per_chunk: consecutive blocks stored as one unit.
        io: where lower tiers do their I/O: threads of this process, or an I/O process that
            leaves the interpreter lock, and the caller, alone.
        put_timeout_s: how long `put` waits for room when write-behind is behind.
        load_timeout_s: how long `get` waits for lower tiers; what is late is a miss.
        stall_s: a lower tier whose write takes longer is read-only until the write returns.
        integrity_key_file: file with a secret of at least 16 bytes; slots are then signed
            with a keyed digest, and who can write the path but lacks the key can cause
            misses only. Keep it outside of the tiers' paths.
        journal: where requests and events are written for people to look at; None: nowhere.
        event_log_blocks: blocks' worth of events (`kvstore.events`) that wait to be taken, by
            process; 0: none are kept.
    """

    identity: KVIdentity
    host: HostTierConfig
    device: DeviceTierConfig | None = None
    disk: DiskTierConfig | None = None
    shared: SharedTierConfig | None = None
    blocks_per_chunk: int = 1
    io: Io = "thread"
    put_timeout_s: float = 10.0
    load_timeout_s: float = 30.0
    stall_s: float = 10.0
    integrity_key_file: str | None = None
    journal: JournalConfig | None = None
    event_log_blocks: int = 0

    def __post_init__(self) -> None:
        _instance("identity", self.identity, KVIdentity)
        _instance("host", self.host, HostTierConfig)
        _instance("device", self.device, DeviceTierConfig, or_none=True)
        _instance("disk", self.disk, DiskTierConfig, or_none=True)
        _instance("shared", self.shared, SharedTierConfig, or_none=True)
        _instance("journal", self.journal, JournalConfig, or_none=True)
        _at_least("blocks_per_chunk", self.blocks_per_chunk, 1)
        for name, blocks in (("host", self.host.num_blocks), ("disk", self.disk.num_blocks if self.disk else None)):
            if blocks is not None and blocks < self.blocks_per_chunk:
                raise ConfigError(
                    f"{name}.num_blocks: {blocks} is less than one chunk; "
                    f"give at least blocks_per_chunk={self.blocks_per_chunk}"
                )
        _one_of("io", self.io, Io)
        _seconds("put_timeout_s", self.put_timeout_s, or_zero=True)
        _seconds("load_timeout_s", self.load_timeout_s)
        _seconds("stall_s", self.stall_s)
        _at_least("event_log_blocks", self.event_log_blocks, 0, MAX_EVENT_LOG_BLOCKS)
        if self.integrity_key_file is not None:
            _text("integrity_key_file", self.integrity_key_file)
        if self.disk and self.shared and os.path.realpath(self.disk.path) == os.path.realpath(self.shared.path):
            raise ConfigError(f"shared.path: {self.shared.path!r} is disk.path too; give each tier its own directory")
        if self.journal is not None:
            journal = os.path.realpath(self.journal.path)
            for name, tier in (("disk", self.disk), ("shared", self.shared)):
                if tier is not None and os.path.realpath(tier.path) == journal:
                    raise ConfigError(f"journal.path: {journal!r} is {name}.path too; give it a directory of its own")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Settings from nested dicts; dtypes are names ("bfloat16")."""
        return build(cls, settings)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Settings from a JSON object, as text."""
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"settings: not JSON ({e}); give a JSON object of {field_names(cls)}") from e
        return cls.from_dict(settings)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from ``KVSTORE_*``: the path of the key in capitals, joined by "_".

        ``KVSTORE_HOST_NUM_BLOCKS=4096``, ``KVSTORE_IDENTITY_LAYOUT_DTYPE=bfloat16``. What is
        not set has its default.
        """
        environ = os.environ if environ is None else environ
        return build(cls, from_variables(cls, ENV_PREFIX, environ))

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`; what is None is left out."""
        return plain(self)


def _at_least(key: str, value: object, low: int, high: int | None = None) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not good:
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{key}: {value!r} is not allowed; give a whole number {allowed}")


def _seconds(key: str, value: object, *, or_zero: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (value > 0 or (or_zero and value == 0)):  # type: ignore[operator]
        raise ConfigError(
            f"{key}: {value!r} is not allowed; give a number of seconds {'of at least' if or_zero else 'above'} 0"
        )


def _text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ConfigError(f"{key}: {value!r} is not allowed; give a text that is not empty")


def _one_of(key: str, value: object, kind: Any) -> None:
    allowed = typing.get_args(kind)
    if value not in allowed:
        raise ConfigError(f"{key}: {value!r} is not allowed; give one of {', '.join(allowed)}")


def _instance(key: str, value: object, kind: type, *, or_none: bool = False) -> None:
    if not isinstance(value, kind) and not (or_none and value is None):
        raise ConfigError(f"{key}: {value!r} is not allowed; give a {kind.__name__}{' or None' if or_none else ''}")
