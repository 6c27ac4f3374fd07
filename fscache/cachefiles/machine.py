"""State of the kernel's objects and of its requests: messages in, actions out, no I/O.

What this stands on (spec ondemand 1.7 to 1.13):

- Each OPEN gets one `copen`, each READ one completion, and a CLOSE nothing. What the kernel has
  ended itself gets no answer any more: kernels before 6.10 give its number to another request.
- A descriptor is closed once its object is withdrawn and nobody uses it, since the number may
  then be another object's. Uses are short: they are writes, and never wait for a backend. The
  next mount of the same name waits for the descriptor to be closed.
- Objects are known by id. Two of one name may live for a moment, as each opening has a new id.
- After `restore` a READ is delivered again that is being worked on here. It keeps its one answer.
"""

from __future__ import annotations

import errno
from enum import Enum, auto
from typing import NamedTuple

from fscache.cachefiles.protocol import Close, Open, Read, copen

__all__ = [
    "Action",
    "CloseFd",
    "Command",
    "Complete",
    "KernelObject",
    "Machine",
    "PendingRead",
    "Phase",
]


class Phase(Enum):
    """Where an object is in its life."""

    OPENING = auto()
    OPEN = auto()
    GONE = auto()


class _Event(Enum):
    ACCEPTED = auto()
    REFUSED = auto()
    WITHDRAWN = auto()


_TRANSITIONS = {
    (Phase.OPENING, _Event.ACCEPTED): Phase.OPEN,
    (Phase.OPENING, _Event.REFUSED): Phase.GONE,
    (Phase.OPENING, _Event.WITHDRAWN): Phase.GONE,
    (Phase.OPEN, _Event.WITHDRAWN): Phase.GONE,
}


class Command(NamedTuple):
    """Write this to the device; when the kernel refuses it, call `Machine.not_opened`."""

    text: bytes
    object: KernelObject


class Complete(NamedTuple):
    """Complete a READ by the ioctl on this descriptor."""

    fd: int
    msg_id: int


class CloseFd(NamedTuple):
    """Close this descriptor."""

    fd: int


Action = Command | Complete | CloseFd


class KernelObject:
    """One opening of one file of the kernel's cache; the machine alone changes it."""

    __slots__ = ("cookie", "fd", "msg_id", "object_id", "phase", "reads", "size", "users", "volume")

    def __init__(self, message: Open) -> None:
        self.object_id = message.object_id
        self.msg_id = message.msg_id
        self.volume = message.volume_key
        self.cookie = message.cookie_key
        self.fd = message.fd
        self.size = 0
        self.phase = Phase.OPENING
        self.users = 0
        self.reads: set[PendingRead] = set()

    def __repr__(self) -> str:
        return f"<object {self.object_id} {self.volume!r} {self.cookie!r} {self.phase.name}>"


class PendingRead:
    """A READ that waits for its one answer."""

    __slots__ = ("length", "msg_id", "object", "offset")

    def __init__(self, message: Read, target: KernelObject) -> None:
        self.msg_id = message.msg_id
        self.offset = message.offset
        self.length = message.length
        self.object = target


class Machine:
    """All objects and requests of one cache; for one thread at a time.

    The actions that a method returns are to be done at once and in their order.
    """

    def __init__(self) -> None:
        self._objects: dict[int, KernelObject] = {}
        self._reads: dict[int, PendingRead] = {}

    @property
    def objects(self) -> list[KernelObject]:
        """The objects that the kernel has open, or is opening."""
        return list(self._objects.values())

    @property
    def waiting(self) -> int:
        """How many READs have no answer."""
        return len(self._reads)

    # OPEN

    def open(self, message: Open) -> tuple[KernelObject, list[Action]]:
        """Take an OPEN; its object has to be given to `answer_open` once."""
        actions: list[Action] = []
        old = self._objects.get(message.object_id)
        if old is not None:
            # Ids rise and come again only when they are used up, long after this one's end.
            actions = self._withdraw(old)
        target = self._objects[message.object_id] = KernelObject(message)
        return target, actions

    def answer_open(self, target: KernelObject, answer: int) -> list[Action]:
        """Answer an OPEN with a size in bytes or a negative errno; nothing when that was done.

        Raises:
            ProtocolError: the answer is neither; then there was none.
        """
        if target.phase is not Phase.OPENING:
            return []
        reply = Command(copen(target.msg_id, answer), target)
        if answer >= 0:
            target.size = answer
            self._move(target, _Event.ACCEPTED)
            return [reply]
        del self._objects[target.object_id]
        self._move(target, _Event.REFUSED)
        return [reply, CloseFd(target.fd)]

    def not_opened(self, target: KernelObject) -> list[Action]:
        """Note that the kernel did not take a positive answer: who opened it has gone."""
        return self._withdraw(target) if target.phase is Phase.OPEN else []

    # READ

    def read(self, message: Read) -> PendingRead | None:
        """Take a READ, which has to be given to `answer_read` once.

        None for one that is being worked on already, and for one of an unknown object, which
        nobody could answer before the kernel has opened that again.
        """
        target = self._objects.get(message.object_id)
        if target is None or target.phase is not Phase.OPEN:
            return None
        old = self._reads.get(message.msg_id)
        if old is not None:
            same = (old.object, old.offset, old.length)
            if same == (target, message.offset, message.length):
                return None
            # The number is another request's now: nobody waits for the old one.
            self._forget(old)
        pending = PendingRead(message, target)
        self._reads[message.msg_id] = pending
        target.reads.add(pending)
        return pending

    def knows(self, message: Read) -> bool:
        """Whether the object of a READ is known."""
        return message.object_id in self._objects

    def answer_read(self, pending: PendingRead) -> list[Action]:
        """Complete a READ; nothing when that was done, or when the kernel has ended it."""
        if self._reads.get(pending.msg_id) is not pending:
            return []
        self._forget(pending)
        return [Complete(pending.object.fd, pending.msg_id)]

    def _forget(self, pending: PendingRead) -> None:
        del self._reads[pending.msg_id]
        pending.object.reads.discard(pending)

    # CLOSE

    def close(self, message: Close) -> list[Action]:
        """Take a CLOSE; one of an unknown object is about descriptors that are closed already."""
        target = self._objects.get(message.object_id)
        return self._withdraw(target) if target is not None else []

    def _withdraw(self, target: KernelObject) -> list[Action]:
        del self._objects[target.object_id]
        self._move(target, _Event.WITHDRAWN)
        for pending in list(target.reads):
            self._forget(pending)
        return [] if target.users else [CloseFd(target.fd)]

    # Use of descriptors

    def hold(self, target: KernelObject) -> bool:
        """Begin to use an object's descriptor; False when it must not be used.

        After True `release` has to be called once.
        """
        if target.phase is not Phase.OPEN:
            return False
        target.users += 1
        return True

    def release(self, target: KernelObject) -> list[Action]:
        """End a use."""
        target.users -= 1
        if target.users or target.phase is not Phase.GONE:
            return []
        return [CloseFd(target.fd)]

    # End

    def end(self, *, answer: bool) -> list[Action]:
        """Let go of all objects.

        Args:
            answer: refuse what is being opened, and complete the READs that wait: their readers
                fail unless the data is there. Else all that is left to a successor, which asks
                for it by `restore`.
        """
        actions: list[Action] = []
        for target in self.objects:
            if answer and target.phase is Phase.OPENING:
                actions += self.answer_open(target, -errno.EIO)
                continue
            if answer:
                for pending in list(target.reads):
                    actions += self.answer_read(pending)
            actions += self._withdraw(target)
        return actions

    @staticmethod
    def _move(target: KernelObject, event: _Event) -> None:
        target.phase = _TRANSITIONS[target.phase, event]
