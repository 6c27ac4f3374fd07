"""One served image from start to stop, with the states that clients see.

What is opened in which order, and why, is in `fscache.runtime` and `fscache.image`: mark
before mount, and the group stays until the file system is gone (spec ondemand 5.4, 5.10).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from erofs import NydusError
from fscache.config import DaemonConfig
from fscache.domain import LazyUnsupported
from fscache.image import ImageOptions, ServedImage
from fscache.runtime import Runtime

__all__ = ["Daemon", "LazyUnsupported", "State", "StateError"]

logger = logging.getLogger(__name__)


class StateError(NydusError):
    """Something was asked for that the daemon's state does not permit."""


class State(StrEnum):
    """States as clients of the API see them (spec tools section 9)."""

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


class Daemon:
    """Serves one image at one mount point; `start`, `wait`, `stop`, or a context manager.

    Args:
        config: backend and cache directory.
        bootstrap: on a file system that EROFS can be mounted from (ext4, xfs, btrfs).
        mountpoint: an existing directory.
        eager: fetch and verify everything first, then mount; works without kernel events.
        directio: read data files past the page cache.
        progress: called with (bytes done, all bytes) while an eager start fetches.
    """

    def __init__(
        self,
        config: DaemonConfig,
        bootstrap: Path,
        mountpoint: Path,
        *,
        eager: bool = False,
        directio: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config
        self.bootstrap = bootstrap
        self.mountpoint = mountpoint
        self._eager = eager
        self._options = ImageOptions(directio=directio, progress=progress)
        self._state = State.INIT
        self._stack = ExitStack()
        self._stop_wanted = threading.Event()
        # True while nothing is mounted and an exception in the main thread does no harm.
        self.interruptible = False
        self.image: ServedImage | None = None

    @property
    def state(self) -> State:
        """Where the daemon is in its life."""
        return self._state

    def _enter(self, state: State) -> None:
        if (self._state, state) not in _TRANSITIONS:
            raise StateError(f"the daemon cannot go from {self._state} to {state}")
        logger.info("state %s -> %s", self._state, state)
        self._state = state

    def start(self) -> None:
        """Open everything and mount; on an error everything is closed again.

        Raises:
            LazyUnsupported: `eager` would work, or the text says why not even that.
            NydusError: bootstrap, backend, cache or mount point is at fault.
        """
        if self._state is not State.INIT:
            raise StateError(f"the daemon was started before, it is {self._state}")
        try:
            runtime = Runtime()
            self._stack.callback(runtime.close)
            self._enter(State.READY)
            # Only the fetch of an eager start takes long, and it comes before the mount.
            self._options.before_mount = self._hold_interrupts
            self.interruptible = self._eager
            self.image = runtime.mount(
                self.config, self.bootstrap, self.mountpoint, self._options, eager=self._eager
            )
        except BaseException:
            self.interruptible = False
            self._stack.close()
            self._state = State.STOPPED
            raise
        self._enter(State.RUNNING)
        logger.info("serving %s at %s", self.bootstrap, self.mountpoint)

    def _hold_interrupts(self) -> None:
        self.interruptible = False

    def request_stop(self) -> None:
        """Make `wait` return; safe from signal handlers and other threads."""
        self._stop_wanted.set()

    def wait(self) -> None:
        """Block until somebody asks for a stop."""
        self._stop_wanted.wait()

    def stop(self) -> None:
        """Unmount and close everything; a second call does nothing.

        A mount with users leaves the tree at once and is served on until the last of them
        is gone, however long that takes: they would read zeros otherwise.
        """
        if self._state is State.STOPPED:
            return
        self._stack.close()
        self._enter(State.STOPPED)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
