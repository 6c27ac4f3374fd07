"""Processes that are forked for a part of the work, and end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, cast

from builder.errors import BuildError

__all__ = ["can_fork", "end_child", "fork_child"]

# <linux/prctl.h>
_SET_DEATH_SIGNAL = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def can_fork() -> bool:
    """Tell whether the process may be forked: of several threads, only one would go on."""
    return threading.active_count() == 1


def fork_child(work: Callable[[], object]) -> int:
    """Fork a process and return its id, for `end_child`.

    Args:
        work: what the process does. It is killed when its parent is; where that is found out
            first, `ConnectionError` is no failure.

    Raises:
        BuildError: there can be no more processes.
    """
    parent = os.getpid()
    # Until the child has no handlers of the parent's any more.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
        if not pid:
            _be_child(work, parent, blocked)
    except OSError as error:
        raise BuildError(f"no process can be started ({error.strerror})") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def _be_child(
    work: Callable[[], object], parent: int, blocked: set[int | signal.Signals]
) -> NoReturn:
    status = 1
    try:
        # Ctrl-C is for the parent, which ends its children.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Who waits for the writer of a FIFO would not see that nobody listens any more.
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        with suppress(ConnectionError):
            if os.getppid() == parent:
                work()
        status = 0
    finally:
        if status:
            sys.excepthook(*cast(Any, sys.exc_info()))
        os._exit(status)


def end_child(pid: int) -> None:
    """End a process, whatever it does, and wait for that."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
