"""A block device of the kernel's NBD client, over sockets that this process serves.

When connections break, the kernel waits for others: those of this process, or of one that
comes after it when it was killed. Requests that were under way are sent again.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from fscache.nbd.errors import DeviceError
from fscache.nbd.server import DISK_FLAGS, DiskServer

__all__ = [
    "IDENTIFIER_PREFIX",
    "KernelDevice",
    "device_index",
    "device_path",
    "identifier_at",
    "identifier_of",
    "is_connected",
]

logger = logging.getLogger(__name__)

# A request without an answer is sent again after this. It bounds how long a reader waits who
# was being served when the worker was killed; whoever is slower loses the connection only.
RESEND_SECONDS = 10
# As long as a holder waits for a successor.
PATIENCE_SECONDS = 60
# Of everything that this program attaches.
IDENTIFIER_PREFIX = "nydusd-"
_BUSY_SECONDS = 2.0
_PAUSE_SECONDS = 0.1
_SYSFS = Path("/sys/block")
_NAME = re.compile(r"nbd(\d{1,6})")


def device_index(path: Path) -> int:
    """Return the number of `/dev/nbdN`; raise `DeviceError`."""
    match = _NAME.fullmatch(path.name)
    if match is None or path.parent != Path("/dev"):
        raise DeviceError("not an NBD device", errno.ENODEV, path=path, expected="/dev/nbd<number>")
    return int(match[1])


def device_path(index: int) -> Path:
    """Return the node of a device."""
    return Path(f"/dev/nbd{index}")


def _attribute(index: int, name: str) -> str | None:
    try:
        return (_SYSFS / f"nbd{index}" / name).read_text().strip()
    except OSError:
        return None


def is_connected(index: int) -> bool:
    """Return whether a device is attached to sockets, of whomever."""
    return _attribute(index, "pid") is not None


def identifier_at(index: int) -> str | None:
    """Return what an attached device was said to be, None when that cannot be told."""
    return _attribute(index, "backend")


def _is_dropped(connection: socket.socket) -> bool:
    """Return whether nobody has the other end."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def identifier_of(bootstrap: int) -> str:
    """Return what the disk of a bootstrap is called in the kernel; its content decides.

    `bootstrap` is an open descriptor.
    """
    with open(os.dup(bootstrap), "rb") as file:
        file.seek(0)
        return IDENTIFIER_PREFIX + hashlib.file_digest(file, "sha256").hexdigest()


class KernelDevice:
    """An attached device; made by `attach` or `take_over`.

    Args:
        server: what is served; not owned.
        index: of the device.
        identifier: of what is on it; a successor has to know it.
        detached: called once when somebody else has detached the device.
    """

    def __init__(
        self,
        server: DiskServer,
        index: int,
        identifier: str,
        detached: Callable[[], None] | None = None,
    ) -> None:
        self.index = index
        self.path = device_path(index)
        self._server = server
        self._identifier = identifier
        self._detached = detached
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._leaving = threading.Event()

    @classmethod
    def attach(
        cls,
        server: DiskServer,
        index: int | None,
        identifier: str,
        connections: int,
        detached: Callable[[], None] | None = None,
    ) -> KernelDevice:
        """Attach a device, that of a number or any free one; raise `DeviceError`."""
        # Imported here: pyroute2 takes long to load.
        from fscache.nbd import netlink

        ends = [socket.socketpair() for _ in range(connections)]
        end = time.monotonic() + _BUSY_SECONDS
        try:
            while True:
                try:
                    found = netlink.connect(
                        index,
                        [theirs.fileno() for _, theirs in ends],
                        size=server.disk.size,
                        block_size=server.disk.block_size,
                        flags=DISK_FLAGS,
                        identifier=identifier,
                        timeout=RESEND_SECONDS,
                        dead_timeout=PATIENCE_SECONDS,
                    )
                    break
                except DeviceError as error:
                    # Whoever only looks at a device has it, too, for a moment.
                    if error.errno != errno.EBUSY or time.monotonic() > end:
                        raise
                    time.sleep(_PAUSE_SECONDS)
        except BaseException:
            for ours, _ in ends:
                ours.close()
            raise
        finally:
            for _, theirs in ends:
                theirs.close()
        device = cls(server, found, identifier, detached)
        for ours, _ in ends:
            device._serve(ours)
        logger.info("attached %s: %d bytes", device.path, server.disk.size)
        return device

    @classmethod
    def take_over(
        cls,
        server: DiskServer,
        index: int,
        identifier: str,
        connections: int,
        detached: Callable[[], None] | None = None,
    ) -> KernelDevice:
        """Serve a device that a killed process has attached.

        Raises:
            DeviceError: it is not attached, has something else on it, or another process
                serves it.
        """
        device = cls(server, index, identifier, detached)
        end = time.monotonic() + _BUSY_SECONDS
        while not (taken := device._inherit(connections)):
            # A process that is just dying has its connections for a moment.
            if time.monotonic() > end:
                raise DeviceError("another process serves it", errno.EBUSY, path=device.path)
            time.sleep(_PAUSE_SECONDS)
        logger.info("took over %s with %d connections", device.path, taken)
        return device

    def _inherit(self, count: int) -> int:
        try:
            return self._reconnect(count)
        except DeviceError as error:
            if error.errno != errno.EINVAL:
                raise
            raise DeviceError(
                "was detached, and somebody still has it open", errno.EBUSY, path=self.path
            ) from error

    def _reconnect(self, count: int) -> int:
        """Give the kernel connections in place of dead ones; return how many it took.

        Raises `DeviceError`.
        """
        from fscache.nbd import netlink

        with ExitStack() as stack:
            ends = [socket.socketpair() for _ in range(count)]
            for ours, _ in ends:
                stack.callback(ours.close)
            try:
                netlink.reconfigure(
                    self.index,
                    identifier=self._identifier,
                    sockets=[theirs.fileno() for _, theirs in ends],
                )
            finally:
                for _, theirs in ends:
                    theirs.close()
            # The kernel does not tell, but holds what it took, the first ones.
            taken = [ours for ours, _ in ends if not _is_dropped(ours)]
            for ours in taken:
                self._serve(socket.socket(fileno=ours.detach()))
        return len(taken)

    def _serve(self, ours: socket.socket) -> None:
        self._server.start(ours, handshake=False, ended=self._lost)

    def _lost(self, *, orderly: bool) -> None:
        """Replace a connection that broke, as long as the device is attached."""
        if orderly:
            self._end()
            return
        while not self._leaving.wait(_PAUSE_SECONDS):
            try:
                if self._reconnect(1):
                    logger.warning("%s: a connection was replaced", self.path)
                    return
            except DeviceError as error:
                logger.info("%s: %s", self.path, error)
                self._end()
                return

    def _end(self) -> None:
        with self._lock:
            told = self._ended.is_set() or self._leaving.is_set()
            self._leaving.set()
            self._ended.set()
        if not told and self._detached is not None:
            self._detached()

    @property
    def has_ended(self) -> bool:
        """Whether the kernel does not have the device any more for what is served here."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait until it `has_ended`; return whether it has."""
        return self._ended.wait(seconds)

    def detach_on_close(self) -> None:
        """Have the kernel detach it when its last user closes it; raise `DeviceError`."""
        from fscache.nbd import netlink

        flags = netlink.ClientFlags.DISCONNECT_ON_CLOSE
        netlink.reconfigure(self.index, identifier=self._identifier, client_flags=flags)

    def release(self) -> None:
        """Have the kernel detach it as soon as it has no user; raise `DeviceError`."""
        self.detach_on_close()
        try:
            # The kernel looks when somebody closes it.
            os.close(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise DeviceError(
                f"cannot be opened ({error.strerror})", error.errno or errno.EIO, path=self.path
            ) from error

    def detach(self) -> None:
        """Detach the device; whoever still reads it gets errors. Raises `DeviceError`."""
        from fscache.nbd import netlink

        if self._ended.is_set():
            return
        self._leaving.set()
        # Somebody else's by now?
        if is_connected(self.index) and identifier_at(self.index) in (None, self._identifier):
            netlink.disconnect(self.index)
            logger.info("detached %s", self.path)
        self._ended.set()

    def leave(self) -> None:
        """Replace no connections any more: a successor does."""
        self._leaving.set()
