"""`nydusd nbd`: one image as a block device, or at a socket for who attaches by itself."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from erofs import open_bootstrap
from erofs.inlined import blob_ids
from erofs.values import Value
from fscache.backend import open_backend
from fscache.backend.retry import retry_policy
from fscache.cache.bootfile import mountable_bootstrap
from fscache.cache.plan import PlanError
from fscache.config import DaemonConfig
from fscache.events import ErrorRing
from fscache.fetch.demand import Demand
from fscache.fetch.fetcher import Fetcher
from fscache.image import ServedImage
from fscache.lifecycle import Lifecycle, State
from fscache.mounts.mount import DEFAULT_READ_AHEAD_KB, set_read_ahead
from fscache.nbd.device import (
    KernelDevice,
    device_index,
    identifier_at,
    identifier_of,
    is_connected,
)
from fscache.nbd.disk import Disk, image_disk, read_disk_plan, tar_disk
from fscache.nbd.errors import DeviceError
from fscache.nbd.listener import SocketListener
from fscache.nbd.server import DiskServer
from fscache.sharing import Domain, prepare_work_dir

__all__ = ["NbdDaemon", "NbdOptions"]

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
_TELL_SECONDS = 10.0


class NbdOptions(Value):
    """What is served, and where: `device` or `socket`, or both.

    Args:
        bootstrap: of the image, or a blob that has it inside.
        config: backend and cache directory.
        device: `/dev/nbd<number>`.
        socket: a path.
        threads: that answer, and connections of the device.
        id: name of the instance.
        supervisor: told to those who ask; the kernel keeps the device for a successor.
    """

    bootstrap: Path
    config: DaemonConfig
    device: Path | None = None
    socket: Path | None = None
    threads: int = 4
    id: str | None = None
    supervisor: str | None = None


class NbdDaemon(Lifecycle):
    """Serves one image as a disk; see `Lifecycle` for states."""

    # Nothing before the device takes long.
    interruptible = False

    def __init__(self, options: NbdOptions) -> None:
        super().__init__()
        self.options = options
        self._stack = ExitStack()
        self._fetcher: Fetcher | None = None
        self._server: DiskServer | None = None
        self._device: KernelDevice | None = None
        # Of the image, once it is open; None for tarfs, which is not cached.
        self.image: ServedImage | None = None
        # Filled when a command line has attached it to the log.
        self.events = ErrorRing()

    @property
    def trouble(self) -> str:
        """What no longer works, for a watchdog; empty when reads are answered."""
        return self._fetcher.trouble if self._fetcher is not None else ""

    @property
    def summary(self) -> str:
        """One line for people."""
        count = self._server.connections if self._server is not None else 0
        places = (self.options.device, self.options.socket)
        where = " and ".join(str(place) for place in places if place is not None)
        return f"{self.state}: {where}, {count} connections"

    def start(self) -> None:
        """Serve; go on with the device if a killed daemon has attached it.

        Raises `NydusError`; then nothing is left.
        """
        self.require(State.INIT)
        try:
            self._begin()
        except BaseException:
            self._stack.close()
            self.enter(State.STOPPED)
            raise
        self.enter(State.RUNNING)

    def _begin(self) -> None:
        options = self.options
        index = device_index(options.device) if options.device is not None else None
        self._fetcher = fetcher = Fetcher()
        self._stack.callback(fetcher.close, _CLOSE_SECONDS)
        stop = threading.Event()
        disk, bootstrap = self._open(fetcher, stop)
        self._server = server = DiskServer(disk, options.threads)
        self._stack.callback(server.close)
        self._stack.callback(stop.set)
        self.enter(State.READY)
        if options.socket is not None:
            self._stack.callback(SocketListener(server, options.socket).close)
        if index is not None:
            self._device = self._attach(server, index, identifier_of(bootstrap))
        logger.info("serving %s: %s", options.bootstrap, self.summary)

    def _open(self, fetcher: Fetcher, stop: threading.Event) -> tuple[Disk, int]:
        """Return the disk, and the descriptor of its metadata."""
        config, named = self.options.config, self.options.bootstrap
        prepare_work_dir(config.work_dir)
        path = mountable_bootstrap(named, config.work_dir)
        plan = read_disk_plan(path)
        with open_bootstrap(path) as bootstrap:
            tars = blob_ids(bootstrap, named) if bootstrap.is_tarfs else None
        if tars is not None:
            backend = open_backend(config.backend)
            self._stack.callback(backend.close)
            fd = _open_file(path)
            self._stack.callback(os.close, fd)
            readers = [backend.open(blob_id) for blob_id in tars]
            return tar_disk(plan, fd, readers, retry_policy(config.backend), stop), fd
        self.image = image = ServedImage(config, named, Path("/"))
        domain = Domain(config.work_dir.absolute(), fetcher)
        blobs = image.open_blobs(domain, fetcher)
        self._stack.callback(image.close)
        fd = image.bootstrap_fd
        return image_disk(plan, fd, blobs, Demand(fetcher), stop), fd

    def _attach(self, server: DiskServer, index: int, identifier: str) -> KernelDevice:
        begin: Callable[..., KernelDevice] = KernelDevice.attach
        if is_connected(index):
            if identifier_at(index) not in (None, identifier):
                raise DeviceError("device has something else on it", path=self.options.device)
            begin = KernelDevice.take_over
        device = begin(server, index, identifier, self.options.threads, self.request_stop)
        set_read_ahead(None, device.path.stat().st_rdev, DEFAULT_READ_AHEAD_KB)
        return device

    def stop(self) -> None:
        """Detach the device, as soon as nobody has it open, and end."""
        if self.state is State.STOPPED:
            return
        if self._device is not None:
            self._release(self._device)
        self._stack.close()
        self.enter(State.STOPPED)

    def _release(self, device: KernelDevice) -> None:
        if device.has_ended:
            logger.info("%s was detached by somebody else", device.path)
            return
        try:
            device.release()
        except DeviceError as error:
            logger.error("%s", error)
            return
        while not device.wait(_TELL_SECONDS):
            logger.warning("%s is in use, waiting", device.path)
        logger.info("detached %s", device.path)


def _open_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PlanError(f"bootstrap cannot be opened ({error.strerror})", path=path) from error
