"""Bytes a second, with a clock of our own."""

import threading

from fscache.fetch.pace import Pace


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_turns_keep_the_limit_whoever_takes_them():
    pace = Pace(1000, Clock())
    assert [pace.delay(length) for length in (500, 2000, 1000)] == [0.0, 0.5, 2.5]


def test_a_pause_is_not_made_up_for():
    clock = Clock()
    pace = Pace(1000, clock)
    assert pace.delay(1000) == 0.0
    clock.now += 60
    assert [pace.delay(1000), pace.delay(1000)] == [0.0, 1.0]


def test_no_limit():
    pace = Pace(0, Clock())
    assert {pace.delay(1 << 40) for _ in range(3)} == {0.0}


def test_stop_ends_a_wait():
    pace, stop = Pace(1), threading.Event()
    assert pace.wait(10**6, stop)
    stop.set()
    assert not pace.wait(1, stop)
