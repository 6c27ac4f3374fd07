"""Inflate gzip and raw deflate data by the C library itself; it is loaded on first use.

Python's `zlib` cannot stop at block boundaries, start in the middle of a byte, or tell the
window, which is all that zran is about (spec 4.10). The package zlib-ng carries the library
that the real builder uses, twice as fast as zlib, and exports it; without that package
the system's libz does the same. ctypes, since cffi takes longer to load than a daemon should.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple, Self

from erofs.errors import CodecError

__all__ = ["MAX_WINDOW", "Inflater", "inflate_at"]

MAX_WINDOW = 32768

# Window bits: raw deflate data, or members of gzip with header and trailer.
_RAW = -15
_GZIP = 31
_TRAILER_SIZE = 8

_NO_FLUSH, _BLOCK = 0, 5
_OK, _STREAM_END, _BUF_ERROR = 0, 1, -5
_AT_BOUNDARY, _UNUSED_BITS = 128, 7
# With the bit of the last block.
_END_OF_BLOCK = 64 | _AT_BOUNDARY
_LIBZ = "libz.so.1"
# So much is inflated in less time than another thread may keep the interpreter's lock.
_LITTLE_BYTES = 64 << 10

_FIELDS: list[tuple[str, Any]] = [
    ("next_in", ctypes.c_void_p),
    ("avail_in", ctypes.c_uint),
    ("total_in", ctypes.c_size_t),
    ("next_out", ctypes.c_void_p),
    ("avail_out", ctypes.c_uint),
    ("total_out", ctypes.c_size_t),
    ("msg", ctypes.c_char_p),
    ("state", ctypes.c_void_p),
    ("zalloc", ctypes.c_void_p),
    ("zfree", ctypes.c_void_p),
    ("opaque", ctypes.c_void_p),
    ("data_type", ctypes.c_int),
]


class _ZngStream(ctypes.Structure):
    """`zng_stream` of zlib-ng.h."""

    _fields_ = [*_FIELDS, ("adler", ctypes.c_uint32), ("reserved", ctypes.c_ulong)]


class _ZStream(ctypes.Structure):
    """`z_stream` of zlib.h."""

    _fields_ = [*_FIELDS, ("adler", ctypes.c_ulong), ("reserved", ctypes.c_ulong)]


class _Library(NamedTuple):
    """The functions of either library that are used here."""

    stream: type[ctypes.Structure]
    version: bytes
    init: Any
    end: Any
    reset: Any
    prime: Any
    inflate: Any
    inflate_little: Any
    set_dictionary: Any
    get_dictionary: Any


def _functions(path: str, prefix: str, stream: type[ctypes.Structure], version: str) -> _Library:
    """Return the functions; raise `OSError`, and `AttributeError` for one that is not there."""
    # All take microseconds, but for `inflate` with much room. Giving up the interpreter's lock for
    # the others would mean to wait for it behind whatever thread takes it.
    library, unlocked = ctypes.PyDLL(path), ctypes.CDLL(path)
    tell = getattr(library, version)
    tell.restype = ctypes.c_char_p

    def function(name: str, source: ctypes.CDLL = library) -> Any:
        return getattr(source, f"{prefix}inflate{name}")

    return _Library(
        stream=stream,
        version=tell(),
        init=function("Init2_"),
        end=function("End"),
        reset=function("Reset2"),
        prime=function("Prime"),
        inflate=function("", unlocked),
        inflate_little=function(""),
        set_dictionary=function("SetDictionary"),
        get_dictionary=function("GetDictionary"),
    )


@cache
def _library() -> _Library:
    try:
        from zlib_ng import zlib_ng

        return _functions(zlib_ng.__file__, "zng_", _ZngStream, "zlibng_version")
    except (ImportError, OSError, AttributeError):
        return _libz()


def _libz() -> _Library:
    try:
        return _functions(_LIBZ, "", _ZStream, "zlibVersion")
    except OSError as error:
        raise CodecError(f"gzip data needs zlib-ng or {_LIBZ} ({error})") from error


class Inflater:
    """One stream of the library; to be closed, and used by one thread at a time.

    Args:
        raw: deflate data alone, instead of members of gzip.

    `at_boundary` is True when `inflate` stopped between two blocks, or right behind the
    header of a member, and `ended` when it stopped behind the end of a member.
    """

    def __init__(self, *, raw: bool = False) -> None:
        library = _library()
        self._library: Any = library
        self._inflate, self._inflate_little = library.inflate, library.inflate_little
        self._stream: Any = library.stream()
        self._reference = ctypes.byref(self._stream)
        self._input = b""
        self._window: Any = None
        self.at_boundary = False
        self.ended = False
        size = ctypes.sizeof(library.stream)
        status = library.init(self._reference, _RAW if raw else _GZIP, library.version, size)
        if status != _OK:
            raise CodecError("the inflating library cannot be initialised", got=status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the library holds; nothing else may be called then."""
        if self._library is not None:
            self._library.end(self._reference)
            self._library = None

    @property
    def pending(self) -> int:
        """Bytes of the input that were not looked at yet."""
        pending: int = self._stream.avail_in
        return pending

    @property
    def unused_bits(self) -> int:
        """How many bits of the last byte belong to what follows."""
        bits: int = self._stream.data_type & _UNUSED_BITS
        return bits

    @property
    def last_byte(self) -> int:
        """The last byte of the input that was looked at."""
        return self._input[len(self._input) - self.pending - 1]

    @property
    def rest(self) -> bytes:
        """The input that was not looked at."""
        return self._input[len(self._input) - self.pending :]

    def feed(self, data: bytes) -> None:
        """Give more input, after all of the former was used."""
        self._input = data
        self._stream.next_in = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
        self._stream.avail_in = len(data)

    def skip(self, count: int) -> None:
        """Leave out bytes of the input."""
        self._stream.next_in += count
        self._stream.avail_in -= count

    def start_at(self, dictionary: bytes, bits: int, byte: int) -> None:
        """Begin in the middle of raw data: with a window, and the last bits of a byte."""
        if bits:
            self._require(self._library.prime(self._reference, bits, byte >> (8 - bits)))
        if dictionary:
            self._require(
                self._library.set_dictionary(self._reference, dictionary, len(dictionary))
            )

    def start_member(self) -> None:
        """Begin with the header of a member of gzip."""
        self._require(self._library.reset(self._reference, _GZIP))
        self.ended = False

    def inflate(self, target: memoryview, *, to_boundary: bool = False) -> int:
        """Fill a buffer as far as the input lasts, and return how many bytes that is.

        Args:
            target: takes the output, one byte at least; fewer only when the input is used up,
                a member ends, or a boundary is met.
            to_boundary: stop where `at_boundary` becomes True.

        Raises:
            CodecError: the data is broken.
        """
        # Holds the buffer while libz writes into it.
        place = ctypes.c_char.from_buffer(target)
        return self.inflate_to(ctypes.addressof(place), len(target), to_boundary=to_boundary)

    def inflate_to(self, address: int, size: int, *, to_boundary: bool = False) -> int:
        """Do as `inflate`, into memory that the caller holds."""
        stream = self._stream
        stream.next_out, stream.avail_out = address, size
        inflate = self._inflate if size > _LITTLE_BYTES else self._inflate_little
        status = inflate(self._reference, _BLOCK if to_boundary else _NO_FLUSH)
        if status != _OK:
            self._require(status)
        self.ended = status == _STREAM_END
        self.at_boundary = stream.data_type & _END_OF_BLOCK == _AT_BOUNDARY
        count: int = size - stream.avail_out
        return count

    @property
    def window_size(self) -> int:
        """How many bytes `window` has."""
        length = ctypes.c_uint()
        self._library.get_dictionary(self._reference, None, ctypes.byref(length))
        return length.value

    def window(self) -> bytes:
        """Return the last bytes of the output that what follows may refer to."""
        length = ctypes.c_uint()
        window = self._window = self._window or ctypes.create_string_buffer(MAX_WINDOW)
        self._library.get_dictionary(self._reference, window, ctypes.byref(length))
        return ctypes.string_at(window, length.value)

    def _require(self, status: int) -> None:
        if status not in (_OK, _STREAM_END, _BUF_ERROR):
            reason = (self._stream.msg or b"").decode("ascii", "replace") or f"status {status}"
            raise CodecError(f"broken gzip data ({reason})")


def inflate_at(
    stored: bytes | memoryview, size: int, dictionary: bytes, bits: int, byte: int
) -> bytearray:
    """Inflate from the middle of a gzip file, over the ends of its members (spec 4.10).

    Args:
        stored: a range of the file that begins in a member's data.
        size: bytes of output that are wanted.
        dictionary: the output before, as far as it may be referred to.
        bits: how many bits of the byte before the range belong to it, and
        byte: that byte.

    Raises:
        CodecError: the data is broken, or too short.
    """
    result = bytearray(size)
    view = memoryview(result)
    done = 0
    with Inflater(raw=True) as inflater:
        inflater.start_at(dictionary, bits, byte)
        inflater.feed(bytes(stored))
        trailer = _TRAILER_SIZE
        while done < size:
            count = inflater.inflate(view[done:])
            done += count
            if inflater.ended:
                inflater.skip(min(trailer, inflater.pending))
                inflater.start_member()
                # libz reads the trailers of members that it has seen the header of.
                trailer = 0
            if not inflater.pending and done < size and not count:
                raise CodecError("gzip data is too short", expected=size, got=done)
    return result
