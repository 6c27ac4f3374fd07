"""The cachefiles channel: one thread that listens, a pool that fills, one reply to each request.

The listening thread only decodes, looks names up and answers OPENs; it never waits for a backend
or for another writer. Everything that uses an anonymous descriptor holds its object meanwhile, so
that no number is closed, and perhaps another file's, below a write (spec ondemand 1.12, 1.13).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from erofs.errors import NydusError
from erofs.layout import BLOCK_SIZE
from fscache.cachefiles.copying import Withdrawn, copy
from fscache.cachefiles.device import Device
from fscache.cachefiles.machine import (
    Action,
    Command,
    Complete,
    KernelObject,
    Machine,
    PendingRead,
    Phase,
)
from fscache.cachefiles.protocol import BadMessage, Close, Open, Read, copen, parse_message
from fscache.cachefiles.slots import Filling
from fscache.cachefiles.sources import Extent, Source
from fscache.channel import ReadRequest, Reply
from fscache.fetch.complaints import Complaints
from fscache.fetch.pool import WorkerPool
from fscache.heartbeat import BEAT_SECONDS, Heartbeat

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

_FAILURE_PAUSE_SECONDS = 0.02
_POLL_SECONDS = 0.01
_STUCK_SECONDS = 120.0

Begin = Callable[[Filling], None]
# Notes that the kernel opens a file; raises `NydusError` for an unknown one.
Opened = Callable[[KernelObject, Begin], Filling]


class _Answer:
    """The channel's side of the reply to one READ."""

    __slots__ = ("_channel", "_pending")

    def __init__(self, channel: Channel, pending: PendingRead) -> None:
        self._channel = channel
        self._pending = pending

    def respond(self, key: int, allow: bool) -> bool:
        """Complete the READ: what the kernel then finds in the file is the answer."""
        return self._channel.answer(self._pending)


class Channel:
    """Serves the requests of one bound device.

    Args:
        device: bound, in on-demand mode; owned.
        opened: see `Opened`; called by the listening thread.
        threads: how many fill files at once.
    """

    def __init__(self, device: Device, opened: Opened, threads: int) -> None:
        self.device = device
        self._opened = opened
        self._machine = Machine()
        # Entered again when a dropped reply answers within.
        self._lock = threading.RLock()
        self._fillings: dict[KernelObject, Filling] = {}
        self._complaints = Complaints()
        self._pool = WorkerPool(threads, 1, "fill")
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._heartbeat = Heartbeat("cachefiles intake")
        self._running = False
        self._thread = threading.Thread(target=self._run, name="cachefiles", daemon=True)

    def start(self) -> None:
        """Begin to take requests."""
        self._heartbeat = Heartbeat("cachefiles intake")
        self._running = True
        self._thread.start()

    @property
    def trouble(self) -> str:
        """What is wrong with an intake that should run, empty when nothing is."""
        if not self._running:
            return ""
        if self._pool.is_stuck(_STUCK_SECONDS):
            return f"writing to the kernel's cache takes more than {_STUCK_SECONDS:.0f} s"
        return self._heartbeat.trouble

    @property
    def waiting(self) -> int:
        """How many READs have no answer."""
        return self._machine.waiting

    @property
    def open_files(self) -> int:
        """How many files the kernel has open."""
        return len(self._fillings)

    # Intake

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self.device.fileno(), select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while self._running:
            self._heartbeat.beat()
            if poll.poll(BEAT_SECONDS * 1000):
                self._drain()

    def _drain(self) -> None:
        """Take all messages; none may be there although the poll said so (spec 1.12)."""
        while self._running:
            self._heartbeat.beat()
            try:
                raw = self.device.read()
            except OSError as error:
                # EMFILE and the like: the kernel has failed that request itself.
                self._complaints.tell("device", f"a request could not be read: {error}")
                time.sleep(_FAILURE_PAUSE_SECONDS)
                return
            if not raw:
                return
            try:
                self._dispatch(raw)
            except Exception:
                # Others wait for this thread.
                logger.exception("handling a request of the kernel failed")

    def _dispatch(self, raw: bytes) -> None:
        try:
            message = parse_message(raw)
        except BadMessage as error:
            logger.critical("%s", error)
            if error.refusable is not None:
                self._refuse(error.refusable)
            return
        if isinstance(message, Open):
            self._open(message)
        elif isinstance(message, Read):
            self._read(message)
        else:
            self._close(message)

    def _refuse(self, message: Open | Read) -> None:
        """Fail what cannot be understood."""
        if isinstance(message, Read):
            with self._lock:
                pending = self._machine.read(message)
            if pending is not None:
                self.answer(pending)
            return
        try:
            self.device.write(copen(message.msg_id, -errno.EIO))
        except OSError as refused:
            logger.error("a bad OPEN was not refused: %s", refused)
        finally:
            if message.fd >= 0:
                os.close(message.fd)

    def _open(self, message: Open) -> None:
        with self._lock:
            stale = [item for item in self._fillings if item.object_id == message.object_id]
            target, actions = self._machine.open(message)
            self._do(actions)
            self._forget(stale)
        try:
            os.set_inheritable(message.fd, False)
            filling = self._opened(target, self._begin)
        except NydusError as error:
            logger.warning("the kernel is refused a file: %s", error)
            self._answer_open(target, -(error.errno or errno.EIO))
            return
        except Exception:
            logger.exception("opening %r failed", target)
            self._answer_open(target, -errno.EIO)
            return
        with self._lock:
            self._fillings[target] = filling
            self._answer_open(target, filling.slot.size)
            self._forget([target])
        if target.phase is Phase.OPEN:
            logger.debug("opened %r, %d bytes", target, target.size)
            filling.follow(filling.slot.ahead())

    def _answer_open(self, target: KernelObject, answer: int) -> None:
        with self._lock:
            self._do(self._machine.answer_open(target, answer))

    def _close(self, message: Close) -> None:
        with self._lock:
            self._do(self._machine.close(message))
            self._forget([item for item in self._fillings if item.object_id == message.object_id])

    def _forget(self, targets: Sequence[KernelObject]) -> None:
        """Let go of those that are gone; the lock is held."""
        for target in targets:
            if target.phase is Phase.GONE:
                filling = self._fillings.pop(target)
                filling.slot.close(filling)

    def _read(self, message: Read) -> None:
        with self._lock:
            pending = self._machine.read(message)
            if pending is None:
                if not self._machine.knows(message):
                    # Comes again when the kernel has opened the file again.
                    logger.error("READ %d of an unknown object", message.msg_id)
                return
            filling = self._fillings[pending.object]
        request = ReadRequest(0, message.object_id, message.offset, message.length)
        reply = Reply(_Answer(self, pending), message.msg_id, request)
        try:
            self._request(filling, request, reply)
        except NydusError as error:
            self._deny(filling, reply, error)
        except Exception as error:
            # The owner of the reply is the one place that catches everything: a reader waits.
            logger.exception("handling %s failed", request)
            reply.deny(error)

    def _request(self, filling: Filling, request: ReadRequest, reply: Reply) -> None:
        """Have a range made ready, then copied; never blocks."""
        end = request.offset + request.length
        if request.offset % BLOCK_SIZE or not request.offset < end <= filling.slot.size:
            reply.deny("range outside of the file")
            logger.error("READ outside of %r: %s", filling.target, request)
            return
        source = filling.slot.source
        around = source.around(request.offset, request.length)

        def ready(error: NydusError | None) -> None:
            if error is not None:
                # Who found it has told it.
                reply.deny(error)
                return
            task = partial(self._fill, filling, source, reply, around)
            # Those of one extent follow each other: the first one copies for all.
            if not self._pool.submit((request.inode, around[0]), task):
                reply.deny("the daemon stops")

        source.request(request.offset, request.length, ready)

    # Filling

    @contextmanager
    def _held(self, target: KernelObject) -> Iterator[None]:
        """Keep the descriptor open during the block; raise `Withdrawn` when it is not."""
        with self._lock:
            if not self._machine.hold(target):
                raise Withdrawn
        try:
            yield
        finally:
            with self._lock:
                self._do(self._machine.release(target))

    def _fill(self, filling: Filling, source: Source, reply: Reply, around: Extent) -> None:
        """Copy what is read, answer, and go on with what is ready around it."""
        request = reply.request
        try:
            with self._held(filling.target):
                copy(filling.target, source, (request.offset, request.offset + request.length))
        except Withdrawn:
            reply.deny("withdrawn")
        except NydusError as error:
            self._deny(filling, reply, error)
        except Exception as error:
            logger.exception("filling %r failed", filling.target)
            reply.deny(error)
        else:
            reply.allow()
            self._copy(filling, source, around)

    def _deny(self, filling: Filling, reply: Reply, error: NydusError) -> None:
        self._complaints.tell(filling.slot.name, str(error))
        reply.deny(error)

    def _copy(self, filling: Filling, source: Source, extent: Extent) -> bool:
        """Copy what nobody waits for; return whether to go on so."""
        if not filling.claim(extent):
            return True
        try:
            with self._held(filling.target):
                copy(filling.target, source, extent)
        except Withdrawn:
            return False
        except NydusError as error:
            logger.info("not copied ahead: %s", error)
            return False
        except Exception:
            logger.exception("filling %r failed", filling.target)
            return False
        finally:
            filling.release(extent)
        return True

    def _begin(self, filling: Filling) -> None:
        if not self._pool.submit_background(partial(self._work_ahead, filling)):
            filling.give_up()

    def _work_ahead(self, filling: Filling) -> None:
        """Copy one extent, and make room for others before the next one."""
        try:
            extent = filling.take()
            if extent is None:
                return
            go_on = self._copy(filling, filling.slot.source, extent)
        except NydusError as error:
            logger.info("not copied ahead: %s", error)
            go_on = False
        if go_on:
            self._begin(filling)
        else:
            filling.give_up()

    # Answers

    def answer(self, pending: PendingRead) -> bool:
        """Complete a READ; return whether it still waited for that."""
        with self._lock:
            actions = self._machine.answer_read(pending)
            self._do(actions)
        return bool(actions)

    def _do(self, actions: Sequence[Action]) -> None:
        """Do what the machine says; the lock is held."""
        for action in actions:
            try:
                if isinstance(action, Command):
                    self.device.write(action.text)
                elif isinstance(action, Complete):
                    self.device.complete(action.fd, action.msg_id)
                else:
                    os.close(action.fd)
            except OSError as error:
                if isinstance(action, Command):
                    logger.info("the kernel does not want %r any more: %s", action.object, error)
                    self._do(self._machine.not_opened(action.object))
                else:
                    # EINVAL: the reader was killed, or the file is withdrawn.
                    level = logging.DEBUG if error.errno == errno.EINVAL else logging.ERROR
                    logger.log(level, "%s refused: %s", action, error)

    # End

    def pause(self) -> None:
        """Take no further requests; those that were taken can still be answered."""
        if self._running:
            self._running = False
            os.eventfd_write(self._stop, 1)
            self._thread.join()

    def close(self, seconds: float, *, leave: bool = False) -> None:
        """Let what is under way end, answer the rest, and close everything.

        Args:
            seconds: for the requests under way, and again for the threads.
            leave: leave what is not answered then to a successor that has the device, too.
        """
        self.pause()
        end = time.monotonic() + seconds
        while self.waiting and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        with self._lock:
            if self.waiting:
                logger.error("%d reads are %s", self.waiting, "left over" if leave else "failed")
            self._do(self._machine.end(answer=not leave))
            self._forget(list(self._fillings))
        self._pool.close(seconds)
        self.device.close()
        os.close(self._stop)
