"""The NIXL transport process: one agent and one thread for each pipe of the process that has started it.

Runs apart because NIXL's Python binding holds the interpreter lock while it copies and polls (1.5.1), and
because UCX ends its process where a peer behaves as it does not expect. Started by
`connectors.nixl_process.life`; ends with its parent, or when that has no pipe any more. Imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections import deque
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from connectors.nixl_process.agent import Agent, AgentError, Memory
from connectors.nixl_process.messages import (
    BOUNCE_NBYTES,
    MAX_MESSAGE_NBYTES,
    OPEN,
    TO_PROCESS,
    Cells,
    Failed,
    Landed,
    Meet,
    Message,
    Met,
    MoveOn,
    Opened,
    ReadBounce,
    ReadCells,
    Rest,
    Waits,
)

logger = logging.getLogger(__name__)

_LOOK_S: Final = 1.0  # whether the parent is still there
_END_S: Final = 2.0  # for agents to be destroyed
_PAUSE_S: Final = 100e-6  # between two looks at transfers: to look all the time takes what the other processes need
_AWAKE_S: Final = 1e-3  # for what comes next: to be woken takes long, and has both processes share a processor
_MOVES: Final = 8  # between two looks at the socket
_MOVE_PAUSE_S: Final = 20e-6
_POPULATE_WRITE: Final = 23  # linux/mman.h, since 5.14
_Arenas = weakref.WeakValueDictionary[tuple[int, int], mmap.mmap]  # by device and inode: mapped once for all pipes


def main() -> int:
    """``python -m connectors.nixl_process CONTROL_FD PARENT_PID``"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    os.dup2(2, 1)  # UCX tells on stdout, which may be the parent's own
    parent = int(sys.argv[2])
    pipes: list[_Pipe] = []
    arenas: _Arenas = weakref.WeakValueDictionary()
    with socket.socket(fileno=int(sys.argv[1])) as control, contextlib.suppress(OSError):
        control.settimeout(_LOOK_S)
        with contextlib.suppress(AgentError):  # each pipe says so; the first one takes UCX half a second
            Agent([]).close()
        while os.getppid() == parent:  # a fork of the parent may hold the other end of the socket
            try:
                order, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE_NBYTES, 3)
            except TimeoutError:
                order = None
            pipes = [pipe for pipe in pipes if pipe.thread.is_alive()]  # the others' memory goes with them
            if order is None:
                continue
            if not order:
                break
            pipes.append(_Pipe(order, fds, arenas))
    end = time.monotonic() + _END_S
    for pipe in pipes:
        pipe.thread.join(max(0.0, end - time.monotonic()))
    return 0


class _Pipe:
    """One pipe's agent, and the thread that serves it until the pipe's socket ends."""

    def __init__(self, order: bytes, fds: list[int], arenas: _Arenas) -> None:
        self._order, self._fds, self._arenas = order, fds, arenas
        self._packet = memoryview(bytearray(MAX_MESSAGE_NBYTES))
        self._theirs: Meet | None = None
        self._under_way: deque[int] = deque()
        self._has_told = False  # that it waits
        self._awake_until = 0.0
        self._moves_on = False
        self.thread = threading.Thread(target=self._run, name="kvstore-nixl", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        agent: Agent | None = None
        with socket.socket(fileno=self._fds.pop(0)) as self._socket:
            try:
                agent = Agent(self._map())
                rows, bounce = self._rows, self._bounce.ctypes.data
                self._send(Opened(agent.metadata(), 0 if rows is None else rows.ctypes.data, bounce))
                while self._turn(agent):
                    pass
            except OSError:  # the parent has closed it
                logger.debug("a pipe was closed")
            except (AgentError, msgspec.DecodeError, ValueError) as e:
                self._fail(str(e))
            except BaseException as e:
                self._fail(f"{type(e).__name__}: {e}")
                raise
            finally:
                if agent is not None:
                    agent.close()

    def _map(self) -> list[Memory]:
        """What is registered."""
        order = OPEN.decode(self._order)
        self._cells = Cells.of(order.slot_nbytes)
        try:
            bounce = _map(self._fds[0])
            with contextlib.suppress(OSError):
                bounce.madvise(_POPULATE_WRITE)
            self._bounce: Memory = np.frombuffer(bounce, dtype=np.uint8).reshape(2, BOUNCE_NBYTES)
            self._rows: Memory | None = None
            if order.num_offered:
                at = os.fstat(self._fds[1])
                arena = self._arenas.setdefault((at.st_dev, at.st_ino), _map(self._fds[1]))
                self._rows = np.frombuffer(arena, dtype=np.uint8).reshape(order.num_offered, order.slot_nbytes)
        finally:
            for fd in self._fds:
                os.close(fd)
        return [self._bounce, *([] if self._rows is None else [self._rows])]

    def _turn(self, agent: Agent) -> bool:
        """Do what is told, or go on with it; False at the end."""
        is_idle = not self._under_way and not self._moves_on and time.monotonic() > self._awake_until
        try:
            nbytes = self._socket.recv_into(self._packet, 0, 0 if is_idle else socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._pause(agent)
        else:
            if not nbytes:
                return False
            self._do(agent, TO_PROCESS.decode(self._packet[:nbytes]))
        self._look(agent)
        return True

    def _look(self, agent: Agent) -> None:
        """Tell what has become of transfers."""
        landed = 0
        while self._under_way and agent.is_done(self._under_way[0]):
            self._under_way.popleft()
            landed += 1
        if landed:
            self._send(Landed(landed))
            self._awake_until = time.monotonic() + _AWAKE_S
        if not self._under_way:
            self._has_told = False
        elif not self._has_told:
            self._has_told = True
            self._send(Waits())

    def _pause(self, agent: Agent) -> None:
        if self._moves_on:
            for _ in range(_MOVES):
                agent.move_on()
            time.sleep(_MOVE_PAUSE_S)
        elif self._under_way:
            time.sleep(_PAUSE_S)
        else:
            os.sched_yield()

    def _do(self, agent: Agent, order: Any) -> None:
        match order:
            case Meet():
                self._theirs = order
                mine = self._cells.of_landing(self._bounce[1].ctypes.data)
                agent.meet(order.metadata, mine, self._cells.of_rows(*order.rows))
                self._send(Met())
            case ReadBounce() if self._theirs is not None:
                into = self._bounce[1].ctypes.data
                self._under_way.append(agent.read(into, self._theirs.bounce, order.nbytes))
            case ReadCells() if self._theirs is not None:
                for into, of in order.transfers:
                    landing = _cells(into, 2 * self._cells.num_landing)
                    theirs = _cells(of, self._theirs.rows[1] * self._cells.per_slot)
                    self._under_way.append(agent.read_cells(landing, theirs))
                    self._look(agent)  # by cma it is done already
            case MoveOn():
                self._moves_on = True
            case Rest():
                self._moves_on = False
            case _:
                raise ValueError(f"{type(order).__name__} is not due")

    def _send(self, message: Message) -> None:
        self._socket.sendall(msgspec.msgpack.encode(message))

    def _fail(self, error: str) -> None:
        with contextlib.suppress(OSError):
            self._send(Failed(error))


def _cells(numbers: bytes, count: int) -> NDArray[np.int32]:
    found = memoryview(numbers).cast("i")
    if not len(found) or not 0 <= min(found) <= max(found) < count:
        raise ValueError("there are no such cells")
    return np.frombuffer(numbers, dtype=np.int32)


def _map(fd: int) -> mmap.mmap:
    mapped = mmap.mmap(fd, 0)
    with contextlib.suppress(OSError):  # huge pages are a wish
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # what UCX leaves running ends with the process
