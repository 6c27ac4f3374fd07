"""An NBD client, made from the protocol's text alone; errors come as `OSError`."""

import os
import socket
import struct
import threading
from itertools import pairwise

OPTION_MAGIC = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
READ, WRITE, DISC, FLUSH, TRIM, CACHE = range(6)
DF = 4


def option(number, data=b""):
    """Return the bytes of an option."""
    return struct.pack(">QII", OPTION_MAGIC, number, len(data)) + data


def go(name=b"", infos=(), number=7):
    """Return the option that begins with an export, or asks about it (6)."""
    body = struct.pack(">I", len(name)) + name
    return option(number, body + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def replies(data):
    """Return (option, kind, data) of the replies to options."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == REPLY_MAGIC
        assert len(data) >= 20 + length
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def request(command, cookie, offset=0, length=0, flags=0):
    """Return the bytes of a request."""
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


class NbdClient:
    """Speaks over a connected socket; safe for many threads after the handshake."""

    def __init__(self, connection, *, handshake=True, structured=False, name=b""):
        self.socket = connection
        connection.settimeout(60)
        self._lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._cookie = 0
        self.structured = structured
        self.size = self.flags = None
        if handshake:
            self._negotiate(name)

    @classmethod
    def connect(cls, path, **options):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.fspath(path))
        return cls(connection, **options)

    def take(self, length):
        data = bytearray()
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise ConnectionError("closed")
            data += part
        return bytes(data)

    def _negotiate(self, name):
        assert self.take(8) == b"NBDMAGIC"
        magic, flags = struct.unpack(">QH", self.take(10))
        assert (magic, flags) == (OPTION_MAGIC, 3)
        self.socket.sendall(struct.pack(">I", 3))
        if self.structured:
            self.socket.sendall(option(8))
            assert self._reply() == (8, 1, b"")
        self.socket.sendall(go(name))
        while True:
            _, kind, data = self._reply()
            if kind == 1:
                return
            if kind & 1 << 31:
                raise OSError(kind & 0xFF, "refused")
            if data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])

    def _reply(self):
        head = self.take(20)
        (length,) = struct.unpack_from(">I", head, 16)
        (found,) = replies(head + self.take(length))
        return found

    def ask(self, command, offset=0, length=0, *, flags=0, payload=b""):
        """Send a request and return its cookie."""
        with self._lock:
            self._cookie += 1
            self.socket.sendall(request(command, self._cookie, offset, length, flags) + payload)
            return self._cookie

    def answer(self, lengths):
        """Return cookie, error and data of the next answer; `lengths` by cookie of reads."""
        with self._receive_lock:
            magic = self.take(4)
            if magic == b"\x67\x44\x66\x98":
                error, cookie = struct.unpack(">IQ", self.take(12))
                length = lengths.get(cookie, 0) if not error else 0
                return cookie, error, self.take(length)
            assert magic == b"\x66\x8e\x33\xef", magic
            return self._chunks(lengths)

    def _chunks(self, lengths):
        """Return an answer of chunks, the first of which begins."""
        pieces, error = [], 0
        while True:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
            body = self.take(length)
            if kind == 1:
                pieces.append((struct.unpack_from(">Q", body)[0], body[8:]))
            elif kind == 2:
                place, size = struct.unpack(">QI", body)
                pieces.append((place, bytes(size)))
            elif kind & 0x8000:
                error, words = struct.unpack_from(">IH", body)
                assert len(body) == 6 + words
            else:
                assert not kind
                assert not body
            if flags & 1:
                break
            assert self.take(4) == b"\x66\x8e\x33\xef"
        data = b"".join(piece for _, piece in pieces)
        for (start, piece), (following, _) in pairwise(pieces):
            assert start + len(piece) == following
        assert error or len(data) == lengths.get(cookie, 0)
        self.pieces = len(pieces)
        return cookie, error, data

    def do(self, command, offset=0, length=0, *, flags=0, payload=b""):
        """Do one request alone on the connection and return its data."""
        cookie = self.ask(command, offset, length, flags=flags, payload=payload)
        answered, error, data = self.answer({cookie: length if command == READ else 0})
        assert answered == cookie
        if error:
            raise OSError(error, os.strerror(error))
        return data

    def read(self, offset, length, flags=0):
        return self.do(READ, offset, length, flags=flags)

    def close(self):
        self.socket.close()
