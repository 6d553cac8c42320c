"""The demo's load: short prompts that decode for long, and long prompts that arrive meanwhile.

All text is cut from the guide. Each long prompt begins elsewhere in it, so that no server can
reuse what it computed for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tools.demo import GUIDE
from tools.demo_vllm.client import Request

_TOPICS: Final = (
    "What is a KV cache?",
    "What is prefix reuse?",
    "What is a block?",
    "What is eviction?",
    "What is a checksum?",
    "What is a footer?",
    "What is a shared path?",
    "What is prefill?",
)
_SHORT: Final = "Question: {topic}\nAnswer: In a few words,"
_WARM_UP: Final = 99  # above the numbers of any load's prompts
_LONG: Final = "\n\n## In short\n\nThe text above says that"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent, and when.

    Args:
        streams: short prompts that are sent together at the start of each round.
        stream_tokens: length of their answers.
        round_s: from one sending of the streams to the next.
        long_at_s: when long prompts come, from the start of each round.
        long_chars: their length.
        long_tokens: length of their answers.
    """

    rounds: int = 2
    round_s: float = 13.0
    streams: int = 4
    stream_tokens: int = 200
    long_at_s: tuple[float, ...] = (0.5, 3.5, 6.5, 9.5)
    long_chars: int = 7000
    long_tokens: int = 8

    def requests(self) -> list[Request]:
        """In the order of their times."""
        made = []
        for i in range(self.rounds):
            start_s, first, first_long = i * self.round_s, i * self.streams, i * len(self.long_at_s)
            made += [self.short(first + n, start_s) for n in range(self.streams)]
            made += [self.long(first_long + n, start_s + at_s) for n, at_s in enumerate(self.long_at_s)]
        return sorted(made, key=lambda request: request.at_s)

    def short(self, number: int, at_s: float) -> Request:
        prompt = short_prompt(number)
        name = f"short prompt {number}"
        return Request(name=name, is_long=False, at_s=at_s, prompt=prompt, max_tokens=self.stream_tokens)

    def long(self, number: int, at_s: float) -> Request:
        prompt = long_prompt(number, self.long_chars)
        return Request(
            name=f"long prompt {number}", is_long=True, at_s=at_s, prompt=prompt, max_tokens=self.long_tokens
        )

    def describe(self, long_prompt_tokens: Sequence[int]) -> str:
        """In words; the lengths are those of the long prompts."""
        num_long, num_short = self.rounds * len(self.long_at_s), self.rounds * self.streams
        return (
            f"{num_long} prompts of {min(long_prompt_tokens):,} to {max(long_prompt_tokens):,} tokens arrive while "
            f"{num_short} streams of {self.stream_tokens} tokens decode, {self.streams} at a time"
        )


def warm_up(load: Load) -> list[Request]:
    """Requests that no load has."""
    long = load.long(_WARM_UP, 0.0)
    return [long, Request(name="warm-up", is_long=False, at_s=0.0, prompt=short_prompt(_WARM_UP), max_tokens=8)]


def short_prompt(number: int) -> str:
    """Fits into one block, which is not full: nothing of it can be stored or reused."""
    return _SHORT.format(topic=_TOPICS[number % len(_TOPICS)])


def long_prompt(number: int, nchars: int) -> str:
    """The guide, begun at another paragraph for each number and cut at a word."""
    paragraphs = GUIDE.read_text().split("\n\n")
    first = number % len(paragraphs)
    text = "\n\n".join([f"# Extract {number}", *paragraphs[first:], *paragraphs[:first]])
    return text[:nchars].rpartition(" ")[0] + _LONG
