"""What the demo of prefill and decode apart found: one row a set-up, as a table or as JSON, and what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.demo_vllm.client import Answer

_EQUAL_WITHIN: Final = 1.1
_COLUMNS: Final = (
    "cores", "ITL median", "ITL p99", "ITL max", "long prompts: first token", "p99", "short: first token",
    "tokens/s", "prompt tokens loaded", "same text",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUpRow:
    """What one set-up did with the load.

    Attributes:
        cores: how many each server has.
        itl_median_s: of all gaps between a token and the next of the decoding streams (ITL: inter-token latency).
        tokens_per_s: of all answers, from the first request to the last token.
        prompt_tokens_loaded: that the answering server did not compute.
        blocks_from_shared_path: that its store counted in the meantime.
        same_text: texts and token ids are those of the first set-up.
    """

    name: str
    cores: str
    ttft_long_median_s: float
    ttft_long_p99_s: float
    ttft_short_median_s: float
    itl_median_s: float
    itl_p99_s: float
    itl_max_s: float
    tokens_per_s: float
    prompt_tokens_loaded: int
    blocks_from_shared_path: int
    same_text: bool

    @classmethod
    def of(
        cls, name: str, cores: str, answers: Sequence[Answer], first: Sequence[Answer], *, shared_blocks: int = 0
    ) -> SetUpRow:
        """``first`` has the first set-up's answers to the same requests."""
        long = [a for a in answers if a.request.is_long]
        short = [a for a in answers if not a.request.is_long]
        gaps = np.array([gap for a in short for gap in a.gaps_s])
        ttft_long = np.array([a.ttft_s for a in long])
        seconds = max(a.came_s[-1] for a in answers) - min(a.sent_s for a in answers)
        return cls(
            name=name,
            cores=cores,
            ttft_long_median_s=float(np.median(ttft_long)),
            ttft_long_p99_s=float(np.percentile(ttft_long, 99)),
            ttft_short_median_s=float(np.median([a.ttft_s for a in short])),
            itl_median_s=float(np.median(gaps)),
            itl_p99_s=float(np.percentile(gaps, 99)),
            itl_max_s=float(gaps.max()),
            tokens_per_s=sum(len(a.token_ids) for a in answers) / seconds,
            prompt_tokens_loaded=sum(a.cached_tokens for a in answers),
            blocks_from_shared_path=shared_blocks,
            same_text=[(a.text, a.token_ids) for a in answers] == [(a.text, a.token_ids) for a in first],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmDemoResult:
    """Everything the demo shows. The first row is one server alone, the last one prefill and decode apart."""

    model: str
    load: str
    prompt_tokens: int
    set_ups: list[SetUpRow]
    seconds: float

    @property
    def same_text(self) -> bool:
        return all(row.same_text for row in self.set_ups)

    @property
    def is_loaded(self) -> bool:
        """Whether the decode server had KV from the store."""
        apart = self.set_ups[-1]
        return apart.prompt_tokens_loaded > 0 and apart.blocks_from_shared_path > 0

    @property
    def ok(self) -> bool:
        return self.same_text and self.is_loaded

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "load": self.load,
            "prompt_tokens": self.prompt_tokens,
            "set_ups": [asdict(row) for row in self.set_ups],
            "same_text": self.same_text,
            "shows": shows(self.set_ups),
            "seconds": round(self.seconds, 1),
        }


def shows(rows: Sequence[SetUpRow]) -> str:
    """One sentence: the tail of ITL in the last set-up against the first and any between, and what it costs."""
    alone, apart = rows[0], rows[-1]
    ratio = alone.itl_p99_s / apart.itl_p99_s
    if ratio >= _EQUAL_WITHIN:
        tail = f"is {ratio:.1f} times shorter with prefill apart"
    elif ratio <= 1 / _EQUAL_WITHIN:
        tail = f"is {1 / ratio:.1f} times longer with prefill apart: splitting did not help here"
    else:
        tail = "is the same with prefill apart: splitting did not help here"
    others = "".join(f"; {row.name}: {_time(row.itl_p99_s)}" for row in rows[1:-1])
    return (
        f"While long prompts arrive, the p99 of inter-token latency {tail} ({_time(apart.itl_p99_s)} against "
        f"{_time(alone.itl_p99_s)}{others}); the first token of a long prompt comes after "
        f"{_time(apart.ttft_long_median_s)} in the median instead of {_time(alone.ttft_long_median_s)}."
    )


def print_result(result: VllmDemoResult, console: Console) -> None:
    """The table, what it shows, and what is wrong."""
    console.print(_table(result))
    console.print(shows(result.set_ups))
    if not result.same_text:
        wrong = ", ".join(row.name for row in result.set_ups if not row.same_text)
        console.print(f"[bold red]Other text than from {result.set_ups[0].name}: {wrong}[/bold red]")
    if not result.is_loaded:
        console.print("[bold red]The decode server loaded nothing: it computed the prompts itself.[/bold red]")


def _table(result: VllmDemoResult) -> Table:
    table = Table(title=f"{result.model}: {result.load}", title_justify="left")
    table.add_column("set-up", style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for row in result.set_ups:
        table.add_row(
            row.name,
            row.cores,
            _time(row.itl_median_s),
            _time(row.itl_p99_s),
            _time(row.itl_max_s),
            _time(row.ttft_long_median_s),
            _time(row.ttft_long_p99_s),
            _time(row.ttft_short_median_s),
            f"{row.tokens_per_s:.0f}",
            f"{row.prompt_tokens_loaded:,} of {result.prompt_tokens:,}",
            "yes" if row.same_text else "NO",
        )
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"
