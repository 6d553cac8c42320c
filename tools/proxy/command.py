"""The command `kvstore proxy`: parses, calls `tools.proxy.app`, says where it listens."""

from __future__ import annotations

from typing import Annotated

import typer

Urls = Annotated[list[str] | None, typer.Option(metavar="URL", help="A server; may be repeated.")]


def proxy(
    prefill: Urls = None,
    decode: Urls = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    min_prompt_chars: Annotated[int, typer.Option(help="Less is not prefilled.")] = 512,
    prefill_timeout_s: Annotated[float, typer.Option(help="All tries together.")] = 60.0,
    connect_timeout_s: Annotated[float, typer.Option(help="One try to connect.")] = 5.0,
    idle_timeout_s: Annotated[float, typer.Option(help="Wait for the next bytes.")] = 300.0,
    health_interval_s: Annotated[float, typer.Option(help="Between looks.")] = 2.0,
    max_in_flight: Annotated[int, typer.Option(help="More get a 429.")] = 1024,
    max_body_mib: Annotated[int, typer.Option(help="Larger get a 413.")] = 32,
    register_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Servers that know this secret may register.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Say where it listens as JSON.")] = False,
) -> None:
    """Spread requests over prefill and decode servers.

    A prompt is computed by a prefill server and answered by a decode server, which answers
    alone where none of the others can.

    \b
    Example: kvstore proxy --prefill http://a:8100 --decode http://b:8200
    """
    from tools.proxy.settings import ProxySettings

    settings = ProxySettings(
        prefill=tuple(prefill or ()),
        decode=tuple(decode or ()),
        host=host,
        port=port,
        min_prompt_chars=min_prompt_chars,
        prefill_timeout_s=prefill_timeout_s,
        connect_timeout_s=connect_timeout_s,
        idle_timeout_s=idle_timeout_s,
        health_interval_s=health_interval_s,
        max_in_flight=max_in_flight,
        max_body_mib=max_body_mib,
        register_key_file=register_key_file,
    )

    from tools.proxy.app import run

    def listening(url: str) -> None:
        from json import dumps

        typer.echo(dumps({"url": url}) if json else f"kvstore proxy listens at {url}")

    run(settings, listening)
