"""The compression table of a blob in the cache: `<blob id>.blob.meta` (tools 6, rafs-v6 4.4).

Read from the blob once, kept in the form that nydusd has, checked whenever it is used. A
process that finds no sound file makes one; it appears whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from erofs import framing
from erofs.blobmeta import CI_ENTRY_V2_SIZE, CI_HEADER_SIZE, CompressionTableHeader
from erofs.citable import (
    CompressionTable,
    cached_size,
    pack_cached,
    parse_cached,
)
from erofs.contexts import CONTEXT_SIZE
from erofs.errors import (
    CorruptStructure,
    FormatError,
    IntegrityError,
    OutOfBounds,
    error_context,
)
from erofs.framing import TAR_HEADER_SIZE, Toc
from erofs.rafs import MAX_CHUNKS_PER_BLOB, BlobEntry, BlobFeatures
from erofs.stored import parse_stored_header, read_stored_table
from fscache.backend.base import check_blob_id
from fscache.cache.cachefile import read_whole, replace

__all__ = ["META_SUFFIX", "Fetched", "TableFile"]

logger = logging.getLogger(__name__)

META_SUFFIX = ".blob.meta"
# An entry and a context for each chunk that a blob may have.
_MAX_SIZE = MAX_CHUNKS_PER_BLOB * (CI_ENTRY_V2_SIZE + CONTEXT_SIZE)
T = TypeVar("T")
# Reads a range of the stored blob; raises `NydusError`.
ReadRange = Callable[[int, int], bytes]


class Fetched(NamedTuple):
    """A table that was read from its blob, and the form in which it is kept."""

    table: CompressionTable
    content: bytes


class TableFile:
    """Where a blob's table is, in the blob and in a cache directory.

    Args:
        directory: the cache directory.
        blob_id: names the file; raises `BackendError` when it is refused.
        entry: says where the table is in the blob. That of a generated chunk dictionary does
            not know how many chunks it has (spec rafs-v6 4.12).

    Raises:
        OutOfBounds: the table has an impossible size.
    """

    def __init__(self, directory: Path, blob_id: str, entry: BlobEntry) -> None:
        if not entry.ci_compressed_size <= entry.ci_uncompressed_size <= _MAX_SIZE:
            raise OutOfBounds(
                "compression table of an impossible size",
                blob=blob_id,
                got=entry.ci_uncompressed_size,
            )
        self.path = directory / f"{check_blob_id(blob_id)}{META_SUFFIX}"
        self._blob_id = blob_id
        self._entry = entry

    def load(self) -> CompressionTable | None:
        """Return the table of the file, None (logged) when there is no sound one."""
        try:
            # As large as the entry says: what else it holds is not looked at.
            expected = cached_size(self._entry.ci_uncompressed_size)
            content = read_whole(self.path, expected)
            if content is None:
                return None
            table = parse_cached(content)
            self._check_header(table.header)
        except (FormatError, OSError) as error:
            logger.warning("%s: discarded: %s", self.path, error)
            return None
        return table

    def fetch(self, read: ReadRange) -> Fetched:
        """Read the table from the blob and check it; `keep` it when it has proved to be right.

        Raises:
            FormatError, CodecError, IntegrityError: it is broken.
            NydusError: what `read` raises.
        """
        entry = self._entry
        with error_context(blob=self._blob_id):
            stored = memoryview(read(entry.ci_offset, entry.ci_compressed_size + CI_HEADER_SIZE))
            self._check_header(parse_stored_header(entry, stored[entry.ci_compressed_size :]))
            table, plain, packed = read_stored_table(entry, stored)
            toc = self._read_toc(read)
            if toc is not None:
                _check_digests(toc, plain, packed)
            return Fetched(table, pack_cached(plain, packed))

    def keep(self, fetched: Fetched) -> None:
        """Write the file; a failure is logged only, since the table is good all the same."""
        try:
            replace(self.path, fetched.content)
        except OSError as error:
            logger.warning("%s: table is not kept: %s", self.path, error)

    def use(self, take: Callable[[CompressionTable], T], read: ReadRange) -> T:
        """Give the table to `take`, that of the file if there is one that it takes.

        Args:
            take: raises `FormatError` when the table says other things than the bootstrap.
            read: is called when the blob has to be asked; the file is made then.

        Returns what `take` does. Raises as `fetch` and `take` do.
        """
        table = self.load()
        if table is not None:
            try:
                return take(table)
            except FormatError as error:
                logger.warning("%s: discarded: %s", self.path, error)
        fetched = self.fetch(read)
        result = take(fetched.table)
        self.keep(fetched)
        return result

    def discard(self) -> None:
        """Remove the file, whose table was wrong."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s: cannot be removed: %s", self.path, error)

    def _check_header(self, header: CompressionTableHeader) -> None:
        """Raise `CorruptStructure` unless it is the header that the bootstrap describes."""
        generated = self._entry.features & BlobFeatures.IS_CHUNKDICT_GENERATED
        for name, expected, got in header.differences(self._entry):
            if generated and name in ("entries", "compressor"):
                continue
            raise CorruptStructure(
                f"{name} in the header of the compression table", expected=expected, got=got
            )

    def _read_toc(self, read: ReadRange) -> Toc | None:
        """Return the blob's ToC, when the bootstrap knows its digest (spec rafs-v6 4.6)."""
        entry = self._entry
        is_layer = entry.features & BlobFeatures.SEPARATE
        size = entry.blob_toc_size
        end = entry.blob_meta_size if is_layer else entry.compressed_size
        if not size or self._entry.features & BlobFeatures.IS_CHUNKDICT_GENERATED:
            return None
        if not TAR_HEADER_SIZE <= size <= end:
            raise CorruptStructure("size of the ToC", got=size)
        raw = read(end - size, size)
        found = hashlib.sha256(raw).digest()
        if found != self._entry.blob_toc_digest:
            raise IntegrityError(
                "ToC does not have its digest",
                offset=end - size,
                expected=self._entry.blob_toc_digest.hex(),
                got=found.hex(),
            )
        return framing.parse_toc(raw, end)


def _check_digests(toc: Toc, plain: bytes, packed: bytes) -> None:
    for name, data in ((framing.SECTION_META, plain), (framing.SECTION_META_HEADER, packed)):
        entry = toc.find(name)
        if entry is None:
            raise CorruptStructure(f"ToC without section {name.decode()}")
        entry.check_digest(data)
