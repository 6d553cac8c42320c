"""When a shared path is collected: at intervals, and soon after it has grown too large."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

_MAX_SHARE: Final = 0.1  # of the time is spent collecting


class GcThread:
    """Runs a collection at once, then at intervals, and when woken; `close` ends it.

    A run that took long puts the next one off, so that the thread collects for a tenth of
    the time at most. A run that raises is counted and logged, and the thread lives on.
    """

    def __init__(self, run: Callable[[Callable[[], bool]], object], interval_s: float) -> None:
        self.runs = 0
        self.failures = 0
        self.last_error: BaseException | None = None
        self._run_once, self._interval_s = run, interval_s
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-shared-gc", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        """Run soon."""
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """End it; False if it is stuck in a system call."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            start = time.monotonic()
            try:
                self._run_once(self._closed.is_set)
                self.runs += 1
                self.last_error = None
            except Exception as e:  # reported, and it lives on
                self.failures += 1
                if self.last_error is None:
                    logger.warning("shared tier: gc failed: %s", e, exc_info=not isinstance(e, OSError))
                self.last_error = e
            pause_s = (time.monotonic() - start) * (1 / _MAX_SHARE - 1)
            if not self._closed.wait(pause_s):
                self._wake.wait(max(0.0, self._interval_s - pause_s))
