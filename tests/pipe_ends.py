"""Pipes' ends over an arena, as `PipeTests` makes them here and in processes of their own."""

from __future__ import annotations

from typing import Any

from connectors.nccl import NcclEnd
from connectors.nixl import NixlEnd
from connectors.tcp import TcpEnd
from kvstore.arena import HostArena


def tcp_end(arena: HostArena, **settings: Any) -> TcpEnd:
    return TcpEnd(arena.rows, **settings)


def nccl_end(arena: HostArena, **settings: Any) -> NcclEnd:
    return NcclEnd(arena.rows, **settings)


def nixl_end(arena: HostArena, **settings: Any) -> NixlEnd:
    """It offers the arena."""
    return NixlEnd(arena.rows, offer_fd=arena.fd, **settings)
