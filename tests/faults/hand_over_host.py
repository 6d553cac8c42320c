"""One host of `test_two_hosts`: an engine's hand-over half, in a process of its own. Answers JSON lines."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from connectors.base import Stripe
from connectors.curve_keys import CurveKeys
from connectors.hand_over import HandOverScheduler
from connectors.hand_over_told import HandOverConfig
from connectors.nccl import NcclEnd
from connectors.nixl import NixlEnd
from connectors.offloading_worker import OffloadingWorker
from connectors.pipe import PipeEnd
from connectors.tcp import TcpEnd
from connectors.testing import PagedEngine, make_caches, make_keys
from connectors.testing.connector import LAYOUT
from kvstore import HostTierConfig, KVIdentity, KVLayout, StoreConfig
from kvstore.slot import Rows
from tools.demo_process import serve

NUM_BLOCKS = 64
ENDS: dict[str, Any] = {"tcp": TcpEnd, "nccl": NcclEnd, "nixl": NixlEnd}


class Host:
    """Commands; every answer is JSON."""

    def start(self, address: str, keys: str, transport: str, load_timeout_s: float) -> dict[str, Any]:
        def make_end(rows: Rows, is_server: bool, offer_fd: int | None) -> PipeEnd:
            offer = {"offer_fd": offer_fd} if transport == "nixl" else {}
            end: PipeEnd = ENDS[transport](rows, is_server=is_server, listen=address, **offer)
            return end

        wide = KVLayout(
            num_layers=3, num_kv_heads=2, head_size=LAYOUT.head_size * 1024, block_size=4, dtype=LAYOUT.dtype
        )
        caches = [[[layer.repeat(1, 1024) for layer in group] for group in groups] for groups in make_caches()]
        config = StoreConfig(
            identity=KVIdentity(model="two hosts", revision="r1", layout=wide),
            host=HostTierConfig(num_blocks=NUM_BLOCKS),
            put_timeout_s=0.0,
            load_timeout_s=load_timeout_s,
        )
        hand_over = HandOverConfig(
            transport=transport,
            make_end=make_end,
            listen=f"tcp://{address}:0",
            keys=CurveKeys.load(Path(keys)),
            lease_s=10.0,
            transfer_s=5.0,
        )
        self._half = HandOverScheduler(config, 1, hand_over=hand_over)
        self._engine = PagedEngine(self._half, [OffloadingWorker(Stripe(0, 1), caches[0], 1)], caches)
        return {"block_nbytes": wide.block_nbytes}

    def prefill(self, n: int, seed: int) -> dict[str, Any]:
        keys = make_keys(n, seed)
        self._engine.store(keys, range(n))
        self._engine.settle()
        return self._half.hand_over([keys]) or {}  # no room: what nobody has taken is held by its lease

    def decode(self, n: int, seed: int, told: dict[str, Any]) -> dict[str, Any]:
        """How many blocks came, all of which are checked byte by byte, and how long that took."""
        keys, begun = make_keys(n, seed), time.monotonic()
        expected = self._half.expect(f"r{seed}", [keys], told)
        self._engine._asked[f"r{seed}"] = keys
        while (found := self._half.lookup(f"r{seed}", [keys], expected=expected)) is None:
            self._engine.step()
            time.sleep(0.002)
        seconds = time.monotonic() - begun
        self._engine.load(f"r{seed}", range(found))
        self._engine.step()
        self._engine.forget(f"r{seed}")
        return {"found": found, "seconds": seconds}

    def held(self) -> list[int]:
        """Blocks that wait to be taken or are being taken, and all that is pinned."""
        return [*self._half._buffer.usage(), self._half.stats()["host"]["pinned_blocks"]]


if __name__ == "__main__":
    serve(Host())
    os._exit(0)
