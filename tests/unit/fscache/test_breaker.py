"""The circuit as a value, and the breaker around reads."""

import pytest
from fakes.registry import at_once

from fscache.backend import AuthError, BackendError, NotFound, ShortRead, Unavailable
from fscache.backend.breaker import Breaker, Circuit
from tests.leftovers import said


def opened(circuit, now=0.0):
    """Return the circuit after enough failures over enough time, and the time."""
    for _ in range(circuit.limit - 1):
        circuit = circuit.failed(now, probe=False)
    now += circuit.patience
    return circuit.failed(now, probe=False), now


def test_failures_open_it_only_after_some_time():
    circuit = Circuit()
    for turn in range(1000):
        circuit = circuit.failed(100.0 + turn * 0.001, probe=False)
    assert circuit.wait(101.0) == 0.0
    circuit = circuit.failed(105.0, probe=False)
    assert circuit.wait(105.0) == circuit.first_pause


def test_few_failures_do_not_open_it():
    circuit = Circuit()
    for turn in range(circuit.limit - 1):
        circuit = circuit.failed(100.0 * turn, probe=False)
    assert circuit.wait(1e6) == 0.0


def test_a_success_in_between_counts():
    circuit = Circuit(limit=2)
    circuit = circuit.failed(0.0, probe=False).succeeded().failed(100.0, probe=False)
    assert circuit.wait(100.0) == 0.0


def test_pauses_grow_up_to_a_limit_and_one_success_closes():
    circuit, now = opened(Circuit())
    pauses = []
    for _ in range(6):
        assert circuit.wait(now) > 0.0
        pauses.append(circuit.wait(now))
        now += circuit.wait(now)
        assert circuit.wait(now) == 0.0
        circuit = circuit.begun()
        assert circuit.wait(now) > 0.0  # one probe at a time
        circuit = circuit.failed(now, probe=True)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]
    now += 2.0
    assert circuit.begun().succeeded() == Circuit()


def test_late_failures_do_not_lengthen_the_pause():
    circuit, now = opened(Circuit())
    assert circuit.failed(now + 0.1, probe=False) == circuit


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def guarded(breaker, error=None):
    with breaker.guard():
        if error is not None:
            raise error


@pytest.mark.parametrize(
    "error",
    [Unavailable("x", temporary=True), ShortRead("x", temporary=True), AuthError("x")],
)
def test_what_counts_as_failure_of_the_backend(error):
    clock = Clock()
    breaker = Breaker(Circuit(limit=2), clock)
    for _ in range(2):
        with pytest.raises(BackendError):
            guarded(breaker, error)
        clock.now += 6.0
    clock.now -= 6.0
    with pytest.raises(Unavailable, match=r"failed for 6 s, next try in 0\.2 s") as caught:
        guarded(breaker)
    assert not caught.value.temporary


@pytest.mark.parametrize("error", [NotFound("x"), BackendError("x"), ShortRead("x")])
def test_what_concerns_one_blob_only(error):
    clock = Clock()
    breaker = Breaker(Circuit(limit=2), clock)
    for _ in range(9):
        with pytest.raises(type(error)):
            guarded(breaker, error)
        clock.now += 5.0
    guarded(breaker)


def test_one_probe_then_all_go_again(caplog):
    clock = Clock()
    breaker = Breaker(Circuit(limit=2), clock)
    for _ in range(2):
        clock.now += 5.0
        with pytest.raises(BackendError):
            guarded(breaker, Unavailable("down", temporary=True))
    clock.now += 1.0
    with breaker.guard():  # the probe
        (other,) = at_once(1, lambda number: guarded(breaker))
    assert "next try" in str(other)
    assert at_once(4, lambda number: guarded(breaker)) == [None] * 4
    told = said(caplog, "fscache.backend.breaker")
    assert [record.getMessage().split(":")[0] for record in told] == [
        "backend fails again and again",
        "backend works again",
    ]


def test_a_probe_that_is_broken_off_counts_as_failed():
    clock = Clock()
    breaker = Breaker(Circuit(limit=1, patience=0.0), clock)
    with pytest.raises(BackendError):
        guarded(breaker, Unavailable("down", temporary=True))
    clock.now += 1.0
    with pytest.raises(KeyboardInterrupt):
        guarded(breaker, KeyboardInterrupt())
    clock.now += 1.0
    guarded(breaker)


def test_reset():
    clock = Clock()
    breaker = Breaker(Circuit(limit=1, patience=0.0), clock)
    with pytest.raises(BackendError):
        guarded(breaker, AuthError("wrong"))
    breaker.reset()
    guarded(breaker)
