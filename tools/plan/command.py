"""The command `kvstore plan`: parses, calls `tools.plan.plan`, shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tools.options import Force, Json


def plan(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="JSON lines, a request each, with hash_ids; or a journal.")
    ],
    block_bytes: Annotated[
        str | None, typer.Option("--block-bytes", metavar="SIZE", help="Of one block; a journal says it itself.")
    ] = None,
    policies: Annotated[str, typer.Option(metavar="NAMES", help="Of eviction.")] = "lru,arc,s3fifo",
    capacities: Annotated[str, typer.Option(metavar="BLOCKS", help="By default eight.")] = "",
    target_hit_rate: Annotated[float | None, typer.Option(metavar="SHARE", help="Find what reaches it.")] = None,
    host_budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Or in blocks.")] = None,
    disk_budget: Annotated[str | None, typer.Option(metavar="SIZE", help="Or in blocks.")] = None,
    chart: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it, a PNG.")] = None,
    force: Force = False,
    exact: Annotated[bool, typer.Option("--exact", help="Simulate all blocks of a long trace, not a sample.")] = False,
    json: Json = False,
) -> None:
    """Find out how large tiers must be.

    Hit rate against capacity for each policy, beside the best that any could have (Belady's MIN), the blocks that a
    target needs, and a setting to paste. Budgets are blocks where no --block-bytes is given.

    \b
    Example: kvstore plan trace.jsonl --block-bytes 2MiB --target-hit-rate 0.5 --chart plan.png
    """
    from tools.new_file import check_free
    from tools.output import parse_size, show
    from tools.plan.plan import Question, names, numbers, of_journal, plan_of
    from tools.plan.trace import read_source

    if chart is not None:
        check_free(chart, "--chart", force=force)
    whole, view = read_source(trace)
    nbytes = None if block_bytes is None else max(1, parse_size("--block-bytes", block_bytes))
    question = Question(
        policies=tuple(names(policies)),
        capacities=numbers("--capacities", capacities),
        block_nbytes=nbytes,
        target=target_hit_rate,
        exact=exact,
    )
    if view is not None:
        question = of_journal(question, view)
    host = _blocks("--host-budget", host_budget, question.block_nbytes)
    disk = _blocks("--disk-budget", disk_budget, question.block_nbytes)
    made = plan_of(whole, replace(question, host_blocks=host, disk_blocks=disk))
    if chart is not None:
        from tools.figures import save
        from tools.plan.chart import draw

        save(draw(made), "--chart", chart, force=force)
    show(made.to_dict(), made.parts(), as_json=json)


def _blocks(option: str, text: str | None, block_nbytes: int | None) -> int | None:
    """Of a budget, in bytes or, where it is not known how large a block is, in blocks."""
    from kvstore.errors import ConfigError
    from tools.output import parse_size
    from tools.plan.plan import numbers

    if text is None:
        return None
    if block_nbytes is not None:
        return parse_size(option, text) // block_nbytes
    try:
        (n,) = numbers(option, text)
    except (ConfigError, ValueError):
        raise ConfigError(f"{option}: {text!r}: give it in blocks, or --block-bytes too") from None
    return n
