"""Decompress tars as streams: gzip and zstd, members and frames one behind the other.

What comes out is bounded by the buffer that takes it, whatever the input claims. An end inside
of a member or frame, a wrong checksum, or something else behind the last one is an error.
"""

from __future__ import annotations

import ctypes
import io
from typing import Any, Protocol

from builder.errors import BuildError
from erofs.errors import CodecError
from erofs.inflate import Inflater

__all__ = ["GzipStream", "Packed", "ZstdStream", "is_gzip", "is_zstd"]

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"

# Four bytes of zstd can stand for 128 KiB, and all output of an input is in memory at once.
_ZSTD_INPUT_BYTES = 2 << 10


def is_gzip(head: bytes) -> bool:
    """Tell whether these are the first bytes of gzip."""
    return head[:2] == _GZIP_MAGIC


def is_zstd(head: bytes) -> bool:
    """Tell whether these are the first four bytes of zstd, or of a frame that it skips."""
    is_skippable = head[1:4] == _SKIPPABLE_MAGIC and head[0] & 0xF0 == 0x50
    return head[:4] == _ZSTD_MAGIC or is_skippable


class Packed(Protocol):
    """Where compressed bytes come from."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none only at the end."""


class GzipStream(io.RawIOBase):
    """The content of all members of a gzip file; zeros may follow them.

    Args:
        source: the file; not closed.

    Raises:
        BuildError: from reading, with the offset in the file.
    """

    # Whether a step ends between two blocks, for subclasses that look at them.
    _to_boundary = False
    # How much of the file the library is given at once.
    _input_bytes = 256 << 10

    def __init__(self, source: Packed) -> None:
        self._source = source
        self._inflater = Inflater()
        self._fed_bytes = 0
        self._between_members = False
        self.output_position = 0

    @property
    def input_position(self) -> int:
        """How many bytes of the file have been used, a partly used one included."""
        return self._fed_bytes - self._inflater.pending

    def readable(self) -> bool:  # noqa: D102 -- as in io.RawIOBase
        return True

    def close(self) -> None:
        """Free what the library holds; the file stays open."""
        if not self.closed:
            self._inflater.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        """Fill as much of a buffer as one step gives, nothing only at the end."""
        target = memoryview(buffer)
        if not target:
            return 0
        # Holds the buffer while it is filled.
        place = ctypes.c_char.from_buffer(target)
        return self.inflate_to(ctypes.addressof(place), len(target))

    def inflate_to(self, address: int, size: int) -> int:
        """Do as `readinto`, with memory of one byte at least that the caller holds."""
        inflater = self._inflater
        while True:
            is_end = not inflater.pending and not self._feed()
            if self._between_members:
                if is_end:
                    return 0
                self._begin_member()
                continue
            try:
                count = inflater.inflate_to(address, size, to_boundary=self._to_boundary)
            except CodecError as error:
                raise BuildError(error.what, offset=self.input_position) from error
            self.output_position += count
            if inflater.at_boundary:
                self._pass_boundary()
            self._between_members = inflater.ended
            if count:
                return count
            # At the end there may still be output, but neither that nor the end of a member.
            if is_end and not self._between_members:
                raise BuildError("broken gzip data (it ends too early)", offset=self._fed_bytes)

    def _feed(self) -> bool:
        """Give the library more of the file; return False at its end."""
        data = self._source.read(self._input_bytes)
        self._inflater.feed(data)
        self._fed_bytes += len(data)
        return bool(data)

    def _begin_member(self) -> None:
        """Skip zeros, or begin with the member that follows."""
        rest = self._inflater.rest
        zeros = len(rest) - len(rest.lstrip(b"\0"))
        if zeros:
            self._inflater.skip(zeros)
            return
        if not is_gzip(rest[:2].ljust(2, _GZIP_MAGIC[1:])):
            raise BuildError(
                "broken gzip data (something else follows)", offset=self.input_position
            )
        self._inflater.start_member()
        self._between_members = False

    def _pass_boundary(self) -> None:
        """Take note of a place between two blocks."""


class ZstdStream(io.RawIOBase):
    """The content of all frames of a zstd file.

    Args:
        source: the file; not closed.

    Raises:
        BuildError: from reading, with the offset in the file.
    """

    def __init__(self, source: Packed) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise CodecError(f"the Python package zstandard is not installed ({error})") from error
        self._error = zstandard.ZstdError
        self._make = zstandard.ZstdDecompressor().decompressobj
        self._source = source
        self._frame: Any = None
        self._input = b""
        self._input_position = 0
        self._output = memoryview(b"")

    def readable(self) -> bool:  # noqa: D102 -- as in io.RawIOBase
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill as much of a buffer as one step gives, nothing only at the end."""
        target = memoryview(buffer)
        while not self._output and self._step():
            pass
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _step(self) -> bool:
        """Decompress a piece of the file, which may give nothing; return False at its end."""
        if not self._input:
            self._input = self._source.read(_ZSTD_INPUT_BYTES)
            self._input_position += len(self._input)
            if not self._input:
                if self._frame is not None:
                    raise BuildError(
                        "broken zstd data (it ends too early)", offset=self._input_position
                    )
                return False
        self._frame = self._frame or self._make()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._error as error:
            raise BuildError(
                f"broken zstd data ({error})", offset=self._input_position - len(self._input)
            ) from error
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
        return True
