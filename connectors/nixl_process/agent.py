"""A NIXL agent: what it has registered, and transfers into that. Only in the transport process.

Agents have no progress thread, which would keep a core busy for each pipe even when nothing moves
(NIXL 1.5.1), and is slower: who waits moves things on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Memory = NDArray[np.uint8]
T = TypeVar("T")


class AgentError(Exception):
    """NIXL has failed; the message says how."""


class Agent:
    """An agent, and the memory that it has registered. One thread uses it.

    Nothing of NIXL leaves it, nor stays in a traceback: an agent is destroyed with the last reference,
    and only then is the memory, which it holds, left alone.
    """

    def __init__(self, memories: list[Memory]) -> None:
        """Raises AgentError where NIXL does not get going."""
        self._memories = memories
        self._nixl: Any = None
        self._registered: Any = None
        self._peer: Any = None
        self._cells: list[Any] = []  # mine, the peer's
        self._transfers: dict[int, Any] = {}
        self._next = 0

        def make() -> None:
            api = load_nixl()
            config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            self._nixl = api.nixl_agent(secrets.token_hex(8), config)
            if memories:
                regions = [(memory.ctypes.data, memory.nbytes, 0, "") for memory in memories]
                self._registered = self._nixl.register_memory(regions, "DRAM")

        _call(make)

    def metadata(self) -> bytes:
        return _call(lambda: bytes(self._nixl.get_agent_metadata()))

    def meet(self, metadata: bytes, mine: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> None:
        """Get to know the peer, and where its cells are, and mine to read them into: (n, 3) each."""

        def meet() -> None:
            self._peer = self._nixl.add_remote_agent(metadata)
            if len(theirs):
                for name, cells in (("NIXL_INIT_AGENT", mine), (self._peer, theirs)):
                    self._cells.append(self._nixl.prep_xfer_dlist(name, cells, "DRAM"))

        _call(meet)

    def read_cells(self, into: NDArray[np.int32], of: NDArray[np.int32]) -> int:
        """Begin to read cells of the peer into cells of this end, as one transfer; its number."""
        return self._begin(lambda: self._nixl.make_prepped_xfer("READ", self._cells[0], into, self._cells[1], of))

    def read(self, into: int, of: int, nbytes: int) -> int:
        """Begin to read between two addresses; the transfer's number."""

        def make() -> Any:
            mine, theirs = (self._nixl.get_xfer_descs([(at, nbytes, 0)], "DRAM") for at in (into, of))
            return self._nixl.initialize_xfer("READ", mine, theirs, self._peer)

        return self._begin(make)

    def is_done(self, number: int) -> bool:
        """Looks, which moves things on. Raises AgentError where the transfer has failed."""
        transfer = self._transfers.get(number)
        if transfer is None:
            return True
        state = _call(lambda: self._nixl.check_xfer_state(transfer))
        return self._is_over(number, state)

    def move_on(self) -> None:
        """Let the peer read."""
        _call(self._nixl.get_new_notifs)

    def close(self) -> None:
        undo: list[Callable[[], object]] = [transfer.release for transfer in self._transfers.values()]
        undo += [cells.release for cells in self._cells]
        if self._peer is not None:
            undo.append(lambda: self._nixl.remove_remote_agent(self._peer))
        if self._registered is not None:
            undo.append(lambda: self._nixl.deregister_memory(self._registered))
        while undo:
            with contextlib.suppress(Exception):
                undo.pop(0)()
        self._transfers.clear()
        self._cells.clear()
        self._nixl = self._registered = None
        self._memories = []

    def _begin(self, make: Callable[[], Any]) -> int:
        def begin() -> str:
            self._transfers[self._next] = make()
            return str(self._nixl.transfer(self._transfers[self._next]))

        self._next += 1
        self._is_over(self._next, _call(begin))
        return self._next

    def _is_over(self, number: int, state: str) -> bool:
        if state == "PROC":
            return False
        if state != "DONE":
            raise AgentError("a transfer has failed")
        self._transfers.pop(number).release()
        return True


def load_nixl() -> Any:
    """NIXL's interface; raises ImportError."""
    # where torch was built without CUDA, nixl 1.5.1 imports all of it, only to read this
    if "torch" not in sys.modules:
        sys.modules.setdefault("torch.version", types.ModuleType("torch.version")).__dict__.setdefault("cuda", None)
    from nixl import _api

    if "NIXL_LOG_LEVEL" not in os.environ:  # it tells whatever it does
        logging.getLogger("nixl").setLevel(logging.WARNING)
    return _api


def _call(function: Callable[[], T]) -> T:
    try:
        return function()
    except Exception as e:  # NIXL's have no base of their own
        problem = f"{type(e).__name__}: {e}"
    raise AgentError(problem)  # not from it: its traceback holds what is NIXL's
