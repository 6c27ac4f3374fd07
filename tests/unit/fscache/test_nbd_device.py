"""The kernel is a fake that keeps and drops sockets as `drivers/block/nbd.c` does."""

import errno
import socket
import struct
import sys
import threading
import types
from enum import IntFlag
from pathlib import Path

import pytest
from fakes.nbd_client import DISC, NbdClient

from fscache.nbd import device as nbd_device
from fscache.nbd.device import KernelDevice, device_index, device_path
from fscache.nbd.disk import Disk
from fscache.nbd.errors import DeviceError
from fscache.nbd.server import DISK_FLAGS, DiskServer

SIZE = 1 << 20


class Kernel:
    """One device of a kernel: sockets, each alive or dead."""

    class ClientFlags(IntFlag):
        DISCONNECT_ON_CLOSE = 2

    def __init__(self, sysfs):
        self.sysfs = sysfs
        self.sockets = []
        self.busy = 0
        self.identifier = None
        self.settings = None
        self.client_flags = None
        self.changed = threading.Condition()

    def _take(self, fd):
        return NbdClient(socket.socket(fileno=socket.dup(fd)), handshake=False)

    def connect(self, index, sockets, *, identifier, **settings):
        if self.busy:
            self.busy -= 1
            raise DeviceError("busy", errno.EBUSY)
        self.index = 5 if index is None else index
        self.identifier, self.settings = identifier, settings
        self.sockets = [self._take(fd) for fd in sockets]
        place = self.sysfs / f"nbd{self.index}"
        place.mkdir()
        (place / "pid").write_text("1\n")
        (place / "backend").write_text(identifier + "\n")
        return self.index

    def reconfigure(self, index, *, identifier, sockets=(), client_flags=None):
        if not self.sockets or (index, identifier) != (self.index, self.identifier):
            raise DeviceError("invalid", errno.EINVAL)
        if client_flags is not None:
            self.client_flags = client_flags
        with self.changed:
            for fd in sockets:
                for number, old in enumerate(self.sockets):
                    if old is None:
                        self.sockets[number] = self._take(fd)
                        self.changed.notify_all()
                        break

    def disconnect(self, index):
        assert index == self.index
        for client in self.sockets:
            if client is not None:
                client.ask(DISC)
                client.close()
        self.sockets = []
        for name in ("pid", "backend"):
            (self.sysfs / f"nbd{index}" / name).unlink()

    def lose(self, number):
        """Do what is done after a request had no answer for too long."""
        client, self.sockets[number] = self.sockets[number], None
        client.close()

    def wait_whole(self):
        with self.changed:
            assert self.changed.wait_for(lambda: None not in self.sockets, 30)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    kernel = Kernel(tmp_path)
    monkeypatch.setitem(sys.modules, "fscache.nbd.netlink", kernel)
    monkeypatch.setattr("fscache.nbd.netlink", kernel, raising=False)
    monkeypatch.setattr(nbd_device, "_SYSFS", tmp_path)
    monkeypatch.setattr(nbd_device, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(nbd_device, "_BUSY_SECONDS", 0.1)
    yield kernel
    for client in kernel.sockets:
        if client is not None:
            client.close()


@pytest.fixture
def server():
    server = DiskServer(Disk(SIZE, 512, []), 2)
    yield server
    server.close()


def test_attach_tells_the_kernel_what_there_is(kernel, server):
    device = KernelDevice.attach(server, None, "it", 3)
    assert (device.index, device.path) == (5, Path("/dev/nbd5"))
    assert not device.has_ended
    assert len(kernel.sockets) == 3
    assert kernel.settings == {
        "size": SIZE,
        "block_size": 512,
        "flags": DISK_FLAGS,
        "timeout": 10,
        "dead_timeout": 60,
    }
    assert [client.read(7, 100) for client in kernel.sockets] == [bytes(100)] * 3
    device.detach_on_close()
    assert kernel.client_flags == 2
    device.detach()
    assert device.has_ended
    device.detach()


def test_a_busy_device_is_tried_again(kernel, server):
    kernel.busy = 2
    assert KernelDevice.attach(server, 7, "it", 1).index == 7
    kernel.busy = 1000
    with pytest.raises(DeviceError, match="busy"):
        KernelDevice.attach(server, 7, "it", 1)


def test_connections_that_break_are_replaced(kernel, server):
    ended = threading.Event()
    device = KernelDevice.attach(server, None, "it", 3, ended.set)
    for lost in ((1,), (0, 1, 2)):
        for number in lost:
            kernel.lose(number)
        kernel.wait_whole()
        assert [client.read(0, 10) for client in kernel.sockets] == [bytes(10)] * 3
    assert not ended.is_set()
    device.detach()
    assert not ended.is_set()


def test_somebody_else_detaches(kernel, server):
    ended = threading.Event()
    device = KernelDevice.attach(server, None, "it", 2, ended.set)
    kernel.disconnect(5)
    assert ended.wait(60)
    assert device.has_ended


def test_a_device_that_vanishes_ends_it_too(kernel, server):
    ended = threading.Event()
    device = KernelDevice.attach(server, None, "it", 2, ended.set)
    clients, kernel.sockets = kernel.sockets, []
    for client in clients:
        client.close()
    assert ended.wait(60)
    assert device.has_ended


def test_a_successor_goes_on(kernel, server):
    first = KernelDevice.attach(server, None, "it", 3)
    first.leave()
    server.close()
    for number, client in enumerate(kernel.sockets):
        with pytest.raises(ConnectionError):
            client.take(1)
        kernel.lose(number)
    successor = DiskServer(Disk(SIZE, 512, []), 2)
    device = KernelDevice.take_over(successor, 5, "it", 4)
    kernel.wait_whole()
    assert successor.connections == 3
    assert [client.read(0, 10) for client in kernel.sockets] == [bytes(10)] * 3
    kernel.lose(1)
    kernel.wait_whole()
    device.detach()
    successor.close()


def test_nobody_takes_over_what_is_served(kernel, server):
    KernelDevice.attach(server, None, "it", 2)
    with pytest.raises(DeviceError, match="another process serves it"):
        KernelDevice.take_over(server, 5, "it", 2)
    with pytest.raises(DeviceError, match="still has it open"):
        KernelDevice.take_over(server, 5, "other", 2)


def test_what_is_known_of_a_device(kernel, server):
    assert not nbd_device.is_connected(5)
    assert nbd_device.identifier_at(5) is None
    KernelDevice.attach(server, None, "it", 1)
    assert nbd_device.is_connected(5)
    assert nbd_device.identifier_at(5) == "it"


@pytest.mark.parametrize("name", ["/dev/nbd", "/dev/nbd1p1", "/dev/sda", "nbd0", "/dev/x/nbd0"])
def test_names_that_are_no_device(name):
    with pytest.raises(DeviceError, match="not an NBD device"):
        device_index(Path(name))


def test_names_of_devices():
    assert device_index(device_path(17)) == 17


def test_netlink_message():
    """The attributes of `linux/nbd-netlink.h`, byte by byte."""
    from fscache.nbd import netlink

    message = netlink.message()
    message["cmd"], message["version"] = 1, 1
    values = {"INDEX": 3, "SIZE_BYTES": 1 << 40, "TIMEOUT": None, "BACKEND_IDENTIFIER": "abc"}
    message["attrs"] = netlink._attributes({**values, "SOCKETS": netlink._sockets([5, 6])})
    message.encode()

    def attribute(kind, body):
        return struct.pack("=HH", 4 + len(body), kind) + body + bytes(-len(body) % 4)

    def number(kind, value, size):
        return attribute(kind, value.to_bytes(size, sys.byteorder))

    sockets = b"".join(attribute(1, number(1, fd, 4)) for fd in (5, 6))
    assert bytes(message.data[16:]) == (
        b"\1\1\0\0"
        + number(1, 3, 4)
        + number(2, 1 << 40, 8)
        + attribute(10, b"abc\0")
        + attribute(7, sockets)
    )


def test_machine_without_nbd():
    from fscache.nbd import netlink

    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has NBD")
    with pytest.raises(DeviceError, match="modprobe nbd") as caught:
        netlink.require_family()
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(DeviceError):
        netlink.disconnect(0)


def test_netlink_is_not_loaded_before_it_is_used():
    assert isinstance(nbd_device, types.ModuleType)
    assert "netlink" not in vars(nbd_device)
