"""Commands that remove what is stored: each parses, calls `tools.remove`, and shows. Imports nothing heavy."""

from __future__ import annotations

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
