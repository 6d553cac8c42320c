"""Commands that remove what is stored: each parses, calls `tools.remove`, and shows. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    StoreTier,
    Tenant,
    Text,
    Tokenizer,
    Tokens,
    choice_of,
)

if TYPE_CHECKING:
    from kvstore.tiers.catalog import Catalog
    from tools.remove import Wanted
    from tools.removed import Removed, Tenants

Namespace = Annotated[str | None, typer.Option("--namespace", metavar="HEX", help="Only of namespaces that begin so.")]
OneTier = Annotated[StoreTier | None, typer.Option("--tier", help="Only of this tier.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]


def gc(
    path: StoredPath,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", metavar="SIZE", help="The oldest go, until a directory holds this.")
    ] = None,
    older_than: Annotated[str | None, typer.Option(metavar="AGE", help="What is older goes: 90s, 2h, 7d.")] = None,
    old_epochs: Annotated[bool, typer.Option("--old-epochs", help="What was stored before a reset goes.")] = False,
    namespace: Namespace = None,
    tier: OneTier = None,
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
        namespace=namespace, tier=tier and tier.value, old_epochs=old_epochs,
        older_than_s=None if older_than is None else parse_age("--older-than", older_than),
        max_nbytes=None if max_bytes is None else parse_size("--max-bytes", max_bytes),
    )  # fmt: skip
    from tools.places import find_catalogs

    ask = _Ask(dry_run=dry_run, yes=True, json=json, integrity_key_file=integrity_key_file)
    _remove(find_catalogs(path, integrity_key_file), wanted, None, ask)


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
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Of this model: its name, or a part of it.")] = None,
    namespace: Namespace = None,
    tier: OneTier = None,
    everything: Annotated[bool, typer.Option("--all", help="All that is stored.")] = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
    integrity_key_file: KeyFile = None,
) -> None:
    """Delete blocks, a prompt, a model, for good.

    What is given must all hold. Chunks go as a whole: what shares one with what was named is said. Shows what would go
    and asks, unless --yes is given; works beside running stores, which may have copies in memory.

    \b
    Example: kvstore purge /var/cache/kv --tokens prompt.json --yes
    """
    from kvstore.journal_view import JournalView
    from tools.places import find_catalogs
    from tools.remove import Wanted, check_given
    from tools.selection import of_choice
    from tools.selection import of_tenant as tenants_blocks

    is_chosen = bool(key or keys or tokens or text is not None or request is not None)
    check_given({"--key": key, "--keys": keys, "--tokens": tokens, "--text": text, "--request": request,
                 "--of-tenant": of_tenant, "--model": model, "--namespace": namespace,
                 "--all": everything})  # fmt: skip
    catalogs, selections = find_catalogs(path, integrity_key_file), []
    view = None if journal is None else JournalView.of(journal)
    if is_chosen:
        choice = choice_of(key, keys, tokens, text, tokenizer, tenant, request, journal)
        selections.append(of_choice(catalogs, choice))
    if of_tenant is not None:
        of_theirs, since = tenants_blocks(view, of_tenant)
        selections.append(of_theirs)
        typer.echo(f"kvstore: the journal goes back {since}: what was stored before it is not found by it", err=True)
    wanted = Wanted(selections=selections, model=model, namespace=namespace, tier=tier and tier.value)
    ask = _Ask(dry_run=dry_run, yes=yes, json=json, integrity_key_file=integrity_key_file)
    _remove(catalogs, wanted, None if view is None else view.tenants_by_hash(), ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ask:
    dry_run: bool
    yes: bool
    json: bool
    integrity_key_file: str | None


def _remove(catalogs: Sequence[Catalog], wanted: Wanted, tenants: Tenants | None, how: _Ask) -> None:
    from tools.output import show
    from tools.remove import remove

    removed = remove(catalogs, wanted, tenants=tenants, integrity_key_file=how.integrity_key_file,
                     confirm=None if how.dry_run else lambda would: how.yes or _confirmed(would))  # fmt: skip
    show(removed.to_dict(), removed.parts(), as_json=how.json)
    if not removed.is_whole:
        raise typer.Exit(130)


def _confirmed(would: Removed) -> bool:
    import sys

    from kvstore.errors import ConfigError
    from tools.output import results

    if not sys.stdin.isatty():
        raise ConfigError("--yes: not given, and nobody can be asked here; give it, or --dry-run")
    for part in would.parts():
        results().print(part)
    return typer.confirm("Delete these?")
