"""Commands that look into blocks: each parses, calls the file that does the work, and shows. Imports nothing heavy."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tools.options import (
    AtItsEnd,
    Force,
    Journal,
    Json,
    KeyFile,
    Keys,
    KeysFile,
    Request,
    StoredPath,
    Tenant,
    Text,
    Tokenizer,
    Tokens,
    choice_of,
)


def dump(
    path: StoredPath,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
    key: Keys = None,
    keys: KeysFile = None,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    tenant: Tenant = "",
    request: Request = None,
    journal: Journal = None,
    force: Force = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Write blocks, or a prompt's KV, to a file.

    A safetensors file with keys and values of each layer, of shape (tokens, heads, head size). Of a prompt, the
    leading blocks that are stored. Each is verified first: exit code 1 if one is damaged.

    \b
    Example: kvstore dump /var/cache/kv --tokens prompt.json --out prompt.safetensors
    """
    from tools.dump import DamagedError, dump_blocks
    from tools.output import show

    choice = choice_of(key, keys, tokens, text, tokenizer, tenant, request, journal)
    try:
        dumped = dump_blocks(path, out, choice, integrity_key_file, force=force)
    except DamagedError as e:
        typer.echo(f"kvstore: {e}", err=True)
        raise typer.Exit(1) from None
    show(asdict(dumped), dumped.parts(), as_json=json)


def load(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="That kvstore dump, or export_prefix, has written.")],
    into: Annotated[Path, typer.Option("--into", metavar="PATH", help="A disk tier's directory, or a shared path.")],
    shared: Annotated[bool, typer.Option("--shared", help="PATH is a shared path.")] = False,
    capacity: Annotated[str, typer.Option(metavar="SIZE", help="The store's bound, as it is or is to be.")] = "64GiB",
    blocks_per_chunk: Annotated[int, typer.Option(min=1, help="As the store has it.")] = 1,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Put a file's blocks into a store.

    The store's identity is the file's: a disk directory of another one is refused, naming what differs.

    \b
    Example: kvstore load prompt.safetensors --into /var/cache/kv --capacity 10GiB
    """
    from kvstore.prefix_file import PrefixFile
    from tools.dump import put
    from tools.output import parse_size, show

    nbytes = parse_size("--capacity", capacity)
    with closing(PrefixFile(file)) as prefix:
        loaded = put(prefix, into, nbytes, is_shared=shared, per_chunk=blocks_per_chunk, key_file=integrity_key_file)
    show(asdict(loaded), loaded.parts(), as_json=json)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A store's directory, or a file of kvstore dump.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What it is compared with.")],
    key: Keys = None,
    key_b: Annotated[
        list[str] | None, typer.Option("--key-b", metavar="KEY", help="Of B, where its keys are others.")
    ] = None,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    tenant: Tenant = "",
    request: Request = None,
    request_b: Annotated[str | None, typer.Option("--request-b", metavar="ID", help="Of B.")] = None,
    journal: Journal = None,
    atol: Annotated[float, typer.Option(min=0.0, help="How far numbers may be apart.")] = 0.0,
    rtol: Annotated[float, typer.Option(min=0.0, help="The same, as a share of B's.")] = 0.0,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Block i with block i, whatever their keys.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show layers too that are equal.")] = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Compare blocks, prompts, files or stores.

    Says what differs: which blocks only one has, and in which layers K and V are apart, from which token on, and by
    how much. For wrong output, quantised KV, a new engine version. Exit code 1 if they differ, 2 if nothing could be
    compared.

    \b
    Example: kvstore diff before.safetensors after.safetensors --by-position --rtol 0.01
    """
    from tools.diff import Side
    from tools.diff import diff as compare
    from tools.layer_sums import Tolerance
    from tools.output import show

    is_chosen = bool(key or tokens or text is not None or request is not None)
    chosen = choice_of(key, None, tokens, text, tokenizer, tenant, request, journal) if is_chosen else None
    has_own = bool(key_b or request_b is not None)
    of_b = choice_of(key_b, None, None, None, None, "", request_b, journal) if has_own else chosen
    found = compare(Side(path=a, choice=chosen), Side(path=b, choice=of_b), tolerance=Tolerance(atol=atol, rtol=rtol),
                    by_position=by_position or has_own, integrity_key_file=integrity_key_file)  # fmt: skip
    show(found.to_dict(), found.parts(everything=everything), as_json=json)
    raise typer.Exit(int(not found.is_equal))


def plot(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A store's directory, a journal, or a file of kvstore dump.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The PNG file to write.")],
    key: Keys = None,
    keys: KeysFile = None,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    tenant: Tenant = "",
    request: Request = None,
    journal: Journal = None,
    force: Force = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Draw K and V as heat maps, or a journal over time.

    The norms of key and value vectors, by layer and head and by layer and token: a head that is dead, or a layer that
    has gone wild, is seen at once. Of a journal: how full each tier is, and what was found where, over time.

    \b
    Example: kvstore plot prompt.safetensors --out prompt.png
    """
    from kvstore.journal import is_journal
    from tools.figures import save
    from tools.new_file import check_free
    from tools.output import lines, show

    check_free(out, force=force)
    if is_journal(path):
        from kvstore.journal_view import JournalView
        from tools.timeline import draw as draw_timeline
        from tools.timeline import timeline

        view = JournalView.of(path)
        over_time = timeline(view)
        save(draw_timeline(over_time), "--out", out, force=force)
        show({"file": str(out), "requests": len(view.requests), "samples": len(view.samples), "notes": over_time.notes},
             lines(f"{len(view.requests)} requests are drawn in {out}", *over_time.notes), as_json=json)  # fmt: skip
        return
    from tools.plot import draw, norms

    is_chosen = bool(key or keys or tokens or text is not None or request is not None)
    choice = choice_of(key, keys, tokens, text, tokenizer, tenant, request, journal) if is_chosen else None
    found = norms(path, choice, integrity_key_file)
    save(draw(found), "--out", out, force=force)
    said = [f"{found.num_blocks} blocks are drawn in {out}", *([found.said()] if found.num_bad else [])]
    show({"file": str(out), **found.to_dict()}, lines(*said), as_json=json)


def explain(
    path: StoredPath,
    key: Keys = None,
    keys: KeysFile = None,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    tenant: Tenant = "",
    request: Request = None,
    journal: Journal = None,
    model: Annotated[str, typer.Option(metavar="TEXT", help="Asked for, where there are several.")] = "",
    other_tenant: Annotated[list[str] | None, typer.Option(metavar="SALT", help="Who may have stored it.")] = None,
    at_its_end: AtItsEnd = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Say why a prompt hits or misses, block by block.

    In each tier: stored, or never stored, evicted, purged, damaged, of another identity or tenant, from before a
    reset. Of a request also what was found when it asked, and whether its deadline had passed.

    \b
    Example: kvstore explain /var/cache/kv --journal /var/lib/kv-journal --request cmpl-42
    """
    from tools.explain import explain as look
    from tools.output import show

    choice = choice_of(key, keys, tokens, text, tokenizer, tenant, request, journal)
    found = look(path, choice, journal=journal, model=model, other_tenants=other_tenant or (),
                 integrity_key_file=integrity_key_file, at_its_end=at_its_end)  # fmt: skip
    show(found.to_dict(), found.parts(), as_json=json)
