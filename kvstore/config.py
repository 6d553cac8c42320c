"""Settings: one frozen dataclass a component, nested, checked when made.

The same settings come from Python, a dict, JSON or the environment; whatever is wrong
raises `ConfigError` naming the key, what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_type_hints

import msgspec
import torch

from kvstore.errors import ConfigError
from kvstore.identity import KVIdentity
from kvstore.layout import dtype_name, parse_dtype

ENV_PREFIX: Final = "KVSTORE_"
MIN_CAPACITY_NBYTES: Final = 4096
OnMismatch = Literal["refuse", "clear"]
Fsync = Literal["never", "flush", "always"]
_T = typing.TypeVar("_T")
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
        _at_least("disk.num_threads", self.num_threads, 1)


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
            _positive("shared.max_age_s", self.max_age_s)
        _one_of("shared.fsync", self.fsync, Fsync)
        _at_least("shared.num_threads", self.num_threads, 1)
        _positive("shared.gc_interval_s", self.gc_interval_s)


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

    def __post_init__(self) -> None:
        for name, kind in (("identity", KVIdentity), ("host", HostTierConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not a {kind.__name__}")
        for name, kind in (("device", DeviceTierConfig), ("disk", DiskTierConfig), ("shared", SharedTierConfig)):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not a {kind.__name__} or None")
        _at_least("blocks_per_chunk", self.blocks_per_chunk, 1)
        for name, blocks in (("host", self.host.num_blocks), ("disk", self.disk and self.disk.num_blocks)):
            if blocks is not None and blocks < self.blocks_per_chunk:
                raise ConfigError(
                    f"{name}.num_blocks: {blocks} is less than one chunk; "
                    f"give at least blocks_per_chunk={self.blocks_per_chunk}"
                )
        _one_of("io", self.io, Io)
        _at_least("put_timeout_s", self.put_timeout_s, 0)
        _positive("load_timeout_s", self.load_timeout_s)
        _positive("stall_s", self.stall_s)
        if self.integrity_key_file is not None:
            _text("integrity_key_file", self.integrity_key_file)
        if self.disk and self.shared and os.path.realpath(self.disk.path) == os.path.realpath(self.shared.path):
            raise ConfigError(f"shared.path: {self.shared.path!r} is disk.path too; give each tier its own directory")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Settings from nested dicts; dtypes are names ("bfloat16")."""
        return _convert(settings, cls, strict=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Settings from a JSON object, as text."""
        try:
            settings = json.loads(text)
        except ValueError as e:
            raise ConfigError(f"settings are not JSON: {e}") from e
        return cls.from_dict(settings)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Settings from ``KVSTORE_*``: the path of the key in capitals, joined by "_".

        ``KVSTORE_HOST_NUM_BLOCKS=4096``, ``KVSTORE_IDENTITY_LAYOUT_DTYPE=bfloat16``.
        """
        environ = os.environ if environ is None else environ
        names = {ENV_PREFIX + "_".join(path).upper(): path for path in _leaves(cls)}
        settings: dict[str, Any] = {}
        for name, value in environ.items():
            if not name.startswith(ENV_PREFIX):
                continue
            if name not in names:
                raise ConfigError(f"{name} is not a setting; allowed: {', '.join(sorted(names))}")
            *parents, leaf = names[name]
            node = settings
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return _convert(settings, cls, strict=False)

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`; what is None is left out."""
        return _to_dict(self)


def _to_dict(value: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if item is None:
            continue
        if dataclasses.is_dataclass(item):
            item = _to_dict(item)
        out[f.name] = dtype_name(item) if isinstance(item, torch.dtype) else item
    return out


def _convert(settings: object, cls: type[_T], *, strict: bool) -> _T:
    _check_keys(settings, cls, "")
    try:
        return msgspec.convert(settings, cls, strict=strict, dec_hook=_decode)
    except msgspec.ValidationError as e:
        cause = e.__cause__ or e.__context__
        if isinstance(cause, ConfigError):
            raise cause from None
        raise ConfigError(f"settings: {e}") from None


def _decode(kind: type, value: Any) -> Any:
    if kind is torch.dtype and isinstance(value, torch.dtype):
        return value
    if kind is torch.dtype and isinstance(value, str):
        return parse_dtype(value)
    raise ConfigError(f"{value!r} is not a {kind.__name__}")


def _check_keys(settings: object, cls: type, path: str) -> None:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path.rstrip('.') or 'settings'}: {settings!r} is not a mapping")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    nested = _nested(cls)
    for key, value in settings.items():
        if key not in fields:
            raise ConfigError(f"{path}{key} is not a setting; allowed: {', '.join(path + f for f in fields)}")
        if key in nested and value is not None:
            _check_keys(value, nested[key], f"{path}{key}.")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in settings:
            raise ConfigError(f"{path}{name} is missing; it has no default")


def _nested(cls: type) -> dict[str, type]:
    """Fields of a settings class that are settings classes themselves."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                found[name] = option
    return found


def _leaves(cls: type) -> list[tuple[str, ...]]:
    nested = _nested(cls)
    paths: list[tuple[str, ...]] = []
    for f in dataclasses.fields(typing.cast(Any, cls)):
        below = _leaves(nested[f.name]) if f.name in nested else [()]
        paths += [(f.name, *rest) for rest in below]
    return paths


def _at_least(key: str, value: object, low: float) -> None:
    number = int | float if isinstance(low, float) or low == 0 else int
    if isinstance(value, bool) or not isinstance(value, number) or not value >= low:
        raise ConfigError(f"{key}: {value!r} is not allowed; give a number of at least {low}")


def _positive(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{key}: {value!r} is not allowed; give a number of seconds above 0")


def _text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{key}: {value!r} is not allowed; give a non-empty text")


def _one_of(key: str, value: object, kind: Any) -> None:
    allowed = typing.get_args(kind)
    if value not in allowed:
        raise ConfigError(f"{key}: {value!r} is not allowed; give one of {', '.join(allowed)}")
