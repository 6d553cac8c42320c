"""Options and arguments that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tools.choice import Choice

StoredPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A disk tier's directory, a shared path, or a folder that holds them.")
]


class StoreTier(StrEnum):
    """Where stores keep what lasts."""

    DISK = "disk"
    SHARED = "shared"


class AnyTier(StrEnum):
    """Those, and where other systems do."""

    DISK = "disk"
    SHARED = "shared"
    VLLM_EXAMPLE = "vllm-example"
    VLLM_FS = "vllm-fs"


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
KeyFile = Annotated[
    str | None,
    typer.Option("--integrity-key-file", metavar="FILE", help="The secret that the slots were signed with."),
]
AtItsEnd = Annotated[bool, typer.Option("--at-its-end", help="Take the journal's last record for now: of an old copy.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]

# Which blocks are meant; see `tools.choice.Choice`.
Keys = Annotated[
    list[str] | None, typer.Option("--key", metavar="KEY", help="A block's key, or its start; may be repeated.")
]
KeysFile = Annotated[Path | None, typer.Option("--keys", metavar="FILE", help="A file with a key a line.")]
Tokens = Annotated[Path | None, typer.Option("--tokens", metavar="FILE", help="A prompt: a JSON list of token ids.")]
Text = Annotated[str | None, typer.Option("--text", metavar="TEXT", help="A prompt; needs --tokenizer.")]
Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="PATH", help="Folder of the model's tokenizer.json.")
]
Tenant = Annotated[str, typer.Option("--tenant", metavar="SALT", help="The salt that the prompt is stored under.")]


Request = Annotated[
    str | None, typer.Option("--request", metavar="ID", help="A request's id, or its start; needs --journal.")
]
Journal = Annotated[Path | None, typer.Option("--journal", metavar="DIR", help="The journal of the servers.")]


def choice_of(
    key: list[str] | None,
    keys: Path | None,
    tokens: Path | None,
    text: str | None,
    tokenizer: Path | None,
    tenant: str,
    request: str | None = None,
    journal: Path | None = None,
) -> Choice:
    from tools.choice import Choice

    return Choice(
        keys=tuple(key or ()), keys_file=keys, tokens_file=tokens, text=text, tokenizer=tokenizer, tenant=tenant,
        request=request, journal=journal,
    )  # fmt: skip
