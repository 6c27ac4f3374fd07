"""A fanotify group and the events of it that wait for answers, its own and inherited ones.

Each event is read straight into a slot of the journal, so a successor of a killed process
finds it (see `fscache.holder.journal`). The kernel knows an event by the number that its
descriptor had in the process which read it, and nobody can tell whether an inherited event
still waits or was answered at the last moment. So no new event may get such a number before
it was answered again: the number is taken by a descriptor of ours, or no event is read.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from typing import NamedTuple

from fscache.channel import ReadRequest, Reply
from fscache.holder.journal import Journal
from fscache.protocol import Event, KernelMessageError, pack_response, parse_events

__all__ = ["Group", "GroupFull", "Inherited"]

logger = logging.getLogger(__name__)


class GroupFull(Exception):
    """Every slot of the journal has an event that waits; none can be read now."""


class Inherited(NamedTuple):
    """An event that a killed process left; `known` tells whether its file is."""

    reply: Reply
    known: bool


class _InheritedResponder:
    """Answers the inherited events of one number, once all that wait under it agree."""

    def __init__(self, group: Group, slots: list[int]) -> None:
        self._group = group
        self._slots = slots
        self._missing = len(slots)
        self._allow = True
        self._lock = threading.Lock()

    def respond(self, key: int, allow: bool) -> bool:
        with self._lock:
            self._missing -= 1
            self._allow = self._allow and allow
            if self._missing:
                return True
        return self._group.respond_inherited(key, self._slots, self._allow)


def _take_number(number: int) -> bool:
    """Open something that has this descriptor number; False when something of ours has it."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    if null == number:
        return True
    try:
        got = fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, number)
    finally:
        os.close(null)
    if got != number:
        os.close(got)
    return got == number


class Group:
    """Owner of a group descriptor and its journal, and of the descriptors of taken events.

    Args:
        fd: the non-blocking group, owned from now on.
        journal: its journal, owned from now on.
    """

    def __init__(self, fd: int, journal: Journal) -> None:
        self.fd = fd
        self.journal = journal
        self._lock = threading.Lock()
        self._waiting: dict[int, int] = {}
        # Numbers of inherited events; True for those that a descriptor of ours has taken.
        self._inherited: dict[int, bool] = {}
        self._readable = threading.Event()
        self._readable.set()

    def read(self) -> Event | None:
        """Take one event; it waits for `respond` from now on. None when there is none.

        Raises:
            GroupFull: no slot is free.
            KernelMessageError: what came is no event.
            OSError: the kernel has denied the event itself (`EMFILE`, spec ondemand 5.10).
        """
        slot = self.journal.reserve()
        if slot is None:
            raise GroupFull
        with self.journal.room(slot) as room:
            try:
                length = os.readv(self.fd, [room])
            except OSError as error:
                self.journal.unreserve(slot)
                if isinstance(error, BlockingIOError):
                    return None
                raise
            content = bytes(room)
        try:
            (event,) = parse_events(content[:length])
        except (KernelMessageError, ValueError):
            self.journal.clear(slot)
            raise
        if event.fd < 0:
            self.journal.clear(slot)
            return event
        with self._lock:
            self._waiting[event.fd] = slot
        return event

    def identify(self, fd: int, device: int, inode: int) -> None:
        """Note which file an event is about, for a successor."""
        self.journal.identify(self._waiting[fd], device, inode)

    @property
    def waiting(self) -> int:
        """How many events of this process wait for answers."""
        return len(self._waiting)

    def respond(self, key: int, allow: bool) -> bool:
        """Answer an event once and close its descriptor, which `key` is.

        Returns False when it was answered before. Raises nothing: there is nobody who could
        do more about a refused answer.
        """
        with self._lock:
            slot = self._waiting.pop(key, None)
            if slot is None:
                return False
            if self.fd >= 0:
                self._write(key, allow)
                self.journal.clear(slot)
            os.close(key)
            return self.fd >= 0

    def _write(self, key: int, allow: bool) -> None:
        try:
            os.write(self.fd, pack_response(key, allow))
        except FileNotFoundError:
            logger.debug("the reader of event %d was killed before its answer", key)
        except OSError as error:
            logger.critical("answer to event %d refused, its reader waits: %s", key, error)

    # Inherited events

    def inherit(self) -> list[Inherited]:
        """Return the events that are in the journal already, before the first `read`.

        Each reply has to be answered like any other. No event may be read before
        `wait_readable` returns.
        """
        by_number: dict[int, list[int]] = {}
        taken = self.journal.taken()
        for event in taken:
            by_number.setdefault(event.fd, []).append(event.slot)
        responders = {
            number: _InheritedResponder(self, slots) for number, slots in by_number.items()
        }
        with self._lock:
            self._inherited = {number: _take_number(number) for number in by_number}
            self._note_readable()
        return [
            Inherited(
                Reply(
                    responders[event.fd],
                    event.fd,
                    ReadRequest(event.device, event.inode, event.offset, event.length),
                ),
                bool(event.inode),
            )
            for event in taken
        ]

    def respond_inherited(self, number: int, slots: list[int], allow: bool) -> bool:
        """Answer an inherited event and give its number free."""
        with self._lock:
            if number not in self._inherited:
                return False
            self._write(number, allow)
            for slot in slots:
                self.journal.clear(slot)
            if self._inherited.pop(number):
                os.close(number)
            self._note_readable()
            return True

    def _note_readable(self) -> None:
        if all(self._inherited.values()):
            self._readable.set()
        else:
            self._readable.clear()

    def wait_readable(self, timeout: float) -> bool:
        """Wait until no new event can get the number of an inherited one, or until the timeout."""
        return self._readable.wait(timeout)

    def close(self) -> None:
        """Deny what still waits, then close descriptor and journal."""
        with self._lock:
            if self.fd < 0:
                return
            waiting = list(self._waiting.items())
            inherited = list(self._inherited.items())
            try:
                for fd, slot in waiting:
                    self._deny(fd)
                    self.journal.clear(slot)
                    os.close(fd)
                for number, taken in inherited:
                    self._deny(number)
                    if taken:
                        os.close(number)
                if waiting or inherited:
                    logger.error("%d reads denied: the channel closes", len(waiting + inherited))
                self._waiting.clear()
                self._inherited.clear()
                self._readable.set()
            finally:
                self._let_go()

    def _deny(self, fd: int) -> None:
        try:
            os.write(self.fd, pack_response(fd, allow=False))
        except OSError as error:
            logger.debug("no denial for event %d: %s", fd, error)

    def leave(self) -> None:
        """Close descriptor and journal without an answer: a successor gives them."""
        with self._lock:
            if self.fd >= 0:
                self._let_go()

    def _let_go(self) -> None:
        group, self.fd = self.fd, -1
        os.close(group)
        self.journal.close()
