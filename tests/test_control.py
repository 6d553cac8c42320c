"""The control channel over real sockets: what is answered, refused, timed out, and who is let in."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import psutil
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta
from typer.testing import CliRunner

from kvstore.errors import ConfigError, KVStoreError, MissingExtraError
from tests.waiting import wait_until
from tools.keygen import keygen

zmq = pytest.importorskip("zmq")

from zmq.utils.monitor import recv_monitor_message  # noqa: E402

from connectors import curve_keys  # noqa: E402
from connectors.control import (  # noqa: E402
    ControlClient,
    ControlClosedError,
    ControlError,
    ControlRefusedError,
    ControlServer,
    ControlTimeoutError,
    Peer,
    Refused,
    make_key_pair,
)
from connectors.curve_keys import CurveKeys, generate  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LOCAL = "tcp://127.0.0.1:0"
MAX_FRAME = 1 << 16
SECRET_TEXT = "a-prompt-nobody-may-see"


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    pass


class Ask(Message, frozen=True):
    number: int
    keys: Annotated[list[Annotated[bytes, Meta(max_length=32)]], Meta(max_length=64)] = []
    text: Annotated[str, Meta(max_length=MAX_FRAME)] = ""


class Slow(Message, frozen=True):
    pass


class Fail(Message, frozen=True):
    how: Annotated[str, Meta(max_length=32)]


class WhoAmI(Message, frozen=True):
    pass


class Answer(Message, frozen=True):
    value: Annotated[str, Meta(max_length=MAX_FRAME)]
    number: int = 0


REQUESTS = Ask | Slow | Fail | WhoAmI


class Handler:
    """Answers, and keeps the futures it has promised for the test to fulfil."""

    def __init__(self) -> None:
        self.futures: list[Future[Answer]] = []

    def __call__(self, peer: Peer, request: Any) -> Any:
        match request:
            case Ask():
                return Answer(str(len(request.text)), request.number)
            case WhoAmI():
                return Answer(peer.id)
            case Slow():
                self.futures.append(Future())
                return self.futures[-1]
            case Fail("refuse"):
                raise ControlRefusedError("not today")
            case Fail("large"):
                return Answer("x" * MAX_FRAME)
            case Fail("future"):
                failed: Future[Answer] = Future()
                failed.set_exception(ValueError(SECRET_TEXT))
                return failed
            case Fail("object"):
                return object()
        raise ValueError(SECRET_TEXT)


@dataclass
class Keys:
    server: CurveKeys | None = None
    client: CurveKeys | None = None

    @property
    def server_key(self) -> str | None:
        return None if self.server is None else self.server.public


def new_keys(peers: dict[str, str] | None = None) -> CurveKeys:
    public, secret = make_key_pair()
    return CurveKeys(public=public, secret=secret, peers=peers or {})


def key_pair_of_two() -> Keys:
    client = new_keys()
    return Keys(new_keys({"client": client.public}), client)


@pytest.fixture(params=["without keys", "with keys"])
def keys(request: pytest.FixtureRequest) -> Keys:
    return key_pair_of_two() if request.param == "with keys" else Keys()


def serve(keys: Keys, handler: Callable[[Peer, Any], Any], listen: str = LOCAL, **kwargs: Any) -> ControlServer:
    kwargs = {"messages": REQUESTS, "max_frame_nbytes": MAX_FRAME, **kwargs}
    return ControlServer(listen, handler, keys=keys.server, **kwargs)


def connect(keys: Keys, address: str, **kwargs: Any) -> ControlClient:
    kwargs = {"messages": Answer, "server_key": keys.server_key, "max_frame_nbytes": MAX_FRAME, **kwargs}
    return ControlClient(address, keys=keys.client, **kwargs)


@dataclass
class Channel:
    server: ControlServer
    client: ControlClient
    handler: Handler
    keys: Keys


@pytest.fixture
def channel(keys: Keys) -> Iterator[Channel]:
    handler = Handler()
    with serve(keys, handler) as server, connect(keys, server.address) as client:
        yield Channel(server, client, handler, keys)


@contextlib.contextmanager
def raw_dealer(address: str, keys: Keys | None = None) -> Iterator[Any]:
    """A socket that sends what it likes."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.rcvtimeo = dealer.sndtimeo = 10_000
    if keys is not None and keys.client is not None and keys.server_key is not None:
        dealer.curve_publickey, dealer.curve_secretkey = keys.client.public.encode(), keys.client.secret.encode()
        dealer.curve_serverkey = keys.server_key.encode()
    dealer.connect(address)
    try:
        yield dealer
    finally:
        context.destroy(linger=0)


def raw_request(body: bytes, number: int = 7, timeout_ms: int = 5000) -> list[bytes]:
    return [number.to_bytes(8, "little"), timeout_ms.to_bytes(4, "little"), body]


def encode(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Call it in a thread of its own."""
    executor = ThreadPoolExecutor(1)
    try:
        return executor.submit(function)
    finally:
        executor.shutdown(wait=False)


# -- asking


def test_roundtrips(channel: Channel) -> None:
    for number in range(200):
        assert channel.client.ask(Ask(number, [b"k" * 32] * (number % 64)), 10) == Answer("0", number)
    assert channel.client.is_alive
    assert channel.server.counts == {}


def test_the_largest_frame_passes(channel: Channel) -> None:
    rest = len(encode(Ask(0, [], "x" * 60_000))) - 60_000
    text = "x" * (MAX_FRAME - rest)
    assert len(encode(Ask(0, [], text))) == MAX_FRAME
    assert channel.client.ask(Ask(0, [], text), 10) == Answer(str(len(text)))
    with pytest.raises(ControlError, match=f"{MAX_FRAME + 1} bytes is over {MAX_FRAME}"):
        channel.client.ask(Ask(0, [], text + "x"), 10)
    with pytest.raises(ControlRefusedError, match="too large"):
        channel.client.ask(Fail("large"), 10)


def test_median_latency(channel: Channel) -> None:
    """Far below 1 ms on a quiet machine; the bound leaves room for a busy one."""
    took = []
    for number in range(500):
        start = time.perf_counter()
        channel.client.ask(Ask(number), 10)
        took.append(time.perf_counter() - start)
    assert sorted(took)[len(took) // 2] < 0.01


def test_64_threads_do_not_wait_for_a_slow_request(channel: Channel) -> None:
    slow = in_thread(lambda: channel.client.ask(Slow(), 60))
    wait_until(lambda: bool(channel.handler.futures))

    def asks(thread: int) -> bool:
        numbers = range(thread * 1000, thread * 1000 + 20)
        return all(channel.client.ask(Ask(n), 30).number == n for n in numbers)

    with ThreadPoolExecutor(64) as executor:
        assert all(executor.map(asks, range(64)))
    assert not slow.done()
    channel.handler.futures[0].set_result(Answer("slow"))
    assert slow.result(10) == Answer("slow")


def test_a_future_that_is_done_already(channel: Channel) -> None:
    done: Future[Answer] = Future()
    done.set_result(Answer("done"))
    with (
        serve(channel.keys, lambda peer, request: done) as server,
        connect(channel.keys, server.address) as client,
    ):
        assert client.ask(Slow(), 10) == Answer("done")


def test_timeout_and_late_answers(channel: Channel) -> None:
    with pytest.raises(ControlTimeoutError, match="in 0.05 s") as raised:
        channel.client.ask(Slow(), 0.05)
    assert isinstance(raised.value, TimeoutError)
    channel.handler.futures[0].cancel()
    for _ in range(20):
        assert channel.client.ask(Ask(3), 10).number == 3
    with pytest.raises(ValueError, match="timeout_s"):
        channel.client.ask(Ask(3), -1)


def test_a_handler_that_sleeps_makes_the_ask_time_out(keys: Keys) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def sleep(peer: Peer, request: Ask) -> Answer:
        asked.set()
        assert go_on.wait(60)
        return Answer("late", request.number)

    with serve(keys, sleep) as server, connect(keys, server.address) as client:
        late = in_thread(lambda: client.ask(Ask(1), 0.3))
        assert asked.wait(10)
        with pytest.raises(ControlTimeoutError):
            late.result(10)
        go_on.set()
        assert client.ask(Ask(2), 10) == Answer("late", 2)  # and not the late answer to 1


def test_a_future_is_given_up_at_its_deadline(channel: Channel) -> None:
    """The server learns the deadline from the request."""
    with raw_dealer(channel.server.address, channel.keys) as dealer:
        dealer.send_multipart(raw_request(encode(Slow()), timeout_ms=50))
        wait_until(lambda: bool(channel.handler.futures) and channel.handler.futures[0].cancelled())
        assert not dealer.poll(100)  # and who asked it has stopped to wait
    assert channel.server.counts == {"late": 1}


def test_too_many_in_flight_at_the_client(keys: Keys) -> None:
    handler = Handler()
    with serve(keys, handler) as server, connect(keys, server.address, max_in_flight=4) as client:
        waiting = [in_thread(lambda: client.ask(Slow(), 60)) for _ in range(4)]
        wait_until(lambda: len(handler.futures) == 4)
        with pytest.raises(ControlError, match="4 requests are in flight"):
            client.ask(Ask(1), 60)
        handler.futures[0].set_result(Answer("x"))
        wait_until(lambda: any(f.done() for f in waiting))
        assert client.ask(Ask(1), 10).number == 1


def test_too_many_in_flight_at_the_server(keys: Keys) -> None:
    handler = Handler()
    with serve(keys, handler, max_in_flight=4) as server, connect(keys, server.address) as client:
        waiting = [in_thread(lambda: client.ask(Slow(), 60)) for _ in range(4)]
        wait_until(lambda: len(handler.futures) == 4)
        with pytest.raises(ControlRefusedError, match="too many requests"):
            client.ask(Slow(), 60)
        assert len(handler.futures) == 4  # refused before it was handled
        for future in handler.futures[:]:
            future.set_result(Answer("x"))
        assert [f.result(10) for f in waiting] == [Answer("x")] * 4
        assert client.ask(Ask(1), 10).number == 1


def test_a_running_future_counts_until_it_is_done(keys: Keys) -> None:
    handler = Handler()
    with serve(keys, handler, max_in_flight=1) as server, connect(keys, server.address) as client:
        waiting = in_thread(lambda: client.ask(Slow(), 0.3))
        wait_until(lambda: bool(handler.futures))
        assert handler.futures[0].set_running_or_notify_cancel()
        with pytest.raises(ControlTimeoutError):
            waiting.result(10)
        with pytest.raises(ControlRefusedError, match="too many requests"):
            client.ask(Ask(1), 10)
        handler.futures[0].set_result(Answer("late"))
        wait_until(lambda: _answers(client))


def _answers(client: ControlClient) -> bool:
    try:
        return bool(client.ask(Ask(1), 5).number == 1)
    except ControlError:
        return False


@pytest.mark.parametrize("how", ["raise", "future", "object"])
def test_a_handler_that_fails_is_refused_without_details(
    channel: Channel, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ControlRefusedError) as raised:
        channel.client.ask(Fail(how), 10)
    assert raised.value.reason == "the request failed"
    assert channel.client.ask(Ask(1), 10).number == 1
    assert channel.server.counts == {"failed": 1}
    assert SECRET_TEXT not in caplog.text
    where = {
        "raise": "ValueError at test_control.py:",
        "future": "ValueError at ",
        "object": "TypeError at server.py:",
    }
    assert where[how] in caplog.text


def test_a_handler_may_say_why_it_refuses(channel: Channel) -> None:
    with pytest.raises(ControlRefusedError) as raised:
        channel.client.ask(Fail("refuse"), 10)
    assert raised.value.reason == "not today"


# -- ends


def test_close_wakes_who_waits(channel: Channel) -> None:
    waiting = [in_thread(lambda: channel.client.ask(Slow(), 60)) for _ in range(8)]
    wait_until(lambda: len(channel.handler.futures) == 8)
    channel.client.close()
    channel.client.close()
    for ask in waiting:
        with pytest.raises(ControlClosedError, match="was closed"):
            ask.result(10)
    with pytest.raises(ControlClosedError):
        channel.client.ask(Ask(1), 10)
    assert not channel.client.is_alive


def test_a_server_may_be_closed_by_its_handler(keys: Keys) -> None:
    server: ControlServer

    def close(peer: Peer, request: Ask) -> Answer:
        server.close()
        return Answer("closed")

    server = serve(keys, close)
    with connect(keys, server.address) as client, contextlib.suppress(ControlClosedError):
        assert client.ask(Ask(1), 60) == Answer("closed")
    server.close()
    assert not server.problem


def test_futures_of_a_closed_server_are_cancelled(channel: Channel) -> None:
    waiting = in_thread(lambda: channel.client.ask(Slow(), 60))
    wait_until(lambda: bool(channel.handler.futures))
    channel.server.close()
    assert channel.handler.futures[0].cancelled()
    with pytest.raises(ControlClosedError, match="peer is gone"):
        waiting.result(10)


def test_server_restart(channel: Channel) -> None:
    address = channel.server.address
    assert channel.client.ask(Ask(1), 10).number == 1
    channel.server.close()
    wait_until(lambda: not channel.client.is_alive)
    start = time.monotonic()
    with pytest.raises(ControlClosedError, match="peer is gone"):
        channel.client.ask(Ask(2), 60)
    assert time.monotonic() - start < 10
    with serve(channel.keys, Handler(), address):
        wait_until(lambda: channel.client.is_alive)
        assert channel.client.ask(Ask(3), 10).number == 3


def test_a_client_waits_for_a_server_that_is_not_there_yet(keys: Keys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    with connect(keys, address) as client:
        with pytest.raises(ControlTimeoutError, match="not yet connected"):
            client.ask(Ask(1), 0.05)
        early = in_thread(lambda: client.ask(Ask(2), 60))
        asked: list[int] = []

        def note(peer: Peer, request: Ask) -> Answer:
            asked.append(request.number)
            return Answer("", request.number)

        with serve(keys, note, address):
            assert early.result(60).number == 2
        assert asked == [2]  # what has timed out before is not sent


def test_a_peer_that_cannot_be_reached_is_not_waited_for_long(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.control.client.CONNECT_S", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with connect(keys, address) as client:
            start = time.monotonic()
            with pytest.raises(ControlTimeoutError, match="not yet connected"):
                client.ask(Ask(1), 60)
            assert time.monotonic() - start < 20


def test_a_slow_answer_is_waited_for(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.control.client.CONNECT_S", 0.1)

    def slow(peer: Peer, request: Ask) -> Answer:
        time.sleep(0.5)
        return Answer("", request.number)

    with serve(keys, slow) as server, connect(keys, server.address) as client:
        wait_until(lambda: client.is_alive)
        assert client.ask(Ask(7), 60).number == 7


@contextlib.contextmanager
def server_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    code = (
        "import sys, threading; from concurrent.futures import Future; from tests.test_control import *\n"
        "handler = Handler()\n"
        "with serve(Keys(), handler) as server:\n"
        "    print(server.address, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_a_peer_that_dies_or_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connectors.control.end._HEARTBEAT_MS", 400)
    monkeypatch.setattr("connectors.control.end._GONE_AFTER_MS", 2000)
    for how in (signal.SIGSTOP, signal.SIGKILL):
        with server_process() as (process, address), connect(Keys(), address) as client:
            assert client.ask(Ask(1), 30).number == 1
            waiting = in_thread(lambda client=client: client.ask(Slow(), 60))
            wait_until(lambda client=client: not client._unsent)
            process.send_signal(how)
            with pytest.raises(ControlClosedError, match="peer is gone"):
                waiting.result(30)
            assert not client.is_alive


def test_a_thread_that_dies_is_reported(
    channel: Channel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("broken")

    assert channel.client.ask(Ask(1), 10).number == 1
    assert not channel.server.problem
    assert not channel.client.problem
    monkeypatch.setattr(channel.client, "_take_answers", broken)
    with pytest.raises(ControlError, match="died of RuntimeError"):
        channel.client.ask(Ask(2), 10)
    with pytest.raises(ControlError, match="died of RuntimeError"):
        channel.client.ask(Ask(2), 10)
    assert channel.client.problem == "RuntimeError"
    assert "kvstore-control-client has died" in caplog.text

    monkeypatch.setattr(channel.server, "_take", broken)
    with connect(channel.keys, channel.server.address) as other, pytest.raises(ControlClosedError, match="gone"):
        other.ask(Ask(2), 60)
    wait_until(lambda: bool(channel.server.problem))
    with pytest.raises(ControlError, match="died of RuntimeError"):
        _ = channel.server.address


def test_nothing_is_left_of_50_clients(channel: Channel) -> None:
    def one() -> None:
        with connect(channel.keys, channel.server.address) as client:
            assert client.ask(Ask(1), 10).number == 1

    one()
    process = psutil.Process()
    gc.collect()
    num_fds, num_threads = process.num_fds(), process.num_threads()
    for _ in range(50):
        one()
    wait_until(lambda: process.num_fds() <= num_fds and process.num_threads() <= num_threads)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("kvstore-control-client") == 1


def test_failed_starts_leave_nothing(channel: Channel) -> None:
    process = psutil.Process()
    with pytest.raises(ConfigError, match="cannot be used"):
        serve(channel.keys, Handler(), channel.server.address)
    gc.collect()
    num_fds, num_threads = process.num_fds(), process.num_threads()
    for _ in range(5):
        with pytest.raises(ConfigError, match="listen: .* cannot be used"):
            serve(channel.keys, Handler(), channel.server.address)
    wait_until(lambda: process.num_fds() <= num_fds and process.num_threads() <= num_threads)


# -- where it listens, and what it takes for messages


def test_it_listens_on_loopback_only(channel: Channel) -> None:
    port = int(channel.server.address.rpartition(":")[2])
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr.ip for c in listening if c.laddr.port == port] == ["127.0.0.1"]
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1"}


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://eth0:0", "tcp://10.0.0.1:1"]
)
def test_without_keys_only_loopback(address: str) -> None:
    with pytest.raises(ConfigError, match="listen: .* is not loopback.*kvstore keygen"):
        serve(Keys(), Handler(), address)
    with pytest.raises(ConfigError, match="address: .* is not loopback.*kvstore keygen"):
        connect(Keys(), address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:0", "ipc:///tmp/x", "inproc://x", "tcp://127.0.0.1", "tcp://127.0.0.1:65536", "tcp://a b:1", ""],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="listen: .* is no address; give tcp://HOST:PORT"):
        serve(Keys(), Handler(), address)


@pytest.mark.parametrize("address", ["tcp://localhost:0", "tcp://127.0.0.2:0", "tcp://[::1]:0"])
def test_other_names_of_loopback(address: str) -> None:
    if "::1" in address and not _has_ipv6_loopback():
        pytest.skip("no IPv6 here")
    with serve(Keys(), Handler(), address) as server, connect(Keys(), server.address) as client:
        assert client.ask(Ask(1), 10).number == 1


def _has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_with_keys_it_may_listen_widely() -> None:
    keys = key_pair_of_two()
    with serve(keys, Handler(), "tcp://0.0.0.0:0") as server:
        port = server.address.rpartition(":")[2]
        with connect(keys, f"tcp://127.0.0.1:{port}") as client:
            assert client.ask(Ask(1), 10).number == 1


class LooseList(Message, frozen=True):
    keys: list[int]


class LooseInside(Message, frozen=True):
    keys: Annotated[list[dict[str, int] | None], Meta(max_length=3)]


class LooseAny(Message, frozen=True):
    value: Any


class Tree(Message, frozen=True):
    inner: Tree | None = None


@pytest.mark.parametrize("loose", [LooseList, Ask | LooseInside, LooseAny])
def test_messages_must_be_bounded(loose: Any) -> None:
    with pytest.raises(TypeError, match=r"Meta\(max_length"):
        serve(Keys(), Handler(), messages=loose)
    with pytest.raises(TypeError, match=r"Meta\(max_length"):
        connect(Keys(), "tcp://127.0.0.1:1", messages=loose)


def test_messages_within_messages_are_bounded_by_depth() -> None:
    body = b"\xc0"
    for _ in range(5000):
        body = b"\x82\xa4type\xa4Tree\xa5inner" + body
    with (
        serve(Keys(), lambda peer, request: Answer("x"), messages=Tree, max_frame_nbytes=1 << 20) as server,
        raw_dealer(server.address) as dealer,
    ):
        dealer.send_multipart(raw_request(body))
        assert dealer.recv_multipart()[1] == encode(Refused("malformed request"))
        dealer.send_multipart(raw_request(encode(Tree(Tree()))))
        assert dealer.recv_multipart()[1] == encode(Answer("x"))


def test_pyzmq_is_imported_only_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, connectors.control, connectors.curve_keys, tools.keygen; print('zmq' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    monkeypatch.setitem(sys.modules, "zmq", None)
    for use in (make_key_pair, lambda: serve(Keys(), Handler()), lambda: connect(Keys(), "tcp://127.0.0.1:1")):
        with pytest.raises(MissingExtraError, match=r"pyzmq is not installed.*kvstore\[p2p\]"):
            use()


# -- what is no request


VALID = encode(Ask(5, [b"k" * 32] * 3, "text"))
HUGE = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
HUGE += [b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\xde\xff\xff", b"\xdd\x7f\xff\xff\xff"]
MALFORMED = {
    "empty": b"",
    "no map": b"\x01",
    "unknown tag": encode(Answer("x")),
    "no tag": b"\x81\xa6number\x01",
    "wrong type": b"\x82\xa4type\xa3Ask\xa6number\xa1x",
    "unknown field": b"\x83\xa4type\xa3Ask\xa6number\x01\xa1x\x01",
    "not utf-8": b"\x83\xa4type\xa3Ask\xa6number\x01\xa4text\xa2\xff\xff",
    "trailing bytes": VALID + b"\0",
    "truncated": VALID[:-1],
    "key too long": b"\x83\xa4type\xa3Ask\xa6number\x01\xa4keys\x91\xc4\x21" + b"k" * 33,
    "too many keys": b"\x83\xa4type\xa3Ask\xa6number\x01\xa4keys\xdc\x00\x41" + b"\xc4\x01k" * 65,
    "deep": b"\x83\xa4type\xa3Ask\xa6number\x01\xa4keys" + b"\x91" * 50_000,
    "deep before the tag": b"\x82\xa1x" + b"\x91" * 50_000,
    **{f"huge {head.hex()}": b"\x83\xa4type\xa3Ask\xa6number\x01\xa4keys" + head for head in HUGE},
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_refused(body: bytes) -> None:
    with serve(Keys(), Handler()) as server, raw_dealer(server.address) as dealer:
        dealer.send_multipart(raw_request(body))
        assert dealer.recv_multipart() == [(7).to_bytes(8, "little"), encode(Refused("malformed request"))]
        dealer.send_multipart(raw_request(VALID))
        assert dealer.recv_multipart()[1] == encode(Answer("4", 5))
        assert server.counts == {"malformed": 1}


def test_wrong_frames_are_refused(channel: Channel) -> None:
    number, timeout, body = raw_request(VALID)
    with raw_dealer(channel.server.address, channel.keys) as dealer:
        for frames, answered in [
            ([b""], bytes(8)),
            ([body], bytes(8)),
            ([b"1234567", timeout, body], bytes(8)),
            ([number], number),
            ([number, timeout], number),
            ([number, body], number),
            ([number, timeout, body, b""], number),
            ([number, timeout + b"\0", body], number),
            ([number, timeout, body] * 1000, number),
            ([b""] * 5000, bytes(8)),
        ]:
            dealer.send_multipart(frames)
            assert dealer.recv_multipart() == [answered, encode(Refused("malformed request"))]
    assert channel.client.ask(Ask(1), 10).number == 1


def test_a_refusal_says_and_logs_nothing_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = encode(Ask(1, [], SECRET_TEXT)) + SECRET_TEXT.encode()
    with serve(Keys(), Handler()) as server, raw_dealer(server.address) as dealer:
        for _ in range(1000):
            dealer.send_multipart(raw_request(body))
            assert SECRET_TEXT.encode() not in dealer.recv_multipart()[1]
    assert SECRET_TEXT not in caplog.text
    refusals = [r.getMessage() for r in caplog.records if "malformed request" in r.getMessage()]
    assert 1 <= len(refusals) <= 3  # at most one in 10 s
    assert f"{len(body) + 12} bytes" in refusals[0]
    assert "DecodeError" in refusals[0]


def test_oversize_frames_are_not_taken(channel: Channel) -> None:
    with raw_dealer(channel.server.address, channel.keys) as dealer:
        dealer.rcvtimeo = 500
        dealer.send_multipart(raw_request(b"\x91" * (MAX_FRAME + 1000)))
        with pytest.raises(zmq.Again):
            dealer.recv_multipart()
    assert channel.client.ask(Ask(1), 10).number == 1


def test_a_peer_cannot_choose_the_name_of_its_connection(channel: Channel) -> None:
    with raw_dealer(channel.server.address, channel.keys) as dealer:
        dealer.disconnect(channel.server.address)
        dealer.routing_id = b"admin"
        dealer.connect(channel.server.address)
        dealer.rcvtimeo = 500
        dealer.send_multipart(raw_request(VALID))
        with pytest.raises(zmq.Again):
            dealer.recv_multipart()
    assert channel.server.counts == {"malformed": 1}
    assert channel.client.ask(Ask(1), 10).number == 1


def test_what_is_no_answer() -> None:
    """A server that answers nonsense: each ask ends, and the client goes on."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    good = encode(Answer("x"))
    try:
        with connect(Keys(), f"tcp://127.0.0.1:{port}") as client:
            for answer in (b"", b"\xdd\xff\xff\xff\xff", VALID, good[:-1]):
                asked = in_thread(lambda: client.ask(Ask(1), 30))
                route, number, _, _ = router.recv_multipart()
                for frames in ([], [b""], [number], [number, good, b""], [b"1234567", good], [bytes(8), good]):
                    router.send_multipart([route, *frames])
                router.send_multipart([route, number, answer])
                with pytest.raises(ControlError, match="sent what is no answer"):
                    asked.result(30)
            asked = in_thread(lambda: client.ask(Ask(1), 30))
            route, number, _, _ = router.recv_multipart()
            router.send_multipart([route, number, good])
            assert asked.result(30) == Answer("x")
    finally:
        context.destroy(linger=0)


def test_a_client_comes_back_from_a_server_that_breaks_the_protocol() -> None:
    """ZeroMQ itself does not try again after that."""
    keys, context = key_pair_of_two(), zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    try:
        with connect(Keys(), f"tcp://127.0.0.1:{port}") as client:
            asked = in_thread(lambda: client.ask(Ask(1), 60))
            route, number, _, _ = router.recv_multipart()
            router.send_multipart([route, number, b"x" * (MAX_FRAME + 1)])
            with pytest.raises(ControlClosedError, match="peer is gone"):
                asked.result(30)
            wait_until(lambda: client.is_alive)
            asked = in_thread(lambda: client.ask(Ask(1), 60))
            route, number, _, _ = router.recv_multipart()
            router.send_multipart([route, number, encode(Answer("x"))])
            assert asked.result(30) == Answer("x")
        with connect(keys, f"tcp://127.0.0.1:{port}") as client:
            with pytest.raises(ControlTimeoutError):
                client.ask(Ask(1), 0.3)  # it has no keys
            context.destroy(linger=0)
            with serve(keys, Handler(), f"tcp://127.0.0.1:{port}"):
                assert client.ask(Ask(2), 60).number == 2
    finally:
        context.destroy(linger=0)


@pytest.fixture(scope="module")
def dealer() -> Iterator[Any]:
    with serve(Keys(), Handler()) as server, raw_dealer(server.address) as made:
        yield made


@settings(max_examples=300)
@given(frames=st.lists(st.binary(max_size=200) | st.just(VALID), min_size=1, max_size=6))
def test_every_message_gets_one_answer(dealer: Any, frames: list[bytes]) -> None:
    dealer.send_multipart(frames)
    number, body = dealer.recv_multipart()
    assert number == (frames[0] if len(frames[0]) == 8 else bytes(8))
    assert msgspec.msgpack.decode(body, type=Refused | Answer)
    assert not dealer.poll(0)


@settings(max_examples=300)
@given(body=st.binary(max_size=300) | st.tuples(st.sampled_from(list(MALFORMED.values())), st.binary()).map(b"".join))
def test_every_body_gets_one_answer(dealer: Any, body: bytes) -> None:
    dealer.send_multipart(raw_request(body, timeout_ms=0))
    number, answer = dealer.recv_multipart()
    assert number == (7).to_bytes(8, "little")
    assert msgspec.msgpack.decode(answer, type=Refused | Answer)


def fuzz(random: random.Random) -> list[bytes]:
    """Frames that are hardly ever a request."""
    number, timeout, _ = raw_request(b"")
    kind = random.randrange(8)
    if kind == 0:
        return [number, timeout, random.randbytes(random.randrange(200))]
    if kind == 1:
        return [number, timeout, VALID[: random.randrange(len(VALID))]]
    if kind == 2:
        mutated = bytearray(VALID)
        for _ in range(random.randrange(1, 6)):
            mutated[random.randrange(len(mutated))] = random.randrange(256)
        return [number, timeout, bytes(mutated)]
    if kind == 3:
        deep = random.choice([b"\x91", b"\x81\xa1x", b"\x81\x91", b"\xdd\x00\x00\x00\x01"]) * random.randrange(1, 3000)
        return [number, timeout, random.choice([b"", VALID[:-5], b"\x82\xa1x"]) + deep]
    if kind == 4:
        at = random.randrange(len(VALID))
        return [number, timeout, VALID[:at] + random.choice(HUGE) + VALID[at:]]
    if kind == 5:
        return [number, timeout, VALID.replace(b"Ask", random.randbytes(3))]
    if kind == 6:
        return [random.choice([b"", number, timeout, VALID]) for _ in range(random.randrange(1, 12))]
    return [random.randbytes(random.choice([0, 1, 4, 8, 50])) for _ in range(random.randrange(1, 5))]


def test_fuzz() -> None:
    """100,000 messages of wrong frames: the server answers on and its memory does not grow."""
    numbers = random.Random(20_260_718)
    process = psutil.Process()
    with (
        serve(Keys(), Handler()) as server,
        raw_dealer(server.address) as dealer,
        connect(Keys(), server.address) as client,
    ):
        assert client.ask(Ask(1), 10).number == 1
        before = process.memory_info().rss
        num_sent = num_answers = 0
        while num_sent < 100_000:
            for _ in range(500):
                dealer.send_multipart(fuzz(numbers))
                num_sent += 1
            while num_answers < num_sent:  # every one is answered
                assert len(dealer.recv_multipart()) == 2
                num_answers += 1
        assert client.ask(Ask(2), 10).number == 2
        assert process.memory_info().rss - before < 50 << 20
        assert not server.problem
        assert server.counts["malformed"] > 90_000


def test_bytes_that_are_no_zeromq(channel: Channel) -> None:
    numbers = random.Random(5)
    host, port = channel.server.address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    for i in range(100):
        with socket.create_connection((host, int(port)), timeout=10) as s, contextlib.suppress(OSError):
            s.sendall((greeting if i % 2 else b"") + numbers.randbytes(numbers.randrange(500)))
    assert channel.client.ask(Ask(1), 10).number == 1


# -- who is let in


def test_a_peer_is_its_public_key() -> None:
    a, b = new_keys(), new_keys()
    server_keys = new_keys({"a": a.public, "b": b.public})
    with serve(Keys(server_keys), Handler()) as server:
        for keys in (a, b):
            with connect(Keys(server_keys, keys), server.address) as client:
                assert client.ask(WhoAmI(), 10) == Answer(keys.public)


def test_without_keys_each_connection_has_its_own_name() -> None:
    with serve(Keys(), Handler()) as server:
        with connect(Keys(), server.address) as a, connect(Keys(), server.address) as b:
            names = [client.ask(WhoAmI(), 10).value for client in (a, b, a)]
        assert names[0] == names[2] != names[1]


def test_an_unknown_key_gets_nothing() -> None:
    keys, handler = key_pair_of_two(), Handler()
    stranger = Keys(keys.server, new_keys())
    with serve(keys, handler) as server, connect(keys, server.address) as known:
        with (
            connect(stranger, server.address) as client,
            pytest.raises(ControlTimeoutError, match="does each end know the other's public key"),
        ):
            client.ask(Slow(), 1.5)
        assert not handler.futures
        assert server.counts["unknown_peers"] >= 1
        assert known.ask(Ask(1), 10).number == 1


def test_an_unknown_key_is_not_even_told_so() -> None:
    keys = key_pair_of_two()
    with serve(keys, Handler()) as server, raw_dealer(server.address, Keys(keys.server, new_keys())) as dealer:
        monitor = dealer.get_monitor_socket()
        wait_until(lambda: server.counts.get("unknown_peers", 0) >= 1)
        time.sleep(0.3)
        seen = set()
        while monitor.poll(0):
            seen.add(recv_monitor_message(monitor)["event"])
        assert not seen & {zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_SUCCEEDED}
        dealer.disable_monitor()
        monitor.close()


def test_a_client_without_keys_or_with_a_wrong_server_key_gets_nothing() -> None:
    keys = key_pair_of_two()
    wrong = Keys(new_keys(), keys.client)
    with serve(keys, Handler()) as server:
        for other in (Keys(), wrong):
            with connect(other, server.address) as client, pytest.raises(ControlTimeoutError):
                client.ask(Ask(1), 1.0)
        with connect(keys, server.address) as client:
            assert client.ask(Ask(1), 10).number == 1


def test_a_client_with_keys_does_not_speak_to_a_server_without() -> None:
    """Nobody can take the encryption off."""
    asked = []
    with serve(Keys(), lambda peer, request: asked.append(request)) as server:
        with connect(key_pair_of_two(), server.address) as client, pytest.raises(ControlTimeoutError):
            client.ask(Ask(1), 1.0)
        assert asked == []


def test_nothing_is_readable_on_the_wire() -> None:
    keys = key_pair_of_two()
    seen = bytearray()
    with serve(keys, Handler()) as server, socket.create_server(("127.0.0.1", 0)) as middle:
        host, port = server.address.removeprefix("tcp://").split(":")

        def relay() -> None:
            client_side, _ = middle.accept()
            server_side = socket.create_connection((host, int(port)))

            def pump(a: socket.socket, b: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    while data := a.recv(1 << 16):
                        seen.extend(data)
                        b.sendall(data)
                    b.shutdown(socket.SHUT_WR)

            back = threading.Thread(target=pump, args=(server_side, client_side))
            back.start()
            pump(client_side, server_side)
            back.join()
            client_side.close()
            server_side.close()

        thread = threading.Thread(target=relay)
        thread.start()
        with connect(keys, f"tcp://127.0.0.1:{middle.getsockname()[1]}") as client:
            assert client.ask(Ask(1, [], SECRET_TEXT * 100), 10).number == 1
        thread.join(20)
    assert len(seen) > len(SECRET_TEXT) * 100
    assert SECRET_TEXT.encode() not in seen
    assert keys.client is not None
    assert curve_keys.key_bytes(keys.client.public) not in seen


def test_keys_that_do_not_fit() -> None:
    keys = key_pair_of_two()
    assert keys.server is not None
    swapped = CurveKeys(public=new_keys().public, secret=keys.server.secret, peers=keys.server.peers)
    with pytest.raises(ConfigError, match=r"public.key does not belong to secret.key"):
        serve(Keys(swapped), Handler())
    with pytest.raises(ConfigError, match="nobody would be let in"):
        serve(Keys(new_keys()), Handler())
    with pytest.raises(ConfigError, match="server_key: give it with keys"):
        connect(keys, "tcp://127.0.0.1:1", server_key=None)
    with pytest.raises(ConfigError, match="server_key: give it with keys"):
        connect(Keys(), "tcp://127.0.0.1:1", server_key=keys.server_key)
    with pytest.raises(ConfigError, match="is no key"):
        connect(keys, "tcp://127.0.0.1:1", server_key="x" * 39)


# -- key files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return generate(tmp_path / "keys", "prefill").folder


def test_generate_and_load(folder: Path, tmp_path: Path) -> None:
    other = generate(tmp_path / "other")
    (folder / "peers/decode.key").write_bytes(other.public_path.read_bytes())
    (folder / "peers/readme.txt").write_text("not a key")
    keys = CurveKeys.load(folder)
    assert (folder / "secret.key").read_text() == keys.secret + "\n"
    assert (folder / "public.key").read_text() == keys.public + "\n"
    assert keys.peers == {"decode": other.public}
    assert keys.secret not in repr(keys)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.iterdir())}
    assert modes == {"keys": 0o700, "secret.key": 0o600, "public.key": 0o644, "peers": 0o700}
    (other.peers_path / "prefill.key").write_text(keys.public)  # no newline at its end
    with (
        serve(Keys(keys), Handler()) as server,
        connect(Keys(keys, CurveKeys.load(str(other.folder))), server.address) as client,
    ):
        assert client.ask(WhoAmI(), 10) == Answer(other.public)


def test_generate_never_overwrites_a_secret(folder: Path) -> None:
    before = (folder / "secret.key").read_bytes(), (folder / "public.key").read_bytes()
    with pytest.raises(ConfigError, match=r"secret.key exists and is not overwritten"):
        generate(folder)
    assert before == ((folder / "secret.key").read_bytes(), (folder / "public.key").read_bytes())
    (folder / "secret.key").rename(folder / "moved")
    (folder / "secret.key").symlink_to(folder / "nowhere")
    with pytest.raises(ConfigError, match="is not overwritten"):
        generate(folder)
    assert not (folder / "nowhere").exists()
    (folder / "secret.key").unlink()
    assert generate(folder).public != before[1].decode().strip()
    CurveKeys.load(folder)


def test_generate_where_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/keys", "/proc/keys-of-nobody"):
        with pytest.raises(ConfigError):
            generate(path)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide").chmod(0o777)
    with pytest.raises(ConfigError, match="may be written by others"):
        generate(tmp_path / "wide")
    for name in ("../x", "", ".x", "a/b", "x" * 65):
        with pytest.raises(ConfigError, match="name:"):
            generate(tmp_path / "keys", name)
    (tmp_path / "taken").mkdir(mode=0o700)
    (tmp_path / "taken/peers").write_text("")
    with pytest.raises(ConfigError, match="in the way"):
        generate(tmp_path / "taken")
    assert not (tmp_path / "taken/secret.key").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    (folder / "secret.key").chmod(mode)
    with pytest.raises(ConfigError, match=r"secret.key can be read by others .*chmod 600"):
        CurveKeys.load(folder)


@pytest.mark.parametrize("name", [".", "peers", "public.key", "peers/a.key"])
def test_what_others_may_write_is_refused(folder: Path, name: str) -> None:
    (folder / "peers/a.key").write_text(new_keys().public)
    (folder / name).chmod(0o777 if (folder / name).is_dir() else 0o666)
    with pytest.raises(ConfigError, match="may be written by others .*chmod go-w"):
        CurveKeys.load(folder)


def test_a_secret_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to user"):
        CurveKeys.load(folder)


@pytest.mark.parametrize("name", ["secret.key", "public.key", "peers/a.key"])
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"x" * 39, b"x" * 41, b"x" * 39 + b" ", b"\xff" * 40, b"#" * 40),
        *(b"x" * 40 + b"\n\n", b"x" * 40 + b"\r\n", b"\n" + b"x" * 40, b"x" * 40 + b"\nmore", b"x" * 100_000),
    ],
)
def test_what_is_no_key_is_refused(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path} is no key: a key file is one line of 40 characters") as raised:
        CurveKeys.load(folder)
    assert "xxx" not in str(raised.value)


def test_files_that_are_missing_or_no_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make one with: kvstore keygen"):
        CurveKeys.load(tmp_path / "nowhere")
    (folder / "peers").rmdir()
    assert CurveKeys.load(folder).peers == {}
    for name in ("public.key", "secret.key"):
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=f"{name} is missing"):
            CurveKeys.load(folder)
    os.mkfifo(folder / "secret.key", 0o600)
    with pytest.raises(ConfigError, match="is no file"):
        CurveKeys.load(folder)


def test_keys_in_z85() -> None:
    """Decoded as ZeroMQ's own reference does."""
    from zmq.utils import z85

    for _ in range(50):
        public, secret = make_key_pair()
        assert curve_keys.is_key(public)
        assert curve_keys.key_bytes(secret) == z85.decode(secret)
    with pytest.raises(ConfigError, match="keys: secret is no key"):
        CurveKeys(public=public, secret="é" * 40)
    with pytest.raises(KVStoreError, match="keys: peer is no key"):
        CurveKeys(public=public, secret=secret, peers={"peer": "short"})


# -- the command


def run_keygen(*arguments: object) -> tuple[int, str]:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(keygen)
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_keygen_says_where_the_keys_are(tmp_path: Path) -> None:
    code, out = run_keygen(tmp_path / "keys", "--name", "prefill-1")
    assert code == 0
    keys = CurveKeys.load(tmp_path / "keys")
    first, second = out.splitlines()
    assert str(tmp_path / "keys/secret.key") in first
    assert keys.public in first
    assert "peers/prefill-1.key" in second
    assert str(tmp_path / "keys/peers") in second
    assert keys.secret not in out
    with pytest.raises(ConfigError, match="not overwritten"):
        run_keygen(tmp_path / "keys")


def test_keygen_as_json(tmp_path: Path) -> None:
    code, out = run_keygen(tmp_path / "keys", "--json")
    assert code == 0
    data = json.loads(out)
    assert CurveKeys.load(Path(data["secret"]).parent).public == data["public_key"]
    assert Path(data["peers"]).is_dir()


def test_keygen_help() -> None:
    code, out = run_keygen("--help")
    assert code == 0
    assert "Example: kvstore keygen" in out
    assert "--json" in out
    assert len(out.splitlines()) < 30
