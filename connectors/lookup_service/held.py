"""What peers hold here, by number: each with its peer, and until when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

from connectors.control import ControlRefusedError

MOST_OPEN: Final = 1024  # of one kind, of all peers together


class Holding(Protocol):
    """One thing that a peer holds.

    Attributes:
        expires: on the clock of `time.monotonic`.
    """

    peer: str
    expires: float

    def end(self) -> None:
        """Give it back. Called once, when it can be found no more."""


T = TypeVar("T", bound=Holding)


class Held(Generic[T]):
    """Thread-safe.

    Args:
        what: they are, in the plural.
        numbers: where their numbers come from.
    """

    def __init__(self, what: str, numbers: Iterator[int]) -> None:
        self._what, self._numbers = what, numbers
        self._lock = threading.Lock()
        self._open: dict[int, T] = {}

    def __len__(self) -> int:
        return len(self._open)

    def check_room(self) -> None:
        """Raises ControlRefusedError: too many are open."""
        if len(self._open) >= MOST_OPEN:
            raise ControlRefusedError(f"{MOST_OPEN} {self._what} are open")

    def add(self, one: T) -> int:
        with self._lock:
            number = next(self._numbers)
            self._open[number] = one
            return number

    def find(self, peer: str, number: int) -> T | None:
        """What that peer holds under this number, if anything."""
        one = self._open.get(number)
        return one if one is not None and one.peer == peer else None

    def take_out(self, number: int) -> T | None:
        """It can be found no more, and is the caller's to end."""
        with self._lock:
            return self._open.pop(number, None)

    def end(self, peer: str, number: int) -> None:
        """End it; there may be none."""
        if self.find(peer, number) is not None and (one := self.take_out(number)) is not None:
            one.end()

    def end_expired(self) -> None:
        now = time.monotonic()
        self.end_where(lambda one: one.expires <= now)

    def end_all_of(self, peer: str) -> None:
        self.end_where(lambda one: one.peer == peer)

    def end_where(self, is_over: Callable[[T], bool]) -> None:
        with self._lock:
            ended = {number: one for number, one in self._open.items() if is_over(one)}
            for number in ended:
                del self._open[number]
        for one in ended.values():
            one.end()
