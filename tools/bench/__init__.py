"""`kvstore bench`: every tier against the bare hardware, and a server against one without, in the same run.

Each figure is the median of ratios over interleaved rounds; what "raw" means stands beside
it. One file a tier; `raw` is the bare hardware; `vllm` has its engines in processes
of their own, which run `vllm_engine`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvstore.errors import ConfigError
from tools.bench import disk, host, index, network, process, shared, vllm
from tools.bench.common import Result, Row, Scale, ScaleName

BENCHES: dict[str, tuple[Callable[[Path, Scale], Iterator[Row]], ...]] = {
    "host": (host.run, process.run),
    "disk": (disk.run,),
    "shared": (shared.run,),
    "index": (index.run,),
    "network": (network.run,),
    "vllm": (vllm.run,),
}


def run(what: str, path: Path | None = None, scale: Scale | None = None) -> Result:
    """Run one benchmark in a temporary directory below ``path``; progress goes to stderr.

    Raises:
        ConfigError: there is no such benchmark, or ``path`` is not a directory.
    """
    if what not in BENCHES:
        raise ConfigError(f"bench: {what!r} is not known; allowed: {', '.join(BENCHES)}")
    if path is not None and not path.is_dir():
        raise ConfigError(f"path: {path} is not a directory")
    rows: list[Row] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=path or Path.cwd()) as folder,
        Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress,
    ):
        task = progress.add_task(f"{what}: starting")
        for bench in BENCHES[what]:
            for row in bench(Path(folder), scale or Scale()):
                rows.append(row)
                progress.update(task, description=f"{what}: {len(rows)} done, last {row.name}: {row.ratio:.2f}")
    return Result(what, rows)


__all__ = ["BENCHES", "Result", "Row", "Scale", "ScaleName", "run"]
