"""LMDB environments: one a file and process, shared by its openers, and never across a fork.

LMDB forbids to open one file twice in a process. What lies at a path may be replaced while
the old file is still open, so environments are told apart by their file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb

from kvstore.errors import ConfigError

_MAX_READERS: Final = 512
_CHECK_TIMEOUT_S: Final = 120.0
_CHECK_SCRIPT: Final = Path(__file__).with_name("lmdb_check.py")

FileId = tuple[int, int]


@dataclass(slots=True)
class _Opened:
    env: lmdb.Environment
    file: FileId
    pid: int
    users: int


_opened: list[_Opened] = []
_lock = threading.Lock()


def check(path: Path) -> str | None:
    """Let a child process walk an index; returns what is wrong with it, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_CHECK_SCRIPT), str(path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {_CHECK_TIMEOUT_S:g} s"
    if done.returncode < 0:
        return f"reading it was killed by signal {-done.returncode}"
    return done.stderr.decode(errors="replace").strip()[-300:] or "unreadable" if done.returncode else None


def file_id(path: Path) -> FileId | None:
    """Which file an environment at this path has now; None where there is none."""
    try:
        found = os.stat(path / "data.mdb")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def acquire(path: Path, map_nbytes: int) -> lmdb.Environment:
    """Open or create an environment, or share the one that is open; `release` it.

    Raises:
        ConfigError: it is open in another PID namespace, or was when this process was forked.
        lmdb.Error, OSError: it cannot be opened.
    """
    with _lock:
        path.mkdir(mode=0o700, exist_ok=True)
        file = file_id(path)
        for opened in _opened:
            if opened.file == file:
                if opened.pid != os.getpid():
                    raise ConfigError(
                        f"disk.path: {path} was open in the process that this one was forked from; "
                        "fork before it is opened, or start processes by spawn"
                    )
                opened.users += 1
                return opened.env
        env = _open(path, map_nbytes)
        file = file_id(path)
        if file is None:
            env.close()
            raise lmdb.Error(f"{path} vanished while it was opened")
        _opened.append(_Opened(env, file, os.getpid(), 1))
        return env


def release(env: lmdb.Environment) -> None:
    """Undo one `acquire`; the last one closes the environment."""
    with _lock:
        opened = next(o for o in _opened if o.env is env)
        opened.users -= 1
        if not opened.users:
            _opened.remove(opened)
            env.close()


def _open(path: Path, map_nbytes: int) -> lmdb.Environment:
    try:
        env = lmdb.open(
            os.path.realpath(path), map_size=map_nbytes, max_dbs=2, max_readers=_MAX_READERS, mode=0o600,
            sync=False, metasync=False, readahead=False, meminit=False,
        )  # fmt: skip
    except lmdb.LockError as e:
        raise ConfigError(
            f"disk.path: {path} is open in another PID namespace ({e}); run the processes that share it "
            "in one PID namespace (containers: --pid=host or a shared pod), or give each its own path"
        ) from e
    env.reader_check()  # those that were killed would keep old pages from being reused
    return env
