"""Commands that show how full and how busy all of it is: each parses, calls the file that does the work, and shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.options import AtItsEnd, Force, Journal, Json, KeyFile, StoredPath


def stat(path: StoredPath, journal: Journal = None, at_its_end: AtItsEnd = False, json: Json = False) -> None:
    """Show how full each tier is, a line each.

    With --journal also the tiers of each server, host memory too: used, pinned, hit rate, and how long ago what is
    hit was asked for before.

    \b
    Example: kvstore stat /var/cache/kv --journal /var/lib/kv-journal
    """
    from tools.output import show
    from tools.stat import stat as look

    found = look(path, journal, at_its_end=at_its_end)
    show(found.to_dict(), found.parts(), as_json=json)


def top(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The servers' journal, or a store's directory.")],
    interval: Annotated[float, typer.Option(min=0.2, max=3600.0, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
    at_its_end: AtItsEnd = False,
    json: Json = False,
) -> None:
    """Watch servers, or a store.

    Of a journal: each server's tiers, what they read, write and evict a second, and the last requests with what was
    found of them. Of a directory: how full it is. Ctrl-C ends it.

    \b
    Example: kvstore top /var/lib/kv-journal
    """
    from tools.output import show
    from tools.top import look, watch

    if once or json:
        data, parts = look(path, at_its_end=at_its_end)
        show(data, parts, as_json=json)
    else:
        watch(path, interval, at_its_end=at_its_end)


def report(
    path: StoredPath,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file to write.")],
    journal: Journal = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan from this, and not from the journal.")
    ] = None,
    force: Force = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Write one HTML page with all of it.

    The tables and pictures of stat, ls, plot and plan, in a file that loads nothing from anywhere and can be sent.

    \b
    Example: kvstore report /var/cache/kv --journal /var/lib/kv-journal --out report.html
    """
    from tools.new_file import check_free
    from tools.output import lines, show, size
    from tools.report.report import make, summary, write

    check_free(out, force=force)
    made = make(path, journal, trace, integrity_key_file)
    nbytes = write(made, out, force=force)
    show(summary(made, nbytes, out), lines(f"{out}: {len(made.sections)} sections, {size(nbytes)}"), as_json=json)
