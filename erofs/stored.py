"""From what is stored in a blob back to content: decrypt, decompress (spec 4.4, 4.8, 4.9).

Pure: bytes in, bytes out. Where a chunk is stored its table says, `erofs.citable`; whether
it is the right one its digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from erofs import codec
from erofs.blobmeta import CI_HEADER_SIZE, CiFlags, CompressionInfo, CompressionTableHeader
from erofs.cipher import BlobCipher, blob_cipher
from erofs.citable import CompressionTable, decompress_table, parse_table
from erofs.contexts import BatchContext
from erofs.errors import CodecError, UnsupportedFeature
from erofs.rafs import BlobEntry, Compressor
from erofs.view import View

__all__ = ["StoredData", "StoredTable", "parse_stored_header", "read_stored_table"]


class StoredTable(NamedTuple):
    """A compression table in plain: decoded, and as bytes without and with its header."""

    table: CompressionTable
    plain: bytes
    header: bytes


class StoredData:
    """Undoes what the builder of one blob did to chunks; threads may share it.

    Raises:
        CorruptStructure: the blob is encrypted, but its key is none.
    """

    def __init__(self, entry: BlobEntry) -> None:
        self._compressor = Compressor(entry.compressor)
        self._cipher = blob_cipher(entry)

    def chunk(
        self, stored: bytes | memoryview, size: int, *, compressed: bool, encrypted: bool = False
    ) -> bytes | memoryview:
        """Return the content of a chunk that is stored by itself; raise `CodecError`."""
        if encrypted:
            stored = self._decrypt(stored, None if compressed else size)
        if compressed:
            return codec.decompress(self._compressor, stored, size)
        if len(stored) != size:
            raise CodecError("stored chunk of the wrong length", expected=size, got=len(stored))
        return stored

    def chunks(self, stored: Sequence[memoryview], sizes: Sequence[int]) -> list[codec.Data]:
        """Return the contents of compressed chunks in one go; `CodecError` says not of which."""
        return codec.decompress_all(self._compressor, stored, sizes)

    def batch(self, context: BatchContext, stored: bytes | memoryview) -> bytes | memoryview:
        """Return the buffer with all chunks of a batch; raise `CodecError`."""
        if self._cipher is None:
            return context.decompress(self._compressor, stored)
        size = context.uncompressed_size
        plain = self._cipher.decrypt(stored)
        # The sizes of the context tell nothing when the builder had to pad.
        return plain if len(plain) == size else codec.decompress(self._compressor, plain, size)

    def context(
        self, table: CompressionTable, number: int, stored: bytes | memoryview
    ) -> bytes | bytearray | memoryview:
        """Return the content of all chunks of a context; raise `CodecError`.

        Args:
            table: has the context.
            number: of it.
            stored: what `CompressionTable.stored_range` says of one of its chunks.
        """
        if table.zran:
            return table.zran[number].inflate(stored, table.dictionaries)
        return self.batch(table.batches[number], stored)

    def unpack(
        self, table: CompressionTable, index: int, stored: bytes | memoryview
    ) -> bytes | memoryview:
        """Return a chunk out of what `CompressionTable.stored_range` says has to be read for it.

        Raises:
            CodecError, IntegrityError: it does not decrypt, or decompress to its size.
        """
        number = table.context_of(index)
        if number is None:
            return self.entry(table, index, stored)
        return table.cut(index, self.context(table, number, stored))

    def _decrypt(self, stored: bytes | memoryview, size: int | None) -> bytes:
        if self._cipher is None:
            raise CodecError("encrypted chunk of a blob that is not encrypted")
        return self._cipher.decrypt(stored, size)

    def entry(
        self, table: CompressionTable, index: int, stored: bytes | memoryview
    ) -> bytes | memoryview:
        """Return the content of a chunk that a table describes, but no part of a context.

        Raises:
            UnsupportedFeature: it takes more than its own stored bytes.
            CodecError: it does not decrypt or decompress.
        """
        entry = table.entries[index]
        if isinstance(entry, CompressionInfo):
            return self.chunk(stored, entry.uncompressed_size, compressed=entry.is_compressed)
        if entry.has_context:
            raise UnsupportedFeature("chunk that is no stored unit", chunk=index)
        return self.chunk(
            stored,
            entry.uncompressed_size,
            compressed=entry.is_compressed,
            encrypted=bool(entry.flags & CiFlags.ENCRYPTED),
        )


def parse_stored_header(entry: BlobEntry, stored: bytes | memoryview) -> CompressionTableHeader:
    """Decode the header behind a compression table as it is in the blob.

    Raises:
        FormatError: it is none.
        CodecError: it does not decrypt.
    """
    return CompressionTableHeader.parse(View(_plain_header(blob_cipher(entry), stored)))


def _plain_header(cipher: BlobCipher | None, stored: bytes | memoryview) -> bytes | memoryview:
    return stored if cipher is None else cipher.decrypt(stored, CI_HEADER_SIZE)


def read_stored_table(entry: BlobEntry, stored: bytes | memoryview) -> StoredTable:
    """Decode a compression table.

    Args:
        entry: says how large it is and how it is encrypted.
        stored: the table and its header behind it, as they are in the blob.

    Raises:
        FormatError: it is no table, or contradicts itself.
        CodecError: it does not decompress or decrypt.
    """
    data, packed = stored[: entry.ci_compressed_size], stored[entry.ci_compressed_size :]
    cipher = blob_cipher(entry)
    packed = _plain_header(cipher, packed)
    header = CompressionTableHeader.parse(View(packed))
    if cipher is None:
        plain = decompress_table(header, data)
    else:
        data = cipher.decrypt(data)
        # What is too short for the cipher was padded, so that the header tells another length.
        plain = decompress_table(header._replace(ci_compressed_size=len(data)), data)
    return StoredTable(parse_table(header, plain), plain, bytes(packed))
