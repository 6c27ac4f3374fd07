"""The fanotify channel: pre-content events of the files in one marked directory.

Rules that this design stands on (spec ondemand 5.3 to 5.10, all tried on 6.18):

- The mark comes before the mounts, and the group is closed after the last mount is gone:
  a group that closes *allows* what waits, and holes are read as zeros from then on.
- A file raises events when it is opened through the marked directory; the same inode,
  opened through another hard link outside of it, raises none. So data are written through
  the unmarked name, also while mounts exist.
- A thread of this process that reads, writes, maps or truncates a file through the marked
  directory, or reads a served mount, waits for this process to answer itself. With the
  GIL held (`mmap.mmap`) it stops every thread. Do neither.
- Marks and ignore marks belong to one group: two daemons that share a data file through
  directories of their own do not see each other's events.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from pathlib import Path

from erofs.errors import NydusError
from fscache import kernel
from fscache.channel import ChannelError, Handler, ReadRequest, Reply
from fscache.channel.group import Group, GroupFull, Inherited
from fscache.heartbeat import BEAT_SECONDS, Heartbeat
from fscache.holder.journal import Journal
from fscache.protocol import Event, KernelMessageError

__all__ = ["FanotifyChannel", "open_group"]

logger = logging.getLogger(__name__)

_GROUP_FLAGS = (
    kernel.FAN_CLASS_PRE_CONTENT
    | kernel.FAN_CLOEXEC
    | kernel.FAN_NONBLOCK
    | kernel.FAN_UNLIMITED_QUEUE
    | kernel.FAN_UNLIMITED_MARKS
)
# 64-bit kernels add O_LARGEFILE themselves (`force_o_largefile`), and no other is supported.
# Nothing is written through these descriptors, and on a file system that has turned read-only
# the kernel could not open them for that: reads of what is there would fail.
_EVENT_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_FAILURE_PAUSE_MS = 20

_HINTS = {
    errno.EPERM: "root (CAP_SYS_ADMIN) is needed for fanotify pre-content events",
    errno.EINVAL: "Linux 6.14 with fanotify pre-content events (FAN_PRE_ACCESS) is needed",
    errno.ENOSYS: "a kernel with fanotify (CONFIG_FANOTIFY_ACCESS_PERMISSIONS) is needed",
    errno.EOPNOTSUPP: "this file system takes no pre-content marks: use ext4, xfs or btrfs",
}


def _channel_error(error: OSError, path: Path | None) -> ChannelError:
    failure = ChannelError(
        f"{_HINTS.get(error.errno or 0, 'fanotify refused')} ({error})", path=path
    )
    failure.errno = error.errno or errno.EIO
    return failure


def open_group() -> int:
    """Create a pre-content group, non-blocking; the caller owns the descriptor.

    Raises:
        ChannelError: no privilege, or no such kernel.
    """
    try:
        return kernel.fanotify_init(_GROUP_FLAGS, _EVENT_FLAGS)
    except OSError as error:
        raise _channel_error(error, None) from error


def _mark(group: int, store: Path) -> None:
    mode = store.stat().st_mode
    if mode & 0o077:
        raise ChannelError(
            "others may read the store, and their reads would download",
            path=store,
            expected="mode 0700",
            got=f"{mode & 0o7777:#o}",
        )
    mask = kernel.FAN_PRE_ACCESS | kernel.FAN_EVENT_ON_CHILD
    try:
        kernel.fanotify_mark(group, kernel.FAN_MARK_ADD, mask, store)
    except OSError as error:
        raise _channel_error(error, store) from error


class FanotifyChannel:
    """Serve the reads of all files that EROFS opens through one marked directory.

    Events flow as soon as `start` returns; mount only then.

    Args:
        store: the directory to mark, of mode 0700; its files are hard links to the data.
        handler: called for each event, see `fscache.channel.Handler`.
        threads: number of intake threads; they only read events and call the handler.
        inherited: group and journal of a killed worker, owned from now on; made when missing.

    Raises:
        ChannelError: the kernel, the file system or the privilege does not allow it.
    """

    def __init__(
        self,
        store: Path,
        handler: Handler,
        threads: int = 2,
        inherited: tuple[int, Journal] | None = None,
    ) -> None:
        self._handler = handler
        self._group = Group(*(inherited or (open_group(), Journal.create())))
        try:
            _mark(self._group.fd, store)
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self._group.close()
            raise
        self._threads = [
            threading.Thread(
                target=self._run, args=(number,), name=f"fanotify-{number}", daemon=True
            )
            for number in range(threads)
        ]
        self._heartbeat = Heartbeat("intake of events", threads)
        self._running = False
        self._leaving = False

    def start(self) -> None:
        """Begin to take events."""
        self._heartbeat = Heartbeat("intake of events", len(self._threads))
        self._running = True
        for thread in self._threads:
            thread.start()

    def inherit(self) -> list[Inherited]:
        """Return what a killed worker left without an answer; before `start`, to be answered."""
        return self._group.inherit()

    def mark_too(self, store: Path) -> None:
        """Serve the files of a further directory; raise `ChannelError`."""
        _mark(self._group.fd, store)

    def fileno(self) -> int:
        """Return the group descriptor, to be copied to a holder process; it stays owned here."""
        return self._group.fd

    @property
    def journal(self) -> Journal:
        """The journal of taken events, to be shared with a holder process."""
        return self._group.journal

    @property
    def waiting(self) -> int:
        """How many events were taken and wait for answers."""
        return self._group.waiting

    @property
    def trouble(self) -> str:
        """What is wrong with an intake that should run, empty when nothing is."""
        return self._heartbeat.trouble if self._running else ""

    def ignore(self, fd: int) -> None:
        """Stop the events of a complete file, given by any descriptor of it.

        Only this channel's: another daemon that serves the same inode is not affected.
        """
        self._mark_ignored(kernel.FAN_MARK_ADD, fd)

    def unignore(self, fd: int) -> None:
        """Bring the events of a file back that `ignore` stopped; fine when they flow."""
        try:
            self._mark_ignored(kernel.FAN_MARK_REMOVE, fd)
        except ChannelError as error:
            if error.errno != errno.ENOENT:
                raise

    def _mark_ignored(self, action: int, fd: int) -> None:
        try:
            kernel.fanotify_mark(
                self._group.fd, action | kernel.FAN_MARK_IGNORE_SURV, kernel.FAN_PRE_ACCESS, fd
            )
        except OSError as error:
            raise _channel_error(error, None) from error

    def _run(self, number: int) -> None:
        while not self._group.wait_readable(BEAT_SECONDS):
            self._heartbeat.beat(number)
            if not self._running:
                return
        poll = select.poll()
        poll.register(self._group.fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            self._heartbeat.beat(number)
            ready = {fd for fd, _ in poll.poll(BEAT_SECONDS * 1000)}
            if not ready:
                continue
            if self._stop in ready and (self._leaving or self._group.fd not in ready):
                return
            self._take()

    def _take(self) -> None:
        try:
            event = self._group.read()
        except (GroupFull, OSError) as error:
            # EMFILE and the like: the kernel has denied that event itself (spec 5.10). The
            # pause lets other threads answer and close before the next event is tried.
            if not isinstance(error, GroupFull):
                logger.error("an event was denied by the kernel, could not be read: %s", error)
            select.poll().poll(_FAILURE_PAUSE_MS)
            return
        except (KernelMessageError, ValueError) as error:
            logger.critical("fanotify event lost: %s", error)
            return
        if event is not None:
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        """Hand one event over; on every way out it has an owner or an answer."""
        if event.fd < 0:
            logger.error("event without a descriptor: %s", event)
            return
        reply = Reply(self._group, event.fd, ReadRequest(0, 0, event.offset, event.length))
        try:
            status = os.fstat(event.fd)
            self._group.identify(event.fd, status.st_dev, status.st_ino)
            request = ReadRequest(status.st_dev, status.st_ino, event.offset, event.length)
            reply.request = request
            if event.offset < 0:
                raise ChannelError("event without a range")
            self._handler(request, reply)
        except NydusError as error:
            logger.warning("denied %s: %s", reply.request, error)
            reply.deny(error)
        except Exception as error:
            # The owner of the reply is the one place that catches everything: a reader waits.
            logger.exception("handler failed on %s", reply.request)
            reply.deny(error)

    def pause(self) -> None:
        """Take no further events; those that were taken can still be answered."""
        self._leaving = True
        self._end_threads()

    def _end_threads(self) -> None:
        if self._running:
            self._running = False
            os.eventfd_write(self._stop, 1)
            for thread in self._threads:
                thread.join()

    def leave(self) -> None:
        """Let go without an answer to anything: a successor has group and journal."""
        self.pause()
        self._group.leave()
        os.close(self._stop)

    def close(self) -> None:
        """Stop after draining the queue, deny what is unanswered, close the group.

        Only after all mounts are gone (`ErofsMount.is_gone`, not mountinfo): whatever
        still reads afterwards gets zeros for holes.
        """
        if self._group.fd < 0:
            return
        self._end_threads()
        self._group.close()
        os.close(self._stop)

    def __enter__(self) -> FanotifyChannel:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
