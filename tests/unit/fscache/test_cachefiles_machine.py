"""The state machine against a simulated kernel: one reply each, never two, never to a stranger."""

import errno
import random

import pytest
from fakes.cachefiles_kernel import Broken, Simulation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fscache.cachefiles.machine import CloseFd, Command, Complete, Machine, Phase
from fscache.cachefiles.protocol import NO_OBJECT, Close, Open, Read
from fscache.protocol import ProtocolError


def opened(machine, object_id=1, fd=7, msg_id=0, size=8192):
    target, actions = machine.open(Open(msg_id, object_id, fd, b"erofs,d", b"c"))
    assert actions == []
    assert machine.answer_open(target, size) == [Command(b"copen %d,%d" % (msg_id, size), target)]
    return target


def reading(machine, object_id=1, msg_id=5, offset=0):
    return machine.read(Read(msg_id, object_id, offset, 4096))


def test_object_from_open_to_close():
    machine = Machine()
    target = opened(machine)
    pending = reading(machine)
    assert (pending.offset, pending.length, pending.object) == (0, 4096, target)
    assert machine.waiting == 1
    assert machine.answer_read(pending) == [Complete(7, 5)]
    assert machine.answer_read(pending) == []
    assert machine.close(Close(9, 1)) == [CloseFd(7)]
    assert machine.objects == []
    assert target.phase is Phase.GONE


def test_refused_object_is_answered_before_its_descriptor_is_closed():
    machine = Machine()
    target, _ = machine.open(Open(3, 1, 7, b"erofs,d", b"c"))
    assert machine.answer_open(target, -errno.ENOENT) == [
        Command(b"copen 3,-2", target), CloseFd(7),
    ]  # fmt: skip
    assert machine.answer_open(target, 4096) == []
    assert machine.objects == []
    assert machine.close(Close(4, 1)) == []


@pytest.mark.parametrize("answer", [1 << 63, -4096])
def test_answer_that_is_none(answer):
    machine = Machine()
    target, _ = machine.open(Open(3, 1, 7, b"erofs,d", b"c"))
    with pytest.raises(ProtocolError):
        machine.answer_open(target, answer)
    assert machine.answer_open(target, -errno.EIO) != []


def test_open_whose_opener_has_gone():
    machine = Machine()
    target = opened(machine)
    assert machine.not_opened(target) == [CloseFd(7)]
    assert machine.not_opened(target) == []
    assert reading(machine) is None


def test_withdrawn_reads_get_no_answer():
    machine = Machine()
    opened(machine)
    pending = reading(machine)
    assert machine.close(Close(9, 1)) == [CloseFd(7)]
    assert machine.answer_read(pending) == []
    assert machine.waiting == 0


def test_descriptor_stays_open_while_it_is_used():
    machine = Machine()
    target = opened(machine)
    assert machine.hold(target)
    assert machine.hold(target)
    assert machine.close(Close(9, 1)) == []
    assert not machine.hold(target)
    assert machine.release(target) == []
    assert machine.release(target) == [CloseFd(7)]


def test_close_of_what_is_not_known():
    machine = Machine()
    target = opened(machine)
    assert machine.close(Close(9, NO_OBJECT)) == []
    assert machine.close(Close(9, 77)) == []
    assert machine.objects == [target]


def test_same_name_opened_again_is_another_object():
    machine = Machine()
    old, new = opened(machine, 1, 7, 0), opened(machine, 2, 8, 1)
    assert machine.objects == [old, new]
    assert machine.close(Close(3, 1)) == [CloseFd(7)]
    assert machine.objects == [new]


def test_object_id_that_comes_again_ends_the_old_object():
    machine = Machine()
    old = opened(machine)
    pending = reading(machine)
    new, actions = machine.open(Open(8, 1, 9, b"erofs,d", b"c"))
    assert actions == [CloseFd(7)]
    assert old.phase is Phase.GONE
    assert machine.answer_read(pending) == []
    assert machine.objects == [new]


def test_read_before_the_answer_or_of_a_stranger():
    machine = Machine()
    machine.open(Open(0, 1, 7, b"erofs,d", b"c"))
    assert reading(machine) is None
    assert reading(machine, object_id=2) is None
    assert machine.knows(Read(5, 1, 0, 4096))
    assert not machine.knows(Read(5, 2, 0, 4096))


def test_read_delivered_twice_has_one_answer():
    machine = Machine()
    opened(machine)
    pending = reading(machine)
    assert reading(machine) is None
    assert machine.answer_read(pending) == [Complete(7, 5)]
    # From here on the number is another request's.
    assert reading(machine) is not None


def test_number_of_a_read_whose_reader_has_gone():
    machine = Machine()
    opened(machine)
    old = reading(machine)
    new = reading(machine, offset=4096)
    assert machine.answer_read(old) == []
    assert machine.answer_read(new) == [Complete(7, 5)]


def test_orderly_end_answers_everything():
    machine = Machine()
    target = opened(machine)
    reading(machine)
    coming, _ = machine.open(Open(6, 2, 8, b"erofs,d", b"x"))
    assert machine.hold(target)
    assert machine.end(answer=True) == [
        Complete(7, 5), Command(b"copen 6,-5", coming), CloseFd(8),
    ]  # fmt: skip
    assert machine.release(target) == [CloseFd(7)]
    assert machine.end(answer=True) == []


def test_end_for_a_successor_answers_nothing():
    machine = Machine()
    opened(machine)
    pending = reading(machine)
    assert machine.end(answer=False) == [CloseFd(7)]
    assert machine.answer_read(pending) == []


def drive(seed, count, *, modern):
    """Let that many events happen; return the simulation, all of whose requests have ended."""
    simulation = Simulation(modern=modern)
    choose = random.Random(seed).randrange
    done = 0
    while done < count:
        done += simulation.step(choose(1 << 30))
    simulation.settle()
    return simulation


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_random_events(seed, modern):
    simulation = drive(seed, 20_000, modern=modern)
    assert simulation.kernel.replies > 2_000


def sequences(count, begin=0):
    """Let that many sequences of events happen, each from the beginning to its end."""
    return sum(
        drive(seed, seed % 40 + 1, modern=seed % 4 > 0).kernel.replies
        for seed in range(begin, begin + count)
    )


def test_random_sequences():
    assert sequences(4_000, begin=1_000_000) > 10_000


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_sequences():
    assert sequences(1_000_000) > 4_000_000


class Protocol(RuleBasedStateMachine):
    """The same, with shrinking."""

    def __init__(self):
        super().__init__()
        self.simulation = Simulation()

    @rule(numbers=st.lists(st.integers(0, (1 << 30) - 1), min_size=1, max_size=20))
    def events(self, numbers):
        for number in numbers:
            self.simulation.step(number)

    @invariant()
    def no_object_without_a_descriptor(self):
        fds = [item.fd for item in self.simulation.machine.objects]
        assert len(set(fds)) == len(fds)
        assert set(fds) <= set(self.simulation.kernel.fds)

    def teardown(self):
        self.simulation.settle()


Protocol.TestCase.settings = settings(stateful_step_count=30)
TestProtocol = Protocol.TestCase


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("twice", "second"),
        ("early", "descriptor closed"),
        ("never", "left without an answer"),
        ("late", "after CLOSE|which is closed|a second"),
    ],
)
def test_the_judge_finds_faults(monkeypatch, fault, text):
    answer_read, withdraw = Machine.answer_read, Machine._withdraw

    def twice(self, pending):
        actions = answer_read(self, pending)
        return actions or [Complete(pending.object.fd, pending.msg_id)]

    def never(self, pending):
        return [] if pending.length == 4096 else answer_read(self, pending)

    def early(self, target):
        withdraw(self, target)
        return [CloseFd(target.fd)]

    def late(self, pending):
        answer_read(self, pending)
        return [Complete(pending.object.fd, pending.msg_id)]

    faults = {"twice": twice, "never": never, "late": late}
    if fault == "early":
        monkeypatch.setattr(Machine, "_withdraw", early)
    else:
        monkeypatch.setattr(Machine, "answer_read", faults[fault])
    with pytest.raises(Broken, match=text):
        _ = [drive(seed, 200, modern=True) for seed in range(100)]
