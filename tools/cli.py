"""The `kvstore` command. Each command is thin: it parses, calls the file that does the work, shows.

Nothing heavy is imported before a command runs, so that help comes at once.

Exit codes: 0, all is well; 1, something stored is damaged (or a demo's answers differ);
2, wrong usage, or there is nothing to look at; 130, interrupted; 141, whoever read the output is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tools.closed_pipe import closable_stdout
from tools.commands import diff, dump, explain, load, plot
from tools.demo_p2p.command import demo_p2p
from tools.demo_vllm.command import demo_vllm
from tools.keygen import keygen
from tools.options import (
    AnyTier,
    Journal,
    Json,
    KeyFile,
    Request,
    StoredPath,
    Tenant,
    Text,
    Tokenizer,
    Tokens,
    choice_of,
)
from tools.overview_commands import report, stat, top
from tools.plan.command import plan
from tools.proxy.command import proxy
from tools.removal_commands import gc, purge

app = typer.Typer(
    name="kvstore",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Look at, check and measure a tiered KV-cache store. Each command has help with an example.",
)


class Bench(StrEnum):
    """What can be measured."""

    HOST = "host"
    DISK = "disk"
    SHARED = "shared"
    INDEX = "index"
    NETWORK = "network"
    VLLM = "vllm"


@app.command()
def demo(
    json: Json = False,
    keep: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Leave what was stored in this empty directory.")
    ] = None,
) -> None:
    """Watch a real model skip its prefill.

    One process reads a guide of some thousand tokens and stores its KV. Others answer
    questions about it from host memory, from disk after a restart, and from a shared path.
    Exit code 1 if their answers are not those of a cold run.

    \b
    Example: kvstore demo --keep ./kv-of-demo
    """
    with _errors():
        from tools.demo import DemoConfig, run
        from tools.demo_report import print_result
        from tools.output import results, show

        result = run(DemoConfig(keep=keep))
        if json:
            show(result.to_dict(), (), as_json=True)
        else:
            print_result(result, results())
        raise typer.Exit(int(not result.same_text))


class Sort(StrEnum):
    """What `ls` can sort by."""

    PATH = "path"
    MODEL = "model"
    BLOCKS = "blocks"
    BYTES = "bytes"
    OLDEST = "oldest"
    NEWEST = "newest"
    REQUESTS = "requests"
    HITS = "hits"


@app.command()
def ls(
    path: StoredPath,
    json: Json = False,
    sort: Annotated[Sort, typer.Option(help="Smallest, or youngest, first.")] = Sort.PATH,
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    model: Annotated[str, typer.Option(metavar="TEXT", help="Only models with this in their name.")] = "",
    tier: Annotated[AnyTier | None, typer.Option(help="Only of this tier.")] = None,
    namespace: Annotated[str, typer.Option(metavar="HEX", help="Only namespaces that begin so.")] = "",
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Only where nothing is newer: 90s, 2h, 7d.")] = "0s",
    limit: Annotated[int | None, typer.Option(min=0, help="So many rows.")] = None,
    journal: Journal = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="A row for each block.")] = False,
    tree: Annotated[bool, typer.Option("--tree", help="Which prompts share which heads; needs --journal.")] = False,
) -> None:
    """Show what is stored, by namespace.

    A row for each, with model, blocks, bytes and age; with --journal also requests, tenants, and in which tiers blocks
    were found. Reads no payload and writes nothing; running stores are not disturbed.

    \b
    Example: kvstore ls /var/cache/kv --sort bytes --reverse --limit 5
    """
    with _errors():
        from kvstore.errors import ConfigError
        from tools.ls import Chosen, list_stored
        from tools.ls_blocks import list_blocks
        from tools.output import parse_age, show
        from tools.prefix_tree import prefix_tree

        chosen = Chosen(
            sort=sort.value, reverse=reverse, model=model, tier=tier.value if tier else "", namespace=namespace,
            older_than_s=parse_age("--older-than", older_than), limit=limit,
        )  # fmt: skip
        if tree:
            if journal is None:
                raise ConfigError("--tree: which block follows which only a journal knows; give --journal too")
            found = prefix_tree(path, journal, limit)
            show(found.to_dict(), found.parts(), as_json=json)
            return
        if blocks:
            list_blocks(path, chosen, journal, as_json=json)
            return
        listing = list_stored(path, chosen, journal)
        show(listing.to_dict(), listing.parts(), as_json=json)


@app.command()
def inspect(
    path: StoredPath,
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A block's key in hex, or as much of its start as is unique.")
    ] = None,
    per_head: Annotated[bool, typer.Option("--per-head", help="A row for each head.")] = False,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    tenant: Tenant = "",
    request: Request = None,
    journal: Journal = None,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Show identity and layout, one block, or a prompt.

    With KEY it shows that block, wherever it is stored; of a prompt or a request all blocks together. For K and V of
    each layer: least and greatest number, mean, norm, how many are zero, NaN or infinite, and how much of the dtype's
    range is used. Exit code 1 if what is shown is damaged.

    \b
    Example: kvstore inspect /var/cache/kv 3f9a0c
    """
    with _errors():
        from kvstore.errors import ConfigError
        from tools.inspect import block_parts, describe, find_block, inspect_together
        from tools.output import show

        is_prompt = tokens is not None or text is not None or request is not None
        if key is not None and is_prompt:
            raise ConfigError("KEY: give it, or a prompt, or a request")
        if is_prompt:
            choice = choice_of(None, None, tokens, text, tokenizer, tenant, request, journal)
            together = inspect_together(path, choice, integrity_key_file, per_head=per_head)
            show(together.to_dict(), together.parts(), as_json=json)
            raise typer.Exit(int(bool(together.damaged)))
        if key is None:
            data, parts = describe(path)
            show(data, parts, as_json=json)
            return
        blocks = find_block(path, key, integrity_key_file, per_head=per_head)
        show({"blocks": [block.to_dict() for block in blocks]}, block_parts(blocks), as_json=json)
        raise typer.Exit(int(any(block.reason for block in blocks)))


@app.command()
def verify(
    path: StoredPath,
    repair: Annotated[bool, typer.Option("--repair", help="Remove what is damaged; rebuild indexes.")] = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Read everything and report what is damaged.

    Names every bad slot and file, and writes nothing, unless --repair is given. What is reported would be a miss,
    and the next store of it heals it.
    Exit code 1 if anything is damaged, or is so still.

    \b
    Example: kvstore verify /var/cache/kv
    """
    with _errors():
        from tools.output import show
        from tools.verify import verify as verify_all
        from tools.verify import verify_and_repair

        report = (verify_and_repair if repair else verify_all)(path, integrity_key_file)
        show(report.to_dict(), report.parts(), as_json=json)
        raise typer.Exit(int(not report.ok))


@app.command()
def bench(
    what: Annotated[Bench, typer.Argument(metavar="WHAT", help="The tier, the index, hand-over, or a vLLM server.")],
    json: Json = False,
    path: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Directory to measure in; by default a temporary one.")
    ] = None,
) -> None:
    """Measure a tier against the bare hardware, or a vLLM server against one without a store.

    Every figure is a ratio of medians over interleaved rounds; what it is compared with is
    said beside it. Takes some minutes and some GB of disk.

    \b
    Example: kvstore bench disk --path /mnt/nvme
    """
    with _errors():
        from tools.bench import run
        from tools.output import show

        result = run(what.value, path)
        show(result.to_dict(), result.parts(), as_json=json)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(version_of("kvstore"))
        raise typer.Exit()


@contextmanager
def _errors() -> Iterator[None]:
    """What is wrong with a person's request is one line and exit code 2, and no traceback."""
    from kvstore.errors import KVStoreError

    try:
        yield
    except KVStoreError as e:
        from tools.output import printable

        sys.stdout.flush()
        typer.echo("\n".join(map(printable, f"kvstore: {e}".splitlines())), err=True)
        raise typer.Exit(2) from None


app.command()(_errors()(dump))
app.command()(_errors()(load))
app.command()(_errors()(diff))
app.command()(_errors()(plot))
app.command()(_errors()(explain))
app.command()(_errors()(gc))
app.command()(_errors()(purge))
app.command()(_errors()(stat))
app.command()(_errors()(top))
app.command()(_errors()(report))
app.command()(_errors()(plan))
app.command()(_errors()(demo_vllm))
app.command()(_errors()(demo_p2p))
app.command()(_errors()(proxy))
app.command()(_errors()(keygen))


def main() -> None:
    """Entry point of the installed command."""
    with closable_stdout():
        app()
