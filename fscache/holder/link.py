"""The worker's side of the holder: find or start it, give it things to keep, take them over.

There is one holder for each mount point that a daemon was started with, found again by a
directory whose name is made from that path. A lock in it tells that a holder lives.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import fscache
from erofs.errors import NydusError
from erofs.values import Value
from fscache.holder.wire import Message, WireError, receive, send

__all__ = ["HeldDomain", "HeldRecord", "HolderError", "HolderLink", "Inheritance"]

logger = logging.getLogger(__name__)

RUN_DIRECTORY = Path("/run/nydusd")
# Below the 120 s after which the kernel complains of hung tasks.
PATIENCE_SECONDS = 60.0
# One that ends on a starved machine takes its time to do so.
_FIND_SECONDS = 30.0
_HANDOVER_SECONDS = 2.0
_PAUSE_SECONDS = 0.02
_MAX_REVIVALS = 3
_SOCKET = "holder.sock"


class HolderError(NydusError):
    """No holder can be started or found, or another worker has it."""


class HeldDomain(Value):
    """A work directory with its marked directory; the descriptors are the receiver's."""

    work_dir: Path
    serve: Path
    group: int
    lock: int
    journal: int


class HeldRecord(Value):
    """What a worker noted under a key, and the descriptors it gave, now the receiver's."""

    key: str
    values: Mapping[str, object]
    descriptors: list[int]


class Inheritance:
    """Everything that a holder had; empty from a new one. `leader` is a worker that lives."""

    def __init__(self) -> None:
        self.domains: list[HeldDomain] = []
        self.records: list[HeldRecord] = []
        self.leader: int | None = None

    def close(self) -> None:
        """Close all descriptors."""
        for domain in self.domains:
            for fd in (domain.group, domain.lock, domain.journal):
                os.close(fd)
        for record in self.records:
            for fd in record.descriptors:
                os.close(fd)
        self.domains, self.records = [], []


def run_directory() -> Path:
    """Return where things are kept that end with the machine: `NYDUSD_RUN_DIR`, or in `/run`."""
    return Path(os.environ.get("NYDUSD_RUN_DIR", RUN_DIRECTORY))


def holder_directory(mountpoint: Path) -> Path:
    """Return where the holder of a mount point has its socket and its log."""
    name = os.fsencode(os.path.realpath(mountpoint))
    return run_directory() / hashlib.sha256(name).hexdigest()[:16]


class HolderLink:
    """The connection of one worker to its holder; use `open`.

    Args:
        directory: see `holder_directory`.
        restart: the command line that the holder starts when this process is killed.

    Raises:
        HolderError: `NYDUSD_HOLDER_SECONDS` is no number.
    """

    def __init__(self, directory: Path, restart: Sequence[str]) -> None:
        self.directory = directory
        self._patience = _patience()
        self._restart = list(restart)
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._domains: dict[str, tuple[Message, list[int]]] = {}
        self._records: dict[str, tuple[Message, list[int]]] = {}
        self._revivals = 0
        self._child = 0
        self._closing = False
        self._leads = threading.Event()
        self.on_yield: Callable[[], None] | None = None

    # Start

    @classmethod
    def open(
        cls, mountpoint: Path, *, restart: Sequence[str] = (), join: bool = False
    ) -> tuple[HolderLink, Inheritance]:
        """Find the holder of a mount point, or start one.

        Args:
            mountpoint: what the daemon was started with.
            restart: see the class.
            join: also when another worker lives, to follow it (`lead`).

        Raises:
            HolderError: none can be started or asked, or another worker lives.
        """
        directory = holder_directory(mountpoint)
        link = cls(directory, restart)
        try:
            inheritance = link._find(join=join)
            (directory / "mountpoint").write_bytes(os.fsencode(mountpoint.absolute()) + b"\n")
        except OSError as error:
            raise HolderError(
                f"no holder can be started ({error.strerror}); NYDUSD_RUN_DIR names another"
                " directory for its socket",
                path=directory,
            ) from error
        threading.Thread(target=link._listen, name="holder-link", daemon=True).start()
        return link, inheritance

    def _find(self, *, join: bool) -> Inheritance:
        begin = time.monotonic()
        answered = None
        while True:
            inheritance = self._start() or self._join()
            now = time.monotonic()
            if inheritance is not None:
                answered = answered or now
                if inheritance.leader is None or join:
                    if inheritance.leader is None:
                        self._leads.set()
                    return inheritance
                # One that is just dying is gone in a moment, however slow the first answer was.
                inheritance.close()
                self._disconnect()
                if now - answered > _HANDOVER_SECONDS:
                    raise HolderError(
                        f"process {inheritance.leader} serves this mount point", path=self.directory
                    )
            if now - begin > _FIND_SECONDS:
                raise HolderError("the holder does not answer", path=self.directory)
            time.sleep(_PAUSE_SECONDS)

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (self.directory, self.directory.parent):
            if place.stat().st_uid != os.geteuid():
                raise HolderError("directory of the holder is another user's", path=place)

    def _start(self) -> Inheritance | None:
        """Start a holder; None when one lives, or is just removing its files."""
        with ExitStack() as stack:
            try:
                self._make_directory()
                lock = os.open(
                    self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
                )
            except FileNotFoundError:
                return None
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if not os.fstat(lock).st_nlink:
                # Removed by a holder that has ended since.
                return None
            (self.directory / _SOCKET).unlink(missing_ok=True)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(stack.enter_context(self._address()))
            listener.listen()
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            self._child = self._spawn(listener.fileno(), theirs.fileno(), lock)
        self._connection = ours
        send(ours, self._hello())
        return Inheritance()

    @contextmanager
    def _address(self) -> Iterator[str]:
        """Give a path of the socket that is not too long for one."""
        fd = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{fd}/{_SOCKET}"
        finally:
            os.close(fd)

    def _spawn(self, listener: int, first: int, lock: int) -> int:
        log = os.open(
            self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        words = [
            sys.executable, "-I", "-S", "-c",
            # The packages are not installed for a Python that is isolated and quick to start.
            "import sys; sys.path.insert(0, sys.argv.pop());"
            "from fscache.holder.process import main; main()",
            _options(listener, first, lock, self.directory, self._patience),
            str(Path(fscache.__file__).parent.parent),
        ]  # fmt: skip
        for fd in (listener, first, lock):
            os.set_inheritable(fd, True)
        try:
            actions = [
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, null, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ]
            return os.posix_spawn(sys.executable, words, os.environ, file_actions=actions)
        finally:
            os.close(log)
            os.close(null)

    def _join(self) -> Inheritance | None:
        """Ask the holder that lives for all it has; None when it is just ending."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        inheritance = Inheritance()
        try:
            with self._address() as address:
                connection.connect(address)
            send(connection, self._hello())
            got = receive(connection)
            if got is None:
                raise ConnectionResetError
            counts = got[0]
            for _ in range(_number(counts, "domains")):
                inheritance.domains.append(_domain(*_must(receive(connection))))
            for _ in range(_number(counts, "records")):
                inheritance.records.append(_record(*_must(receive(connection))))
            leader = counts.get("leader")
            inheritance.leader = leader if isinstance(leader, int) else None
        except (OSError, WireError) as error:
            logger.debug("holder not asked: %s", error)
            inheritance.close()
            connection.close()
            return None
        self._connection = connection
        return inheritance

    def _hello(self) -> Message:
        return {
            "do": "hello",
            "pid": os.getpid(),
            "restart": self._restart,
            "directory": os.getcwd(),  # noqa: PTH109 -- words of the wire are strings
        }

    # What is kept

    def keep_domain(self, work_dir: Path, serve: Path, group: int, lock: int, journal: int) -> None:
        """Have a work directory's group kept, before anything is mounted from it."""
        message: Message = {
            "do": "domain",
            "key": os.fsdecode(work_dir),
            "serve": os.fsdecode(serve),
        }
        self._keep(self._domains, message, [group, lock, journal])

    def drop_domain(self, work_dir: Path) -> None:
        """Have a work directory's group closed, after all mounts from it are gone."""
        self._drop(self._domains, "drop domain", os.fsdecode(work_dir))

    def keep(self, key: str, values: Message, descriptors: Sequence[int] = ()) -> None:
        """Have something noted under a key, in place of what was there.

        A value named `erofs` is a file system below `/sys/fs/erofs`, for which everything is
        kept as long as it exists.
        """
        message: Message = {"do": "keep", "key": key, "record": values}
        self._keep(self._records, message, descriptors)

    def drop(self, key: str) -> None:
        """Have a note forgotten."""
        self._drop(self._records, "drop", key)

    def _keep(
        self,
        kept: dict[str, tuple[Message, list[int]]],
        message: Message,
        descriptors: Sequence[int],
    ) -> None:
        with self._lock:
            self._forget(kept, str(message["key"]))
            kept[str(message["key"])] = (message, [os.dup(fd) for fd in descriptors])
            self._send(message, descriptors)

    def _drop(self, kept: dict[str, tuple[Message, list[int]]], what: str, key: str) -> None:
        with self._lock:
            self._forget(kept, key)
            self._send({"do": what, "key": key})

    @staticmethod
    def _forget(kept: dict[str, tuple[Message, list[int]]], key: str) -> None:
        _, descriptors = kept.pop(key, ({}, []))
        for fd in descriptors:
            os.close(fd)

    def _send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        if self._connection is None:
            return
        # A holder that is gone is replaced by `_listen`, which sends everything again.
        with suppress(OSError):
            send(self._connection, message, descriptors)

    # What the holder says

    def _listen(self) -> None:
        if self._child:
            os.waitpid(self._child, 0)
        while True:
            connection = self._connection
            try:
                got = receive(connection) if connection is not None else None
            except (OSError, WireError) as error:
                logger.debug("holder: %s", error)
                got = None
            if got is None:
                if self._closing or not self._revive():
                    return
                continue
            what = got[0].get("do")
            if what == "lead":
                self._leads.set()
            elif what == "yield" and self.on_yield is not None:
                self.on_yield()

    def _revive(self) -> bool:
        """Start another holder in place of one that was killed, and give it everything."""
        with self._lock:
            self._disconnect()
            self._revivals += 1
            if self._closing or self._revivals > _MAX_REVIVALS:
                logger.error("the holder is gone: reads will give zeros if this process is killed")
                return False
            logger.error("the holder was killed, another one is started")
            try:
                # One that is just dying has the lock for a moment yet.
                end = time.monotonic() + _HANDOVER_SECONDS
                while self._start() is None:
                    if time.monotonic() > end:
                        logger.error("another holder serves this mount point")
                        return False
                    time.sleep(_PAUSE_SECONDS)
                if self._connection is None:
                    return False
                for message, descriptors in (*self._domains.values(), *self._records.values()):
                    send(self._connection, message, descriptors)
            except OSError as error:
                logger.error("no holder can be started: %s", error)
                return False
        os.waitpid(self._child, 0)
        return True

    def lead(self, timeout: float) -> bool:
        """Ask the worker that leads to stop, and wait until it has; return whether it did."""
        if not self._leads.is_set():
            with self._lock:
                self._send({"do": "lead"})
        return self._leads.wait(timeout)

    # End

    def close(self, *, leave: bool = False) -> None:
        """Part in order; with `leave` everything stays for a successor."""
        with self._lock:
            self._closing = True
            self._send({"do": "bye", "leave": leave})
            for kept in (self._domains, self._records):
                for key in list(kept):
                    self._forget(kept, key)
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError):
                # Wakes the thread that reads.
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _patience() -> float:
    """Return the seconds that reads wait for a successor; raise `HolderError`."""
    text = os.environ.get("NYDUSD_HOLDER_SECONDS")
    if text is None:
        return PATIENCE_SECONDS
    with suppress(ValueError):
        seconds = float(text)
        if seconds >= 0:
            return seconds
    raise HolderError("NYDUSD_HOLDER_SECONDS is no number of seconds", got=repr(text))


def _options(listener: int, first: int, lock: int, directory: Path, patience: float) -> str:
    return json.dumps(
        {
            "listener": listener,
            "first": first,
            "lock": lock,
            "directory": str(directory),
            "patience": patience,
        }
    )


def _must(got: tuple[Message, list[int]] | None) -> tuple[Message, list[int]]:
    if got is None:
        raise ConnectionResetError
    return got


def _number(message: Message, key: str) -> int:
    value = message.get(key)
    return value if isinstance(value, int) else 0


def _domain(message: Message, descriptors: list[int]) -> HeldDomain:
    group, lock, journal = descriptors
    return HeldDomain(Path(str(message["key"])), Path(str(message["serve"])), group, lock, journal)


def _record(message: Message, descriptors: list[int]) -> HeldRecord:
    values = message.get("record")
    return HeldRecord(str(message["key"]), values if isinstance(values, dict) else {}, descriptors)
