"""The states of a daemon as clients see them (spec tools section 9), and the wish to stop."""

from __future__ import annotations

import logging
import threading
from enum import StrEnum

from erofs.errors import NydusError

__all__ = ["Lifecycle", "State", "StateError"]

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class StateError(NydusError):
    """Something was asked for that the daemon's state does not permit."""


class State(StrEnum):
    """Where a daemon is in its life."""

    INIT = "INIT"
    READY = "READY"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"


_TRANSITIONS = {
    (State.INIT, State.READY),
    (State.READY, State.RUNNING),
    (State.RUNNING, State.STOPPED),
    (State.READY, State.STOPPED),
    (State.INIT, State.STOPPED),
}


class Lifecycle:
    """A state that only moves along the table, and an event that ends `wait`."""

    def __init__(self) -> None:
        self._state = State.INIT
        self._stop_wanted = threading.Event()

    @property
    def state(self) -> State:
        """Where the daemon is in its life."""
        return self._state

    def enter(self, state: State) -> None:
        """Go to a state; raise `StateError` when there is no way."""
        if (self._state, state) not in _TRANSITIONS:
            raise StateError(f"the daemon cannot go from {self._state} to {state}")
        logger.info("state %s -> %s", self._state, state)
        self._state = state

    def require(self, *states: State) -> None:
        """Raise `StateError` unless the daemon is in one of the states."""
        if self._state not in states:
            raise StateError(f"the daemon is {self._state}, not {' or '.join(states)}")

    def request_stop(self) -> None:
        """Make `wait` return; safe from signal handlers and other threads."""
        self._stop_wanted.set()

    def wait(self) -> None:
        """Block until somebody asks for a stop."""
        # The kernel gives the second of two signals to any thread, which does not end a wait of
        # the main thread: its handler runs when that one comes by.
        while not self._stop_wanted.wait(_LOOK_SECONDS):
            pass
