"""Reply and Group over a socket that plays the kernel's side."""

import errno
import gc
import logging
import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from fscache.channel import ReadRequest, Reply
from fscache.channel.group import Group, GroupFull
from fscache.holder.journal import Journal
from fscache.protocol import pack_response

REQUEST = ReadRequest(1, 2, 4096, 8192)


def event(fd, offset=4096, length=8192):
    """What the kernel sends: metadata, then a range record."""
    head = struct.pack("=IBBHQii", 48, 3, 0, 24, 0x100000, fd, 1)
    return head + struct.pack("=BBHIQQ", 6, 0, 24, 0, offset, length)


class Fake:
    """A group whose kernel is a socket; `memory` is the journal, which outlives the group."""

    def __init__(self, slots=64):
        journal = Journal.create(slots)
        self.memory = os.dup(journal.fd)
        self.kernel, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        end.setblocking(False)
        self.group = Group(end.detach(), journal)

    def successor(self):
        """Another process with a copy of the group and the same journal."""
        return Group(os.dup(self.group.fd), Journal(os.dup(self.memory)))

    def read(self, number):
        self.kernel.send(event(number))
        return self.group.read()

    def reply(self):
        fd = os.memfd_create("event")
        assert self.read(fd).fd == fd
        return fd, Reply(self.group, fd, REQUEST)

    def answers(self):
        found = []
        while True:
            try:
                data = self.kernel.recv(64)
            except BlockingIOError:
                return found
            if not data:
                return found
            found.append(data)


@pytest.fixture
def fake():
    fake = Fake()
    yield fake
    fake.group.close()
    fake.kernel.close()
    os.close(fake.memory)


def is_open(fd):
    return Path(f"/proc/self/fd/{fd}").exists()


def test_allow_answers_and_closes(fake):
    fd, reply = fake.reply()
    assert reply.allow()
    assert fake.answers() == [pack_response(fd, allow=True)]
    assert not is_open(fd)


def test_deny_answers_and_logs(fake, caplog):
    caplog.set_level(logging.DEBUG)
    fd, reply = fake.reply()
    assert reply.deny(ValueError("bad digest"))
    assert fake.answers() == [pack_response(fd, allow=False)]
    assert not is_open(fd)
    assert "bad digest" in caplog.text
    assert "8192" in caplog.text


@pytest.mark.parametrize("second", ["allow", "deny", "close"])
@pytest.mark.parametrize("first", ["allow", "deny", "close"])
def test_first_answer_counts(fake, first, second):
    fd, reply = fake.reply()
    calls = {"allow": reply.allow, "deny": lambda: reply.deny("no"), "close": reply.close}
    calls[first]()
    assert not calls[second]()
    assert fake.answers() == [pack_response(fd, allow=first == "allow")]


def test_second_answer_leaves_a_reused_descriptor_alone(fake):
    fd, reply = fake.reply()
    reply.allow()
    other = os.memfd_create("other")
    try:
        assert other == fd
        assert not reply.deny("late")
        reply.close()
        assert is_open(other)
    finally:
        os.close(other)


def test_dropped_reply_denies(fake, caplog):
    fd, reply = fake.reply()
    del reply
    gc.collect()
    assert fake.answers() == [pack_response(fd, allow=False)]
    assert not is_open(fd)
    assert "dropped" in caplog.text


def test_exception_in_a_with_block_denies(fake):
    fd, reply = fake.reply()
    with pytest.raises(KeyError), reply:
        raise KeyError
    assert fake.answers() == [pack_response(fd, allow=False)]


def test_with_block_keeps_an_answer(fake):
    fd, reply = fake.reply()
    with reply:
        reply.allow()
    assert fake.answers() == [pack_response(fd, allow=True)]


def test_one_of_many_threads_answers(fake):
    for _ in range(50):
        fd, reply = fake.reply()
        barrier = threading.Barrier(4)
        results = []

        def answer(reply=reply, barrier=barrier, results=results):
            barrier.wait()
            results.append(reply.allow())

        threads = [threading.Thread(target=answer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [False, False, False, True]
        assert fake.answers() == [pack_response(fd, allow=True)]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EINVAL])
def test_refused_answer_raises_nothing_and_closes(fake, monkeypatch, caplog, code):
    fd, reply = fake.reply()

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, caplog.at_level(logging.DEBUG):
        patch.setattr(os, "write", refuse)
        assert reply.allow()
    assert not is_open(fd)
    assert ("killed" if code == errno.ENOENT else "refused") in caplog.text


def test_group_close_denies_what_waits(fake):
    fd, reply = fake.reply()
    done_fd, done = fake.reply()
    done.allow()
    group = fake.group.fd
    fake.group.close()
    assert fake.answers() == [pack_response(done_fd, True), pack_response(fd, False)]
    assert not is_open(group)
    # The number of the group may belong to another file by now: nothing is written to it.
    assert not reply.allow()
    assert not is_open(fd)
    fake.group.close()


def test_full_journal_takes_nothing():
    fake = Fake(slots=1)
    _, reply = fake.reply()
    fake.kernel.send(event(99))
    with pytest.raises(GroupFull):
        fake.group.read()
    reply.allow()
    assert fake.group.read().fd == 99
    # Number 99 is no descriptor of ours: nothing but the answer may be tried with it.
    fake.group.leave()
    fake.kernel.close()
    os.close(fake.memory)


def test_answered_events_leave_no_trace(fake):
    _, reply = fake.reply()
    reply.allow()
    assert Journal(os.dup(fake.memory)).taken() == []


def test_successor_answers_what_a_killed_worker_left(fake):
    fd, _killed = fake.reply()
    fake.group.identify(fd, 7, 8)
    other, _killed_too = fake.reply()
    successor = fake.successor()
    first, second = sorted(successor.inherit(), key=lambda item: not item.known)
    assert first.known
    assert first.reply.request == ReadRequest(7, 8, 4096, 8192)
    assert not second.known
    assert second.reply.request == ReadRequest(0, 0, 4096, 8192)
    first.reply.allow()
    second.reply.deny("no bytes")
    assert fake.answers() == [pack_response(fd, True), pack_response(other, False)]
    # The descriptors were those of the killed process.
    assert is_open(fd)
    assert is_open(other)
    assert Journal(os.dup(fake.memory)).taken() == []
    successor.close()


def test_number_of_an_inherited_event_is_taken_until_its_answer(fake):
    """The kernel would give the answer to a new event of this number: nobody filled its bytes."""
    fake.read(700)
    successor = fake.successor()
    (inherited,) = successor.inherit()
    assert successor.wait_readable(0)
    assert is_open(700)
    inherited.reply.allow()
    assert not is_open(700)
    assert fake.answers() == [pack_response(700, True)]
    fake.group.leave()
    successor.close()


def test_nothing_is_read_while_a_number_of_ours_waits(fake):
    fd, _killed = fake.reply()
    successor = fake.successor()
    (inherited,) = successor.inherit()
    assert not successor.wait_readable(0)
    inherited.reply.allow()
    assert successor.wait_readable(0)
    assert is_open(fd)
    successor.close()


def test_two_inherited_events_of_one_number_are_allowed_when_both_are_ready(fake):
    """A worker was killed between an answer and its note: one of the two waits no more."""
    fake.read(1000)
    fake.read(1000)
    successor = fake.successor()
    first, second = successor.inherit()
    first.reply.allow()
    assert fake.answers() == []
    second.reply.allow()
    assert fake.answers() == [pack_response(1000, True)]
    fake.group.leave()
    successor.close()


def test_inherited_events_are_denied_when_the_successor_ends(fake):
    fd, _reply = fake.reply()
    successor = fake.successor()
    inherited = successor.inherit()
    successor.close()
    assert fake.answers() == [pack_response(fd, False)]
    assert not inherited[0].reply.allow()
