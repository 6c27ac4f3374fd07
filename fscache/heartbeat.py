"""Whether threads that go round and round still do, for a watchdog."""

from __future__ import annotations

import time

__all__ = ["BEAT_SECONDS", "Heartbeat"]

# How often a loop that has nothing to do should come by, and when it is taken for dead.
BEAT_SECONDS = 5.0
LATE_SECONDS = 30.0


class Heartbeat:
    """Moments at which each of some loops was last seen; a thread that ended is late, too.

    Args:
        name: what the loops do, for people.
        loops: how many there are.
    """

    def __init__(self, name: str, loops: int = 1) -> None:
        self._name = name
        self._seen = [time.monotonic()] * loops

    def beat(self, loop: int = 0) -> None:
        """Note that a loop has come by."""
        self._seen[loop] = time.monotonic()

    @property
    def trouble(self) -> str:
        """What is wrong, empty when no loop is late."""
        late = time.monotonic() - min(self._seen)
        return f"{self._name}: no move for {late:.0f} s" if late > LATE_SECONDS else ""
