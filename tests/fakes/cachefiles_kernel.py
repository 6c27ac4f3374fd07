"""A simulated kernel of the cachefiles protocol: legal events in any order, and a strict judge.

It speaks bytes to the codec and hears actions of the state machine, and it knows what became of
each request: its rules are those of spec ondemand 1.6 to 1.13 and 3.1. `Simulation` also plays the
daemon around the machine, which answers in any order and uses descriptors in between.
"""

from __future__ import annotations

import re

from fscache.cachefiles.machine import CloseFd, Command, Complete, Machine
from fscache.cachefiles.protocol import NO_OBJECT, Close, Open, Read, parse_message

PAGE = 4096
SIZE = 16 * PAGE


class Broken(AssertionError):
    """The daemon broke a rule."""


def check(condition, text):
    if not condition:
        raise Broken(text)


class Request:
    """An OPEN, READ or CLOSE; `ended` once the kernel itself has given it up."""

    def __init__(self, kind, target, msg_id, place=(0, 0)):
        self.kind, self.target, self.msg_id, self.place = kind, target, msg_id, place
        # Whether `read` may return it, and whether it ever did.
        self.unread = True
        self.delivered = False
        self.answers = 0
        self.ended = False


class Target:
    """What the kernel knows of one file: `fds` are the daemon's descriptors of this opening."""

    def __init__(self, volume, cookie):
        self.volume, self.cookie = volume, cookie
        self.state = "closed"
        self.object_id = 0
        self.fd = None
        # Once the daemon has read the CLOSE, nothing is answered any more.
        self.told = False


class SimulatedKernel:
    """The kernel's side: `cyclic` ids hardly ever come again, else the lowest free one is used."""

    def __init__(self, cyclic):
        self.cyclic = cyclic
        self.next_id = 0
        self.next_object = 1
        self.next_fd = 3
        self.requests = {}
        self.targets = []
        # Descriptor → (target, object id), as long as the daemon has it open.
        self.fds = {}
        self.replies = 0
        # Whether `restore` follows, which has everything delivered again.
        self.handing_over = False

    # What happens in the kernel

    def _add(self, kind, target, place=(0, 0)):
        if not self.cyclic:
            self.next_id = 0
        while self.next_id in self.requests:
            self.next_id += 1
        self.requests[self.next_id] = Request(kind, target, self.next_id, place)
        self.next_id += 1

    def has_room(self):
        return len(self.requests) < 60

    def open(self, volume, cookie):
        """A mount looks a file up."""
        target = Target(volume, cookie)
        self.targets.append(target)
        self._open(target)
        return target

    def _open(self, target):
        target.object_id = 0
        self._add("open", target)
        target.state = "opening"

    def read(self, target, offset, length):
        """A reader misses a range."""
        self._add("read", target, (offset, length))

    def kill(self, request):
        """A reader is killed: its request is gone, and nobody says so."""
        self._end(request)

    def withdraw(self, target):
        """The last mount goes: everything of the object is ended, and a CLOSE is sent."""
        for request in [item for item in self.requests.values() if item.target is target]:
            self._end(request)
        self.targets.remove(target)
        if target.state == "open" or target.fd is not None:
            self._add("close", target)
        target.state = "dropping"

    def abort(self, target):
        """Who opens it is killed."""
        for request in [item for item in self.requests.values() if item.target is target]:
            self._end(request)
        self.targets.remove(target)
        target.state = "gone"

    def fail(self, request):
        """The daemon has no descriptor left for an OPEN (`EMFILE`)."""
        self._end(request)
        self._fail_opening(request.target)

    def _fail_opening(self, target):
        target.state = "closed"
        for waiting in self._pending(target, "read"):
            self._end(waiting)

    def restore(self):
        """All that has no answer is to be delivered again."""
        for request in self.requests.values():
            request.unread = True

    def _end(self, request):
        request.ended = True
        del self.requests[request.msg_id]

    def _pending(self, target, kind):
        return [
            item for item in self.requests.values() if item.target is target and item.kind == kind
        ]

    # The device

    def deliverable(self):
        """Return the requests that `read` could return now.

        A READ of a closed object does not come before the object is open again.
        """
        for request in list(self.requests.values()):
            if request.kind == "read" and request.unread and request.target.state == "closed":
                self._open(request.target)
        return [
            request
            for request in self.requests.values()
            if request.unread and (request.kind != "read" or request.target.state == "open")
        ]

    def deliver(self, request):
        """Return the message of a request."""
        request.unread, request.delivered = False, True
        target = request.target
        if request.kind == "open":
            check(target.fd is None, "test: descriptor of an opening object")
            target.object_id, self.next_object = self.next_object, self.next_object + 1
            target.fd, self.next_fd = self.next_fd, self.next_fd + 1
            self.fds[target.fd] = target
            keys = (target.volume, target.cookie)
            return Open(request.msg_id, target.object_id, target.fd, *keys).pack()
        if request.kind == "read":
            return Read(request.msg_id, target.object_id, *request.place).pack()
        self._end(request)
        target.told = True
        known = target.object_id if target.fd is not None else NO_OBJECT
        return Close(request.msg_id, known).pack()

    def copen(self, text):
        """Hear a `copen`; return whether it was taken."""
        match = re.fullmatch(rb"copen (\d+),(-?\d+)", text)
        check(match, f"no copen: {text!r}")
        self.replies += 1
        request = self.requests.get(int(match[1]))
        if request is None:
            return False
        check(request.kind == "open" and request.delivered, f"copen for another request: {text!r}")
        target = request.target
        self._answered(request)
        if int(match[2]) >= 0 and target.fd is not None:
            target.state = "open"
            return True
        self._fail_opening(target)
        return True

    def cread(self, fd, msg_id):
        """Hear the completion of a READ."""
        check(fd in self.fds, f"ioctl on descriptor {fd}, which is closed")
        target = self.fds[fd]
        check(not target.told, "completion after CLOSE was read")
        self.replies += 1
        request = self.requests.get(msg_id)
        if request is None or request.target is not target or request.kind != "read":
            # A killed reader, or a withdrawn object that the daemon has not heard of.
            return False
        check(request.delivered, "completion of a READ that was not delivered")
        self._answered(request)
        return True

    def _answered(self, request):
        request.answers += 1
        check(request.answers == 1, "a second answer")
        del self.requests[request.msg_id]

    def close_fd(self, fd):
        """Hear that a descriptor was closed."""
        check(fd in self.fds, f"descriptor {fd} closed twice")
        target = self.fds.pop(fd)
        target.fd = None
        if target.state == "open":
            waiting = [item for item in self._pending(target, "read") if item.delivered]
            check(self.handing_over or not waiting, "descriptor closed with a READ in hand")
            target.state = "closed"
        elif target.state == "opening":
            check(False, "descriptor closed before its copen")

    def close_all(self):
        """A killed daemon's descriptors are closed, whatever it was doing."""
        for target in self.fds.values():
            target.fd = None
            if target.state == "open":
                target.state = "closed"
        self.fds.clear()


class Simulation:
    """Kernel and daemon; each method is one event, chosen by numbers.

    Args:
        modern: Linux 6.10 and later: who waits can be killed, and ids hardly ever come again.
    """

    def __init__(self, *, modern=True):
        self.modern = modern
        self.kernel = SimulatedKernel(modern)
        self.machine = Machine()
        self.opening = []
        self.reads = []
        self.held = []
        self.names = 0
        self.taken = 0

    # Kernel events; each returns whether it was possible

    def mount(self, number):
        if len(self.kernel.targets) > 6 or not self.kernel.has_room():
            return False
        self.names += 1
        self.kernel.open(b"erofs,v%d" % (number % 3), b"c%d" % self.names)
        return True

    def miss(self, number):
        ready = [item for item in self.kernel.targets if item.state in ("open", "closed")]
        if not ready or not self.kernel.has_room():
            return False
        target = ready[number % len(ready)]
        self.kernel.read(target, number % 12 * PAGE, (number % 4 + 1) * PAGE)
        return True

    def kill_reader(self, number):
        if not self.modern:
            return False
        reads = [item for item in self.kernel.requests.values() if item.kind == "read"]
        if not reads:
            return False
        self.kernel.kill(reads[number % len(reads)])
        return True

    def unmount(self, number):
        ready = [item for item in self.kernel.targets if item.state in ("open", "closed")]
        if not ready or not self.kernel.has_room():
            return False
        self.kernel.withdraw(ready[number % len(ready)])
        return True

    def abort_mount(self, number):
        opening = [item for item in self.kernel.targets if item.state == "opening"]
        if not opening or not self.modern:
            return False
        self.kernel.abort(opening[number % len(opening)])
        return True

    def restore_again(self, number):
        """A second `restore` while READs are in hand; not while an OPEN is (spec 3.2)."""
        if self.opening:
            return False
        self.kernel.restore()
        return True

    def kill_daemon(self, number):
        """Another daemon takes over: everything that this one knew is lost."""
        if number % 8:
            return False
        self.kernel.close_all()
        self._succeed()
        return True

    def hand_over(self, number):
        """A daemon that ends leaves what is not answered, if there is something in use."""
        if number % 8:
            return False
        while self.answer_open(number):
            pass
        self.kernel.handing_over = True
        self._do(self.machine.end(answer=False))
        while self.release(number):
            pass
        for pending in self.reads:
            check(not self.machine.answer_read(pending), "a completion after the end")
        check(not self.kernel.fds, "descriptors left open at the end")
        self.kernel.handing_over = False
        self._succeed()
        return True

    def _succeed(self):
        self.machine = Machine()
        self.opening, self.reads, self.held = [], [], []
        self.kernel.restore()

    def no_descriptor(self, number):
        unread = [item for item in self.kernel.deliverable() if item.kind == "open"]
        if not unread or number % 4:
            return False
        self.kernel.fail(unread[number // 4 % len(unread)])
        return True

    # Daemon events

    def take(self, number):
        found = self.kernel.deliverable()
        if not found:
            return False
        request = found[number % len(found)]
        message = parse_message(self.kernel.deliver(request))
        self.taken += 1
        if isinstance(message, Open):
            target, actions = self.machine.open(message)
            self._do(actions)
            self.opening.append(target)
        elif isinstance(message, Close):
            self._do(self.machine.close(message))
        else:
            check(self.machine.knows(message), "READ of an unknown object")
            pending = self.machine.read(message)
            if pending is not None:
                self.reads.append(pending)
        return True

    def answer_open(self, number):
        if not self.opening:
            return False
        target = self.opening.pop(number % len(self.opening))
        answer = SIZE if number % 5 else -(number % 4095 + 1)
        self._do(self.machine.answer_open(target, answer))
        # Whoever answers twice is not heard.
        check(not self.machine.answer_open(target, answer), "a second copen")
        return True

    def answer_read(self, number):
        if not self.reads:
            return False
        pending = self.reads.pop(number % len(self.reads))
        self._do(self.machine.answer_read(pending))
        check(not self.machine.answer_read(pending), "a second completion")
        return True

    def use(self, number):
        objects = self.machine.objects
        if not objects or len(self.held) > 8:
            return False
        target = objects[number % len(objects)]
        if not self.machine.hold(target):
            return False
        self.held.append(target)
        return True

    def release(self, number):
        if not self.held:
            return False
        target = self.held.pop(number % len(self.held))
        check(target.fd in self.kernel.fds, "descriptor closed while it was used")
        self._do(self.machine.release(target))
        return True

    def _do(self, actions):
        for action in actions:
            if isinstance(action, Command):
                if not self.kernel.copen(action.text):
                    self._do(self.machine.not_opened(action.object))
            elif isinstance(action, Complete):
                self.kernel.cread(action.fd, action.msg_id)
            else:
                assert isinstance(action, CloseFd)
                held = [item for item in self.held if item.fd == action.fd]
                check(not held, "descriptor closed while it was used")
                self.kernel.close_fd(action.fd)

    EVENTS = (
        mount, miss, miss, miss, kill_reader, unmount, abort_mount, no_descriptor,
        restore_again, kill_daemon, hand_over, take, take, take, take, answer_open, answer_open,
        answer_read, answer_read, answer_read, use, release, release,
    )  # fmt: skip

    def step(self, number):
        """Let one event happen, if it can."""
        event = self.EVENTS[number % len(self.EVENTS)]
        return event(self, number // len(self.EVENTS))

    def settle(self):
        """Let everything come to its end; then nothing may be left without an answer."""
        while self.kernel.deliverable() or self.opening or self.reads or self.held:
            for event in (self.take, self.answer_open, self.answer_read, self.release):
                while event(1):
                    pass
        check(not self.kernel.requests, f"left without an answer: {self.kernel.requests}")
        check(self.machine.waiting == 0, "the machine waits")
        alive = {item.fd for item in self.kernel.targets if item.fd is not None}
        check(set(self.kernel.fds) == alive, "descriptors left open")
        check({item.fd for item in self.machine.objects} == alive, "objects left over")
