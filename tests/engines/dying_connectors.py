"""Connectors whose engine is killed in the middle of the first transfer that it sends."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from connectors.nccl import NcclPipe
from connectors.pipe import PipeEnd
from connectors.vllm import KVStoreNcclConnector, KVStoreNixlConnector, KVStoreTcpConnector
from connectors.wire.frame import Frame
from kvstore.slot import Slots


def _dying(end: PipeEnd) -> PipeEnd:
    """Its pipe announces slots, sends half of them (gloo: none), and the process is gone."""
    join = end.join

    def dying_join(peer_hello: bytes, timeout_s: float) -> Any:
        pipe: Any = join(peer_hello, timeout_s)

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def send_slots(slots: Slots, timeout_s: float) -> None:
            if isinstance(pipe, NcclPipe):
                pipe._way(0).send = die  # both ends have agreed on what comes
            frame = Frame.of_slots(len(slots), pipe._slot_nbytes)
            sent = slots if isinstance(pipe, NcclPipe) else slots[: len(slots) // 2]
            pipe._send_rows(frame, sent, time.monotonic() + timeout_s)
            die()

        pipe.send_slots = send_slots
        return pipe

    end.join = dying_join  # type: ignore[method-assign]
    return end


class DyingTcpConnector(KVStoreTcpConnector):
    def make_end(self, *arguments: Any) -> PipeEnd:
        return _dying(super().make_end(*arguments))


class DyingNcclConnector(KVStoreNcclConnector):
    def make_end(self, *arguments: Any) -> PipeEnd:
        return _dying(super().make_end(*arguments))


class DyingNixlConnector(KVStoreNixlConnector):
    def make_end(self, *arguments: Any) -> PipeEnd:
        return _dying(super().make_end(*arguments))
