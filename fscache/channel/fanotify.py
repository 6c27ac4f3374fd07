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
from fscache.protocol import Event, KernelMessageError, pack_response, parse_events

__all__ = ["FanotifyChannel", "Group", "open_group"]

_log = logging.getLogger(__name__)

_GROUP_FLAGS = (
    kernel.FAN_CLASS_PRE_CONTENT
    | kernel.FAN_CLOEXEC
    | kernel.FAN_NONBLOCK
    | kernel.FAN_UNLIMITED_QUEUE
    | kernel.FAN_UNLIMITED_MARKS
)
# 64-bit kernels add O_LARGEFILE themselves (`force_o_largefile`), and no other is supported.
_EVENT_FLAGS = os.O_RDWR | os.O_CLOEXEC
_READ_BYTES = 4096
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


class Group:
    """Owner of a fanotify group descriptor and of the list of events that wait for answers.

    Args:
        fd: the descriptor, owned from now on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = threading.Lock()
        self._waiting: set[int] = set()

    def take(self, fd: int) -> None:
        """Note that the event with descriptor `fd` was read and waits for an answer."""
        with self._lock:
            self._waiting.add(fd)

    def respond(self, fd: int, allow: bool) -> bool:
        """Answer an event once; return False when it was answered before.

        Raises nothing: there is nobody who could do more about a refused answer.
        """
        with self._lock:
            if fd not in self._waiting:
                return False
            self._waiting.remove(fd)
            try:
                os.write(self.fd, pack_response(fd, allow))
            except FileNotFoundError:
                _log.debug("the reader of event %d was killed before its answer", fd)
            except OSError as error:
                _log.critical("answer to event %d refused, its reader waits: %s", fd, error)
            return True

    def close(self) -> None:
        """Deny what still waits, then close the descriptor."""
        with self._lock:
            group, self.fd = self.fd, -1
            if group < 0:
                return
            try:
                for fd in self._waiting:
                    _deny_quietly(group, fd)
                if self._waiting:
                    _log.error("%d reads denied: the channel closes", len(self._waiting))
                self._waiting.clear()
            finally:
                os.close(group)


def _deny_quietly(group: int, fd: int) -> None:
    try:
        os.write(group, pack_response(fd, allow=False))
    except OSError as error:
        _log.debug("no denial for event %d: %s", fd, error)


def open_group() -> int:
    """Create a pre-content group, non-blocking; the caller owns the descriptor.

    Raises:
        ChannelError: no privilege, or no such kernel.
    """
    try:
        return kernel.fanotify_init(_GROUP_FLAGS, _EVENT_FLAGS)
    except OSError as error:
        raise _channel_error(error, None) from error


class FanotifyChannel:
    """Serve the reads of all files that EROFS opens through one marked directory.

    Events flow as soon as the constructor returns; mount only then.

    Args:
        store: the directory to mark, of mode 0700; its files are hard links to the data.
        handler: called for each event, see `fscache.channel.Handler`.
        threads: number of intake threads; they only read events and call the handler.

    Raises:
        ChannelError: the kernel, the file system or the privilege does not allow it.
    """

    def __init__(self, store: Path, handler: Handler, threads: int = 2) -> None:
        self._handler = handler
        mode = store.stat().st_mode
        if mode & 0o077:
            raise ChannelError(
                "others may read the store, and their reads would download",
                path=store,
                expected="mode 0700",
                got=f"{mode & 0o7777:#o}",
            )
        self._group = Group(open_group())
        try:
            kernel.fanotify_mark(
                self._group.fd,
                kernel.FAN_MARK_ADD,
                kernel.FAN_PRE_ACCESS | kernel.FAN_EVENT_ON_CHILD,
                store,
            )
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            self._group.close()
            raise _channel_error(error, store) from error
        self._threads = [
            threading.Thread(target=self._run, name=f"fanotify-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def fileno(self) -> int:
        """Return the group descriptor, to be copied to a holder process; it stays owned here."""
        return self._group.fd

    def ignore(self, fd: int) -> None:
        """Stop the events of a complete file, given by any descriptor of it.

        Only this channel's: another daemon that serves the same inode is not affected.
        """
        self._mark_ignored(kernel.FAN_MARK_ADD, fd)

    def unignore(self, fd: int) -> None:
        """Bring the events of a file back that `ignore` stopped."""
        self._mark_ignored(kernel.FAN_MARK_REMOVE, fd)

    def _mark_ignored(self, action: int, fd: int) -> None:
        try:
            kernel.fanotify_mark(
                self._group.fd, action | kernel.FAN_MARK_IGNORE_SURV, kernel.FAN_PRE_ACCESS, fd
            )
        except OSError as error:
            raise _channel_error(error, None) from error

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._group.fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._group.fd in ready:
                self._take_batch()
            elif self._stop in ready:
                return

    def _take_batch(self) -> None:
        try:
            buffer = os.read(self._group.fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            # EMFILE and the like: the kernel has denied that event itself (spec 5.10). The
            # pause lets other threads close descriptors before the next event is tried.
            _log.error("an event was denied by the kernel, could not be read: %s", error)
            select.poll().poll(_FAILURE_PAUSE_MS)
            return
        try:
            events = parse_events(buffer)
        except KernelMessageError as error:
            _log.critical("fanotify events lost: %s", error)
            events = error.events
        for event in events:
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        """Hand one event over; on every way out it has an owner or an answer."""
        if event.fd < 0:
            _log.error("event without a descriptor: %s", event)
            return
        self._group.take(event.fd)
        reply = Reply(self._group, event.fd, ReadRequest(0, 0, event.offset, event.length))
        try:
            status = os.fstat(event.fd)
            request = ReadRequest(status.st_dev, status.st_ino, event.offset, event.length)
            reply.request = request
            if event.offset < 0:
                raise ChannelError("event without a range")
            self._handler(request, reply)
        except NydusError as error:
            _log.warning("denied %s: %s", reply.request, error)
            reply.deny(error)
        except Exception as error:  # noqa: BLE001
            # The owner of the reply is the one place that catches everything: a reader waits.
            _log.exception("handler failed on %s", reply.request)
            reply.deny(error)

    def close(self) -> None:
        """Stop after draining the queue, deny what is unanswered, close the group.

        Only after all mounts are gone (`ErofsMount.is_gone`, not mountinfo): whatever
        still reads afterwards gets zeros for holes.
        """
        if self._group.fd < 0:
            return
        os.eventfd_write(self._stop, 1)
        for thread in self._threads:
            thread.join()
        self._group.close()
        os.close(self._stop)

    def __enter__(self) -> FanotifyChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
