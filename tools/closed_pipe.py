"""Stdout whose reader may go away, as `head` does: the command ends then, quietly, and with an exit code of its own.

Not by SIGPIPE, which would also kill a command whose socket is closed, or that is in the middle of a removal.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn, TextIO

CLOSED: Final = 141  # as shells say of what SIGPIPE has ended


@contextmanager
def closable_stdout() -> Iterator[None]:
    """Stdout is that until the block ends, when all has been written; started with it closed, it goes nowhere."""
    stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") if sys.stdout is None else sys.stdout
    sys.stdout = _ClosablePipe(stdout)
    try:
        yield
    finally:
        sys.stdout.flush()


class _ClosablePipe(io.TextIOWrapper):
    """Takes a stream's place; raises SystemExit, which neither rich nor click take for an error of their own."""

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        super().__init__(stream.buffer, stream.encoding, stream.errors, line_buffering=stream.isatty(),
                         write_through=getattr(stream, "write_through", False))  # fmt: skip

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._end()

    def _end(self) -> NoReturn:
        """What is still written on the way out goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        sys.exit(CLOSED)
