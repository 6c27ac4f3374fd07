"""sd_notify against a real socket of ours: messages, addresses, and when they stop."""

import logging
import os
import socket
import threading

import pytest

from fscache.systemd import Notifier, Watchdog
from tests.leftovers import said


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    address = str(tmp_path / "notify") if request.param == "path" else f"@nydusd-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0", 1) if address[0] == "@" else address)
        receiver.settimeout(20)
        yield Manager(receiver, address)


class Manager:
    def __init__(self, receiver, address):
        self.receiver = receiver
        self.address = address

    def environment(self, **extra):
        return {"NOTIFY_SOCKET": self.address, "PATH": "/bin", **extra}

    def message(self):
        return self.receiver.recv(4096).decode()

    def is_quiet(self):
        self.receiver.setblocking(False)
        try:
            self.receiver.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.receiver.settimeout(20)
        return False


def test_messages(manager):
    notifier = Notifier.from_environment(manager.environment())
    notifier.ready("2 mounts\nat /mnt")
    notifier.stopping("going")
    notifier.alive("well")
    assert [manager.message() for _ in range(3)] == [
        "READY=1\nSTATUS=2 mounts at /mnt",
        "STOPPING=1\nSTATUS=going",
        "WATCHDOG=1\nSTATUS=well",
    ]


def test_variables_are_not_for_children(manager):
    environment = manager.environment(WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getpid()))
    notifier = Notifier.from_environment(environment)
    assert environment == {"PATH": "/bin"}
    assert notifier.watchdog == 3.0


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"},
    ],
)
def test_no_watchdog(manager, extra):
    notifier = Notifier.from_environment(manager.environment(**extra))
    assert notifier.watchdog == 0
    with Watchdog(notifier, lambda: "", lambda: ""):
        pass
    assert manager.is_quiet()


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_without_a_manager_nothing_happens(address, caplog):
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    notifier.ready("x")
    assert notifier.watchdog == 0
    assert len(said(caplog, "fscache.systemd")) == bool(address)


def test_a_manager_that_is_gone_or_full_is_a_warning(tmp_path, caplog):
    notifier = Notifier(str(tmp_path / "gone"))
    notifier.ready("x")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "full"))
        full = Notifier(str(tmp_path / "full"))
        while len(said(caplog, "fscache.systemd")) < 2:
            full.alive("x" * 100)
    told = said(caplog, "fscache.systemd")
    assert [record.levelno for record in told] == [logging.WARNING] * 2
    assert "READY=1" in caplog.text


def test_signs_of_life_only_while_alive(manager, caplog):
    notifier = Notifier(manager.address, 0.02)
    state = {"reason": ""}
    looked = threading.Semaphore(0)

    def reason():
        looked.release()
        return state["reason"]

    with Watchdog(notifier, reason, lambda: "well"):
        for _ in range(3):
            assert manager.message() == "WATCHDOG=1\nSTATUS=well"
        state["reason"] = "intake stuck"
        # Whoever looked before the change has told by the second look after it.
        while looked.acquire(blocking=False):
            pass
        for _ in range(2):
            assert looked.acquire(timeout=60)
        while not manager.is_quiet():
            pass
        for _ in range(5):
            assert looked.acquire(timeout=60)
        assert manager.is_quiet()
        state["reason"] = ""
        assert manager.message() == "WATCHDOG=1\nSTATUS=well"
    told = said(caplog, "fscache.systemd")
    told = [record for record in told if record.levelno == logging.CRITICAL]
    assert [record.getMessage() for record in told] == [
        "no sign of life for the watchdog: intake stuck"
    ]


def test_a_look_that_hangs_is_no_sign_of_life(manager):
    notifier = Notifier(manager.address, 0.02)
    hangs, released = threading.Event(), threading.Event()

    def reason():
        hangs.set()
        released.wait(20)
        return "was stuck"

    with Watchdog(notifier, reason, lambda: ""):
        assert hangs.wait(60)
        assert manager.is_quiet()
        released.set()
