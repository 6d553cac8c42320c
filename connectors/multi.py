"""Several connectors as one: the longest prefix loads, all store what was not just loaded.

vLLM's MultiConnector loads from the first child that has any tokens, however few, and stores
back to every other child what was loaded. Here all children are asked, and the one with the
longest prefix loads (the first, where several have as much).

A child that raises where it is asked or told to store is left out of that call: a cache never
fails a request. One that cannot do what it has promised, or cannot be reset, is not passed
over: the engine would compute with what is not there, or with what is no longer right.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from connectors.base import Asker, Blocks, Keys, SchedulerHalf, WorkerHalf
from kvstore.events import TierEvent
from kvstore.keys import BlockKey

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MultiScheduler(SchedulerHalf):
    """The children's scheduler halves, in order of preference.

    Job numbers are told apart as ``number * len(children) + child``, tiers as ``host`` of the
    first child, ``host.1`` of the second and so on: adding a child renames none.

    Args:
        blocks_per_chunk: the longest chunk of a child; a multiple of those of the others.
    Raises:
        ValueError: there are no children.
    """

    def __init__(self, children: Sequence[SchedulerHalf], blocks_per_chunk: int = 1) -> None:
        if not children:
            raise ValueError("give at least one connector")
        self.children, self._per_chunk = list(children), blocks_per_chunk
        self._promised: dict[str, tuple[int, Sequence[BlockKey]]] = {}  # the child, and what it was asked for
        self._loader: dict[str, int] = {}  # the child that last loaded for a request
        self._expected: dict[str, dict[int, int]] = {}  # blocks that each child was told of
        self._loaded: dict[str, set[BlockKey]] = {}  # by request, until it is forgotten; of the first group
        self._holders: Counter[BlockKey] = Counter()  # requests that have loaded a block

    def ended(self, request_id: str, keys: Keys) -> None:
        self._each(lambda _, child: child.ended(request_id, keys))

    def begin(self, request_id: str, keys: Keys) -> None:
        self._each(lambda _, child: child.begin(request_id, keys))

    def expect(self, request_id: str, keys: Keys, params: Mapping[str, Any] | None) -> int:
        self._expected[request_id] = self._each(lambda _, child: child.expect(request_id, keys, params))
        return max(self._expected[request_id].values(), default=0)

    def asked(self, asker: Asker, keys: Keys) -> None:
        self._each(lambda _, child: child.asked(asker, keys))

    def not_needed(self, request_id: str) -> None:
        self._each(lambda _, child: child.not_needed(request_id))

    def hand_over(self, keys: Keys, params: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """All that the children have to say; each has a field of its own."""
        told: dict[str, Any] = {}
        for answer in self._each(lambda _, child: child.hand_over(keys, params)).values():
            told |= answer or {}
        return told or None

    def lookup(self, request_id: str, keys: Keys, *, expected: int = 0) -> int | None:
        """None while a child that wants to be asked again may have more; each keeps its own deadline.

        The other children's promises end with the step.
        """
        self._promised.pop(request_id, None)
        answers = self._each(
            lambda i, child: child.lookup(request_id, keys, expected=self._expected_of(i, request_id, expected))
        )
        known = {i: n for i, n in answers.items() if n is not None}
        best = max(known, key=lambda i: known[i], default=None)  # the first of the longest
        longest = 0 if best is None else known[best]
        if len(known) < len(answers) and longest < len(keys[0]):
            return None
        if best is not None:
            self._promised[request_id] = best, keys[0]
        return longest

    def load(self, request_id: str, blocks: Blocks) -> None:
        if request_id not in self._promised:
            raise ValueError(f"nothing is promised to {request_id}")
        child, keys = self._promised.pop(request_id)
        self.children[child].load(request_id, blocks)
        self._loader[request_id] = child
        loaded = self._loaded.setdefault(request_id, set())
        new = set(keys[: len(blocks[0])]) - loaded
        self._holders.update(new)
        loaded |= new

    def store(self, keys: Keys, blocks: Blocks) -> None:
        """What a request that goes on has loaded is not stored back, to any child.

        It is left out as blocks that the engine does not have, so that chunks begin where they
        did; a chunk of which only some blocks were loaded is stored.
        """
        is_new = self._are_new(keys[0])
        if any(is_new):
            mine = [[block if new else None for block, new in zip(ids, is_new, strict=True)] for ids in blocks]
            self._each(lambda _, child: child.store(keys, mine))

    def end_step(self, *, wait_s: float = 0.0) -> list[Any]:
        """By child. They wait one after the other, ``wait_s`` in all."""
        self._promised.clear()
        return [child.end_step(wait_s=wait_s / len(self.children)) for child in self.children]

    def failed(self, numbers: Sequence[int]) -> None:
        n = len(self.children)
        for i, child in enumerate(self.children):
            if mine := [number // n for number in numbers if number % n == i]:
                child.failed(mine)

    def reported(self, reports: Mapping[int, int]) -> None:
        n = len(self.children)
        for i, child in enumerate(self.children):
            if mine := {number // n: count for number, count in reports.items() if number % n == i}:
                child.reported(mine)

    def has_open_jobs(self) -> bool:
        return any(child.has_open_jobs() for child in self.children)

    def forget(self, request_id: str) -> None:
        self._promised.pop(request_id, None)
        self._loader.pop(request_id, None)
        self._expected.pop(request_id, None)
        for key in self._loaded.pop(request_id, ()):
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
        self._each(lambda _, child: child.forget(request_id))

    def reset(self) -> None:
        """All of them; then what the first that could not has raised."""
        self._loaded.clear()
        self._holders.clear()
        errors: list[Exception] = []
        for child in self.children:
            try:
                child.reset()
            except Exception as e:
                errors.append(e)
        if errors:
            raise errors[0]

    def stats(self) -> dict[str, dict[str, Any]]:
        stats = self._each(lambda _, child: child.stats())
        named = {_name(tier, i): fields for i, tiers in stats.items() for tier, fields in tiers.items()}
        return {name: {**fields, "name": name} for name, fields in named.items()}

    def take_events(self) -> list[TierEvent]:
        events = self._each(lambda _, child: child.take_events())
        return [replace(event, tier=_name(event.tier, i)) for i, mine in events.items() for event in mine]

    def sources(self, request_id: str, num_blocks: int) -> dict[str, int]:
        """By kind of tier: of which child it was does not matter here."""
        child = self._loader.get(request_id)
        return self.children[child].sources(request_id, num_blocks) if child is not None else {}

    def close(self) -> None:
        """All of them, also where one raises."""
        self._each(lambda _, child: child.close())

    def _are_new(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Of each block, whether any of its chunk has not been loaded."""
        n = self._per_chunk
        chunks = [keys[i : i + n] for i in range(0, len(keys), n)]
        return [new for chunk in chunks for new in [any(key not in self._holders for key in chunk)] * len(chunk)]

    def _expected_of(self, child: int, request_id: str, expected: int) -> int:
        """Each waits for what was handed over to it; keys may begin behind the request's first block."""
        told = self._expected.get(request_id)
        if told is None:
            return expected
        return told.get(child, 0) - (max(told.values(), default=0) - expected)

    def _each(self, call: Callable[[int, SchedulerHalf], T]) -> dict[int, T]:
        """What each child answers, in order; those that raise are left out."""
        answers: dict[int, T] = {}
        for i, child in enumerate(self.children):
            try:
                answers[i] = call(i, child)
            except Exception:
                logger.exception("connector %d (%s) failed, and is left out", i, type(child).__name__)
        return answers


class MultiWorker(WorkerHalf):
    """The children's worker halves, in the same order."""

    def __init__(self, children: Sequence[WorkerHalf]) -> None:
        self.children = list(children)

    def load(self, step: Sequence[Any]) -> None:
        for child, part in zip(self.children, step, strict=True):
            child.load(part)

    def store(self, step: Sequence[Any]) -> None:
        for child, part in zip(self.children, step, strict=True):
            child.store(part)

    def take_failed_blocks(self) -> list[tuple[int, int]]:
        return [failed for child in self.children for failed in child.take_failed_blocks()]

    def take_failed_jobs(self) -> list[int]:
        n = len(self.children)
        return [number * n + i for i, child in enumerate(self.children) for number in child.take_failed_jobs()]

    def take_reports(self) -> dict[int, int]:
        n = len(self.children)
        return {
            number * n + i: count
            for i, child in enumerate(self.children)
            for number, count in child.take_reports().items()
        }

    def close(self) -> None:
        """All of them, also where one raises."""
        for i, child in enumerate(self.children):
            try:
                child.close()
            except Exception:
                logger.exception("connector %d (%s) could not be closed", i, type(child).__name__)


def _name(tier: str, child: int) -> str:
    return f"{tier}.{child}" if child else tier
