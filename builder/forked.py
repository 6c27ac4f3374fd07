"""Processes that read, digest and compress ranges of a file, for the process that forked them.

Threads share the interpreter's lock: whoever comes back from a C library waits for it behind the
thread that walks the source, longer than its work took. These processes share the file and a
piece of memory with their parent, so that no content is sent. Hand-out and answers go over
sockets of messages: whatever process is free takes the next range, and one that was killed is
seen by the end of its answers.
"""

from __future__ import annotations

import mmap
import os
import queue
import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Self

from builder.blob import Data, Stored
from builder.child import end_child, fork_child
from builder.errors import BuildError
from erofs.errors import NydusError

__all__ = ["COMPRESSED", "ForkedWorkers", "Part", "RangeJob", "Worked", "read_range"]

_JOB = struct.Struct("=III4xQQ")
_PART = struct.Struct("=III")
_ANSWER = struct.Struct("=I?")
RECORD = struct.Struct("=32sIII")
KNOWN, PLAIN, COMPRESSED, CONTENT = range(4)
_MESSAGE_BYTES = 64 << 10
# Of ciphers, which pad.
_SLACK_BYTES = 64
_SLOT_BYTES = 32 << 20
_LEAST_SLOTS_A_WORKER = 2
_MAX_WORKERS = 16


class Worked(NamedTuple):
    """What a worker has found out of a chunk.

    `stored` is None where that is not needed yet: of what is known already, and of what goes
    into a batch. `data` is the content, empty where nobody needs it any more.
    """

    digest: bytes
    crc32c: int
    data: Data
    stored: Stored | None


# Of each chunk: digest, CRC, how many bytes are stored, and what they are.
Record = tuple[bytes, int, int, int]


class Part(NamedTuple):
    """A chunk in a range: place from its start and size in bytes, and whether it is for a batch."""

    start: int
    size: int
    is_small: bool


# Gets the content of chunks, and for each whether it is for a batch.
Work = Callable[[Sequence[tuple[memoryview, bool]]], list[Worked]]


class _Process(NamedTuple):
    pid: int
    answers: socket.socket


class RangeJob:
    """A range that was handed out; has what `Future` has of a task."""

    def __init__(self, workers: ForkedWorkers, number: int, slot: int, parts: int) -> None:
        self._workers = workers
        self.number = number
        self.slot = slot
        self.parts = parts

    def done(self) -> bool:
        """Tell whether it need not be waited for; raise `BuildError`."""
        return self._workers.is_done(self)

    def result(self) -> list[Worked]:
        """Return what was found, copied; the slot is free then. Raise `BuildError`."""
        records, shared = self.take()
        content = memoryview(bytes(shared))
        self.release()
        found, place = [], 0
        for digest, crc, length, kind in records:
            kept = content[place : place + length]
            place += length
            if kind == CONTENT:
                found.append(Worked(digest, crc, kept, None))
            else:
                stored = None if kind == KNOWN else Stored(kept, kind == COMPRESSED)
                found.append(Worked(digest, crc, b"", stored))
        return found

    def take(self) -> tuple[list[Record], memoryview]:
        """Return what was found, and what is stored of it, which is valid until `release`.

        Raises:
            BuildError: a process has ended, or met what `on_failure` raises.
        """
        return self._workers.wait(self)

    def release(self) -> None:
        """Let the slot be used for another range; any thread may call it."""
        self._workers.free.put(self.slot)


class ForkedWorkers:
    """Forks on construction; a context manager that ends the processes.

    Args:
        count: of processes.
        descriptor: of the file that ranges are of.
        work: what to do with a range; whatever it raises makes `on_failure` be called here.
        span: the largest range in bytes, and
        parts: the most chunks in one.
        on_failure: is called with offset, length and parts, and raises what is wrong.

    Raises:
        BuildError: there can be no more processes, or from waiting: one has ended.
    """

    def __init__(
        self, count: int, descriptor: int, work: Work, span: int, parts: int,
        on_failure: Callable[[int, int, Sequence[Part]], NoReturn],
    ) -> None:  # fmt: skip
        count = min(count, _MAX_WORKERS)
        self._descriptor = descriptor
        self._work = work
        self._on_failure = on_failure
        self._span = span
        self._slot_bytes = span + parts * (RECORD.size + _SLACK_BYTES)
        self.slots = max(count * _LEAST_SLOTS_A_WORKER, _SLOT_BYTES // self._slot_bytes)
        self._memory = memoryview(mmap.mmap(-1, self.slots * self._slot_bytes))
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.slots):
            self.free.put(slot)
        self._asked: dict[int, tuple[int, int, Sequence[Part]]] = {}
        self._answered: set[int] = set()
        self._next = 0
        self._jobs, jobs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._processes: list[_Process] = []
        self._poll = select.poll()
        try:
            for _ in range(count):
                self._fork(jobs)
        except BaseException:
            self.close()
            raise
        finally:
            jobs.close()

    def _fork(self, jobs: socket.socket) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def answer() -> None:
            for each in (self._jobs, ours, *(process.answers for process in self._processes)):
                each.close()
            self._answer(jobs, theirs)

        try:
            pid = fork_child(answer)
        except BuildError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._processes.append(_Process(pid, ours))
        self._poll.register(ours, select.POLLIN)

    # In the child.

    def _answer(self, jobs: socket.socket, answers: socket.socket) -> None:
        buffer = memoryview(bytearray(self._span))
        while message := jobs.recv(_MESSAGE_BYTES):
            number, slot, _, offset, length = _JOB.unpack_from(message)
            parts = list(_PART.iter_unpack(message[_JOB.size :]))
            is_done = self._carry_out(slot, buffer[:length], offset, parts)
            answers.send(_ANSWER.pack(number, is_done))

    def _carry_out(
        self, slot: int, buffer: memoryview, offset: int, parts: Sequence[tuple[int, int, int]]
    ) -> bool:
        """Leave what was found in the slot; return False when anything is wrong."""
        try:
            read_range(self._descriptor, buffer, offset)
            worked = self._work(
                [(buffer[start : start + size], bool(small)) for start, size, small in parts]
            )
        # The parent, which tries it again and has somebody to tell, raises what is wrong.
        except (NydusError, OSError, MemoryError):
            return False
        at = slot * self._slot_bytes
        records = self._memory[at : at + RECORD.size * len(parts)]
        place = at + len(records)
        for number, (digest, crc, data, stored) in enumerate(worked):
            kept: Data = b""
            kind = KNOWN
            if stored is not None:
                kept, kind = stored.data, COMPRESSED if stored.is_compressed else PLAIN
            elif data:
                kept, kind = data, CONTENT
            self._memory[place : place + len(kept)] = kept
            place += len(kept)
            RECORD.pack_into(records, number * RECORD.size, digest, crc, len(kept), kind)
        return True

    # In the parent.

    def submit(self, offset: int, length: int, parts: Sequence[Part]) -> RangeJob:
        """Hand out a range of the file; wait for a free slot. Raise `BuildError`."""
        job = RangeJob(self, self._next, self.free.get(), len(parts))
        self._next += 1
        self._asked[job.number] = offset, length, parts
        head = _JOB.pack(job.number, job.slot, len(parts), offset, length)
        try:
            self._jobs.send(head + b"".join([_PART.pack(*part) for part in parts]))
        except ConnectionError as error:
            raise self._ended() from error
        return job

    def is_done(self, job: RangeJob) -> bool:
        """Tell whether an answer is there; raise `BuildError`."""
        if job.number not in self._answered:
            self._take_answers(0)
        return job.number in self._answered

    def wait(self, job: RangeJob) -> tuple[list[Record], memoryview]:
        """Return the records of a range and what is stored of it; raise `BuildError`."""
        while job.number not in self._answered:
            self._take_answers(None)
        self._answered.remove(job.number)
        del self._asked[job.number]
        at = job.slot * self._slot_bytes
        end = at + RECORD.size * job.parts
        records: list[Record] = list(RECORD.iter_unpack(self._memory[at:end]))
        size = sum([length for _, _, length, _ in records])
        return records, self._memory[end : end + size]

    def _take_answers(self, timeout: int | None) -> None:
        """Take the answers that are there, one of each process; raise `BuildError`."""
        ready = {descriptor for descriptor, _ in self._poll.poll(timeout)}
        for process in self._processes:
            if process.answers.fileno() not in ready:
                continue
            try:
                answer = process.answers.recv(_ANSWER.size)
            except ConnectionError as error:
                raise self._ended() from error
            if not answer:
                raise self._ended()
            number, is_done = _ANSWER.unpack(answer)
            if not is_done:
                self._on_failure(*self._asked[number])
            self._answered.add(number)

    @staticmethod
    def _ended() -> BuildError:
        return BuildError("a process that digests and compresses has ended")

    def close(self) -> None:
        """End the processes, whatever they do."""
        self._jobs.close()
        for process in self._processes:
            end_child(process.pid)
            process.answers.close()
        self._processes.clear()
        # Who still writes what is in there keeps it.
        self._memory = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_range(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Read as many bytes as the buffer has; raise `BuildError`."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise BuildError("the source has become shorter while it was read", offset=offset)
        done += count
