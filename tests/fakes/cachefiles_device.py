"""A fake `/dev/cachefiles`: the test is the kernel, and files with direct I/O are its cache."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import socket

from fscache.cachefiles.device import Device
from fscache.cachefiles.protocol import Close, Open, Read

TIMEOUT = 60
PAGE = 4096


class FakeDevice(Device):
    """The daemon's end: messages and commands go through a socket, completions to the test."""

    def __init__(self, end, kernel):
        super().__init__(os.dup(end.fileno()))
        os.set_blocking(self.fileno(), False)
        self.kernel = kernel
        self.refuse_commands = False
        self.read_errors = []

    def write(self, text):
        if self.refuse_commands:
            raise OSError(errno.EINVAL, "refused")
        # As the kernel, which attaches the file by and by.
        super().write(text)

    def read(self):
        if self.read_errors:
            raise OSError(self.read_errors.pop(), "test")
        return super().read()

    def complete(self, fd, msg_id):
        self.kernel.completed.put((os.fstat(fd).st_ino, msg_id))


class FakeObject:
    """One opening; `fd` is the daemon's descriptor, `path` the kernel's file."""

    def __init__(self, object_id, path, fd):
        self.object_id, self.path, self.fd = object_id, path, fd
        self.inode = os.fstat(fd).st_ino

    @property
    def is_open(self):
        """Whether the daemon still has the descriptor."""
        try:
            return os.fstat(self.fd).st_ino == self.inode
        except OSError:
            return False

    def data(self):
        return self.path.read_bytes()

    def has(self, offset, length):
        """Whether a range is no hole."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                data = os.lseek(fd, offset, os.SEEK_DATA)
                return data == offset and os.lseek(fd, offset, os.SEEK_HOLE) >= offset + length
            return False
        finally:
            os.close(fd)


class FakeKernel:
    """The test's end."""

    def __init__(self, directory):
        self.directory = directory
        self.end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.end.settimeout(TIMEOUT)
        self.completed = queue.Queue()
        self.device = FakeDevice(theirs, self)
        theirs.close()
        self.number = 0
        self.opened = 0

    def close(self):
        self.end.close()

    def send(self, message):
        self.end.send(message.pack())

    def command(self):
        """Return the next command of the daemon."""
        return self.end.recv(4096)

    def next_id(self):
        self.number += 1
        return self.number

    def begin_open(self, scope, name, path=None):
        """Send an OPEN; return the object and the number of the request."""
        self.opened += 1
        path = path or self.directory / f"object{self.opened}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        opened = FakeObject(self.opened, path, fd)
        msg_id = self.next_id()
        self.send(Open(msg_id, opened.object_id, fd, b"erofs," + scope.encode(), name.encode()))
        return opened, msg_id

    def open(self, scope, name, path=None):
        """Open a file; return the object, and the size or negative errno of the answer."""
        opened, msg_id = self.begin_open(scope, name, path)
        number, _, answer = self.command().removeprefix(b"copen ").partition(b",")
        assert int(number) == msg_id
        if int(answer) > 0 and opened.path.stat().st_size != int(answer):
            os.truncate(opened.path, int(answer))
        return opened, int(answer)

    def begin_read(self, opened, offset, length):
        msg_id = self.next_id()
        self.send(Read(msg_id, opened.object_id, offset, length))
        return msg_id

    def answered(self):
        """Return inode and number of the next completion."""
        return self.completed.get(timeout=TIMEOUT)

    def read(self, opened, offset, length):
        """Ask once for a range; return its bytes, None when the first page is a hole then."""
        msg_id = self.begin_read(opened, offset, length)
        assert self.answered() == (opened.inode, msg_id)
        if not opened.has(offset, PAGE):
            return None
        with opened.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def withdraw(self, opened):
        self.send(Close(self.next_id(), opened.object_id))
