"""Whether a tier's storage answers: off after an error, on again by itself.

Knows no files: its owner says what failed, and tries again when `TierHealth.allow` says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

FIRST_RETRY_S: Final = 1.0
MAX_RETRY_S: Final = 60.0


class TierHealth:
    """On until `fail`; then one caller at a time may try again, at intervals that double.

    Storage that breaks again within ``max_retry_s`` of coming back goes on waiting where it
    was, so that what flaps logs two lines a minute at most. Thread-safe.

    Args:
        what: what the log lines name, e.g. "disk tier /cache".
        effect: what the log line says has happened to it.
    """

    def __init__(
        self,
        what: str,
        *,
        effect: str = "off",
        first_retry_s: float = FIRST_RETRY_S,
        max_retry_s: float = MAX_RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures = 0
        self.last_error: BaseException | None = None
        self._what, self._effect = what, effect
        self._first_s, self._max_s = first_retry_s, max_retry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._on = True
        self._trying = False
        self._delay_s = 0.0
        self._retry_at = 0.0
        self._failed_at = 0.0
        self._recovered_at = float("-inf")

    @property
    def on(self) -> bool:
        return self._on

    def allow(self) -> bool:
        """Whether to use the storage now: always while on; while off, once an interval.

        Who is allowed while off reports with `fail` or `recover`.
        """
        if self._on:
            return True
        with self._lock:
            now = self._clock()
            if self._on:
                return True
            if now < self._retry_at:
                return False
            self._trying = True
            self._retry_at = now + self._delay_s
            return True

    def fail(self, error: BaseException) -> None:
        """The storage raised: off, or off for longer if this was a try. Logs when it turns off."""
        with self._lock:
            now = self._clock()
            self.failures += 1
            self.last_error = error
            if self._on:
                steady = now - self._recovered_at >= self._max_s
                self._delay_s = self._first_s if steady else min(2 * self._delay_s, self._max_s)
                self._failed_at = now
            elif self._trying:
                self._delay_s = min(2 * self._delay_s, self._max_s)
            else:
                return  # an operation from before it turned off
            turned_off, self._on, self._trying = self._on, False, False
            self._retry_at = now + self._delay_s
            delay_s = self._delay_s
        if turned_off:
            logger.warning("%s is %s: %s; trying again from %.3g s on", self._what, self._effect, error, delay_s)

    def recover(self) -> None:
        """A try went well: on. Without a try under way, or while on, it changes nothing."""
        with self._lock:
            if self._on or not self._trying:
                return
            self._on, self._trying = True, False
            self._recovered_at = self._clock()
            off_s = self._recovered_at - self._failed_at
        logger.info("%s is on again after %.3g s", self._what, off_s)
