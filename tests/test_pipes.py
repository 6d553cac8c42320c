"""Pipes: the suite of `connectors.testing` over every transport, and what only one of them can do."""

from __future__ import annotations

from connectors.nccl import NcclEnd
from connectors.nixl import NixlEnd
from connectors.tcp import TcpEnd
from connectors.testing import PipeTests


class TestTcpPipe(PipeTests):
    end = TcpEnd


class TestNcclPipe(PipeTests):
    """By gloo; NCCL needs a GPU for each end."""

    end = NcclEnd


class TestNixlPipe(PipeTests):
    end = NixlEnd
