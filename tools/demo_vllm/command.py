"""The command `kvstore demo-vllm`: calls `tools.demo_vllm.run`, shows what it found."""

from __future__ import annotations

from typing import Annotated

import typer


def demo_vllm(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Watch prefill disturb decode, and not.

    The same requests go to one vLLM server, and to a prefill and a decode server that share a
    storage path behind the proxy, on the same two cores. Takes some minutes.
    Exit code 1 if texts differ, or if the decode server loaded nothing.

    \b
    Example: kvstore demo-vllm
    """
    from tools.demo_vllm.report import print_result
    from tools.demo_vllm.run import run
    from tools.output import results, show

    result = run()
    if json:
        show(result.to_dict(), (), as_json=True)
    else:
        print_result(result, results())
    raise typer.Exit(int(not result.ok))
