"""A command in a guest on this terminal, as if it ran here."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vmlab import frames
from vmlab.errors import LabError
from vmlab.machine import Guest

__all__ = ["LEAVE", "interact"]

# Ctrl-], as in telnet: kills a guest that does not listen any more.
LEAVE = b"\x1d"
_END_OF_INPUT = b"\x04"
_READ_BYTES = 4096


def _size() -> tuple[int, int]:
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return (24, 80)
    return (size.lines, size.columns)


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Let every key through to the guest while the block runs."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class _Sender:
    """Passes on keys and sizes of the window, from a thread and from a signal handler."""

    def __init__(self, guest: Guest, fd: int) -> None:
        self._guest = guest
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, kind: int, payload: Any) -> None:
        with self._lock, contextlib.suppress(LabError):  # the receiving side tells of its end
            self._guest.send(kind, payload)

    def pump(self) -> None:
        """Send what is typed until its end, or until `LEAVE` kills the guest."""
        while data := os.read(self._fd, _READ_BYTES):
            if LEAVE in data:
                self._guest.kill()
                return
            self.send(frames.STDIN, data)
        self.send(frames.STDIN, _END_OF_INPUT)


def interact(guest: Guest, argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command in a terminal of the guest, connected to this one; return its status.

    Raises:
        GuestDied: the guest ended, also when `LEAVE` was typed.
    """
    fd = sys.stdin.fileno()
    sender = _Sender(guest, fd)
    guest.send_run(argv, env, None, _size())
    before = signal.signal(signal.SIGWINCH, lambda *_: sender.send(frames.RESIZE, _size()))
    threading.Thread(target=sender.pump, daemon=True).start()
    try:
        with _raw(fd):
            for kind, payload in guest.receive(None, "shell"):
                if kind == frames.STDOUT:
                    sys.stdout.buffer.write(payload)
                    sys.stdout.buffer.flush()
                elif kind == frames.EXIT:
                    break
    finally:
        signal.signal(signal.SIGWINCH, before)
    return int(payload["status"])
