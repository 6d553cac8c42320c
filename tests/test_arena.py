"""Host memory: how it is given up."""

from __future__ import annotations

import threading

from connectors.testing.pipe_content import at_once
from kvstore.arena import HostArena


def test_threads_close_it_at_once() -> None:
    """Its file is closed once: else one that somebody has opened meanwhile would be."""
    for _ in range(300):
        arena, together = HostArena(2, 4096, sharing="memfd"), threading.Barrier(4, timeout=10.0)

        def close(arena: HostArena = arena, together: threading.Barrier = together) -> None:
            together.wait()
            arena.close()  # raises where the file is closed already

        at_once(*[close] * 4)
        assert arena.fd is None
