"""The command `kvstore demo-p2p`: calls `tools.demo_p2p.run`, shows what it found."""

from __future__ import annotations

from typing import Annotated

import typer


def demo_p2p(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Watch prefill servers hand KV to decode servers.

    Two and two vLLM servers behind the proxy, by NIXL, gloo and TCP in turn, against one server
    alone. Takes some minutes. Exit code 1 if texts differ, or if nothing was handed over.

    \b
    Example: kvstore demo-p2p
    """
    from tools.demo_p2p.report import print_result
    from tools.demo_p2p.run import run
    from tools.output import results, show

    result = run()
    if json:
        show(result.to_dict(), (), as_json=True)
    else:
        print_result(result, results())
    raise typer.Exit(int(not result.ok))
