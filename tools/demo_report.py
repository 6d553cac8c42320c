"""What the demo found: one row a source, the answers, what is stored; as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.ls import Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One question answered from one source."""

    tokens: int
    nbytes: int
    load_s: float
    ttft_s: float
    logits: np.ndarray
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """Medians over the questions; the logit difference is the largest of all."""

    source: str
    tokens: int
    nbytes: int
    gb_per_s: float
    ttft_s: float
    speedup: float
    max_abs_logit_diff: float
    same_text: bool

    @classmethod
    def of(cls, source: str, answers: Sequence[Measured], cold: Sequence[Measured]) -> SourceRow:
        """Compare the answers from one source with those computed from the start, in the same order."""
        pairs = list(zip(answers, cold, strict=True))
        ttft_s = median(a.ttft_s for a in answers)
        return cls(
            source=source,
            tokens=int(median(a.tokens for a in answers)),
            nbytes=int(median(a.nbytes for a in answers)),
            gb_per_s=median(a.nbytes / a.load_s / 1e9 if a.load_s else 0.0 for a in answers),
            ttft_s=ttft_s,
            speedup=median(c.ttft_s for c in cold) / ttft_s,
            max_abs_logit_diff=max(float(np.abs(a.logits - c.logits).max()) for a, c in pairs),
            same_text=all(a.text == c.text for a, c in pairs),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Everything the demo shows.

    Attributes:
        stored: what `kvstore ls` says of the tiers.
    """

    model: str
    prompt_tokens: int
    sources: list[SourceRow]
    answers: list[tuple[str, str]]
    seconds: float
    stored: Listing

    @property
    def same_text(self) -> bool:
        return all(row.same_text for row in self.sources)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "sources": [asdict(row) for row in self.sources],
            "answers": [{"question": question, "answer": answer} for question, answer in self.answers],
            "same_text": self.same_text,
            "stored": self.stored.to_dict(),
            "seconds": round(self.seconds, 1),
        }


def print_result(result: DemoResult, console: Console) -> None:
    """The table, then the answers, then what is stored."""
    console.print(_table(result))
    for question, answer in result.answers:
        console.print(f"\n[bold]Q[/bold] {question}", highlight=False)
        console.print(f"[bold]A[/bold] {answer}", highlight=False)
    if result.same_text:
        console.print(f"\nAll {len(result.sources)} sources gave the same text.")
    else:
        wrong = ", ".join(row.source for row in result.sources if not row.same_text)
        console.print(f"\n[bold red]Other text than cold from: {wrong}[/bold red]")
    console.print("\nStored (kvstore ls):")
    for part in result.stored.parts():
        console.print(part)


def _table(result: DemoResult) -> Table:
    table = Table(title=f"{result.model}, a prompt of {result.prompt_tokens} tokens, medians over the questions")
    table.add_column("source", style="bold")
    for name in ("tokens loaded", "MB", "load GB/s", "first token", "speed-up", "max |Δ logit|"):
        table.add_column(name, justify="right")
    for row in result.sources:
        loaded = [f"{row.nbytes / 1e6:.1f}", f"{row.gb_per_s:.2f}"] if row.nbytes else ["-", "-"]
        table.add_row(
            row.source,
            str(row.tokens),
            *loaded,
            f"{row.ttft_s * 1e3:,.0f} ms",
            f"{row.speedup:.1f} x",
            f"{row.max_abs_logit_diff:.1e}" if row.max_abs_logit_diff else "0",
        )
    return table
