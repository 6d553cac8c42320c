"""Makes settings objects out of nested mappings and environment variables, and back.

Works for any frozen dataclass of plain values, dtypes and other such dataclasses. It knows
names and types only: which values are allowed is checked by the objects themselves.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from kvstore.errors import ConfigError
from kvstore.layout import DtypeField, parse_dtype

_T = typing.TypeVar("_T")


def build(cls: type[_T], settings: object, path: str = "") -> _T:
    """A settings object from nested mappings; dtypes may be names.

    Args:
        path: dotted key of this object and a dot, for messages; "" at the top.
    Raises:
        ConfigError: an unknown or a missing key, or a value that is not allowed.
    """
    if isinstance(settings, cls):
        return settings
    if not isinstance(settings, Mapping):
        what = f"a mapping of {field_names(cls)}"
        raise ConfigError(f"{path[:-1] or 'settings'}: {settings!r} is not allowed; give {what}")
    _check_names(cls, settings, path)
    kinds, values = _kinds(cls), dict(settings)
    for name, value in settings.items():
        if dataclasses.is_dataclass(kinds[name]) and value is not None:
            values[name] = build(kinds[name], value, f"{path}{name}.")
    try:
        for name, value in settings.items():
            if kinds[name] is DtypeField and isinstance(value, str):
                values[name] = parse_dtype(value)
        return cls(**values)
    except ConfigError as e:
        raise ConfigError(_in_full(str(e), path)) from None


def from_variables(cls: type, prefix: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Nested settings from variables named ``prefix`` and the path of the key in capitals.

    Raises:
        ConfigError: a variable with the prefix names no setting, or is no number where one is due.
    """
    leaves = {prefix + "_".join(path).upper(): (path, kind) for path, kind in _leaves(cls)}
    settings: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(prefix):
            continue
        if name not in leaves:
            raise ConfigError(f"{name}: not a setting; allowed: {', '.join(sorted(leaves))}")
        (*parents, leaf), kind = leaves[name]
        node = settings
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = _parse(name, text, kind)
    return settings


def plain(value: Any) -> dict[str, Any]:
    """Inverse of `build`: nested dicts of plain values; what is None is left out."""
    out: dict[str, Any] = {}
    kinds = _kinds(type(value))
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if item is None:
            continue
        if dataclasses.is_dataclass(item):
            item = plain(item)
        out[f.name] = value.stored_dtype.name if kinds[f.name] is DtypeField else item
    return out


def field_names(cls: type) -> str:
    """The keys of a settings class, for messages."""
    return ", ".join(f.name for f in dataclasses.fields(typing.cast(Any, cls)))


def _check_names(cls: type, settings: Mapping[str, Any], path: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in settings:
        if key not in fields:
            raise ConfigError(f"{path}{key}: not a setting; allowed: {', '.join(path + name for name in fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in settings:
            raise ConfigError(f"{path}{name}: missing; it has no default")


def _in_full(message: str, path: str) -> str:
    """A class names its keys from itself on: "layout.dtype" is "identity.layout.dtype"."""
    *parents, own = path[:-1].split(".")
    return ".".join((*parents, message)) if own and message.startswith(f"{own}.") else message


def _kinds(cls: type) -> dict[str, type]:
    """The type of each field of a settings class, without its "or None"."""
    kinds = {}
    for name, hint in get_type_hints(cls).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds[name] = next(option for option in options if option is not types.NoneType)
    return kinds


def _leaves(cls: type) -> Iterator[tuple[tuple[str, ...], type]]:
    for name, kind in _kinds(cls).items():
        below = _leaves(kind) if dataclasses.is_dataclass(kind) else [((), kind)]
        yield from (((name, *path), leaf) for path, leaf in below)


def _parse(key: str, text: str, kind: type) -> object:
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{key}: {text!r} is not allowed; give {what}") from None
    return text
