"""Check a data blob against its blob table entry and, if there is one, its bootstrap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from erofs import blobmeta, framing
from erofs.blobmeta import (
    CI_HEADER_SIZE,
    DIGEST_SIZE,
    CompressionTableHeader,
    chunk_data_size,
)
from erofs.check import WARNING, Collector, Finding
from erofs.citable import CompressionTable
from erofs.digest import crc32c, digest
from erofs.errors import CorruptStructure, IntegrityError, error_context
from erofs.framing import TAR_HEADER_SIZE, Section, Toc, TocEntry
from erofs.rafs import (
    INLINED_BLOB_ID,
    BlobEntry,
    BlobFeatures,
    ChunkFlags,
    ChunkInfo,
    Digester,
)
from erofs.reader import Bootstrap
from erofs.stored import StoredData, parse_stored_header, read_stored_table
from erofs.view import ReadAt, align_up

__all__ = ["check_blob", "read_compression_header", "read_compression_table"]

_WINDOW = 1 << 20
_ENCRYPTED_SECTIONS = (framing.SECTION_META, framing.SECTION_META_HEADER)
_SECTION_ORDER = (
    framing.SECTION_BLOB,
    framing.SECTION_META,
    framing.SECTION_DIGEST,
    framing.SECTION_BOOTSTRAP,
    framing.SECTION_TOC,
)


def read_compression_header(blob: ReadAt, entry: BlobEntry) -> CompressionTableHeader:
    """Read the header of the compression table from where the entry puts it.

    Raises:
        FormatError: it is not there.
        CodecError: it does not decrypt.
    """
    data = _read(blob, entry.ci_offset + entry.ci_compressed_size, CI_HEADER_SIZE, "header")
    return parse_stored_header(entry, data)


def read_compression_table(blob: ReadAt, entry: BlobEntry) -> CompressionTable:
    """Read and decode the compression table; memory is in proportion to it.

    Raises:
        FormatError: it is not there, elsewhere, or its entries contradict each other.
        CodecError: it does not decompress or decrypt.
    """
    size = entry.ci_compressed_size + CI_HEADER_SIZE
    return read_stored_table(entry, _read(blob, entry.ci_offset, size, "compression table")).table


def _read(blob: ReadAt, offset: int, length: int, what: str) -> bytes:
    if offset < 0 or offset + length > blob.size():
        raise CorruptStructure(f"{what} outside of the blob", offset=offset, got=length)
    return bytes(blob.read_at(offset, length))


def _windows(blob: ReadAt, start: int, end: int) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a range in pieces of at most a mebibyte."""
    for position in range(start, end, _WINDOW):
        yield blob.read_at(position, min(_WINDOW, end - position))


def _sha256(blob: ReadAt, start: int, end: int) -> bytes:
    if start < 0 or end > blob.size():
        raise CorruptStructure("digest over a range outside of the blob", offset=start, got=end)
    state = hashlib.sha256()
    for data in _windows(blob, start, end):
        state.update(data)
    return state.digest()


class _Promise(NamedTuple):
    """What is known of a chunk before it is read: its digest, and its CRC if there is one."""

    digest: bytes
    crc32c: int | None = None


class _BlobCheck:
    def __init__(
        self, entry: BlobEntry, blob: ReadAt, layer: ReadAt | None, out: Collector
    ) -> None:
        self.entry = entry
        self.blob = blob
        # Where the chunks are, when not in the blob.
        self.layer = layer
        self.out = out
        self.features = BlobFeatures(entry.features & sum(BlobFeatures))
        self.sections: dict[bytes, Section] = {}
        self.table: CompressionTable | None = None
        self.promises: dict[int, _Promise] = {}
        self.infos: list[ChunkInfo] = []

    def read_chunk_infos(self, image: Bootstrap | None) -> None:
        """Take over what the bootstrap knows of this blob's chunks."""
        if image is not None:
            index = self.entry.blob_index
            self.infos = [info for info in image.chunk_infos if info.blob_index == index]

    def read_sections(self) -> None:
        """Walk the tar headers and check that the sections are in order (spec 4.1)."""
        if BlobFeatures.HAS_TAR_HEADER not in self.features:
            return
        sections = framing.read_sections(self.blob)
        self.sections = {section.name: section for section in sections}
        order = [
            _SECTION_ORDER.index(section.name)
            for section in sections
            if section.name in _SECTION_ORDER
        ]
        rising = all(left < right for left, right in pairwise(order))
        if len(order) != len(sections) or not rising:
            self.out.error(f"unknown or misplaced sections: {[s.name for s in sections]}")
        meta = self.sections.get(framing.SECTION_META)
        size = self.entry.ci_compressed_size + CI_HEADER_SIZE
        if meta is None or (meta.offset, meta.size) != (self.entry.ci_offset, size):
            self.out.error("section blob.meta is not where the blob table says")

    def check_size(self) -> None:
        """Compare the length of the file with the entry (spec 4.7)."""
        expected = self.entry.compressed_size
        if self.layer is not None:
            self._check_layer_size(self.layer)
            return
        if BlobFeatures.CAP_TAR_TOC not in self.features:
            return
        if BlobFeatures.INLINED_FS_META in self.features:
            boot = self.sections.get(framing.SECTION_BOOTSTRAP)
            if boot is not None and boot.offset != expected:
                self.out.error(f"bootstrap of the blob: expected at {expected}", None, boot.offset)
        elif self.blob.size() != expected and framing.SECTION_BOOTSTRAP not in self.sections:
            self.out.error(f"size of the blob: expected {expected}, got {self.blob.size()}")

    def _check_layer_size(self, layer: ReadAt) -> None:
        expected = self.entry.compressed_size
        if layer.size() != expected:
            self.out.error(f"size of the layer: expected {expected}, got {layer.size()}")
        expected = self.entry.blob_meta_size
        if expected and self.blob.size() != expected:
            self.out.error(f"size of the tables: expected {expected}, got {self.blob.size()}")

    def check_header(self) -> None:
        """Compare the header of the compression table with the entry (spec 7.1)."""
        header = read_compression_header(self.blob, self.entry)
        offset = self.entry.ci_offset + self.entry.ci_compressed_size
        for name, expected, got in header.differences(self.entry):
            what = f"{name} in the compression table header: expected {expected}, got {got}"
            self.out.error(what, offset=offset)

    def read_table(self) -> None:
        """Decode the compression table and compare it with entry and bootstrap."""
        self.table = table = read_compression_table(self.blob, self.entry)
        data_size = chunk_data_size(self.entry)
        limit = align_up(self.entry.uncompressed_size, blobmeta.CI_ALIGNMENT)
        for number, chunk in enumerate(table.entries):
            start, size = table.stored_range(number)
            end = chunk.uncompressed_offset + chunk.uncompressed_size
            if start + size > data_size or end > limit:
                self.out.error(f"chunk {number} ends behind the data", offset=start)
        if table.uncompressed_size != limit:
            end = table.uncompressed_size
            self.out.error(f"uncompressed size: expected {limit}, the chunks end at {end}")
        for info in self.infos:
            if info.chunk_index >= len(table.entries) or not table.agrees(info):
                self.out.error(f"chunk {info.chunk_index} is elsewhere in blob and bootstrap")

    def read_digests(self) -> None:
        """Gather the digests of the chunks, and compare array and bootstrap (spec 4.1)."""
        section = self.sections.get(framing.SECTION_DIGEST)
        if section is None:
            if BlobFeatures.INLINED_CHUNK_DIGEST in self.features:
                self.out.error("blob without its digest array")
        elif section.size != DIGEST_SIZE * self.entry.chunk_count:
            self.out.error(f"digest array of {section.size} bytes", offset=section.offset)
        else:
            array = bytes(self.blob.read_at(section.offset, section.size))
            digests = blobmeta.parse_digests(array, self.entry.chunk_count)
            self.promises = {n: _Promise(value) for n, value in enumerate(digests)}
        for info in self.infos:
            crc = info.crc32c if info.flags & ChunkFlags.HAS_CRC else None
            known = self.promises.get(info.chunk_index)
            if known is not None and known.digest != info.digest:
                self.out.error(f"chunk {info.chunk_index} has two digests, in blob and bootstrap")
            self.promises[info.chunk_index] = _Promise(info.digest, crc)

    def check_toc(self) -> None:
        """Check the table of contents and the digest of every section it names (spec 4.6)."""
        if BlobFeatures.HAS_TOC not in self.features and not self.entry.blob_toc_size:
            return
        toc = framing.read_toc(self.blob)
        self._check_toc_digest(toc)
        for entry in toc.entries:
            with self.out.guard():
                self._check_toc_entry(entry)

    def _check_toc_digest(self, toc: Toc) -> None:
        size, expected = self.entry.blob_toc_size, self.entry.blob_toc_digest
        if not size:
            return
        if size != len(toc.raw):
            self.out.error(f"ToC size: expected {size}, got {len(toc.raw)}")
        if hashlib.sha256(toc.raw).digest() != expected:
            self.out.error("the ToC does not have its digest")

    def _check_toc_entry(self, entry: TocEntry) -> None:
        name = entry.text
        offset, size = entry.offset, entry.compressed_size
        section = self.sections.get(entry.name)
        if entry.name == framing.SECTION_BLOB:
            # The digest takes in the header behind the chunks, and the offset was wrong once.
            offset, size = 0, size + TAR_HEADER_SIZE
            if size - TAR_HEADER_SIZE != chunk_data_size(self.entry):
                self.out.error(f"ToC: size of {name}: got {entry.compressed_size}")
        elif entry.name in (framing.SECTION_DIGEST, framing.SECTION_BOOTSTRAP) and (
            section is None or (section.offset, section.size) != (offset, size)
        ):
            self.out.error(f"ToC: section {name} is elsewhere", offset=offset)
        if BlobFeatures.ENCRYPTED in self.features and entry.name in _ENCRYPTED_SECTIONS:
            self._check_encrypted(entry)
        elif entry.flags != framing.TOC_NONE:
            framing.read_toc_section(self.blob, entry)
        # A section may be as large as the blob: not all of it at once.
        elif _sha256(self.blob, offset, offset + size) != entry.digest:
            raise IntegrityError(f"section {entry.text} does not have its digest", offset=offset)

    def _check_encrypted(self, entry: TocEntry) -> None:
        """Check a section whose digest is over what it is in plain (spec 4.6, 4.8)."""
        size = self.entry.ci_compressed_size + CI_HEADER_SIZE
        stored = _read(self.blob, self.entry.ci_offset, size, "compression table")
        found = read_stored_table(self.entry, stored)
        entry.check_digest(found.plain if entry.name == framing.SECTION_META else found.header)

    def check_id(self) -> None:
        """Recompute the blob id: all but the digest array, or with a bootstrap inside all."""
        expected = self.entry.id
        if self.layer is not None:
            found = _sha256(self.layer, 0, self.layer.size()).hex()
            if found != expected:
                self.out.warn(f"id of the layer {expected}: by content it is {found}")
            expected = self.entry.blob_meta_digest.hex()
        if self.entry.blob_id == INLINED_BLOB_ID or not expected.strip("0"):
            return
        skip = self.sections.get(framing.SECTION_DIGEST)
        start, end = (skip.offset, skip.header_offset) if skip is not None else (0, 0)
        without, whole = hashlib.sha256(), hashlib.sha256()
        for first, last, counts in (
            (0, start, True),
            (start, end, False),
            (end, self.blob.size(), True),
        ):
            for data in _windows(self.blob, first, last):
                whole.update(data)
                if counts:
                    without.update(data)
        if expected not in (without.hexdigest(), whole.hexdigest()):
            self.out.warn(f"blob id {expected}: by content it is {without.hexdigest()}")

    def check_data(self, progress: Callable[[int], None] | None) -> Iterator[Finding]:
        """Decompress every chunk, one at a time, and compare digest and CRC."""
        if self.table is None:
            return
        digester = Digester(self.entry.digester)
        reader = _ChunkReader(self.layer or self.blob, self.entry, self.table)
        unknown = 0
        for number in range(len(self.table.entries)):
            with self.out.guard(), error_context(chunk=number):
                data = reader.read(number)
                promise = self.promises.get(number)
                if promise is None:
                    unknown += 1
                elif digest(digester, data) != promise.digest:
                    raise IntegrityError("wrong digest")
                elif promise.crc32c is not None and crc32c(data) != promise.crc32c:
                    raise IntegrityError("wrong CRC-32C")
                if progress is not None:
                    progress(len(data))
            yield from self.out.drain()
        if unknown:
            count = len(self.table.entries)
            yield Finding(WARNING, f"{unknown} of {count} chunks have no known digest")


class _ChunkReader:
    """Reads and decodes chunks of a blob in order; a context is decoded once."""

    def __init__(self, blob: ReadAt, entry: BlobEntry, table: CompressionTable) -> None:
        self._blob = blob
        self._data = StoredData(entry)
        self._table = table
        self._content: tuple[int, bytes | bytearray | memoryview] | None = None

    def read(self, number: int) -> bytes | memoryview:
        context = self._table.context_of(number)
        if context is None or self._content is None or self._content[0] != context:
            stored = _read(self._blob, *self._table.stored_range(number), "data")
            if context is None:
                return self._data.entry(self._table, number, stored)
            self._content = context, self._data.context(self._table, context, stored)
        return self._table.cut(number, self._content[1])


def _unchecked(entry: BlobEntry, tables: ReadAt | None) -> str | None:
    """Return why the sections of a blob are not there to be checked, if so."""
    features = entry.features
    if features & BlobFeatures.TARFS:
        return "the blob is a plain tar"
    if features & BlobFeatures.SEPARATE and tables is None:
        return "the data is the original layer, and the tables are in another file"
    if features & BlobFeatures.EXTERNAL:
        return "the data is external"
    return None


def check_blob(
    entry: BlobEntry,
    blob: ReadAt,
    image: Bootstrap | None = None,
    *,
    tables: ReadAt | None = None,
    data: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Finding]:
    """Yield what is wrong with a data blob; nothing means that readers take it.

    Sections, compression table, digests, ToC and id are compared with each other, with
    `entry` and with the chunk table of `image` (spec rafs-v6 4.1 to 4.7, 7.1). With `data`
    every chunk is decompressed and compared with its digest. Memory is bounded by the
    tables; data is read in windows, or chunk by chunk.

    Args:
        entry: of the blob table.
        blob: has the chunks.
        image: which the entry is of.
        tables: has the tables of a blob that is an original layer; without it that is not
            checked.
        data: read every chunk.
        progress: called with the number of content bytes after each good chunk.

    Raises:
        OSError: `blob` cannot be read.
    """
    reason = _unchecked(entry, tables)
    if reason is not None:
        yield Finding(WARNING, f"blob {entry.id} is not checked: {reason}")
        return
    out = Collector(WARNING)
    if entry.features & BlobFeatures.SEPARATE and tables is not None:
        check = _BlobCheck(entry, tables, blob, out)
    else:
        check = _BlobCheck(entry, blob, None, out)
    with out.guard():
        check.read_chunk_infos(image)
    steps = (
        check.read_sections,
        check.check_size,
        check.check_header,
        check.read_table,
        check.read_digests,
        check.check_toc,
        check.check_id,
    )
    for step in steps:
        with out.guard():
            step()
        yield from out.drain()
    if data:
        yield from check.check_data(progress)
