"""JSON that anyone may have written: names that come once, and no numbers that are none."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: bytes) -> Any:
    """What a bounded text says.

    Raises:
        ValueError: it is no JSON, not UTF-8, nested too deeply, or a name comes twice in it.
    """
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
