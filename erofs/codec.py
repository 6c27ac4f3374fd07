"""Compression of chunks and tables, by on-disk id; libraries are loaded on first use.

The bytes have to equal those of the real builder (spec 4.3): zstd frames of libzstd
1.5.4 to 1.5.6 at level 3, and `LZ4_compress_default`, which `lz4.block.compress` does
not call and which is therefore called in that package's own extension; by ctypes, since cffi
takes 25 ms to read the two declarations.
"""

from __future__ import annotations

import threading
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from erofs.errors import CodecError
from erofs.rafs import Compressor

__all__ = ["Codec", "compress", "compress_all", "decompress", "decompress_all", "load"]

Data = bytes | memoryview

ZSTD_LEVEL = 3
_GZIP_MEMBER = 31
_local = threading.local()


def _missing(package: str, error: ImportError) -> CodecError:
    return CodecError(f"the Python package {package} is not installed ({error})")


def _zstd(kind: str, make: Callable[[Any], Any]) -> Any:
    """Return this thread's zstd object; they are not safe to share between threads."""
    found = getattr(_local, kind, None)
    if found is None:
        try:
            import zstandard
        except ImportError as error:
            raise _missing("zstandard", error) from error
        found = make(zstandard)
        setattr(_local, kind, found)
    return found


def _zstd_compress(data: bytes | memoryview) -> bytes:
    compressor = _zstd("compressor", lambda zstd: zstd.ZstdCompressor(level=ZSTD_LEVEL))
    result: bytes = compressor.compress(data)
    return result


def _zstd_compress_all(
    pieces: Sequence[bytes | bytearray | memoryview],
) -> Sequence[memoryview] | None:
    """Compress many pieces to frames of their own; None when the library cannot do that."""
    compressor = _zstd("compressor", lambda zstd: zstd.ZstdCompressor(level=ZSTD_LEVEL))
    # Only the package's extension in C has it.
    compress_many = getattr(compressor, "multi_compress_to_buffer", None)
    if compress_many is None:
        return None
    return [memoryview(segment) for segment in compress_many(list(pieces), threads=1)]


def _zstd_decompress(data: bytes | memoryview, size: int) -> bytes:
    decompressor = _zstd("decompressor", lambda zstd: zstd.ZstdDecompressor())
    import zstandard

    try:
        # The bound is the length that is expected, not what the frame claims about itself.
        if zstandard.frame_content_size(data) not in (-1, size):
            raise CodecError(
                "zstd frame of the wrong size",
                expected=size,
                got=zstandard.frame_content_size(data),
            )
        result: bytes = decompressor.decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise CodecError(f"broken zstd frame ({error})") from error
    return result


def _zstd_decompress_all(pieces: Sequence[Data], sizes: Sequence[int]) -> list[Data] | None:
    """Decompress many frames to their sizes; None when the library cannot do that."""
    decompressor = _zstd("decompressor", lambda zstd: zstd.ZstdDecompressor())
    # Only the package's extension in C has it.
    decompress_many = getattr(decompressor, "multi_decompress_to_buffer", None)
    if decompress_many is None:
        return None
    import zstandard

    try:
        found = decompress_many(list(pieces), decompressed_sizes=array("Q", sizes), threads=1)
    except zstandard.ZstdError as error:
        raise CodecError(f"broken zstd frame ({error})") from error
    return [memoryview(segment) for segment in found]


@cache
def _lz4_library() -> tuple[Any, Any]:
    """Return ctypes and the library inside of the package's extension."""
    try:
        import ctypes

        import lz4.block._block as extension
    except ImportError as error:
        raise _missing("lz4", error) from error
    return ctypes, ctypes.CDLL(extension.__file__)


def _lz4_target(size: int) -> bytearray:
    """Return this thread's buffer for output, large enough: new memory would take page faults."""
    found: bytearray | None = getattr(_local, "lz4_target", None)
    if found is None or len(found) < size:
        found = _local.lz4_target = bytearray(size)
    return found


def _lz4_compress(data: bytes | bytearray | memoryview) -> bytes:
    ctypes, library = _lz4_library()
    size = len(data)
    bound = library.LZ4_compressBound(size)
    target = _lz4_target(bound)
    # Of what is read-only, ctypes takes bytes alone.
    source = memoryview(data)
    start = bytes(source) if source.readonly else ctypes.byref(ctypes.c_char.from_buffer(source))
    place = ctypes.byref(ctypes.c_char.from_buffer(target))
    length = library.LZ4_compress_default(start, place, size, bound)
    if length <= 0:
        raise CodecError("LZ4 compression failed", got=length)
    return bytes(memoryview(target)[:length])


def _lz4_decompress(data: bytes | memoryview, size: int) -> bytes:
    try:
        import lz4.block
    except ImportError as error:
        raise _missing("lz4", error) from error
    try:
        result: bytes = lz4.block.decompress(data, uncompressed_size=size)
    except (lz4.block.LZ4BlockError, ValueError, MemoryError) as error:
        raise CodecError(f"broken LZ4 block ({error})") from error
    return result


class Codec:
    """Name and two directions of one algorithm."""

    def __init__(
        self,
        name: str,
        compress: Callable[[bytes | memoryview], bytes],
        decompress: Callable[[bytes | memoryview, int], bytes],
    ) -> None:
        self.name = name
        self.compress = compress
        self.decompress = decompress


def _refuse_compress(data: bytes | memoryview) -> bytes:
    raise CodecError("gzip is only read, as part of a reference to an OCI layer")


def _gzip_decompress(data: bytes | memoryview, size: int) -> bytes:
    """Decompress the beginning of a member of gzip: that of eStargz has a chunk there."""
    try:
        return zlib.decompressobj(_GZIP_MEMBER).decompress(data, size)
    except zlib.error as error:
        raise CodecError(f"broken gzip data ({error})") from error


CODECS = {
    Compressor.NONE: Codec("none", bytes, lambda data, size: bytes(data)),
    Compressor.LZ4_BLOCK: Codec("lz4_block", _lz4_compress, _lz4_decompress),
    Compressor.GZIP: Codec("gzip", _refuse_compress, _gzip_decompress),
    Compressor.ZSTD: Codec("zstd", _zstd_compress, _zstd_decompress),
}


def compress(algorithm: Compressor, data: bytes | memoryview) -> bytes | None:
    """Return the compressed bytes, or None when they would not be smaller than `data`."""
    if algorithm is Compressor.NONE or not data:
        return None
    result = CODECS[algorithm].compress(data)
    return result if len(result) < len(data) else None


def compress_all(
    algorithm: Compressor, pieces: Sequence[bytes | bytearray | memoryview]
) -> list[Data | None]:
    """Return for each piece what `compress` returns, in one go.

    A library that takes many at once gives up the interpreter's lock only once for them.
    """
    if algorithm is Compressor.ZSTD and len(pieces) > 1 and all(pieces):
        many = _zstd_compress_all(pieces)
        if many is not None:
            return [
                result if len(result) < len(piece) else None
                for piece, result in zip(pieces, many, strict=True)
            ]
    return [compress(algorithm, memoryview(piece)) for piece in pieces]


def decompress(algorithm: Compressor, data: bytes | memoryview, size: int) -> bytes:
    """Return exactly `size` bytes, or raise `CodecError`; never allocates more than `size`."""
    result = CODECS[algorithm].decompress(data, size)
    if len(result) != size:
        raise CodecError("decompressed to the wrong length", expected=size, got=len(result))
    return result


def load(algorithm: Compressor) -> None:
    """Load the library for decompression, as the first chunk would; a missing one shows there."""
    with suppress(CodecError):
        CODECS[algorithm].decompress(b"", 0)


def decompress_all(
    algorithm: Compressor, pieces: Sequence[Data], sizes: Sequence[int]
) -> list[Data]:
    """Return for each piece what `decompress` returns, in one go; an error does not say of which.

    A library that takes many at once gives up the interpreter's lock only once for them.
    """
    if algorithm is Compressor.ZSTD and len(pieces) > 1:
        many = _zstd_decompress_all(pieces, sizes)
        if many is not None:
            return many
    return [decompress(algorithm, *item) for item in zip(pieces, sizes, strict=True)]
