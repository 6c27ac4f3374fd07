"""Reply and Group over a socket that plays the kernel's side."""

import errno
import gc
import logging
import os
import socket
import threading
from pathlib import Path

import pytest

from fscache.channel import ReadRequest, Reply
from fscache.channel.fanotify import Group
from fscache.protocol import pack_response

REQUEST = ReadRequest(1, 2, 4096, 8192)


class Fake:
    def __init__(self):
        self.kernel, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self.group = Group(end.detach())

    def reply(self):
        fd = os.memfd_create("event")
        self.group.take(fd)
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
