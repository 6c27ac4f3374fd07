"""Wire, journal and loop of the holder, without a process or a kernel's group."""

import errno
import fcntl
import os
import socket
import struct
from types import SimpleNamespace

import pytest

from fscache.holder import link as link_module
from fscache.holder.journal import Journal, JournalError
from fscache.holder.link import (
    HeldRecord,
    HolderError,
    HolderLink,
    Inheritance,
    holder_directory,
)
from fscache.holder.process import Holder
from fscache.holder.wire import WireError, receive, send
from fscache.succession import recorded_entries
from tests.leftovers import no_open_file_left


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize("text", ["", "soon", "-1", "nan"])
def test_patience_is_a_number_of_seconds(text, tmp_path, monkeypatch):
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("NYDUSD_HOLDER_SECONDS", text)
    with pytest.raises(HolderError, match="no number of seconds"):
        HolderLink.open(tmp_path)


def test_messages_carry_descriptors(pair):
    ours, theirs = pair
    fd = os.memfd_create("carried")
    os.write(fd, b"content")
    send(ours, {"do": "keep"}, [fd, fd])
    send(ours, {"do": "drop", "text": "x" * 100_000})
    os.close(fd)
    message, descriptors = receive(theirs)
    assert message == {"do": "keep"}
    assert [os.pread(got, 7, 0) for got in descriptors] == [b"content"] * 2
    assert not any(os.get_inheritable(got) for got in descriptors)
    for got in descriptors:
        os.close(got)
    message, descriptors = receive(theirs)
    assert len(message["text"]) == 100_000
    assert descriptors == []


def test_end_between_messages_is_none(pair):
    ours, theirs = pair
    ours.close()
    assert receive(theirs) is None


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 100) + b"{}",
        struct.pack("<I", 1 << 30),
        struct.pack("<I", 2) + b"[]",
        struct.pack("<I", 2) + b"{]",
        b"\1",
    ],
)
def test_broken_messages_leave_no_descriptor(pair, data):
    ours, theirs = pair
    with no_open_file_left():
        socket.send_fds(ours, [data], [0])
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(WireError):
            receive(theirs)


def event(fd):
    head = struct.pack("=IBBHQii", 48, 3, 0, 24, 0x100000, fd, 1)
    return head + struct.pack("=BBHIQQ", 6, 0, 24, 0, 4096, 8192)


def test_journal_is_shared():
    journal = Journal.create(4)
    other = Journal(os.dup(journal.fd))
    slots = [journal.reserve() for _ in range(3)]
    for slot, fd in zip(slots[:2], (70, 71), strict=True):
        with journal.room(slot) as room:
            room[:48] = event(fd)
    journal.identify(slots[1], 5, 6)
    assert [tuple(taken)[1:] for taken in sorted(other.taken(), key=lambda one: one.fd)] == [
        (70, 0, 0, 4096, 8192),
        (71, 5, 6, 4096, 8192),
    ]
    successor = Journal(os.dup(journal.fd))
    assert sum(successor.reserve() is not None for _ in range(4)) == 2
    journal.clear(slots[1])
    assert [taken.fd for taken in other.taken()] == [70]
    # The file of an earlier event is no file of the next one.
    with journal.room(slots[1]) as room:
        room[:48] = event(72)
    assert {taken.fd: taken.inode for taken in other.taken()} == {70: 0, 72: 0}
    for one in (journal, other, successor):
        one.close()


@pytest.mark.parametrize("size", [0, 100, 129])
def test_other_memory_is_no_journal(size):
    fd = os.memfd_create("other")
    os.ftruncate(fd, size)
    with pytest.raises(JournalError):
        Journal(fd)
    os.close(fd)


def test_worker_that_is_killed_before_the_holder_has_started(pair, tmp_path):
    """Its reads fail in time: nothing is let go as if nobody waited."""
    ours, theirs = pair
    answers, group = os.pipe()
    journal = Journal.create(4)
    with journal.room(journal.reserve()) as room:
        room[:48] = event(70)
    send(ours, {"do": "hello", "pid": 1})
    message = {"do": "domain", "key": "/work", "serve": str(tmp_path / "serve")}
    send(ours, message, [group, os.open(tmp_path, os.O_RDONLY), journal.fd])
    ours.close()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "holder.sock"))
        listener.listen()
        Holder(listener, str(tmp_path), 0.1).run(theirs)
    os.close(group)
    assert os.read(answers, 64) == struct.pack("=iI", 70, 2 | errno.EIO << 24)
    os.close(answers)
    journal.close()


class _Clock:
    """Moves when somebody sleeps; what is due is then done."""

    def __init__(self, due, act):
        self.now, self.due, self.act = 0.0, due, act

    def module(self):
        return SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)

    def sleep(self, _):
        before, self.now = self.now, self.now + 1
        if before < self.due <= self.now:
            self.act()


@pytest.fixture
def ending(tmp_path, monkeypatch):
    """Hold the lock of a holder that listens no more; give its mount point and descriptor."""
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(tmp_path / "run"))
    directory = holder_directory(tmp_path / "mnt")
    directory.mkdir(parents=True, mode=0o700)
    directory.parent.chmod(0o700)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield tmp_path / "mnt", lock
    os.close(lock)


def test_start_waits_for_a_holder_that_ends_slowly(ending, monkeypatch):
    mountpoint, lock = ending
    clock = _Clock(25, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
    monkeypatch.setattr(link_module, "time", clock.module())
    theirs = []

    def spawn(self, listener, first, lock):
        theirs.append(os.dup(first))
        return 0

    monkeypatch.setattr(HolderLink, "_spawn", spawn)
    link, inheritance = HolderLink.open(mountpoint)
    assert clock.now == 25
    assert inheritance.leader is None
    link.close()
    os.close(*theirs)


def test_start_gives_up_a_holder_that_never_ends(ending, monkeypatch):
    mountpoint, _ = ending
    clock = _Clock(1000, lambda: None)
    monkeypatch.setattr(link_module, "time", clock.module())
    with pytest.raises(HolderError, match="the holder does not answer"):
        HolderLink.open(mountpoint)
    assert 30 < clock.now < 40


def test_a_successor_shows_what_clients_have_mounted():
    """Before it serves: not the private tmpfs, nor what was unmounted under its users."""
    inheritance = Inheritance()
    values = [
        {"kind": "tmpfs", "path": "", "mounted_at": 1.0},
        {"kind": "image", "path": "/a", "mounted_at": 2.0, "leaving": False},
        {"kind": "image", "path": "/b", "mounted_at": 3.0, "leaving": True},
        {"kind": "bind", "path": "/c", "mounted_at": 4.0},
        {"kind": "orphan", "erofs": "name"},
    ]
    inheritance.records = [HeldRecord(str(n), item, []) for n, item in enumerate(values)]
    entries = recorded_entries(inheritance)
    assert [(e.path, e.mounted_at, e.is_image) for e in entries] == [
        ("/a", 2.0, True),
        ("/c", 4.0, False),
    ]
