"""The holder process: keeps groups, journals and records; fails reads that nobody will serve.

One thread, one loop, standard library only: nothing here may fail for lack of memory, of a
module on a disk, or of patience. It is told what to keep by the worker that leads, gives all
of it to the next one, and ends when nothing is left to be kept.

A group stays open until no file system that its reads come from exists: the kernel names
each in `/sys/fs/erofs`, also after a lazy unmount under a running container (spec ondemand
5.14). Nothing that is answered here is ever allowed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator

from fscache.holder.journal import Journal
from fscache.holder.wire import Message, WireError, receive, send

__all__ = ["main"]

_SYSFS = "/sys/fs/erofs"
_POLL_MS = 500
# Standing in for a killed `nydusd erofs`: more often than this in a minute is no accident.
_MAX_RESTARTS = 5
_RESTART_WINDOW = 60.0
# Ignored: whoever wants an end tells the worker, and nobody waits for restarted workers.
# SIGUSR1 is for workers too, and `systemctl kill` sends it to all.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1)
_READ_BYTES = 4096
_EVENT = struct.Struct("=IBBHQii")
_RESPONSE = struct.Struct("=iI")
# FAN_DENY_ERRNO(EIO)
_DENY_EIO = 2 | errno.EIO << 24


def _log(text: str) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    with contextlib.suppress(OSError):
        os.write(2, f"{now}Z holder[{os.getpid()}]: {text}\n".encode(errors="backslashreplace"))


class _Domain:
    """A fanotify group, the lock of its marked directory, and its journal."""

    def __init__(self, message: Message, descriptors: list[int]) -> None:
        self.message = message
        self.group, self.lock, self.journal = descriptors

    def deny_taken(self) -> None:
        """Fail the reads whose events a dead worker had read."""
        # A copy, since a journal closes its descriptor; opened now, as its slots have changed.
        journal = Journal(os.dup(self.journal))
        try:
            for taken in journal.taken():
                self._deny(taken.fd)
                journal.clear(taken.slot)
        finally:
            journal.close()

    def deny_waiting(self) -> None:
        """Fail the reads whose events nobody has read."""
        while True:
            try:
                events = os.read(self.group, _READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                # EMFILE and the like: the kernel has denied that event itself.
                _log(f"event not read: {error}")
                return
            for fd in _event_descriptors(events):
                self._deny(fd)
                os.close(fd)

    def _deny(self, fd: int) -> None:
        # ENOENT: answered before, or the reader was killed.
        with contextlib.suppress(OSError):
            os.write(self.group, _RESPONSE.pack(fd, _DENY_EIO))

    def close(self, *, remove: bool) -> None:
        """Let go of everything, and remove the marked directory when it is not needed again."""
        os.close(self.group)
        os.close(self.journal)
        serve = self.message.get("serve")
        if remove and isinstance(serve, str):
            # Beside its list of mounts (`fscache.store`) it holds nothing but hard links; what
            # cannot be removed the next start removes.
            with contextlib.suppress(OSError):
                os.unlink(".mounts/list", dir_fd=self.lock)
                os.rmdir(".mounts", dir_fd=self.lock)
            with contextlib.suppress(OSError):
                for name in os.listdir(self.lock):
                    os.unlink(name, dir_fd=self.lock)
                os.rmdir(serve)
        os.close(self.lock)


def _event_descriptors(events: bytes) -> Iterator[int]:
    position = 0
    while position + _EVENT.size <= len(events):
        length, _, _, _, _, fd, _ = _EVENT.unpack_from(events, position)
        if fd >= 0:
            yield fd
        if length < _EVENT.size:
            return
        position += length


class _Peer:
    """A connected worker; `candidate` while it waits for the leader to go."""

    def __init__(self, connection: socket.socket, message: Message) -> None:
        self.connection = connection
        self.pid = message.get("pid")
        # The command line to start it again with, and where; empty when a client does that.
        restart = message.get("restart")
        self.restart = [str(word) for word in restart] if isinstance(restart, list) else []
        self.directory = str(message.get("directory", "/"))
        self.orderly = False
        # An orderly end that leaves everything for a successor.
        self.leaves = False


class Holder:
    """What is kept, for whom, and until when.

    Args:
        listener: where workers connect; its file and those beside it go with the holder.
        directory: the directory of the listener.
        patience: seconds that reads may wait for a successor.
    """

    def __init__(self, listener: socket.socket, directory: str, patience: float) -> None:
        self._listener = listener
        self._directory = directory
        self._patience = patience
        self._domains: dict[str, _Domain] = {}
        self._records: dict[str, tuple[Message, list[int]]] = {}
        self._leader: _Peer | None = None
        self._candidates: list[_Peer] = []
        self._alone_since = time.monotonic()
        self._denying = False
        self._restarts: list[float] = []

    # The loop

    def run(self, first: socket.socket) -> None:
        """Serve until nothing is left to be kept."""
        self._greet(first)
        while self._leader is not None or self._needed():
            for fd in self._wait():
                self._handle(fd)
            self._look_after_the_orphaned()
        self._end()

    def _wait(self) -> list[int]:
        """Return the descriptors that have something; look up now and then without a worker."""
        poll = select.poll()
        # Workers first: one that was killed is gone before its successor is heard.
        for watched in (*(peer.connection for peer in self._peers()), self._listener):
            poll.register(watched, select.POLLIN)
        if self._denying:
            for domain in self._domains.values():
                poll.register(domain.group, select.POLLIN)
        return [fd for fd, _ in poll.poll(_POLL_MS if self._leader is None else None)]

    def _peers(self) -> list[_Peer]:
        return [*([self._leader] if self._leader is not None else []), *self._candidates]

    def _handle(self, fd: int) -> None:
        if fd == self._listener.fileno():
            connection, _ = self._listener.accept()
            self._greet(connection)
            return
        for peer in self._peers():
            if peer.connection.fileno() == fd:
                self._hear(peer)
                return
        for domain in self._domains.values():
            if domain.group == fd and self._denying:
                domain.deny_waiting()

    def _needed(self) -> bool:
        if self._candidates or self._any_alive():
            return True
        return time.monotonic() - self._alone_since < self._patience

    def _any_alive(self) -> bool:
        """Whether a file system that was recorded exists, mounted anywhere or not at all."""
        for record, _ in self._records.values():
            name = record.get("erofs")
            if isinstance(name, str) and os.path.exists(f"{_SYSFS}/{name}"):
                return True
        return False

    def _look_after_the_orphaned(self) -> None:
        if self._leader is not None or self._denying:
            return
        if time.monotonic() - self._alone_since < self._patience:
            return
        self._denying = True
        if self._any_alive():
            _log("no worker came: reads of what is not cached fail from now on")
        for domain in self._domains.values():
            domain.deny_taken()
            domain.deny_waiting()
        # The last descriptor of some devices fails those who wait, by being closed.
        for key, (record, _) in list(self._records.items()):
            if record.get("orphaned") == "close":
                self._drop(key)

    # Workers

    def _greet(self, connection: socket.socket) -> None:
        """Give a new worker everything that is kept; it leads unless another one does."""
        try:
            got = receive(connection)
            if got is None or got[0].get("do") != "hello":
                connection.close()
                return
            peer = _Peer(connection, got[0])
            # One that was killed meanwhile has left messages that count all the same.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._send_all(peer)
        except (WireError, OSError) as error:
            _log(f"worker not taken: {error}")
            connection.close()
            return
        if self._leader is None:
            self._lead(peer)
        else:
            self._candidates.append(peer)

    def _send_all(self, peer: _Peer) -> None:
        send(
            peer.connection,
            {
                "domains": len(self._domains),
                "records": len(self._records),
                "leader": self._leader.pid if self._leader is not None else None,
            },
        )
        for domain in self._domains.values():
            descriptors = [domain.group, domain.lock, domain.journal]
            send(peer.connection, domain.message, descriptors)
        for key, (record, descriptors) in self._records.items():
            send(peer.connection, {"key": key, "record": record}, descriptors)

    def _lead(self, peer: _Peer) -> None:
        self._leader = peer
        self._denying = False

    def _hear(self, peer: _Peer) -> None:
        try:
            got = receive(peer.connection)
        except ConnectionResetError:
            # It closed before it read all that was sent to it: an end as any other.
            got = None
        except (WireError, OSError) as error:
            _log(f"worker {peer.pid}: {error}")
            got = None
        if got is None:
            self._lose(peer)
            return
        message, descriptors = got
        try:
            self._obey(peer, message, descriptors)
        except (OSError, ValueError) as error:
            _log(f"worker {peer.pid}: {message.get('do')}: {error}")

    def _obey(self, peer: _Peer, message: Message, descriptors: list[int]) -> None:
        what, key = message.get("do"), str(message.get("key"))
        if what == "domain":
            self._drop_domain(key)
            self._domains[key] = _Domain(message, descriptors)
            return
        if what == "keep":
            record = message.get("record")
            self._drop(key)
            self._records[key] = (record if isinstance(record, dict) else {}, descriptors)
            return
        for fd in descriptors:
            os.close(fd)
        if what == "drop":
            self._drop(key)
        elif what == "drop domain":
            self._drop_domain(key)
        elif what == "bye":
            peer.orderly = True
            peer.leaves = bool(message.get("leave"))
        elif what == "lead" and self._leader is not None and self._leader is not peer:
            send(self._leader.connection, {"do": "yield"})
        elif what == "lead":
            send(peer.connection, {"do": "lead"})

    def _drop(self, key: str) -> None:
        _, descriptors = self._records.pop(key, ({}, []))
        for fd in descriptors:
            os.close(fd)

    def _drop_domain(self, key: str) -> None:
        domain = self._domains.pop(key, None)
        if domain is not None:
            domain.close(remove=False)

    def _lose(self, peer: _Peer) -> None:
        peer.connection.close()
        if peer is not self._leader:
            self._candidates.remove(peer)
            return
        self._leader = None
        self._alone_since = time.monotonic()
        if not peer.orderly:
            _log(f"worker {peer.pid} was killed; {len(self._records)} records are kept")
        elif not peer.leaves:
            # It has closed what it could; only what still has users is kept.
            self._alone_since -= self._patience
        if self._candidates:
            successor = self._candidates.pop(0)
            self._lead(successor)
            with contextlib.suppress(OSError):
                send(successor.connection, {"do": "lead"})
        elif not peer.orderly and peer.restart:
            self._restart(peer)

    def _restart(self, peer: _Peer) -> None:
        """Start the worker again, for daemons that nobody else looks after."""
        now = time.monotonic()
        self._restarts = [when for when in self._restarts if now - when < _RESTART_WINDOW]
        if len(self._restarts) >= _MAX_RESTARTS:
            _log(f"worker killed {_MAX_RESTARTS} times in a minute: not started again")
            return
        self._restarts.append(now)
        pid = os.fork()
        if not pid:
            self._become(peer)
        _log(f"worker started again as process {pid}")

    @staticmethod
    def _become(peer: _Peer) -> None:
        """Be the worker, in the child of a fork; never returns."""
        try:
            os.setsid()
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            _set_oom_score("0")
            os.chdir(peer.directory)
            os.execv(peer.restart[0], peer.restart)
        finally:
            os._exit(127)

    def _end(self) -> None:
        """Let go of everything: nobody reads any more."""
        # First of all: a worker that starts now must find nobody here.
        for name in ("holder.sock", "mountpoint"):
            with contextlib.suppress(OSError):
                os.unlink(f"{self._directory}/{name}")
        self._listener.close()
        for domain in self._domains.values():
            domain.close(remove=True)
        with contextlib.suppress(OSError):
            log = f"{self._directory}/log"
            if not os.path.getsize(log):
                os.unlink(log)
            # The lock last, as from then on the directory may be another one's; what has said
            # something stays.
            os.unlink(f"{self._directory}/lock")
            os.rmdir(self._directory)


def _set_oom_score(adjustment: str) -> None:
    """Say how soon this process may be killed for memory: -1000 is never."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(adjustment)


def _close_others(wanted: set[int]) -> None:
    """Close what came along by chance: descriptors that the kernel had just given the worker."""
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - wanted:
        with contextlib.suppress(OSError):
            os.close(fd)


def main() -> None:
    """Run with the words that `fscache.holder.link` gives: one JSON object."""
    options = json.loads(sys.argv[1])
    # The child of a child: whoever started the worker does not find a stranger below it.
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.setsid()
    _set_oom_score("-1000")
    _close_others({0, 1, 2, *(options[name] for name in ("listener", "first", "lock"))})
    for name in ("listener", "first", "lock"):
        os.set_inheritable(options[name], False)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.socket(fileno=options["listener"])
    listener.setblocking(True)
    first = socket.socket(fileno=options["first"])
    # `options["lock"]` stays open as long as this process lives: it tells that it does.
    Holder(listener, options["directory"], options["patience"]).run(first)
