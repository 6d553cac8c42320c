"""Peers, on every transport in turn."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from connectors.nixl_process.life import ProcessHold
from tests.hand_over.peers import ENDS, Engine, Remote, Served


@pytest.fixture(autouse=True, params=ENDS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has what is below use a transport: each in turn."""
    monkeypatch.setattr("tests.hand_over.peers.chosen", request.param)
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """NIXL's takes a second to start: it need not for each case, nor in a lease's time."""
    if importlib.util.find_spec("nixl") is None:
        yield
        return
    with contextlib.closing(ProcessHold(is_local=True)):
        yield


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.close()


@pytest.fixture
def remote(served: Served) -> Iterator[Remote]:
    remote = Remote(served.server.address)
    yield remote
    remote.close()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*arguments: Any, **settings: Any) -> Engine:
        engines.append(Engine(*arguments, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
