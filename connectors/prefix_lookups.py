"""Prefixes on their way up from the lower tiers, for a scheduler that must not wait.

A prefix that host memory lacks is looked for, and promoted, by a thread; whoever wants the
same one waits for the same lookup. What a producer is said to be writing right now is asked
for again until it is there, or until the deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvstore.keys import BlockKey
from kvstore.planes import Planes

logger = logging.getLogger(__name__)

_THREADS: Final = 4
_MOST: Final = 256  # under way; who comes later takes what host memory has
_FIRST_ANSWER_S: Final = 0.002  # a lower tier's index lies in memory: most lookups have ended by then
_RETRY_S: Final = 0.01


class _Lookup:
    """One prefix on its way up."""

    def __init__(self, keys: Sequence[BlockKey], deadline: float) -> None:
        self.keys, self.deadline, self.ended_at = list(keys), deadline, 0.0
        self.came: dict[str, int] = {}  # blocks by tier
        self.ended = threading.Event()

    def covers(self, keys: Sequence[BlockKey]) -> bool:
        """Whether these keys, the rest of some prefix, were all looked for."""
        return keys[-1] in self.keys


class PrefixLookups:
    """Called by one thread, the scheduler's.

    Args:
        timeout_s: after which a request waits no longer, and takes what has come.
    """

    def __init__(self, planes: Planes, timeout_s: float) -> None:
        self._planes, self._timeout_s = planes, timeout_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="kvstore-lookup")
        self._of_request: dict[str, dict[int, _Lookup]] = {}  # by KV cache group
        self._deadlines: dict[str, float] = {}  # of requests
        self._under_way: dict[BlockKey, _Lookup] = {}  # by first key
        self._asked: _Lookup | None = None  # the last one that somebody still waits for
        self._stopping = threading.Event()

    def begin(self, request_id: str, missing: Sequence[BlockKey]) -> _Lookup | None:
        """Look for the rest of a request's prefix; None where there is nothing to look for, or in.

        Args:
            missing: keys of one KV cache group, the first of which host memory does not have.
        """
        if not missing or self._planes.promotion() is None:
            return None
        lookup = self._under_way.get(missing[0])
        if lookup is None:
            if len(self._under_way) >= _MOST:
                return None
            lookup = _Lookup(missing, time.monotonic() + self._timeout_s)
            self._under_way[missing[0]] = lookup
            self._pool.submit(self._bring_up, lookup)
        self._of_request.setdefault(request_id, {})[missing[0].group] = lookup
        return lookup

    def is_settled(self, request_id: str, missing: Sequence[BlockKey], expected: int = 0) -> bool:
        """Whether nothing more of these keys is on its way up; begins to look for them where nobody has.

        Args:
            expected: leading ones that somebody is about to have written.
        """
        now = time.monotonic()
        deadline = self._deadlines.setdefault(request_id, now + self._timeout_s)
        lookup = self._of_request.get(request_id, {}).get(missing[0].group)
        if lookup is None or self._is_over(lookup, missing, expected, now):
            lookup = self.begin(request_id, missing)
            if lookup is not None:
                lookup.ended.wait(_FIRST_ANSWER_S)
        if lookup is None or now >= deadline or (lookup.ended.is_set() and expected <= 0):
            return True
        self._asked = lookup
        return False

    def _is_over(self, lookup: _Lookup, missing: Sequence[BlockKey], expected: int, now: float) -> bool:
        """Whether it found less than there may be: it was another request's, or what is expected was not there yet."""
        if not lookup.ended.is_set():
            return False
        return not lookup.covers(missing) or (expected > 0 and now >= lookup.ended_at + _RETRY_S)

    def is_late(self, request_id: str) -> bool:
        """Whether a request's deadline has passed while something was on its way up."""
        lookups = self._of_request.get(request_id, {}).values()
        is_over = time.monotonic() >= self._deadlines.get(request_id, float("inf"))
        return is_over and any(not lookup.ended.is_set() or lookup.ended_at >= lookup.deadline for lookup in lookups)

    def wait(self, timeout_s: float) -> None:
        """Give the threads their time, where an engine has nothing to compute but asks again."""
        asked, self._asked = self._asked, None
        if asked is not None and timeout_s > 0:
            (self._stopping if asked.ended.is_set() else asked.ended).wait(timeout_s)

    def came(self, request_id: str) -> dict[str, int]:
        """Blocks that came up for a request, by tier; of the group of which most did."""
        lookups = self._of_request.get(request_id, {}).values()
        return max((dict(lookup.came) for lookup in lookups), key=lambda came: sum(came.values()), default={})

    def forget(self, request_id: str) -> None:
        """The request is over; who else waits for its lookup still does."""
        self._of_request.pop(request_id, None)
        self._deadlines.pop(request_id, None)

    def reset(self) -> None:
        """Nobody waits for what is under way any more."""
        self._of_request.clear()
        self._under_way.clear()

    def close(self) -> None:
        """End what waits, and wait for what reads."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _bring_up(self, lookup: _Lookup) -> None:
        """Runs in a thread: promote as much of the prefix as there is."""
        try:
            done, planes = 0, self._planes
            while (
                done < len(lookup.keys)
                and not self._stopping.is_set()
                and (promotion := planes.promotion()) is not None
            ):
                keys = lookup.keys[done:]
                found = promotion.find(keys)
                came = promotion.load(found, keys, None, lookup.deadline)
                lookup.came[found.tier] = lookup.came.get(found.tier, 0) + came
                came = came or planes.manager.prefix_hit(keys)
                done += came
                if not came or time.monotonic() >= lookup.deadline:
                    break
        except Exception:  # what was to be loaded is computed instead
            logger.exception("a prefix could not be brought up from the lower tiers")
        finally:
            if self._under_way.get(lookup.keys[0]) is lookup:
                self._under_way.pop(lookup.keys[0], None)
            lookup.ended_at = time.monotonic()
            lookup.ended.set()
