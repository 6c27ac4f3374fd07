"""`nydusd singleton`: a process with the API and a registry of blobs, and no mount point.

With `--fscache` what is registered is served to the kernel's cachefiles (`fscache.cachefiles`),
and clients mount it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from erofs.values import EMPTY, Value, field
from fscache.blobentry import BlobEntry
from fscache.blobs import BlobRegistry
from fscache.events import ErrorRing
from fscache.holder.link import HolderLink, Inheritance
from fscache.lifecycle import Lifecycle, State, StateError
from fscache.supervisor import receive_state, send_state

if TYPE_CHECKING:
    from fscache.cachefiles.service import KernelService

__all__ = ["SingletonDaemon", "SingletonOptions"]

logger = logging.getLogger(__name__)

# For how long a predecessor may answer what it has begun.
_HANDOVER_SECONDS = 15.0


class SingletonOptions(Value):
    """What a singleton daemon begins with.

    Args:
        id: name of the instance, as clients gave it.
        supervisor: socket of a client that keeps state.
        blobs: entries to register first.
        fscache: directory for the kernel's cache; None when it is not to be served.
        tag: name of that cache.
        threads: how many fill it at once.
        environment: adds to the configurations of entries.
    """

    id: str | None = None
    supervisor: str | None = None
    blobs: tuple[BlobEntry, ...] = ()
    fscache: Path | None = None
    tag: str | None = None
    threads: int = 4
    environment: Mapping[str, str] = field(default=EMPTY, repr=False)


class SingletonDaemon(Lifecycle):
    """Keeps a registry of blobs, and serves it to the kernel's cachefiles where that is wanted."""

    # Nothing it does takes long.
    interruptible = False

    def __init__(self, options: SingletonOptions) -> None:
        super().__init__()
        self.options = options
        self.blobs = BlobRegistry()
        # Filled when a command line has attached it to the log.
        self.events = ErrorRing()
        self._service: KernelService | None = None
        self._link: HolderLink | None = None
        self._inheritance: Inheritance | None = None
        self._leaves = False

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"{self.state}: {self._service.summary if self._service else 'no mounts'}"

    @property
    def trouble(self) -> str:
        """What no longer works, for a watchdog; empty when all is well."""
        return self._service.trouble if self._service is not None else ""

    # Life

    def start(self) -> None:
        """Serve, or go on with what a killed daemon served, and register the first blobs.

        Raises `NydusError`; then nothing is left.
        """
        self.require(State.INIT)
        if self.options.fscache is not None:
            self._serve(self.options.fscache, self._find_holder(self.options.fscache, join=False))
        self._begin()

    def _find_holder(self, directory: Path, *, join: bool) -> Inheritance:
        link, inheritance = HolderLink.open(directory, join=join)
        link.on_yield = self.request_leave
        self._link = link
        return inheritance

    def _serve(self, directory: Path, inheritance: Inheritance) -> None:
        # Imported here: a daemon of another kind needs nothing of it.
        from fscache.cachefiles.service import CacheOptions, KernelService

        link = self._link
        if link is None:
            raise StateError("there is no holder")
        options = CacheOptions(directory, self.options.tag, self.options.threads)
        inherits = bool(inheritance.records)
        try:
            self._service = KernelService(
                options, self.blobs, self.options.environment, link, inheritance
            )
        except BaseException:
            link.close(leave=inherits)
            raise

    def _begin(self) -> None:
        try:
            for entry in self.options.blobs:
                self.add(entry)
        except BaseException:
            self._end()
            raise
        if self.state is State.INIT:
            self.enter(State.READY)
        self.enter(State.RUNNING)
        if self._service is None:
            logger.info("serving the API only")

    def stop(self) -> None:
        """End; what is mounted is left to a successor, where there can be one."""
        if self.state is not State.STOPPED:
            self._end()
            self.enter(State.STOPPED)

    def _end(self) -> None:
        service, self._service = self._service, None
        inheritance, self._inheritance = self._inheritance, None
        leave = inheritance is not None
        if inheritance is not None:
            inheritance.close()
        if service is not None:
            leave = service.close(leave=self._leaves)
        if self._link is not None:
            self._link.close(leave=leave)

    # Blobs

    def add(self, entry: BlobEntry) -> None:
        """Register an entry; raise `NydusError`."""
        if self._service is not None:
            self._service.add(entry)
        elif self.options.fscache is None:
            self.blobs.add(entry)
        else:
            raise StateError(f"the daemon is {self.state}: nothing is served yet")

    def remove(self, domain_id: str, name: str) -> None:
        """Drop an entry, or with an empty name all of a domain; unknown ones are no error."""
        if self._service is not None:
            self._service.remove(domain_id, name)
        else:
            self.blobs.remove(domain_id, name)

    def cull(self, name: str) -> bool:
        """Remove an idle blob from the kernel's cache; return False where none is served.

        Raises `CachefilesError` when it is in use.
        """
        if self._service is None:
            return False
        self._service.cull(name)
        return True

    # Succession

    @property
    def _supervisor(self) -> Path | None:
        supervisor = self.options.supervisor
        return Path(supervisor) if supervisor is not None else None

    def send_state(self) -> bool:
        """Tell the supervisor how a successor finds what is served; False when nothing is.

        Raises `SupervisorError`.
        """
        if self._service is None or self._link is None:
            return False
        if not self._service.can_be_taken_over:
            raise StateError("no successor could go on: this kernel has no 'restore' (Linux 6.8)")
        send_state(self._supervisor, self._link.directory)
        return True

    def take_over(self) -> None:
        """Find out what a predecessor has left, or still has; raise `NydusError`."""
        self.require(State.INIT)
        if self.options.fscache is None:
            raise StateError("nothing can be taken over without --fscache")
        directory = receive_state(self._supervisor)
        inheritance = self._find_holder(self.options.fscache, join=True)
        if self._link is None or self._link.directory != directory:
            raise StateError("the supervisor's state is of a daemon with another --fscache")
        self._inheritance = inheritance
        self.enter(State.READY)

    def start_taken_over(self) -> None:
        """Serve what was taken over, as soon as the predecessor has let go of it.

        Raises:
            StateError: nothing was taken over, or the predecessor does not let go.
            NydusError: as `start`; then the holder waits for another successor.
        """
        self.require(State.READY)
        inheritance, link = self._inheritance, self._link
        if inheritance is None or link is None or self.options.fscache is None:
            raise StateError("nothing was taken over")
        if not link.lead(_HANDOVER_SECONDS):
            raise StateError(f"process {inheritance.leader} does not let go of its cache")
        if inheritance.leader is not None:
            # Asked again, now that nobody changes it any more.
            inheritance.close()
            link.close(leave=True)
            inheritance = self._find_holder(self.options.fscache, join=False)
        self._inheritance = None
        self._serve(self.options.fscache, inheritance)
        self._begin()

    def request_leave(self) -> None:
        """Make `wait` return, for a stop that leaves everything to a successor."""
        self._leaves = True
        self.request_stop()
