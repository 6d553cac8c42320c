"""What `kvstore explain` has found: block by block, as data and for people."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import RenderableType

from kvstore.journal_entries import Request
from tools.ls import problem_lines
from tools.output import age, lines, table


@dataclass(frozen=True, slots=True)
class Finding:
    """One block in one tier.

    Attributes:
        why: "stored"; else "never stored", "evicted", "purged", "corrupt", "reset", "by_other", "identity", "epoch",
            "tenant", "ended" or "silent" (the process whose memory it was in), "gone" (who removed it is not in the
            journal), or "unknown" (no journal, or it does not reach back so far).
        detail: for people.
    """

    why: str
    detail: str

    @property
    def is_hit(self) -> bool:
        return self.why == "stored"


@dataclass(frozen=True, slots=True)
class Explained:
    """One block.

    Attributes:
        index: which block of the prompt, or of the keys as they were given.
        then: the tier that had it when the request asked; "computed"; "late": a tier had it, but the deadline had
            passed; empty where no request was given.
        is_usable: it is stored somewhere and, of a prompt, all blocks before it are.
    """

    index: int
    key: str
    tiers: dict[str, Finding]
    then: str
    is_usable: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """Blocks, and what was known.

    Attributes:
        model: whose KV is asked for; several where single keys are several models'.
        is_prompt: the blocks are those of a prompt, so that none is of use behind a miss.
    """

    model: str
    is_prompt: bool
    block_size: int
    tiers: list[str]
    blocks: list[Explained]
    request: Request | None
    notes: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_usable(self) -> int:
        return sum(block.is_usable for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        request = self.request
        asked = None
        if request is not None:
            asked = {
                "request": request.request_id, "time_ns": request.t_ns, "tenant": request.tenant,
                "namespace": request.namespace.hex(), "num_tokens": request.num_tokens, "hits": request.hits,
                "waited_s": request.waited_s, "is_late": request.is_late,
            }  # fmt: skip
        return {
            "model": self.model, "block_size": self.block_size, "usable_blocks": self.num_usable,
            "blocks": [asdict(block) for block in self.blocks], "asked": asked, "notes": self.notes,
            "problems": self.problems,
        }  # fmt: skip

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        if (request := self.request) is not None:
            hits = ", ".join(f"{tier} {n}" for tier, n in request.hits.items()) or "nothing"
            yield from lines(
                f"request {request.request_id or '(without an id)'}, {age((time.time_ns() - request.t_ns) / 1e9)} ago: "
                f"{request.num_tokens} tokens; found were, in blocks: {hits}; waited {request.waited_s * 1e3:.0f} ms"
                + (", past its deadline" if request.is_late else "")
            )
        tokens = ("tokens",) if self.is_prompt else ()
        columns = ("blocks", *tokens, "first key", *self.tiers, *(("then",) if self.request else ()), "now")
        title = f"{self.model}: {self.num_usable} of {len(self.blocks)} blocks would be a hit now"
        yield table(title, columns, map(self._cells, self._runs()), left=len(columns))
        yield from lines(*self.notes)
        yield from problem_lines(self.problems)

    def _runs(self) -> Iterator[list[Explained]]:
        """Neighbours of which the same is to be said."""
        run: list[Explained] = []
        for block in self.blocks:
            if run and self._said(run[-1]) != self._said(block):
                yield run
                run = []
            run.append(block)
        if run:
            yield run

    def _said(self, block: Explained) -> tuple[object, ...]:
        return (*(f.detail for f in block.tiers.values()), block.then, block.is_usable)

    def _cells(self, run: list[Explained]) -> tuple[object, ...]:
        first, last = run[0], run[-1]
        numbers = f"{first.index}" if len(run) == 1 else f"{first.index} to {last.index}"
        tokens = f"{first.index * self.block_size} to {(last.index + 1) * self.block_size - 1}"
        is_stored = any(finding.is_hit for finding in first.tiers.values())
        now = "hit" if first.is_usable else "behind a miss" if is_stored else "miss"
        then = (first.then,) if self.request else ()
        where = (tokens,) if self.is_prompt else ()
        return (numbers, *where, first.key[:12], *(first.tiers[t].detail for t in self.tiers), *then, now)
