"""Connections that serve a disk: handshake, requests, replies, threads.

One thread reads a connection and answers what is ready; what has to be fetched is answered
by a small pool, in whichever order it comes. Each request is answered exactly once; when its
connection breaks instead, the client asks again on another one.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from fscache.fetch.pool import WorkerPool
from fscache.nbd.disk import Data, Disk, Slice
from fscache.nbd.handshake import Export, Handshake, Phase
from fscache.nbd.protocol import (
    Command,
    ExportFlags,
    ProtocolError,
    Request,
    RequestParser,
)
from fscache.nbd.serving import Pending

__all__ = ["DISK_FLAGS", "Connection", "DiskServer"]

logger = logging.getLogger(__name__)

DISK_FLAGS = (
    ExportFlags.HAS_FLAGS
    | ExportFlags.READ_ONLY
    | ExportFlags.SEND_FLUSH
    | ExportFlags.CAN_MULTI_CONN
    | ExportFlags.SEND_CACHE
)
_RECEIVE_BYTES = 1 << 16
# How many requests of a connection may wait for answers; the kernel's queue has 128.
_MAX_WAITING = 256
_HANDSHAKE_SECONDS = 30.0
_CLOSE_SECONDS = 1.0
_MAX_BUFFERS = 256


class Ended(Protocol):
    """What is to be done at the end of a connection."""

    def __call__(self, *, orderly: bool) -> None: ...


class DiskServer:
    """A disk, and what all of its connections share; close it before the disk's sources.

    Args:
        disk: what is served.
        threads: answer what had to be fetched.
    """

    def __init__(self, disk: Disk, threads: int) -> None:
        self.disk = disk
        self._pool = WorkerPool(threads, threads, "nbd-answer")
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._answering = 0
        self._closed = False
        # False after a file gave less than it should have: the next error gets its reply.
        self.direct = True

    def start(
        self, client: socket.socket, *, handshake: bool, ended: Ended | None = None
    ) -> Connection:
        """Serve a connected socket, which is owned from now on.

        Args:
            client: a stream socket.
            handshake: whether the client begins with one; the kernel does not.
            ended: called by the connection's thread when it takes no more requests, with
                `orderly` telling whether the client had said so.

        Raises:
            ProtocolError: the server is closed.
        """
        connection = Connection(self, client, handshake, ended)
        with self._changed:
            if self._closed:
                client.close()
                raise ProtocolError("the server is closed")
            self._connections.add(connection)
        connection.start()
        return connection

    def forget(self, connection: Connection) -> None:
        """Take note that a connection has ended."""
        with self._changed:
            self._connections.discard(connection)

    def later(self, answer: Callable[[], None]) -> bool:
        """Have the pool answer a request; return whether it will, unless the server closes."""
        return self._pool.submit(None, answer)

    @contextmanager
    def sources(self) -> Iterator[bool]:
        """Keep the disk's sources open for the block; gives False when they are not any more."""
        with self._changed:
            usable = not self._closed
            self._answering += usable
        try:
            yield usable
        finally:
            if usable:
                with self._changed:
                    self._answering -= 1
                    self._changed.notify_all()

    @property
    def connections(self) -> int:
        """How many connections are served."""
        return len(self._connections)

    @property
    def waiting(self) -> int:
        """How many requests wait for their answers."""
        with self._changed:
            return sum(connection.waiting for connection in self._connections)

    def pause(self) -> None:
        """Take no further requests; those that were taken are answered. Connections then end."""
        with self._changed:
            for connection in self._connections:
                connection.pause()

    def close(self) -> None:
        """End all connections; the disk's sources are not used afterwards."""
        with self._changed:
            self._closed = True
            connections = list(self._connections)
            for connection in connections:
                connection.hang_up()
            self._changed.wait_for(lambda: self._answering == 0)
        for connection in connections:
            connection.abandon()
        self._pool.close(_CLOSE_SECONDS)


class Connection:
    """One connected client; made by `DiskServer.start`."""

    def __init__(
        self, server: DiskServer, client: socket.socket, handshake: bool, ended: Ended | None
    ) -> None:
        self._server = server
        self._socket = client
        self._handshake = handshake
        self._ended = ended
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._pausing = self._abandoned = False
        self.waiting = 0
        self.structured = False
        self._thread = threading.Thread(target=self._run, name="nbd", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the connection, and for the answers under way."""
        self._thread.join()

    def pause(self) -> None:
        """Take no further requests."""
        self._pausing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def hang_up(self) -> None:
        """Break the connection; requests without an answer stay so."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Let the thread end without the answers that it waits for."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    # Life

    def _run(self) -> None:
        orderly = False
        try:
            rest = self._negotiate() if self._handshake else b""
            if rest is not None:
                orderly = self._transmit(rest)
        except ProtocolError as error:
            logger.warning("connection ends: %s", error)
        except OSError as error:
            logger.debug("connection ends: %s", error)
        except Exception:
            # The client asks again on another connection; this process serves those.
            logger.exception("connection ends")
        finally:
            if self._pausing:
                self._wait_below(1)
            self.hang_up()
            # Told before the end of what was asked: nobody waits for these answers any more.
            if self._ended is not None:
                self._ended(orderly=orderly)
            self._wait_below(1)
            self._socket.close()
            self._server.forget(self)

    def _negotiate(self) -> bytes | None:
        """Do the handshake; return what came behind it, None when the client has gone."""
        handshake = Handshake({b"": Export(self.disk.size, DISK_FLAGS)})
        self._socket.settimeout(_HANDSHAKE_SECONDS)
        self._socket.sendall(handshake.greeting())
        while handshake.phase not in (Phase.TRANSMISSION, Phase.CLOSED):
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                return None
            self._socket.sendall(handshake.receive(data))
        self._socket.settimeout(None)
        self.structured = handshake.structured
        return handshake.rest if handshake.phase is Phase.TRANSMISSION else None

    def _transmit(self, data: bytes) -> bool:
        """Take requests until there are no more; return whether the client said so."""
        parser = RequestParser()
        while True:
            for request in parser.feed(data):
                if request.command == Command.DISC:
                    # What was asked before is answered first.
                    self._wait_below(1)
                    return True
                self._take(request)
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                return False

    def _take(self, request: Request) -> None:
        self._wait_below(_MAX_WAITING)
        with self._changed:
            self.waiting += 1
        with self._server.sources() as usable:
            if usable:
                Pending(self, request).begin()
            else:
                self._answered()

    def _wait_below(self, limit: int) -> None:
        """Wait until fewer requests than this wait for answers."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting < limit or self._abandoned)

    def _answered(self) -> None:
        with self._changed:
            self.waiting -= 1
            self._changed.notify_all()

    # What a request wants of its client

    @property
    def disk(self) -> Disk:
        """What is read."""
        return self._server.disk

    @property
    def direct(self) -> bool:
        """Whether files are sent as such."""
        return self._server.direct

    def later(self, answer: Callable[[], None]) -> None:
        """Have another thread answer a request."""
        if not self._server.later(lambda: self._answer(answer)):
            self._answered()

    def _answer(self, answer: Callable[[], None]) -> None:
        with self._server.sources() as usable:
            if usable:
                answer()
            else:
                self._answered()

    def reply(self, data: Sequence[Data]) -> None:
        """Send an answer whole; a connection that does not take it is broken."""
        try:
            with self._sending:
                self._send(data)
        except OSError as error:
            logger.debug("answer not sent: %s", error)
            self.hang_up()
        finally:
            self._answered()

    def _send(self, data: Sequence[Data]) -> None:
        buffers: list[memoryview] = []
        for item in data:
            if not isinstance(item, Slice):
                buffers.append(memoryview(item))
            else:
                self._send_buffers(buffers)
                buffers = []
                self._send_file(item)
        self._send_buffers(buffers)

    def _send_buffers(self, buffers: list[memoryview]) -> None:
        for first in range(0, len(buffers), _MAX_BUFFERS):
            batch = buffers[first : first + _MAX_BUFFERS]
            while batch:
                sent = self._socket.sendmsg(batch)
                while batch and sent >= len(batch[0]):
                    sent -= len(batch.pop(0))
                if sent:
                    batch[0] = batch[0][sent:]

    def _send_file(self, item: Slice) -> None:
        offset, end = item.offset, item.offset + item.length
        while offset < end:
            try:
                sent = os.sendfile(self._socket.fileno(), item.fd, offset, end - offset)
            except (BrokenPipeError, ConnectionError):
                raise
            except OSError as error:
                self._server.direct = False
                logger.warning("reads fail: a file of the cache cannot be sent (%s)", error)
                raise
            if not sent:
                self._server.direct = False
                raise OSError(errno.EIO, "file is too short")
            offset += sent
