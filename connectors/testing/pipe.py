"""What every transport must hold: a suite to be inherited, for ours and for yours.

    def my_end(arena: HostArena, *, is_server: bool, max_nbytes: int) -> PipeEnd:  # at module level
        return MyEnd(arena.rows, is_server=is_server, max_nbytes=max_nbytes)

    class TestMine(PipeTests):
        end = my_end

Most cases have both ends in this process, in two threads. Those that kill or stop the peer have it
in a process of its own, which does what it is told.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import os
import signal
import time
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import pytest
import torch

from connectors.pipe import MAX_DIMS, Pipe, PipeClosedError, PipeEnd, PipeError, PipeProtocolError, PipeTimeoutError
from connectors.testing.pipe_content import (
    LONG_S,
    MAX_NBYTES,
    NUM_SLOTS,
    SLOT_NBYTES,
    SOON_S,
    as_slots,
    assert_closed,
    assert_same,
    at_once,
    carry,
    carry_slots,
    drain,
    fill,
    join,
    make_arena,
    make_tensor,
    raised,
    recv_all,
    send_all,
    slot_content,
)
from connectors.testing.pipe_peer import PeerProcess
from connectors.wire.frame import DTYPES
from kvstore.arena import HostArena
from kvstore.slot import Rows


@dataclass
class Pair:
    """Two joined ends; ``a`` is the server."""

    a: Pipe
    b: Pipe
    rows_a: Rows
    rows_b: Rows

    def ways(self) -> list[tuple[Pipe, Rows, Pipe, Rows]]:
        """From one and to the other, both ways."""
        return [(self.a, self.rows_a, self.b, self.rows_b), (self.b, self.rows_b, self.a, self.rows_a)]


SLOT_PATTERNS: Final[dict[str, tuple[list[int], list[int]]]] = {
    "single": ([5], [17]),
    "adjacent": (list(range(4, 12)), list(range(9, 17))),
    "all": (list(range(NUM_SLOTS)), list(range(NUM_SLOTS))),
    "scattered": ([3, 23, 1, 8, 14, 5], [22, 2, 9, 0, 16, 11]),
    "scattered into adjacent": ([3, 23, 1, 8, 14, 5], list(range(6))),
    "runs of other lengths": ([0, 1, 2, 3, 10, 11, 20, 21], [5, 6, 8, 9, 10, 11, 12, 1]),
    "backwards": (list(range(23, -1, -1)), [*range(12, 24), *range(12)]),
    "none": ([], []),
}


class PipeTests(ABC):
    """Subclass it, name the subclass ``Test…``, and say what its ends are.

    Attributes:
        end: makes one, of a `HostArena` that is a memfd; importable by its name in another process.
        env: what such a process needs in its environment.
        leak_rounds: pipes that are made to see what they leave behind.
    """

    end: Callable[..., PipeEnd]
    env: Mapping[str, str] = {}
    leak_rounds = 50

    def make_end(self, arena: HostArena, *, is_server: bool) -> PipeEnd:
        return type(self).end(arena, is_server=is_server, max_nbytes=MAX_NBYTES)

    def make_ends(self, a: HostArena, b: HostArena) -> tuple[PipeEnd, PipeEnd]:
        """Two that can be joined, the first of which is the server."""
        return self.make_end(a, is_server=True), self.make_end(b, is_server=False)

    @pytest.fixture
    def arenas(self) -> Iterator[tuple[HostArena, HostArena]]:
        a, b = make_arena(), make_arena()
        yield a, b
        a.close()
        b.close()

    @pytest.fixture
    def pair(self, arenas: tuple[HostArena, HostArena]) -> Iterator[Pair]:
        end_a, end_b = self.make_ends(*arenas)
        with contextlib.closing(end_a), contextlib.closing(end_b):
            a, b = join(end_a, end_b)
            with a, b:
                yield Pair(a, b, arenas[0].rows, arenas[1].rows)

    @pytest.fixture
    def peer(self) -> Iterator[PeerProcess]:
        end = type(self).end
        peer = PeerProcess(f"{end.__module__}:{end.__name__}", self.env)
        yield peer
        peer.close()

    @pytest.fixture
    def rows(self, arenas: tuple[HostArena, HostArena]) -> Rows:
        return arenas[0].rows

    @pytest.fixture
    def pipe(self, arenas: tuple[HostArena, HostArena], peer: PeerProcess) -> Iterator[Pipe]:
        """Joined with a peer in another process."""
        with contextlib.closing(self.make_end(arenas[0], is_server=True)) as end, peer.join(end) as pipe:
            yield pipe

    # -- tensors

    def test_tensors_come_in_the_order_in_which_they_were_sent(self, pair: Pair) -> None:
        tensors = [make_tensor(torch.float32, (i % 7, 1 + 37 * (i % 11)), i) for i in range(150)]
        for sender, _, receiver, _ in pair.ways():
            _, came = at_once(partial(send_all, sender, tensors), partial(recv_all, receiver, len(tensors)))
            for one, other in zip(came, tensors, strict=True):
                assert_same(one, other)

    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
    def test_every_dtype(self, pair: Pair) -> None:
        for dtype in DTYPES:
            self.check_tensor(pair, make_tensor(dtype, (5, 3)))

    def test_every_shape(self, pair: Pair) -> None:
        for shape in [(), (0,), (1,), (3, 0, 5), (2,) * MAX_DIMS, (1, 65537), (1 << 20, 3)]:
            self.check_tensor(pair, make_tensor(torch.int16, shape))

    def test_tensors_of_which_memory_is_not_the_content(self, pair: Pair) -> None:
        x = make_tensor(torch.complex64, (6, 8))
        x.requires_grad_()
        for tensor in (x, x[::2, 1:], x.t(), x[:1].expand(4, 8), x.conj(), x.conj().imag, x[3, 3]):
            self.check_tensor(pair, tensor)

    def test_none_is_not_an_empty_tensor(self, pair: Pair) -> None:
        for tensor in (None, torch.empty(0), None, torch.tensor(1.5)):
            came = carry(pair.a, pair.b, tensor)
            if tensor is None:
                assert came is None
            else:
                assert_same(came, tensor)

    def test_into_a_tensor_that_is_given(self, pair: Pair) -> None:
        for dtype, shape in ((torch.bfloat16, (64, 33)), (torch.bool, (7,)), (torch.float32, ()), (torch.int8, (0,))):
            sent, out = make_tensor(dtype, shape), torch.zeros(shape, dtype=dtype)
            came = carry(pair.a, pair.b, sent, out)
            assert came is out
            assert_same(out, sent)

    @pytest.mark.parametrize(
        "out",
        [
            torch.zeros(4, 4),
            torch.zeros(16),
            torch.zeros(4, 2),
            torch.zeros(2, 4, dtype=torch.int32),
            torch.zeros(4, 2).t(),
        ],
        ids=["larger", "flat", "turned", "dtype", "not contiguous"],
    )
    def test_into_a_tensor_that_does_not_fit(self, pair: Pair, out: torch.Tensor) -> None:
        sent = torch.ones(2, 4)
        (_, sender_s), (error, _) = at_once(
            lambda: raised(lambda: pair.a.send_tensor(sent, LONG_S)),
            lambda: raised(lambda: pair.b.recv_tensor(LONG_S, out)),
        )
        assert isinstance(error, PipeProtocolError) and sender_s < SOON_S
        assert not out.any()
        assert_closed(pair.b, pair.a)

    def test_what_is_too_large_is_not_sent(self, pair: Pair) -> None:
        for tensor in (torch.empty(MAX_NBYTES + 1, dtype=torch.uint8), torch.empty([1] * (MAX_DIMS + 1))):
            with pytest.raises(PipeProtocolError, match=r"\d"):
                pair.a.send_tensor(tensor, LONG_S)
        self.check_tensor(pair, torch.arange(5))
        self.check_tensor(pair, torch.zeros(MAX_NBYTES, dtype=torch.uint8))

    def test_what_was_sent_may_be_overwritten(self, pair: Pair) -> None:
        def send() -> None:
            tensor = torch.empty(1 << 20, dtype=torch.uint8)
            for i in range(12):
                pair.a.send_tensor(tensor.fill_(i), LONG_S)

        _, came = at_once(send, lambda: [pair.b.recv_tensor(LONG_S) for _ in range(12)])
        for i, tensor in enumerate(came):
            assert tensor is not None and bool((tensor == i).all())

    def test_both_ways_at_once(self, pair: Pair) -> None:
        tensors = [make_tensor(torch.uint8, (n,), n) for n in (6 << 20, 100, 9 << 20, 0, 4 << 20)]
        fill(pair.rows_a, 1)
        fill(pair.rows_b, 2)
        sent, got = np.arange(12), np.arange(12, NUM_SLOTS)

        def send(pipe: Pipe) -> None:
            for tensor in tensors:
                pipe.send_tensor(tensor, LONG_S)
                pipe.send_slots(sent, LONG_S)

        def receive(pipe: Pipe) -> list[torch.Tensor | None]:
            came = []
            for _ in tensors:
                came.append(pipe.recv_tensor(LONG_S))
                assert list(pipe.recv_slots(got, LONG_S))[-1] == 12
            return came

        _, of_b, _, of_a = at_once(
            lambda: send(pair.a), lambda: receive(pair.b), lambda: send(pair.b), lambda: receive(pair.a)
        )
        for came in (of_a, of_b):
            for one, other in zip(came, tensors, strict=True):
                assert_same(one, other)
        for slot in range(12):
            assert np.array_equal(pair.rows_b[12 + slot], slot_content(slot, 1))
            assert np.array_equal(pair.rows_a[12 + slot], slot_content(slot, 2))

    def check_tensor(self, pair: Pair, tensor: torch.Tensor) -> None:
        for sender, _, receiver, _ in pair.ways():
            assert_same(carry(sender, receiver, tensor), tensor)

    # -- slots

    @pytest.mark.parametrize("pattern", SLOT_PATTERNS)
    def test_slots(self, pair: Pair, pattern: str) -> None:
        sent, got = map(as_slots, SLOT_PATTERNS[pattern])
        for sender, rows, receiver, their_rows in pair.ways():
            fill(rows, 3)
            their_rows[:] = 0xEE
            steps = carry_slots(sender, receiver, sent, got)
            assert steps[-1:] == [len(got)] and steps == sorted(set(steps)) and all(n >= 0 for n in steps)
            self.check_slots(their_rows, dict(zip(got.tolist(), sent.tolist(), strict=True)), 3)
            self.check_slots(rows, {slot: slot for slot in range(NUM_SLOTS)}, 3)

    def check_slots(self, rows: Rows, sent: Mapping[int, int], seed: int) -> None:
        """Rows hold what other rows of the peer held, and the rest nothing."""
        for slot, row in enumerate(rows):
            if slot in sent:
                assert np.array_equal(row, slot_content(sent[slot], seed)), f"slot {slot}"
            else:
                assert bool((row == 0xEE).all()), f"slot {slot} was written, which nobody sent"

    def test_what_has_come_can_be_read_while_the_rest_is_under_way(self, pair: Pair) -> None:
        fill(pair.rows_a, 4)
        order = np.random.default_rng(0).permutation(NUM_SLOTS)

        def receive() -> list[int]:
            steps: list[int] = []
            for n in pair.b.recv_slots(order, LONG_S):
                for i in range(steps[-1] if steps else 0, n):
                    assert np.array_equal(pair.rows_b[order[i]], slot_content(i, 4))
                steps.append(n)
            return steps

        _, steps = at_once(lambda: pair.a.send_slots(np.arange(NUM_SLOTS), LONG_S), receive)
        assert len(steps) > 1, "eight megabytes came as one"

    def test_sent_slots_may_be_overwritten(self, pair: Pair) -> None:
        def send() -> None:
            for i in range(10):
                pair.rows_a[:6] = i
                pair.a.send_slots(np.arange(6), LONG_S)

        def receive() -> None:
            for i in range(10):
                assert list(pair.b.recv_slots(np.arange(6, 12), LONG_S))[-1] == 6
                assert bool((pair.rows_b[6:12] == i).all())

        at_once(send, receive)

    def test_tensors_and_slots_take_turns(self, pair: Pair) -> None:
        fill(pair.rows_a, 5)

        def send() -> None:
            for i in range(NUM_SLOTS):
                pair.a.send_tensor(torch.tensor([i]), LONG_S)
                pair.a.send_slots(as_slots([i]), LONG_S)

        def receive() -> None:
            for i in range(NUM_SLOTS):
                assert_same(pair.b.recv_tensor(LONG_S), torch.tensor([i]))
                assert list(pair.b.recv_slots(as_slots([NUM_SLOTS - 1 - i]), LONG_S))[-1] == 1

        at_once(send, receive)
        self.check_slots(pair.rows_b, {NUM_SLOTS - 1 - i: i for i in range(NUM_SLOTS)}, 5)

    @pytest.mark.parametrize(("sent", "got"), [(3, 2), (2, 3), (0, 1), (1, 0)])
    def test_another_number_of_slots_than_were_sent(self, pair: Pair, sent: int, got: int) -> None:
        (sender, sender_s), (receiver, _) = at_once(
            lambda: raised(lambda: pair.a.send_slots(np.arange(sent), LONG_S)),
            lambda: raised(lambda: list(pair.b.recv_slots(np.arange(got), LONG_S))),
        )
        assert isinstance(receiver, PipeProtocolError)
        assert isinstance(sender, PipeClosedError) and sender_s < SOON_S
        assert_closed(pair.b, pair.a)

    def test_slots_where_a_tensor_is_due(self, pair: Pair) -> None:
        (sender, _), (receiver, _) = at_once(
            lambda: raised(lambda: pair.a.send_slots(np.arange(3), LONG_S)),
            lambda: raised(lambda: pair.b.recv_tensor(LONG_S)),
        )
        assert isinstance(receiver, PipeProtocolError) and isinstance(sender, PipeClosedError)
        assert_closed(pair.b, pair.a)

    def test_a_tensor_where_slots_are_due(self, pair: Pair) -> None:
        _, (receiver, _) = at_once(
            lambda: raised(lambda: pair.a.send_tensor(torch.zeros(3), LONG_S)),
            lambda: raised(lambda: list(pair.b.recv_slots(np.arange(3), LONG_S))),
        )
        assert isinstance(receiver, PipeProtocolError)
        assert_closed(pair.b, pair.a)

    @pytest.mark.parametrize("slots", [[NUM_SLOTS], [-1], [0, 1, 1 << 40]])
    def test_slots_that_there_are_not(self, pair: Pair, slots: list[int]) -> None:
        with pytest.raises(ValueError, match="slots"):
            pair.a.send_slots(as_slots(slots), LONG_S)
        with pytest.raises(ValueError, match="slots"):
            pair.b.recv_slots(as_slots(slots), LONG_S)
        self.check_tensor(pair, torch.arange(3))

    def test_receiving_slots_that_is_given_up_closes_the_pipe(self, pair: Pair) -> None:
        def receive() -> None:
            for _ in pair.b.recv_slots(np.arange(NUM_SLOTS), LONG_S):
                break

        (error, seconds), _ = at_once(lambda: raised(lambda: pair.a.send_slots(np.arange(NUM_SLOTS), LONG_S)), receive)
        assert isinstance(error, PipeClosedError) and seconds < SOON_S
        assert_closed(pair.b, pair.a)

    # -- deadlines, and ends

    def test_nothing_comes_and_the_pipe_is_as_it_was(self, pair: Pair) -> None:
        for timeout_s in (0.0, 0.2, 0.05):
            for pipe in (pair.a, pair.b):
                error, seconds = raised(partial(pipe.recv_tensor, timeout_s))
                assert isinstance(error, PipeTimeoutError) and timeout_s <= seconds < timeout_s + SOON_S
            self.check_tensor(pair, torch.arange(7))

    @pytest.mark.parametrize("what", ["tensor", "slots"])
    def test_nobody_receives(self, pair: Pair, what: str) -> None:
        tensor = torch.zeros(MAX_NBYTES, dtype=torch.uint8)
        calls = {
            "tensor": lambda: pair.a.send_tensor(tensor, 0.3),
            "slots": lambda: pair.a.send_slots(np.arange(NUM_SLOTS), 0.3),
        }
        error, seconds = raised(calls[what])
        assert isinstance(error, PipeTimeoutError) and 0.3 <= seconds < SOON_S
        assert_closed(pair.a)
        error, seconds = raised(lambda: drain(pair.b))
        assert isinstance(error, PipeError) and seconds < SOON_S
        assert_closed(pair.b)

    def test_no_slots_come(self, pair: Pair) -> None:
        pair.rows_b[:] = 0xEE
        error, seconds = raised(lambda: list(pair.b.recv_slots(np.arange(3), 0.3)))
        assert isinstance(error, PipeTimeoutError) and 0.3 <= seconds < SOON_S
        assert_closed(pair.b, pair.a)
        self.check_slots(pair.rows_b, {}, 0)

    @pytest.mark.parametrize("who", ["own", "peer's"])
    @pytest.mark.parametrize("what", ["recv_tensor", "send_tensor", "recv_slots", "send_slots"])
    def test_close_wakes_up_who_waits(self, pair: Pair, who: str, what: str) -> None:
        tensor, slots = torch.zeros(MAX_NBYTES, dtype=torch.uint8), np.arange(NUM_SLOTS)
        calls: dict[str, Callable[[], object]] = {
            "recv_tensor": lambda: pair.a.recv_tensor(LONG_S),
            "send_tensor": lambda: pair.a.send_tensor(tensor, LONG_S),
            "recv_slots": lambda: list(pair.a.recv_slots(slots, LONG_S)),
            "send_slots": lambda: pair.a.send_slots(slots, LONG_S),
        }
        with ThreadPoolExecutor(1) as thread:
            waiting: Future[tuple[BaseException | None, float]] = thread.submit(raised, calls[what])
            time.sleep(0.2)
            assert not waiting.done()
            (pair.a if who == "own" else pair.b).close()
            error, seconds = waiting.result(LONG_S)
        assert isinstance(error, PipeClosedError) and seconds < SOON_S
        error, seconds = raised(lambda: drain(pair.b))  # there may be slots, which are no tensor
        assert isinstance(error, PipeError) and seconds < SOON_S
        assert_closed(pair.a, pair.b)

    @pytest.mark.parametrize("who", ["a", "b"])
    def test_a_close_is_seen_by_both(self, pair: Pair, who: str) -> None:
        """By who does not use it, too."""
        self.check_tensor(pair, torch.arange(7))
        assert not pair.a.is_closed and not pair.b.is_closed
        getattr(pair, who).close()
        deadline = time.monotonic() + LONG_S
        while not (pair.a.is_closed and pair.b.is_closed):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_closed_twice(self, pair: Pair) -> None:
        for _ in range(2):
            pair.a.close()
            pair.b.close()
        assert_closed(pair.a, pair.b)

    def test_what_was_sent_before_the_end_may_come_but_never_in_part(self, pair: Pair) -> None:
        tensors = [make_tensor(torch.uint8, (n,), n) for n in (10, 1000, 100_000)]

        def send() -> None:
            for tensor in tensors:
                pair.a.send_tensor(tensor, LONG_S)
            pair.a.close()

        came: list[torch.Tensor | None] = []

        def receive() -> None:
            while True:
                came.append(pair.b.recv_tensor(LONG_S))

        _, (error, _) = at_once(send, partial(raised, receive))
        assert isinstance(error, PipeClosedError)
        for one, other in zip(came, tensors, strict=False):
            assert_same(one, other)

    # -- joining

    def test_hellos_that_are_refused(self, arenas: tuple[HostArena, HostArena]) -> None:
        smaller = HostArena.attach(os.dup(arenas[1].fd or 0), NUM_SLOTS * SLOT_NBYTES // 4096, 4096)
        ends = [*self.make_ends(*arenas), *self.make_ends(arenas[0], smaller)]
        a, b, _, small_b = ends
        good = b.hello()
        bad = [b"", b"\x00", good[:-1], good + b"\x00", good * 3, good * (1 << 20), a.hello(), small_b.hello()]
        bad += [_OTHER_HELLO, bytes(len(good)), good.replace(b"transport", b"transputt")]
        try:
            for hello in bad:
                with pytest.raises(PipeProtocolError, match=r"\S"):
                    a.join(hello, SOON_S)
            for pipe in join(a, b):  # no harm was done
                pipe.close()
        finally:
            for end in ends:
                end.close()
            smaller.close()

    def test_the_peer_does_not_come(self, arenas: tuple[HostArena, HostArena]) -> None:
        for ends in (self.make_ends(*arenas), self.make_ends(*arenas)[::-1]):
            with contextlib.closing(ends[0]), contextlib.closing(ends[1]):
                error, seconds = raised(partial(ends[0].join, ends[1].hello(), 0.3))
                assert isinstance(error, PipeTimeoutError) and 0.2 < seconds < SOON_S

    def test_ends_that_are_never_joined(self, arenas: tuple[HostArena, HostArena]) -> None:
        for end in self.make_ends(*arenas):
            assert end.hello()
            end.close()
            end.close()

    def test_nothing_is_left_behind(self, arenas: tuple[HostArena, HostArena]) -> None:
        def one(i: int) -> None:
            ends = self.make_ends(*arenas)
            a, b = join(*ends)
            sent = make_tensor(torch.uint8, (1 + 4096 * i,), i)
            assert_same(carry(a, b, sent), sent)
            slots = np.arange(4)
            at_once(lambda: b.send_slots(slots, LONG_S), lambda: list(a.recv_slots(slots, LONG_S)))
            if i % 3 == 0:
                assert isinstance(raised(lambda: list(a.recv_slots(slots, 0.0)))[0], PipeTimeoutError)
            for opened in (a, b, *ends):
                opened.close()

        def left() -> tuple[int, int]:
            gc.collect()
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        for i in range(3):  # libraries keep some things for good
            one(i)
        before = left()
        for i in range(self.leak_rounds):
            one(i)
        deadline = time.monotonic() + SOON_S
        while any(now > then for now, then in zip(left(), before, strict=True)):
            assert time.monotonic() < deadline, f"files and threads: {before}, then {left()}"
            time.sleep(0.05)

    # -- a peer in a process of its own

    def test_between_two_processes(self, pipe: Pipe, peer: PeerProcess, rows: Rows) -> None:
        tensors = [make_tensor(dtype, shape) for dtype in DTYPES for shape in ((3, 4), (), (1 << 18,))]
        peer.start("echo", len(tensors) + 1)
        for tensor in tensors:
            pipe.send_tensor(tensor, LONG_S)
            assert_same(pipe.recv_tensor(LONG_S), tensor)
        pipe.send_tensor(None, LONG_S)
        assert pipe.recv_tensor(LONG_S) is None
        assert peer.result() is None
        peer.ask("fill", 6)
        for sent, got in SLOT_PATTERNS.values():
            rows[:] = 0xEE
            peer.start("send_slots", sent, LONG_S)
            assert list(pipe.recv_slots(as_slots(got), LONG_S))[-1] == len(got)
            assert peer.result() is None
            self.check_slots(rows, dict(zip(got, sent, strict=True)), 6)
        fill(rows, 7)
        peer.start("recv_slots", list(range(NUM_SLOTS)), LONG_S)
        pipe.send_slots(np.arange(NUM_SLOTS), LONG_S)
        assert peer.result()[-1] == NUM_SLOTS
        assert peer.ask("digests") == [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
        pipe.close()
        assert peer.ask("recv_tensor", LONG_S) == "raised PipeClosedError"

    @pytest.mark.parametrize("what", ["idle", "recv_slots", "send_slots", "tensors"])
    def test_the_peer_is_killed(self, pipe: Pipe, peer: PeerProcess, what: str) -> None:
        slots = np.arange(NUM_SLOTS)
        everything = slots.tolist()

        def receive() -> None:
            while True:
                for _ in pipe.recv_slots(slots, LONG_S):
                    pass

        def send() -> None:
            while True:
                pipe.send_slots(slots, LONG_S)

        def echo() -> None:
            tensor = torch.zeros(4 << 20)
            while True:
                pipe.send_tensor(tensor, LONG_S)
                pipe.recv_tensor(LONG_S)

        calls: dict[str, Callable[[], object]] = {
            "idle": lambda: pipe.recv_tensor(LONG_S),
            "recv_slots": receive,
            "send_slots": send,
            "tensors": echo,
        }
        commands: dict[str, tuple[Any, ...]] = {
            "recv_slots": ("send_slots", everything, LONG_S, 1 << 30),
            "send_slots": ("recv_slots", everything, LONG_S, 1 << 30),
            "tensors": ("echo", 1 << 30),
        }
        if what in commands:
            peer.start(*commands[what])
        with ThreadPoolExecutor(1) as thread:
            under_way = thread.submit(raised, calls[what])
            time.sleep(0.4)
            assert not under_way.done()
            killed = time.monotonic()
            peer.signal(signal.SIGKILL)
            error, _ = under_way.result(LONG_S)
        assert isinstance(error, PipeClosedError) and time.monotonic() - killed < SOON_S
        assert_closed(pipe)

    def test_the_peer_is_stopped(self, pipe: Pipe, peer: PeerProcess) -> None:
        peer.signal(signal.SIGSTOP)
        try:
            error, seconds = raised(lambda: pipe.recv_tensor(0.5))
            assert isinstance(error, PipeTimeoutError) and seconds < SOON_S
            error, seconds = raised(lambda: pipe.send_slots(np.arange(NUM_SLOTS), 0.5))
            assert isinstance(error, PipeTimeoutError) and seconds < SOON_S
            _, seconds = raised(pipe.close)
            assert seconds < SOON_S
        finally:
            peer.signal(signal.SIGCONT)
        assert peer.ask("recv_slots", [0], LONG_S) in ("raised PipeClosedError", "raised PipeProtocolError")

    def test_the_peer_is_stopped_while_it_sends(self, pipe: Pipe, peer: PeerProcess, rows: Rows) -> None:
        """What is received into is left alone as soon as the error is raised."""
        peer.ask("fill", 8)
        peer.start("send_slots", list(range(NUM_SLOTS)), LONG_S, 1 << 30)
        slots = np.arange(NUM_SLOTS)

        def receive() -> None:
            for i in itertools.count():
                for come in pipe.recv_slots(slots, 1.0):
                    if i >= 5 and come < NUM_SLOTS:
                        peer.signal(signal.SIGSTOP)

        error, _ = raised(receive)
        rows[:] = 0xEE
        peer.signal(signal.SIGCONT)
        assert isinstance(error, PipeTimeoutError)
        assert peer.result() == "raised PipeClosedError"
        time.sleep(0.3)
        self.check_slots(rows, {}, 0)


_OTHER_HELLO: Final = (
    b"\x84\xa9transport\xa5other\xa9is_server\xc2\xabslot_nbytes\xce\x00\x05\xa0\x00\xaamax_nbytes\xce\x02\x00\x00\x00"
)
