"""The command `kvstore keygen`: makes a key pair, says where it is and what to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def keygen(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Made if need be; holds one host's keys.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What peers call this host; by default its host name.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Say where the files are as JSON.")] = False,
) -> None:
    """Make the keys by which servers that hand KV over know each other.

    Each host has its own pair. The public key goes to the peers, the secret one stays. A secret
    that exists is never overwritten.

    \b
    Example: kvstore keygen ~/.kvstore/keys
    """
    from connectors.curve_keys import generate

    files = generate(folder.expanduser(), name)
    if json:
        from tools.output import show

        paths = {"secret": files.secret_path, "public": files.public_path, "peers": files.peers_path}
        data = {**{what: str(path) for what, path in paths.items()}, "name": files.name, "public_key": files.public}
        show(data, (), as_json=True)
        return
    typer.echo(f"Made {files.secret_path} (keep it here) and {files.public_path}: {files.public}")
    typer.echo(
        f"Copy {files.public_path.name} to each peer as peers/{files.name}.key in its folder, "
        f"and each peer's into {files.peers_path}/."
    )
