"""A path that engines share, for any engine: one stores a prefix, others load it.

What a producer stores is on the path a moment after its request has ended. Its hand-over says
how much of the prompt is coming, so that a consumer waits for that, up to its deadline, and
does not compute what is almost there. Without one a consumer takes what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from connectors.base import Keys
from connectors.offloading import OffloadingScheduler
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError

_FIELD: Final = "kvstore"
_MOST_BLOCKS: Final = 1 << 24


class SharedStorageScheduler(OffloadingScheduler):
    """The scheduler half of offloading, with a shared path below it.

    Raises:
        ConfigError: no shared path is set, or as for `OffloadingScheduler`.
    """

    def __init__(self, config: StoreConfig, num_workers: int, windows: Sequence[int | None] = (None,)) -> None:
        if config.shared is None:
            raise ConfigError("shared: not set; a connector for shared storage needs a path")
        super().__init__(config, num_workers, windows)

    def hand_over(self, keys: Keys, params: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        n = self._held(keys)[0]  # what was dropped would be waited for in vain
        return {_FIELD: {"namespace": self._planes.current()[1].hex(), "num_blocks": n}} if n else None

    def expect(self, request_id: str, keys: Keys, params: Mapping[str, Any] | None) -> int:
        """How many blocks a hand-over says; 0 for other KV than ours, and for what is none."""
        told = (params or {}).get(_FIELD)
        if not isinstance(told, Mapping) or told.get("namespace") != self._planes.current()[1].hex():
            return 0
        n = told.get("num_blocks")
        return n if isinstance(n, int) and not isinstance(n, bool) and 0 < n <= _MOST_BLOCKS else 0
