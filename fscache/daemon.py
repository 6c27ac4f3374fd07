"""One served image from start to stop: what is opened in which order, and closed in reverse.

The order is the safety: mark before mount, and the group stays until the file system is
gone, because a group that closes turns holes into zeros (spec ondemand 5.4, 5.10).
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from erofs import Bootstrap, CorruptStructure, NydusError, error_context, open_bootstrap
from erofs.rafs import BlobEntry, ChunkInfo
from fscache.backend import Backend, open_backend
from fscache.backend.retry import retry_policy
from fscache.cachedblob import CachedBlob
from fscache.channel.eager import mount_complete
from fscache.channel.fanotify import FanotifyChannel
from fscache.config import DaemonConfig
from fscache.fetcher import Fetcher, FetcherOptions
from fscache.metrics import CacheMetrics
from fscache.mount import ErofsMount, MountBusy, MountError, mount_erofs
from fscache.probe import lazy_supported, probe
from fscache.service import Service
from fscache.store import ServeDirectory, remove_stale

__all__ = ["Daemon", "LazyUnsupported", "State", "StateError"]

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.05
_TELL_SECONDS = 10.0


class StateError(NydusError):
    """Something was asked for that the daemon's state does not permit."""


class LazyUnsupported(NydusError):
    """This machine cannot read lazily; the text names what is missing."""


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


def _stop_events(channel: FanotifyChannel, blob: CachedBlob) -> None:
    """Tell the kernel that a blob is complete; at the end of the daemon nobody asks any more."""
    if channel.fileno() >= 0:
        channel.ignore(blob.cache.fileno())


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the bootstrap says about one blob."""

    entry: BlobEntry
    chunks: list[ChunkInfo]


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
        self._directio = directio
        self._progress = progress
        self._state = State.INIT
        self._stack = ExitStack()
        self._stop_wanted = threading.Event()
        # True while nothing is mounted and an exception in the main thread does no harm.
        self.interruptible = False
        self.mounted_at: float | None = None
        self.backend: Backend | None = None
        self.cache_metrics = CacheMetrics(config.work_dir)

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
            self._start()
        except BaseException:
            self._stack.close()
            self._state = State.STOPPED
            raise
        self._enter(State.RUNNING)
        logger.info("serving %s at %s", self.bootstrap, self.mountpoint)

    def _start(self) -> None:
        # Looked at first: nobody wants to fetch an image and then hear of a wrong path.
        if not self.mountpoint.is_dir():
            raise MountError("mount point is not a directory", errno.ENOTDIR, path=self.mountpoint)
        plans = read_plans(self.bootstrap)
        self._prepare_work_dir()
        self.backend = open_backend(self.config.backend)
        self._stack.callback(self.backend.close)
        fetcher = Fetcher(FetcherOptions(retry=retry_policy(self.config.backend)))
        self._stack.callback(fetcher.close, CLOSE_SECONDS)
        self._enter(State.READY)
        mount = (
            self._start_eager(plans, fetcher) if self._eager else self._start_lazy(plans, fetcher)
        )
        self.mounted_at = time.time()
        self._stack.callback(self._end_mount, mount)

    def _prepare_work_dir(self) -> None:
        work_dir = self.config.work_dir
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"cache directory cannot be made ({error.strerror})", path=work_dir
            ) from error
        if not self._eager:
            verdict = lazy_supported(probe(work_dir))
            if not verdict.ok:
                raise LazyUnsupported(
                    f"lazy reading is not possible here: {verdict.detail}"
                    " (--eager fetches everything first)"
                )

    def _open_blob(
        self,
        plan: _Plan,
        fetcher: Fetcher,
        on_complete: Callable[[CachedBlob], None] | None = None,
    ) -> CachedBlob:
        if self.backend is None:
            raise StateError("the backend is not open")
        opened: list[CachedBlob] = []
        blob = CachedBlob.open(
            self.config.work_dir,
            plan.entry,
            plan.chunks,
            self.backend.open(plan.entry.id),
            self.cache_metrics,
            on_complete=(lambda: on_complete(opened[0])) if on_complete else None,
        )
        opened.append(blob)
        return blob

    def _start_lazy(self, plans: list[_Plan], fetcher: Fetcher) -> ErofsMount:
        for path in remove_stale(self.config.work_dir):
            logger.info("removed %s of a daemon that is gone", path)
        store = ServeDirectory.create(self.config.work_dir)
        self._stack.callback(store.remove)
        service = Service(fetcher)
        channel = FanotifyChannel(store.directory, service.handle)
        self._stack.callback(channel.close)
        devices = []
        for plan in plans:
            blob = self._open_blob(plan, fetcher, partial(_stop_events, channel))
            service.add(blob)
            fetcher.attach(blob)
            devices.append(store.link(blob.blob_id, blob.path))
        mount = mount_erofs(self.bootstrap, devices, self.mountpoint, directio=self._directio)
        if mount.name is None:
            # After a lazy unmount nobody could tell when the last user is gone.
            mount.unmount()
            raise LazyUnsupported("lazy reading needs /sys/fs/erofs: is sysfs mounted at /sys?")
        return mount

    def _start_eager(self, plans: list[_Plan], fetcher: Fetcher) -> ErofsMount:
        blobs = []
        for plan in plans:
            blob = self._open_blob(plan, fetcher)
            fetcher.attach(blob)
            blobs.append(blob)
        everything = sum(sum(blob.map.uncompressed_sizes) for blob in blobs)
        before = 0
        self.interruptible = True
        for blob in blobs:
            fetcher.fetch_all(blob, self._fetched(before, everything))
            before += sum(blob.map.uncompressed_sizes)
        self.interruptible = False
        return mount_complete(
            self.bootstrap,
            [blob.path for blob in blobs],
            self.mountpoint,
            directio=self._directio,
        )

    def _fetched(self, before: int, everything: int) -> Callable[[int, int], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda done, _: progress(before + done, everything)

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

    def _end_mount(self, mount: ErofsMount) -> None:
        try:
            mount.unmount()
        except MountBusy:
            mount.detach()
            logger.warning(
                "%s is in use: unmounted lazily, served on until its last user ends",
                mount.mountpoint,
            )
        if self._eager:
            # Complete files need nobody; what was detached ends with its users by itself.
            return
        told = time.monotonic()
        while not mount.is_gone():
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                logger.warning("%s still has users, waiting for them", mount.mountpoint)
            time.sleep(_POLL_SECONDS)

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


def read_plans(path: Path) -> list[_Plan]:
    """Read what a bootstrap says about its blobs, in device order.

    Raises:
        FormatError: broken, or device table and blob table contradict each other.
        StateError: the file cannot be opened.
    """
    try:
        image = open_bootstrap(path)
    except OSError as error:
        raise StateError(f"bootstrap cannot be opened ({error.strerror})", path=path) from error
    with image, error_context(path=path):
        _check_devices(image)
        plans = [_Plan(entry, []) for entry in image.blobs]
        for info in image.chunk_infos:
            plans[info.blob_index].chunks.append(info)
        return plans


def _check_devices(image: Bootstrap) -> None:
    """Refuse sizes that differ: the kernel goes by the one table, the cache by the other."""
    for entry, slot in zip(image.blobs, image.devices, strict=True):
        if slot.blocks * image.block_size != entry.uncompressed_size:
            raise CorruptStructure(
                "device slot and blob table differ in size",
                blob=entry.id,
                expected=entry.uncompressed_size,
                got=slot.blocks * image.block_size,
            )
        if slot.tag.rstrip(b"\0") != entry.blob_id:
            raise CorruptStructure("device slot and blob table name different blobs", blob=entry.id)
