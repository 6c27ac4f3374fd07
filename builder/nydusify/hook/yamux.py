"""Several streams over one connection: the client's side of yamux.

Source: spec.md of hashicorp/yamux (version 0): frames of 12 bytes, big endian, 256 KiB of window
for each stream and direction. The other side may open no streams here: what a plug-in could ask
back for is not offered.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from builder.nydusify.hook.errors import PluginError

__all__ = ["Session", "Stream"]

_HEADER = struct.Struct(">BBHII")
_VERSION = 0
_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = range(4)
_SYN, _ACK, _FIN, _RST = 1, 2, 4, 8
_WINDOW = 256 << 10
_PIECE_BYTES = 32 << 10
# What a window can be raised to by updates; more is nonsense.
_WINDOW_MAX = 1 << 30
_SEND_SECONDS = 30


class Stream:
    """One stream; `read` and `write` are for one thread each.

    Args:
        session: carries it.
        number: of the stream.
        consumer: takes what comes at once, instead of `read`.
    """

    def __init__(
        self, session: Session, number: int, consumer: Callable[[bytes], None] | None
    ) -> None:
        self._session = session
        self._number = number
        self._consumer = consumer
        self._received = bytearray()
        self._ended = False
        self._may_send = _WINDOW

    def write(self, data: bytes, deadline: float) -> None:
        """Send bytes; raise `PluginError` when they are not taken by the deadline."""
        session = self._session
        rest = memoryview(data)
        while rest:
            with session.changed:
                session.wait(lambda: self._may_send or self._ended, deadline)
                if self._ended:
                    raise PluginError("plug-in has closed the stream")
                count = min(len(rest), self._may_send, _PIECE_BYTES)
                self._may_send -= count
            session.send(_DATA, 0, self._number, count, bytes(rest[:count]))
            rest = rest[count:]

    def read(self, length: int, deadline: float) -> bytes:
        """Return exactly that many bytes; raise `PluginError` when they do not come."""
        parts = bytearray()
        session = self._session
        while len(parts) < length:
            with session.changed:
                session.wait(lambda: bool(self._received) or self._ended, deadline)
                if not self._received:
                    raise PluginError("plug-in has closed the stream")
                piece = bytes(self._received[: length - len(parts)])
                del self._received[: len(piece)]
            parts += piece
            session.send(_WINDOW_UPDATE, 0, self._number, len(piece))
        return bytes(parts)

    def take(self, flags: int, data: bytes) -> int:
        """Take a frame of data, with `changed` held; return how much of it is consumed."""
        if len(self._received) + len(data) > _WINDOW:
            raise PluginError("plug-in sends more than the window", got=len(data))
        if flags & (_FIN | _RST):
            self._ended = True
        if self._consumer is not None:
            self._consumer(data)
            return len(data)
        self._received += data
        return 0

    def widen(self, flags: int, count: int) -> None:
        """Take a frame that permits to send more, with `changed` held."""
        self._may_send += count
        if self._may_send > _WINDOW_MAX:
            raise PluginError("plug-in widens the window without end", got=count)
        if flags & (_FIN | _RST):
            self._ended = True


class Session:
    """A connection with streams; a thread reads what comes until `close`.

    `changed` guards all state of streams, and tells when it changes.

    Args:
        connection: owned from here on.
    """

    def __init__(self, connection: socket.socket) -> None:
        # Who does not read what is sent is not waited for without end.
        limit = struct.pack("@ll", _SEND_SECONDS, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._connection = connection
        self._sending = threading.Lock()
        self.changed = threading.Condition()
        self._streams: dict[int, Stream] = {}
        self._failure: PluginError | None = None
        self._reader = threading.Thread(target=self._read_all, name="yamux", daemon=True)
        self._reader.start()

    def open(self, consumer: Callable[[bytes], None] | None = None) -> Stream:
        """Open a stream; raise `PluginError`."""
        with self.changed:
            number = 2 * len(self._streams) + 1
            stream = self._streams[number] = Stream(self, number, consumer)
        self.send(_WINDOW_UPDATE, _SYN, number, 0)
        return stream

    def wait(self, ready: Callable[[], object], deadline: float) -> None:
        """Wait with `changed` held; raise `PluginError` at the deadline or when it is over."""
        while not ready():
            if self._failure is not None:
                raise PluginError("connection to the plug-in broke") from self._failure
            left = deadline - time.monotonic()
            if left <= 0:
                raise PluginError("plug-in does not answer in time")
            self.changed.wait(left)

    def send(self, kind: int, flags: int, number: int, length: int, data: bytes = b"") -> None:
        """Send a frame; raise `PluginError`."""
        try:
            with self._sending:
                self._connection.sendall(_HEADER.pack(_VERSION, kind, flags, number, length) + data)
        except OSError as error:
            raise PluginError(f"connection to the plug-in broke ({error})") from error

    def close(self) -> None:
        """End the connection and the thread."""
        with suppress(OSError):  # the other side was first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()

    def _read_all(self) -> None:
        try:
            with self._connection.makefile("rb") as file:
                while True:
                    self._read_frame(file.read)
        except PluginError as error:
            failure = error
        except OSError as error:
            failure = PluginError(f"connection to the plug-in broke ({error})")
        with self.changed:
            self._failure = failure
            self.changed.notify_all()

    def _read_frame(self, read: Callable[[int], bytes]) -> None:
        header = read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise PluginError("plug-in has closed the connection")
        version, kind, flags, number, length = _HEADER.unpack(header)
        if version != _VERSION or kind > _GO_AWAY:
            raise PluginError("no frame of yamux", got=header.hex())
        if kind == _GO_AWAY:
            raise PluginError("plug-in ends the session", got=length)
        if kind == _PING:
            if flags & _SYN:
                self.send(_PING, _ACK, 0, length)
            return
        data = _read_data(read, length) if kind == _DATA else b""
        if flags & _SYN:
            self.send(_WINDOW_UPDATE, _RST, number, 0)
            return
        with self.changed:
            stream = self._streams.get(number)
            if stream is None:
                raise PluginError("frame for a stream that was never opened", got=number)
            if kind == _WINDOW_UPDATE:
                stream.widen(flags, length)
            consumed = stream.take(flags, data) if kind == _DATA else 0
            self.changed.notify_all()
        if consumed:
            self.send(_WINDOW_UPDATE, 0, number, consumed)


def _read_data(read: Callable[[int], bytes], length: int) -> bytes:
    if length > _WINDOW:
        raise PluginError("plug-in sends more than the window", got=length)
    data = read(length)
    if len(data) < length:
        raise PluginError("plug-in has closed the connection")
    return data
