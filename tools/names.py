"""Names that a person gives of what is stored: one that is not there is said, and what is there instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from kvstore.errors import ConfigError, NotStoredError

_NAMESPACE: Final = re.compile(r"[0-9a-f]{1,32}")
_SHOWN: Final = 8
_MAX_NAME: Final = 80


def models_like(text: str, known: Iterable[object]) -> set[str]:
    """The model of that name or, where there is none, those with it in their name.

    Raises:
        NotStoredError: there is none of either; names those that there are.
    """
    names = {str(name) for name in known}
    found = {text} & names or {name for name in names if text.lower() in name.lower()}
    if not found:
        raise NotStoredError(f"--model: no model {text!r} here; there are: {_listed(names)}")
    return found


def model_like(text: str, known: Iterable[object]) -> str:
    """As `models_like`, where it must be one; raises NotStoredError."""
    found = models_like(text, known)
    if len(found) > 1:
        raise NotStoredError(f"--model: {text!r} is in {len(found)} names: {_listed(found)}; give all of one")
    return found.pop()


def check_namespace(text: str) -> None:
    """Raises ConfigError for what is no start of a namespace."""
    if not _NAMESPACE.fullmatch(text.lower()):
        raise ConfigError(
            f"--namespace: {text[:_MAX_NAME]!r} is not allowed; give up to 32 hex digits, as ls shows them"
        )


def check_there(text: str, known: Iterable[bytes | str]) -> None:
    """Raises NotStoredError where no namespace begins so; names those that there are."""
    names = {name if isinstance(name, str) else name.hex() for name in known} - {""}
    if not any(name.startswith(text.lower()) for name in names):
        raise NotStoredError(f"--namespace: none here begins with {text!r}; there are: {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    some = sorted(name[:_MAX_NAME] for name in names)
    more = f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else ""
    return (", ".join(some[:_SHOWN]) or "none") + more
