"""What a service manager wants to hear (sd_notify(3)): readiness, status, and signs of life.

One datagram for each message, to the socket that the environment names. Nothing depends on
it: without a service manager, or with one that is gone, all of this does nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, MutableMapping

__all__ = ["Notifier", "Watchdog"]

logger = logging.getLogger(__name__)

_RECHECK_SECONDS = 1.0


class Notifier:
    """Sends messages to the service manager, if there is one (`present`).

    Args:
        address: path of its socket, or an abstract name behind `@`; empty for none.
        watchdog: seconds within which it wants to hear of us again and again; 0 for never.
    """

    def __init__(self, address: str, watchdog: float = 0.0) -> None:
        if address.startswith("@"):
            address = "\0" + address[1:]
        elif address and not address.startswith("/"):
            # Of other kinds (vsock) none is about a service of this machine.
            logger.warning("NOTIFY_SOCKET is not understood: %s", address)
            address = ""
        self._address = address
        self.present = bool(address)
        self.watchdog = watchdog if address else 0.0

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str]) -> Notifier:
        """Take the service manager's variables out: they are not for our own children."""
        address = environment.pop("NOTIFY_SOCKET", "")
        micros = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        meant = pid in ("", str(os.getpid()))
        return cls(address, int(micros) / 1e6 if micros.isdecimal() and meant else 0.0)

    def ready(self, status: str) -> None:
        """Tell that everything is mounted, with a line for people."""
        self._send("READY=1", _status(status))

    def stopping(self, status: str) -> None:
        """Tell that the end has begun."""
        self._send("STOPPING=1", _status(status))

    def alive(self, status: str) -> None:
        """Tell that we live; a service manager that does not hear it for too long kills us."""
        self._send("WATCHDOG=1", _status(status))

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        message = "\n".join(lines).encode("utf-8", "backslashreplace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                # A manager that does not read must not stop us.
                sender.setblocking(False)
                sender.sendto(message, self._address)
        except OSError as error:
            logger.warning("the service manager is not told (%s): %s", error, lines[0])


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.splitlines())


class Watchdog:
    """Tells the service manager that we live, as long as we do; a context manager.

    Looks twice within the time that the manager waits, and each second once we seem dead.

    Args:
        notifier: does nothing without a watchdog time.
        reason: returns what no longer works; empty when all is well. A call that hangs is
            a sign of death, too.
        status: returns the line for people.
    """

    def __init__(
        self, notifier: Notifier, reason: Callable[[], str], status: Callable[[], str]
    ) -> None:
        self._notifier = notifier
        self._reason = reason
        self._status = status
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._notifier.watchdog:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._notifier.watchdog:
            self._thread.join(_RECHECK_SECONDS)

    def _run(self) -> None:
        told = ""
        pause = 0.0
        while not self._stop.wait(pause):
            reason = self._reason()
            if not reason:
                self._notifier.alive(self._status())
            elif reason != told:
                logger.critical("no sign of life for the watchdog: %s", reason)
            told = reason
            pause = self._notifier.watchdog / 2
            if reason:
                pause = min(pause, _RECHECK_SECONDS)
