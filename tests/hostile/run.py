"""Runs commands, one after the other in this process: a JSON list of arguments a line comes in, an answer goes out.

An answer is exit code, what was raised, the end of what went to stderr, and the most memory that
this process has had so far, in MiB.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from tools.cli import app


def most_mib() -> int:
    """Not `getrusage`, which counts what the parent had when it forked."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


def main() -> None:
    for line in sys.stdin:
        arguments = json.loads(line)
        done = CliRunner().invoke(app, arguments)
        raised = done.exception is not None and not isinstance(done.exception, SystemExit)
        error = repr(done.exception)[:500] if raised else ""
        gc.collect()  # what one command leaves is not the next one's
        print(json.dumps([done.exit_code, error, done.stderr[-500:], most_mib()]), flush=True)


if __name__ == "__main__":
    main()
