"""A file that a command writes: it gets its name when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvstore.errors import ConfigError


def check_free(out: Path, option: str = "--out", *, force: bool) -> None:
    """Raises ConfigError, which names the option, where there is such a file already, or a link, and nobody said that
    it may go."""
    if os.path.lexists(out) and not force:
        raise ConfigError(f"{option}: {str(out)!r} is there already; give another name, or --force")


@contextmanager
def new_file(out: Path, option: str = "--out") -> Iterator[BinaryIO]:
    """A file to be written, beside ``out``; it is durable and has its name when the block ends, and is gone where
    that raised. A link of that name is replaced, and what it leads to stays as it is.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = out.with_name(f"{out.name}.{os.getpid()}.new")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as e:
        raise ConfigError(f"{option}: {str(out)!r} cannot be written ({e.strerror})") from e
    finally:
        temporary.unlink(missing_ok=True)
