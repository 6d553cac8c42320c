"""Whether a process that was is still there: by its number and when it started, on the host where that means something.

A number is given to another process some time after; the two together are not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_MOST: Final = (1 << 31) - 1
_STATE, _STARTED = 0, 19  # fields of /proc/PID/stat, counted behind the name; see proc_pid_stat(5)


def process_place() -> str:
    """Where this process's numbers count: this boot of the kernel, and its process-id namespace. Empty where neither
    can be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def started_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where that cannot be told."""
    found = _stat(pid)
    return int(found[_STARTED]) if found else 0


def is_running(pid: int, started: int, place: str) -> bool | None:
    """Whether a process is there that has this number and start, as `started_ticks` and `process_place` told them to
    itself; None: here that cannot be known."""
    if not (place and started and 0 < pid <= _MOST) or place != process_place():
        return None
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    found = _stat(pid)
    if not found:
        return None
    return int(found[_STARTED]) == started and found[_STATE] not in ("Z", "X")


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    fields = text.rpartition(")")[2].split()  # a name may have brackets and blanks in it
    return fields if len(fields) > _STARTED else []
