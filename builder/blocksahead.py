"""Inflate a gzip file ahead of who reads it, and tell where its blocks and chunks are.

Where a context of zran begins depends on how far the file was inflated when a chunk begins, so
that inflating has to stop at each header and chunk. A process of its own reads the headers, too,
and stops where its parent will stop: what it inflated lies in memory that both share, and with it
how far the file was used at each stop (`builder.zran.Stop`).
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

from builder.child import end_child, fork_child
from builder.errors import BuildError
from builder.source.measuring import Layer, MeasuredStream, measured_layer
from builder.tarstream import ByteStream, TarError, TarStream
from builder.zran import BlockStream, Stop
from erofs.inflate import MAX_WINDOW

__all__ = ["BlocksAhead"]

_STOP = struct.Struct("=QQQQIBB")
_PIECE_BYTES = 1 << 20
# Most stops are headers and the files behind them, 1024 bytes at least.
_PIECE_STOPS = 4096
_SLOT_BYTES = _PIECE_BYTES + _PIECE_STOPS * _STOP.size
_SLOTS = 8
# What it is, and two numbers; text or a digest may follow.
_MESSAGE = struct.Struct("=IQQ")
_PIECE, _END, _BROKEN, _UNREADABLE = range(4)
_MESSAGE_BYTES = 4096


class _Recorder:
    """The process's side: a stream for `TarStream` that leaves in the slots what it inflates.

    Args:
        blocks: the content.
        chunk_size: of the build.
        memory: the slots, and `parent` is told of those that are full, and tells of those that
            are free again.
    """

    def __init__(
        self, blocks: BlockStream, chunk_size: int, memory: memoryview, parent: socket.socket
    ) -> None:
        self._blocks = blocks
        self._chunk_size = chunk_size
        self._memory = memory
        self._parent = parent
        # The mapping stays where it is, and as long as the process.
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._number = -1
        self._begin_slot()

    def _begin_slot(self) -> None:
        self._number += 1
        if self._number >= _SLOTS and not self._parent.recv(1):
            raise ConnectionError("nobody wants more")
        start = self._number % _SLOTS * _SLOT_BYTES
        self._slot = self._memory[start : start + _SLOT_BYTES]
        self._slot_address = self._address + start
        self._filled = self._stops = 0

    def _hand_over(self) -> None:
        """Let the parent have what is in the slot; wait for a free one."""
        self._parent.send(_MESSAGE.pack(_PIECE, self._filled, self._stops))
        self._begin_slot()

    def _inflate(self, size: int) -> memoryview:
        """Inflate at most so much, but something unless the content has ended; note the stop."""
        slot, start = self._slot, self._filled
        end, place = min(start + size, _PIECE_BYTES), start
        address, inflate_to = self._slot_address, self._blocks.inflate_to
        while place < end and (count := inflate_to(address + place, end - place)):
            place += count
        stop = self._blocks.stop()
        if stop is not None and place > start:
            _STOP.pack_into(slot, _PIECE_BYTES + self._stops * _STOP.size, *stop)
            self._stops += 1
            self._filled = place
            if place == _PIECE_BYTES or self._stops == _PIECE_STOPS:
                self._hand_over()
        return slot[start:place]

    def read(self, size: int, /) -> bytes:
        """Return at most so many bytes, none only at the end."""
        return bytes(self._inflate(size))

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill as much of a buffer as the slot has room for, nothing only at the end."""
        data = self._inflate(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def skip(self, count: int) -> None:
        """Go over content, with a stop behind each chunk; the end is met by who reads on."""
        while count:
            rest = min(count, self._chunk_size)
            count -= rest
            while rest:
                done = len(self._inflate(rest))
                if not done:
                    return
                rest -= done

    def record(self) -> None:
        """Go over all of the content; what is wrong with the tar is for the parent to find."""
        try:
            with suppress(TarError):
                for _ in TarStream(self, "", self.skip, sys.maxsize):
                    pass
            while self._inflate(_PIECE_BYTES):
                pass
        finally:
            self._hand_over()


class BlocksAhead:
    """The content of a gzip file, inflated by a process that runs ahead; has what `Blocks` has.

    A context manager, which ends the process. There may be no other thread when it is made.

    Args:
        source: read by the process from now on, to its end; not closed.
        chunk_size: of the build.
        digested: whether the SHA-256 of the file is wanted.

    `layer` is what the file is, as soon as reading has come to the end.

    Raises:
        BuildError, OSError: from reading, with the offset in the file; or there can be no process.
    """

    def __init__(self, source: ByteStream, chunk_size: int, *, digested: bool) -> None:
        self.layer = Layer("", 0)
        self._memory = memoryview(mmap.mmap(-1, _SLOTS * _SLOT_BYTES))
        self._slot = memoryview(b"")
        self._stops: Iterator[tuple[int, ...]] = iter(())
        self._stop: Stop | None = None
        # Of the slot: where it begins in the content, and how far it was read. Then the content
        # before it that blocks may refer to, and the window of the last block if that is there.
        self._start = self._place = 0
        self._before = self._window = b""
        self._taken = 0
        self._ended = False
        self._process, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def work() -> None:
            self._process.close()
            _work(source, chunk_size, digested, self._memory, theirs)

        try:
            self._pid = fork_child(work)
        except BuildError:
            self._process.close()
            raise
        finally:
            theirs.close()

    def read(self, size: int, /) -> bytes:
        """Return at most so many bytes, none only at the end."""
        return bytes(self._next(size))

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill as much of a buffer as is there, nothing only at the end."""
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> memoryview:
        while self._place == len(self._slot) and not self._ended:
            self._take_slot()
        data = self._slot[self._place : self._place + size]
        self._place += len(data)
        return data

    def _take_slot(self) -> None:
        """Give the slot back for the next one; raise what the process met."""
        try:
            if self._taken:
                self._leave_slot()
            message = self._process.recv(_MESSAGE_BYTES)
        except ConnectionError as error:
            raise self._lost() from error
        if not message:
            raise self._lost()
        kind, first, second = _MESSAGE.unpack_from(message)
        rest = message[_MESSAGE.size :]
        if kind == _BROKEN:
            raise BuildError(rest.decode(), offset=first)
        if kind == _UNREADABLE:
            raise OSError(first, rest.decode())
        if kind == _END:
            self.layer = Layer(rest.decode(), first)
            self._ended = True
            return
        start = self._taken % _SLOTS * _SLOT_BYTES
        stops = start + _PIECE_BYTES
        self._slot = self._memory[start : start + first]
        self._stops = _STOP.iter_unpack(self._memory[stops : stops + second * _STOP.size])
        self._taken += 1

    @staticmethod
    def _lost() -> BuildError:
        return BuildError("the process that inflates has ended")

    def _leave_slot(self) -> None:
        for fields in self._stops:
            self._stop = Stop._make(fields)
        self._window = self.window()
        self._before = (self._before + bytes(self._slot[-MAX_WINDOW:]))[-MAX_WINDOW:]
        self._start += len(self._slot)
        self._slot, self._place = memoryview(b""), 0
        self._process.send(b"\0")

    def stop(self) -> Stop | None:
        """Return what is known where reading has come to; None before the first block."""
        position = self._start + self._place
        stop = self._stop
        while position and (stop is None or stop.out_offset < position):
            stop = self._stop = Stop._make(next(self._stops))
        if stop is not None and stop.out_offset != position:
            raise BuildError("the process that inflates has missed a chunk", offset=position)
        return stop

    def window(self) -> bytes:
        """Return the content before the block of the last stop that it may refer to."""
        stop = self._stop
        if stop is None or stop.block_out < self._start:
            return self._window
        size, place = stop.window_size, stop.block_out - self._start
        if place >= size:
            return bytes(self._slot[place - size : place])
        return (self._before + self._slot[:place])[-size:] if size else b""

    def close(self) -> None:
        """End the process."""
        end_child(self._pid)
        self._process.close()
        # Who still has some of it keeps it.
        self._memory = self._slot = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(
    source: ByteStream, chunk_size: int, digested: bool, memory: memoryview, parent: socket.socket
) -> None:
    """Do what the process is for, and tell the parent what became of it."""

    def record(measured: MeasuredStream) -> None:
        with BlockStream(measured, keep_windows=False) as blocks:
            _Recorder(blocks, chunk_size, memory, parent).record()

    try:
        _, layer = measured_layer(source, record, digested=digested)
        message = _MESSAGE.pack(_END, layer.size, 0) + layer.blob_id.encode("ascii")
    except BuildError as error:
        message = _MESSAGE.pack(_BROKEN, error.where["offset"], 0) + error.what.encode()
    except ConnectionError:
        raise
    except OSError as error:
        message = _MESSAGE.pack(_UNREADABLE, error.errno, 0) + str(error.strerror).encode()
    parent.send(message)
    # What was sent would be lost with a socket that is closed before it was read empty.
    while parent.recv(1):
        pass
