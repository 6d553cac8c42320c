"""What a disk tier's store.json says: whose KV the directory holds, and how much of it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kvstore.strict_json import parse_json

_FORMAT: Final = "kvstore disk tier"
_MAX_NBYTES: Final = 1 << 20
_MOST: Final = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryHeader:
    """The file's fields."""

    content: dict[str, Any]
    placement: dict[str, Any]
    slot_nbytes: int
    num_slots: int

    def differences(self, other: DirectoryHeader) -> dict[str, tuple[object, object]]:
        """Fields of identity and placement that differ: name -> (self's, other's)."""
        mine = {**self.content, **self.placement, "slot_nbytes": self.slot_nbytes}
        theirs = {**other.content, **other.placement, "slot_nbytes": other.slot_nbytes}
        names = [*mine, *(k for k in theirs if k not in mine)]
        return {k: (mine.get(k), theirs.get(k)) for k in names if mine.get(k) != theirs.get(k)}


def read_header(path: Path) -> DirectoryHeader | None:
    """Parse a directory's store.json; None where there is none or it is damaged."""
    try:
        # O_NONBLOCK: a FIFO in its place must not hold the opener
        fd = os.open(path / "store.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as f:
            raw = parse_json(f.read(_MAX_NBYTES))
        header = DirectoryHeader(
            content=dict(raw["content"]),
            placement=dict(raw["placement"]),
            slot_nbytes=int(raw["slot_nbytes"]),
            num_slots=int(raw["num_slots"]),
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return (
        header
        if raw.get("format") == _FORMAT and 0 < header.slot_nbytes <= _MOST and 0 < header.num_slots <= _MOST
        else None
    )


def write_header(path: Path, header: DirectoryHeader) -> None:
    """Replace a directory's store.json, durably."""
    temporary = path / "store.json.new"
    with open(temporary, "w", encoding="utf-8", opener=private) as f:
        json.dump({"format": _FORMAT, **asdict(header)}, f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path / "store.json")


def private(path: str, flags: int) -> int:
    """An ``opener`` for files that only their owner reads."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
