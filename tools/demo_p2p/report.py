"""What the demo of direct hand-over found: one row a transport, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.demo_vllm.client import Answer

_COLUMNS: Final = (
    "first token, median", "p99", "hand-over of a prompt", "GB/s", "prompt tokens handed over", "same text",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportRow:
    """What one transport did with the load.

    Attributes:
        hand_over_s: from the request for a prompt's blocks until they are in the decode server's memory, on average.
        gb_per_s: of that.
        blocks: that the decode servers' stores had from their peers.
        same_text: texts and token ids are those of one server alone.
    """

    name: str
    ttft_median_s: float
    ttft_p99_s: float
    hand_over_s: float
    gb_per_s: float
    blocks: int
    prompt_tokens_handed_over: int
    same_text: bool

    @classmethod
    def of(
        cls,
        name: str,
        answers: Sequence[Answer],
        alone: Sequence[Answer],
        *,
        blocks: int = 0,
        nbytes: int = 0,
        seconds: float = 0.0,
    ) -> TransportRow:
        """``seconds`` is how long all transfers took together."""
        ttft = np.array([answer.ttft_s for answer in answers])
        return cls(
            name=name,
            ttft_median_s=float(np.median(ttft)),
            ttft_p99_s=float(np.percentile(ttft, 99)),
            hand_over_s=seconds / len(answers),
            gb_per_s=nbytes / seconds / 1e9 if seconds else 0.0,
            blocks=blocks,
            prompt_tokens_handed_over=sum(answer.cached_tokens for answer in answers),
            same_text=[(a.text, a.token_ids) for a in answers] == [(a.text, a.token_ids) for a in alone],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class P2pDemoResult:
    """Everything the demo shows. The first row is one server alone."""

    model: str
    prompt_tokens: list[int]
    rows: list[TransportRow]
    missing: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every transport handed over, and the texts are those of one server."""
        return all(row.same_text for row in self.rows) and all(
            row.blocks > 0 and row.prompt_tokens_handed_over > 0 for row in self.rows[1:]
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "transports": [asdict(row) for row in self.rows],
            "missing": self.missing,
            "ok": self.ok,
            "seconds": round(self.seconds, 1),
        }


def print_result(result: P2pDemoResult, console: Console) -> None:
    """The table, and what is wrong."""
    tokens = result.prompt_tokens
    title = f"{result.model}: {len(tokens)} prompts of {min(tokens):,} to {max(tokens):,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("transport", style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in result.rows:
        handed = row.blocks > 0
        table.add_row(
            row.name,
            _time(row.ttft_median_s),
            _time(row.ttft_p99_s),
            _time(row.hand_over_s) if handed else "-",
            f"{row.gb_per_s:.2f}" if handed else "-",
            f"{row.prompt_tokens_handed_over:,} of {sum(tokens):,}",
            "yes" if row.same_text else "NO",
        )
    console.print(table)
    for row in result.rows[1:]:
        if not row.blocks:
            console.print(f"[bold red]{row.name}: nothing was handed over; the decode servers computed it.[/bold red]")
    for name in result.missing:
        console.print(f"{name} is not installed and was left out: pip install 'kvstore[{name.lower()}]'")


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"
