"""The other end of `kvstore bench network`, a process of its own: sends what it is asked for.

Run by `tools.demo_process.Child`; answers JSON lines. `Bare` is used by both ends.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, Protocol

import numpy as np
import torch

from connectors.control import ControlServer
from connectors.lookup_messages import REQUESTS
from connectors.lookup_service import LookupService
from connectors.pipe import Pipe, PipeEnd
from kvstore import HostTierConfig, KVIdentity, StoreConfig
from kvstore.arena import HostArena
from kvstore.keys import BlockKey
from kvstore.lookup_buffer import LocalLookupBuffer
from kvstore.planes import Planes
from tools.bench.common import layout_of
from tools.demo_process import serve

SLOT_NBYTES: Final = 368_640
NUM_SLOTS: Final = (64 << 20) // SLOT_NBYTES
KEYS: Final = [BlockKey.of(i.to_bytes(32, "little")) for i in range(NUM_SLOTS)]
TIMEOUT_S: Final = 30.0
LOOPBACK: Final = "127.0.0.1"
_MOVES: Final = 8  # between two looks at the socket


def open_planes() -> Planes:
    """Memory for just what is sent at once; a memfd, as an engine's is."""
    identity = KVIdentity(model="bench", revision="network", layout=layout_of(SLOT_NBYTES))
    return Planes(StoreConfig(identity=identity, host=HostTierConfig(num_blocks=NUM_SLOTS)), shared_arena=True)


def make_end(transport: str, arena: HostArena, *, is_server: bool) -> PipeEnd:
    if transport == "tcp":
        from connectors.tcp import TcpEnd

        return TcpEnd(arena.rows, is_server=is_server)
    if transport == "gloo":
        from connectors.nccl import NcclEnd

        return NcclEnd(arena.rows, is_server=is_server)
    from connectors.nixl import NixlEnd

    return NixlEnd(arena.rows, is_server=is_server, offer_fd=arena.fd if is_server else None)


def _memory() -> HostArena:
    return HostArena(NUM_SLOTS, SLOT_NBYTES, sharing="memfd")


class Bare(Protocol):
    """A transport without a pipe around it: moves all of an arena once, from the server to the client."""

    def hello(self) -> str: ...
    def join(self, peer_hello: str) -> None: ...
    def send(self) -> None: ...
    def receive(self) -> None: ...
    def close(self) -> None: ...


class BareTcp:
    """``sendmsg`` and ``recv_into``."""

    def __init__(self, is_server: bool) -> None:
        self._is_server = is_server
        self._arena = _memory()
        self._memory = memoryview(self._arena.rows.reshape(-1))  # type: ignore[arg-type]
        self._socket = socket.create_server((LOOPBACK, 0)) if is_server else socket.socket()

    def hello(self) -> str:
        return str(self._socket.getsockname()[1]) if self._is_server else ""

    def join(self, peer_hello: str) -> None:
        if self._is_server:
            listener, self._socket = self._socket, self._socket.accept()[0]
            listener.close()
        else:
            self._socket.connect((LOOPBACK, int(peer_hello)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> None:
        sent = 0
        while sent < len(self._memory):
            sent += self._socket.sendmsg([self._memory[sent:]])

    def receive(self) -> None:
        came = 0
        while came < len(self._memory):
            came += self._socket.recv_into(self._memory[came:])

    def close(self) -> None:
        self._socket.close()


class BareGloo:
    """One tensor by ``torch.distributed``."""

    def __init__(self, is_server: bool) -> None:
        self._is_server = is_server
        self._tensor = torch.from_numpy(_memory().rows.reshape(-1))
        self._port = 0
        if is_server:
            self._listener = socket.create_server((LOOPBACK, 0))
            self._port = self._listener.getsockname()[1]

    def hello(self) -> str:
        return str(self._port)

    def join(self, peer_hello: str) -> None:
        dist: Any = torch.distributed

        timeout = timedelta(seconds=TIMEOUT_S)
        fd = self._listener.detach() if self._is_server else None
        store = dist.TCPStore(
            LOOPBACK, self._port or int(peer_hello), 2, self._is_server, timeout=timeout, master_listen_fd=fd
        )
        options = dist.ProcessGroupGloo._Options()
        options._timeout, options._threads = timeout, 1
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        self._store: Any = store
        self._group: Any = dist.ProcessGroupGloo(store, 0 if self._is_server else 1, 2, options)

    def send(self) -> None:
        self._group.send([self._tensor], 1, 0).wait()

    def receive(self) -> None:
        self._group.recv([self._tensor], 0, 0).wait()

    def close(self) -> None:
        del self._group, self._store


class BareNixl:
    """One READ of all slots, by the client, once a byte has told it to."""

    def __init__(self, is_server: bool) -> None:
        os.environ.setdefault("UCX_MODULES", "^ib")
        from nixl._api import nixl_agent, nixl_agent_config

        self._rows = _memory().rows
        # a progress thread would turn at both ends, beside the pipe that this is compared with, too
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = nixl_agent(f"bare-{'server' if is_server else 'client'}", config)
        self._agent.register_memory([(self._rows.ctypes.data, self._rows.nbytes, 0, "")], "DRAM")
        self._is_server = is_server
        self._socket = socket.create_server((LOOPBACK, 0)) if is_server else socket.socket()

    def hello(self) -> str:
        port = self._socket.getsockname()[1] if self._is_server else 0
        return f"{port} {self._rows.ctypes.data} {self._agent.get_agent_metadata().hex()}"

    def join(self, peer_hello: str) -> None:
        port, address, metadata = peer_hello.split()
        if self._is_server:
            self._socket = self._socket.accept()[0]
        else:
            self._socket.connect((LOOPBACK, int(port)))
        peer = self._agent.add_remote_agent(bytes.fromhex(metadata))
        self._mine = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", _slots_at(self._rows.ctypes.data), "DRAM")
        self._theirs = self._agent.prep_xfer_dlist(peer, _slots_at(int(address)), "DRAM")

    def send(self) -> None:
        self._socket.sendall(b"\0")
        while not _is_readable(self._socket):
            for _ in range(_MOVES):
                self._agent.get_new_notifs()  # which moves things on
        self._socket.recv(1)

    def receive(self) -> None:
        self._socket.recv(1)
        every = np.arange(NUM_SLOTS, dtype=np.int32)
        handle = self._agent.make_prepped_xfer("READ", self._mine, every, self._theirs, every)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        handle.release()
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        self._socket.sendall(b"\0")

    def close(self) -> None:
        """With the process."""


def _is_readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0.0)[0])


BARE: Final[dict[str, Callable[[bool], Bare]]] = {"tcp": BareTcp, "gloo": BareGloo, "nixl": BareNixl}


def _slots_at(address: int) -> np.ndarray:
    return np.array([(address + i * SLOT_NBYTES, SLOT_NBYTES, 0) for i in range(NUM_SLOTS)], dtype=np.uint64)


class Sender:
    """Commands; every answer is JSON."""

    def __init__(self) -> None:
        self._planes = open_planes()
        rng = np.random.default_rng(0)
        rows = self._planes.arena.rows
        rows[:] = rng.integers(0, 256, rows.shape, dtype=np.uint8)
        self._slots = np.arange(NUM_SLOTS)
        self._planes.seal(self._slots, KEYS)
        self._ends: dict[str, PipeEnd] = {}
        self._pipes: dict[str, Pipe] = {}
        self._bare: dict[str, Bare] = {}
        self._served: Any = None

    def hello(self, transport: str) -> str:
        self._ends[transport] = make_end(transport, self._planes.arena, is_server=True)
        return self._ends[transport].hello().hex()

    def join(self, transport: str, hello: str) -> dict[str, Any]:
        self._pipes[transport] = self._ends.pop(transport).join(bytes.fromhex(hello), TIMEOUT_S)
        return {}

    def send(self, transport: str) -> dict[str, Any]:
        self._pipes[transport].send_slots(self._slots, TIMEOUT_S)
        return {}

    def bare_hello(self, transport: str) -> str:
        self._bare[transport] = BARE[transport](True)
        return self._bare[transport].hello()

    def bare_join(self, transport: str, hello: str) -> dict[str, Any]:
        self._bare[transport].join(hello)
        return {}

    def bare_send(self, transport: str) -> dict[str, Any]:
        self._bare[transport].send()
        return {}

    def serve(self) -> str:
        """An empty lookup buffer; its address."""
        planes = open_planes()
        buffer = LocalLookupBuffer(planes, lease_s=TIMEOUT_S)
        service = LookupService(buffer, planes, {})
        self._served = ControlServer(f"tcp://{LOOPBACK}:0", service.handle, messages=REQUESTS, keys=None)
        return str(self._served.address)


if __name__ == "__main__":
    sender = Sender()
    with suppress(KeyboardInterrupt):
        serve(sender)
    os._exit(0)  # what transports leave running ends with the process
