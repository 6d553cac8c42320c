"""A tier turns off after an error, and on again by itself."""

from __future__ import annotations

import logging

import pytest

from kvstore.tiers.health import TierHealth


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> TierHealth:
    return TierHealth("a tier", first_retry_s=1.0, max_retry_s=8.0, clock=clock)


def test_on_until_it_fails(health: TierHealth) -> None:
    assert health.on
    assert health.allow()
    health.fail(OSError("gone"))
    assert not health.on
    assert not health.allow()
    assert health.failures == 1
    assert str(health.last_error) == "gone"


def test_tries_again_at_doubling_intervals(health: TierHealth, clock: Clock) -> None:
    health.fail(OSError("gone"))
    for delay_s in (1, 2, 4, 8, 8, 8):
        clock.now += delay_s * 0.99
        assert not health.allow()
        clock.now += delay_s * 0.01 + 1e-6
        assert health.allow()
        assert not health.allow(), "one caller at a time"
        health.fail(OSError("still gone"))


def test_a_try_that_goes_well_turns_it_on(health: TierHealth, clock: Clock) -> None:
    health.fail(OSError("gone"))
    clock.now += 2
    assert health.allow()
    health.recover()
    assert health.on
    assert health.allow()


def test_operations_from_before_change_nothing(health: TierHealth, clock: Clock) -> None:
    health.fail(OSError("gone"))
    for _ in range(10):
        health.fail(OSError("gone too"))
    health.recover()
    assert not health.on, "nobody has tried"
    clock.now += 1.01
    assert health.allow(), "the interval has not grown"


def test_what_flaps_waits_longer_and_longer(health: TierHealth, clock: Clock) -> None:
    for delay_s in (1, 2, 4, 8, 8):
        health.fail(OSError("gone"))
        clock.now += delay_s * 0.9
        assert not health.allow()
        clock.now += delay_s * 0.2
        assert health.allow()
        health.recover()
    clock.now += 8
    health.fail(OSError("gone"))
    clock.now += 1.01
    assert health.allow(), "it was on for long: from the start again"


def test_logs_one_line_each_way(health: TierHealth, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            health.fail(OSError("gone"))
            clock.now += 100
            health.allow()
            health.fail(OSError("gone"))
        clock.now += 100
        assert health.allow()
        health.recover()
        health.recover()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "a tier is off: gone" in caplog.text
