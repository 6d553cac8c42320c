"""The command `kvstore plan`: parses, calls `tools.plan.plan`, shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.options import Json


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
    json: Json = False,
) -> None:
    """Find out how large tiers must be.

    Hit rate against capacity for each policy, beside the best that any could have (Belady's MIN), and the blocks to
    configure for a target or a budget. Budgets are blocks where no --block-bytes is given.

    \b
    Example: kvstore plan trace.jsonl --block-bytes 2MiB --target-hit-rate 0.5 --chart plan.png
    """
    from tools.output import parse_size, show
    from tools.plan.plan import Question, names, numbers
    from tools.plan.plan import plan as make
    from tools.plan.trace import block_nbytes_of

    nbytes = block_nbytes_of(trace) if block_bytes is None else max(1, parse_size("--block-bytes", block_bytes))

    def blocks(option: str, text: str | None) -> int | None:
        if text is None:
            return None
        return parse_size(option, text) // nbytes if nbytes is not None else numbers(option, text)[0]

    made = make(
        trace,
        Question(
            policies=tuple(names(policies)),
            capacities=numbers("--capacities", capacities),
            block_nbytes=nbytes,
            target=target_hit_rate,
            host_blocks=blocks("--host-budget", host_budget),
            disk_blocks=blocks("--disk-budget", disk_budget),
        ),
    )
    if chart is not None:
        from tools.figures import save
        from tools.plan.chart import draw

        save(draw(made), "--chart", chart)
    show(made.to_dict(), made.parts(), as_json=json)
