"""Contexts of a version 2 compression table: batches and zran restart points (spec 4.9, 4.10).

Pure records and their parsers. They lie behind the entries of the table, zran dictionaries
behind them; which chunk uses which context is `erofs.blobmeta`'s business.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from erofs.codec import decompress
from erofs.errors import CorruptStructure, OutOfBounds
from erofs.inflate import inflate_at
from erofs.rafs import MAX_CHUNK_SIZE, MAX_COMPRESSED_SIZE, Compressor

CONTEXT_SIZE = 40
MAX_DICTIONARY = 32768
# For chunks of 16 MiB the real builder makes contexts that its own reader finds too large.
MAX_CONTEXT_SIZE = 2 * MAX_CHUNK_SIZE
# Only a few bytes that are encrypted are stored larger than they are (spec 4.8).
ENCRYPTED_MIN = 18

_BATCH = struct.Struct("<II32s")
_ZRAN = struct.Struct("<QQQIIIBBH")


class BatchContext(NamedTuple):
    """Several small chunks that are compressed as one: sizes in bytes of the whole."""

    compressed_size: int
    uncompressed_size: int
    reserved: bytes = bytes(32)

    def pack(self) -> bytes:
        """Encode the context."""
        return _BATCH.pack(*self)

    def decompress(self, compressor: Compressor, stored: bytes | memoryview) -> bytes | memoryview:
        """Return the buffer with all chunks of the batch; raise `CodecError`.

        A batch is raw when its two sizes are equal, whatever its entries say (spec 4.9).
        """
        if self.compressed_size == self.uncompressed_size:
            return stored
        return decompress(compressor, stored, self.uncompressed_size)


class ZranContext(NamedTuple):
    """Where to start inflating a tar.gz: positions in it, in the tar, and in the dictionaries."""

    in_offset: int
    out_offset: int
    dict_offset: int
    in_len: int
    out_len: int
    dict_size: int
    ctx_byte: int
    ctx_bits: int
    reserved: int = 0

    def pack(self) -> bytes:
        """Encode the context."""
        return _ZRAN.pack(*self)

    def inflate(self, stored: bytes | memoryview, dictionaries: memoryview) -> bytearray:
        """Return the output with all chunks of the context; raise `CodecError`.

        Args:
            stored: its range of the tar.gz.
            dictionaries: of the whole table.
        """
        end = self.dict_offset + self.dict_size
        dictionary = bytes(dictionaries[self.dict_offset : end])
        return inflate_at(stored, self.out_len, dictionary, self.ctx_bits, self.ctx_byte)


def _check_batch(number: int, batch: BatchContext) -> None:
    size, stored = batch.uncompressed_size, batch.compressed_size
    if not 0 < size <= MAX_CHUNK_SIZE or not 0 < stored <= max(size, ENCRYPTED_MIN):
        raise OutOfBounds(f"batch {number} of impossible sizes", got=f"{stored}/{size}")


def _check_zran(number: int, context: ZranContext, dictionaries: int) -> None:
    if context.ctx_bits > 7:
        raise CorruptStructure(f"zran context {number} with impossible bits", got=context.ctx_bits)
    if not (0 < context.in_len <= MAX_CONTEXT_SIZE and 0 < context.out_len <= MAX_CONTEXT_SIZE):
        raise OutOfBounds(
            f"zran context {number} of impossible sizes", got=f"{context.in_len}/{context.out_len}"
        )
    if context.in_offset + context.in_len > MAX_COMPRESSED_SIZE:
        raise OutOfBounds(f"zran context {number} outside of its data", got=context.in_offset)
    if context.dict_size > MAX_DICTIONARY or context.dict_offset + context.dict_size > dictionaries:
        raise OutOfBounds(
            f"zran context {number} with a dictionary outside of the table",
            expected=f"at most {dictionaries} bytes",
            got=f"{context.dict_size} bytes at {context.dict_offset}",
        )


def _area(data: memoryview, count: int) -> memoryview:
    if count * CONTEXT_SIZE > len(data):
        raise OutOfBounds(
            "contexts outside of the compression table",
            expected=f"{count * CONTEXT_SIZE} bytes",
            got=len(data),
        )
    return data[: count * CONTEXT_SIZE]


def parse_batches(data: memoryview, count: int) -> tuple[BatchContext, ...]:
    """Decode and check the contexts of a batch table; `data` is all that is behind the entries.

    Raises:
        OutOfBounds: they do not fit, or a batch has impossible sizes.
    """
    batches = tuple(BatchContext._make(fields) for fields in _BATCH.iter_unpack(_area(data, count)))
    for number, batch in enumerate(batches):
        _check_batch(number, batch)
    return batches


def parse_zran(data: memoryview, count: int) -> tuple[tuple[ZranContext, ...], memoryview]:
    """Decode and check the contexts of a zran table; return them and the dictionaries behind.

    Raises:
        FormatError: they do not fit, or point outside of what they may.
    """
    contexts = tuple(ZranContext._make(fields) for fields in _ZRAN.iter_unpack(_area(data, count)))
    dictionaries = data[count * CONTEXT_SIZE :]
    for number, context in enumerate(contexts):
        _check_zran(number, context, len(dictionaries))
    return contexts, dictionaries
