"""Commands that look into blocks: each parses, calls the file that does the work, and shows. Imports nothing heavy."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.options import (
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

if TYPE_CHECKING:
    from tools.remove import Removed, Wanted


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
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
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
        bool, typer.Option("--by-position", help="The first block with the first, whatever their keys.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare blocks, prompts, files or stores.

    Shows which blocks only one has, and for the others by layer: the greatest difference, the relative error and
    the cosine of K and V, and the first token and layer that are apart. For wrong output, quantised KV, a new engine
    version. Exit code 1 if they differ by more than the tolerance.

    \b
    Example: kvstore diff before.safetensors after.safetensors --by-position --rtol 0.01
    """
    from tools.diff import diff as compare
    from tools.output import show

    is_chosen = bool(key or tokens or text is not None or request is not None)
    chosen = choice_of(key, None, tokens, text, tokenizer, tenant, request, journal) if is_chosen else None
    has_own = bool(key_b or request_b is not None)
    of_b = choice_of(key_b, None, None, None, None, "", request_b, journal) if has_own else chosen
    found = compare(a, b, (chosen, of_b), atol=atol, rtol=rtol, by_position=by_position or has_own)
    show(found.to_dict(), found.parts(), as_json=json)
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
    from tools.output import lines, show

    if is_journal(path):
        from kvstore.journal_view import JournalView
        from tools.timeline import draw as draw_timeline

        view = JournalView.of(path)
        save(draw_timeline(view), "--out", out)
        show({"file": str(out), "requests": len(view.requests), "samples": len(view.samples)},
             lines(f"{len(view.requests)} requests are drawn in {out}"), as_json=json)  # fmt: skip
        return
    from tools.plot import draw, norms

    is_chosen = bool(key or keys or tokens or text is not None or request is not None)
    choice = choice_of(key, keys, tokens, text, tokenizer, tenant, request, journal) if is_chosen else None
    found = norms(path, choice, integrity_key_file)
    save(draw(found), "--out", out)
    data = {"file": str(out), "blocks": found.num_blocks, "tokens": found.of_tokens.shape[-1],
            "norm_by_head": found.of_heads.tolist()}  # fmt: skip
    show(data, lines(f"{found.num_blocks} blocks are drawn in {out}"), as_json=json)


Namespace = Annotated[str | None, typer.Option("--namespace", metavar="HEX", help="Only of namespaces that begin so.")]
Tier = Annotated[str | None, typer.Option("--tier", metavar="TIER", help="Only disk, or only shared.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]


def gc(
    path: StoredPath,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", metavar="SIZE", help="The oldest go, until a directory holds this.")
    ] = None,
    older_than: Annotated[str | None, typer.Option(metavar="AGE", help="What is older goes: 90s, 2h, 7d.")] = None,
    old_epochs: Annotated[bool, typer.Option("--old-epochs", help="What was stored before a reset goes.")] = False,
    namespace: Namespace = None,
    tier: Tier = None,
    dry_run: DryRun = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Make room: remove what is old.

    Works beside running stores, to whom what has gone is a miss. Interrupted, it leaves the rest as it was, and
    has exit code 130.

    \b
    Example: kvstore gc /mnt/kv --older-than 7d --max-bytes 500GiB --dry-run
    """
    from tools.output import parse_age, parse_size
    from tools.remove import Wanted, check_given

    check_given({"--max-bytes": max_bytes, "--older-than": older_than, "--old-epochs": old_epochs,
                 "--namespace": namespace})  # fmt: skip
    wanted = Wanted(
        namespace=namespace, tier=tier, old_epochs=old_epochs,
        older_than_s=None if older_than is None else parse_age("--older-than", older_than),
        max_nbytes=None if max_bytes is None else parse_size("--max-bytes", max_bytes),
    )  # fmt: skip
    _remove(path, wanted, integrity_key_file, dry_run=dry_run, ask=False, json=json)


def purge(
    path: StoredPath,
    key: Keys = None,
    keys: KeysFile = None,
    tokens: Tokens = None,
    text: Text = None,
    tokenizer: Tokenizer = None,
    tenant: Tenant = "",
    request: Request = None,
    of_tenant: Annotated[
        str | None, typer.Option(metavar="SALT", help="All of a tenant, or of its digest; needs --journal.")
    ] = None,
    journal: Journal = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="All of this model.")] = None,
    namespace: Namespace = None,
    everything: Annotated[bool, typer.Option("--all", help="All that is stored.")] = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Delete blocks, a prompt, a model, for good.

    On disk they are overwritten, so that nothing brings them back. Chunks go as a whole. Asks first, unless --yes is
    given; works beside running stores, which may have copies in memory.

    \b
    Example: kvstore purge /var/cache/kv --tokens prompt.json --yes
    """
    from tools.remove import Wanted, check_given, keys_of, keys_of_tenant

    is_chosen = bool(key or keys or tokens or text is not None or request is not None)
    check_given({"--key": key, "--keys": keys, "--tokens": tokens, "--text": text, "--request": request,
                 "--of-tenant": of_tenant, "--model": model, "--namespace": namespace,
                 "--all": everything})  # fmt: skip
    chosen = None
    if is_chosen:
        choice = choice_of(key, keys, tokens, text, tokenizer, tenant, request, journal)
        chosen = keys_of(path, choice, integrity_key_file)
    if of_tenant is not None:
        keys_there, since = keys_of_tenant(journal, of_tenant)
        chosen = [*(chosen or ()), *keys_there]
        typer.echo(f"kvstore: the journal goes back {since}: what was stored before it is not found by it", err=True)
    wanted = Wanted(keys=chosen, model=model, namespace=namespace)
    _remove(path, wanted, integrity_key_file, dry_run=dry_run, ask=not yes, json=json)


def _remove(
    path: Path, wanted: Wanted, integrity_key_file: str | None, *, dry_run: bool, ask: bool, json: bool
) -> None:
    import sys

    from kvstore.errors import ConfigError
    from tools.output import results, show
    from tools.remove import remove

    def confirm(would: Removed) -> bool:
        if not ask:
            return True
        if not sys.stdin.isatty():
            raise ConfigError("--yes: not given, and nobody can be asked here; give it, or --dry-run")
        for part in would.parts():
            results().print(part)
        return typer.confirm("Delete these?")

    removed = remove(path, wanted, integrity_key_file=integrity_key_file, confirm=None if dry_run else confirm)
    show(removed.to_dict(), removed.parts(), as_json=json)
    if not removed.is_whole:
        raise typer.Exit(130)


def stat(path: StoredPath, journal: Journal = None, json: Json = False) -> None:
    """Show how full each tier is, a line each.

    With --journal also the tiers of each server, host memory too: used, pinned, hit rate, and how long ago what is
    hit was asked for before.

    \b
    Example: kvstore stat /var/cache/kv --journal /var/lib/kv-journal
    """
    from tools.output import show
    from tools.stat import stat as look

    found = look(path, journal)
    show(found.to_dict(), found.parts(), as_json=json)


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
                 integrity_key_file=integrity_key_file)  # fmt: skip
    show(found.to_dict(), found.parts(), as_json=json)


def top(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The servers' journal, or a store's directory.")],
    interval: Annotated[float, typer.Option(min=0.2, max=3600.0, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
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
        data, parts = look(path)
        show(data, parts, as_json=json)
    else:
        watch(path, interval)


def report(
    path: StoredPath,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file to write.")],
    journal: Journal = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan from this, and not from the journal.")
    ] = None,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Write one HTML page with all of it.

    The tables and pictures of stat, ls, plot and plan, in a file that loads nothing from anywhere and can be sent.

    \b
    Example: kvstore report /var/cache/kv --journal /var/lib/kv-journal --out report.html
    """
    from tools.output import lines, show, size
    from tools.report.report import make, summary, write

    made = make(path, journal, trace, integrity_key_file)
    nbytes = write(made, out)
    show(summary(made, nbytes, out), lines(f"{out}: {len(made.sections)} sections, {size(nbytes)}"), as_json=json)
