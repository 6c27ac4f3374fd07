"""Check a data blob against its blob table entry and, if there is one, its bootstrap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from erofs import blobmeta, codec
from erofs.blobmeta import (
    CI_ENTRY_V1_SIZE,
    CI_HEADER_SIZE,
    DIGEST_SIZE,
    TAR_HEADER_SIZE,
    CompressionInfo,
    CompressionTableHeader,
    Section,
    Toc,
    TocEntry,
)
from erofs.check import WARNING, Collector, Finding, chunk_data_size
from erofs.digest import crc32c, digest
from erofs.errors import CorruptStructure, IntegrityError, UnsupportedFeature, error_context
from erofs.rafs import (
    INLINED_BLOB_ID,
    BlobEntry,
    BlobFeatures,
    ChunkFlags,
    ChunkInfo,
    Compressor,
    Digester,
)
from erofs.reader import Bootstrap
from erofs.view import ReadAt, View, align_up

__all__ = ["check_blob", "read_compression_header", "read_compression_table"]

_WINDOW = 1 << 20
_SECTION_ORDER = (
    blobmeta.SECTION_BLOB,
    blobmeta.SECTION_META,
    blobmeta.SECTION_DIGEST,
    blobmeta.SECTION_BOOTSTRAP,
    blobmeta.SECTION_TOC,
)
_TOC_CODECS = {
    blobmeta.TOC_NONE: Compressor.NONE,
    blobmeta.TOC_ZSTD: Compressor.ZSTD,
    blobmeta.TOC_LZ4: Compressor.LZ4_BLOCK,
}
# What a ToC may make us decompress at once; a real bootstrap is far smaller.
_SECTION_MAX = 1 << 32
# Merging takes the mark of an inlined bootstrap out of the blob table (spec 5.4).
_MERGE_DROPS = BlobFeatures.INLINED_FS_META | BlobFeatures.IS_CHUNKDICT_GENERATED


def read_compression_header(blob: ReadAt, entry: BlobEntry) -> CompressionTableHeader:
    """Read the header of the compression table from where the entry puts it.

    Raises:
        FormatError: it is not there.
    """
    data = _read(blob, entry.ci_offset + entry.ci_compressed_size, CI_HEADER_SIZE, "header")
    return CompressionTableHeader.parse(View(data))


def read_compression_table(blob: ReadAt, entry: BlobEntry) -> list[CompressionInfo]:
    """Read and decode a version 1 compression table; memory is in proportion to the blob.

    Raises:
        FormatError: it is not there, of version 2, or its chunks are not adjacent.
        CodecError: it does not decompress.
    """
    read_compression_header(blob, entry).require_v1()
    # Every chunk takes at least a byte, so the table cannot outgrow the blob by much.
    if entry.ci_uncompressed_size > CI_ENTRY_V1_SIZE * blob.size():
        raise CorruptStructure("more chunks than bytes in the blob", got=entry.ci_uncompressed_size)
    stored = _read(blob, entry.ci_offset, entry.ci_compressed_size, "compression table")
    if entry.ci_compressor not in Compressor.__members__.values():
        raise UnsupportedFeature("compressor of a compression table", got=entry.ci_compressor)
    plain = codec.decompress(Compressor(entry.ci_compressor), stored, entry.ci_uncompressed_size)
    return blobmeta.parse_compression_table(plain, entry.chunk_count)


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
    def __init__(self, entry: BlobEntry, blob: ReadAt, out: Collector) -> None:
        self.entry = entry
        self.blob = blob
        self.out = out
        self.features = BlobFeatures(entry.features & sum(BlobFeatures))
        self.sections: dict[bytes, Section] = {}
        self.chunks: list[CompressionInfo] = []
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
        sections = blobmeta.read_sections(self.blob)
        self.sections = {section.name: section for section in sections}
        order = [
            _SECTION_ORDER.index(section.name)
            for section in sections
            if section.name in _SECTION_ORDER
        ]
        rising = all(left < right for left, right in pairwise(order))
        if len(order) != len(sections) or not rising:
            self.out.error(f"unknown or misplaced sections: {[s.name for s in sections]}")
        meta = self.sections.get(blobmeta.SECTION_META)
        size = self.entry.ci_compressed_size + CI_HEADER_SIZE
        if meta is None or (meta.offset, meta.size) != (self.entry.ci_offset, size):
            self.out.error("section blob.meta is not where the blob table says")

    def check_size(self) -> None:
        """Compare the length of the file with the entry (spec 4.7)."""
        expected = self.entry.compressed_size
        if BlobFeatures.CAP_TAR_TOC not in self.features:
            return
        if BlobFeatures.INLINED_FS_META in self.features:
            boot = self.sections.get(blobmeta.SECTION_BOOTSTRAP)
            if boot is not None and boot.offset != expected:
                self.out.error(f"bootstrap of the blob: expected at {expected}", None, boot.offset)
        elif self.blob.size() != expected and blobmeta.SECTION_BOOTSTRAP not in self.sections:
            self.out.error(f"size of the blob: expected {expected}, got {self.blob.size()}")

    def check_header(self) -> None:
        """Compare the header of the compression table with the entry (spec 7.1)."""
        entry = self.entry
        header = read_compression_header(self.blob, entry)
        pairs = {
            "features": (entry.features & ~_MERGE_DROPS, header.features & ~_MERGE_DROPS),
            "entries": (entry.chunk_count, header.ci_entries),
            "compressor": (entry.ci_compressor, header.ci_compressor),
            "offset": (entry.ci_offset, header.ci_offset),
            "compressed size": (entry.ci_compressed_size, header.ci_compressed_size),
            "uncompressed size": (entry.ci_uncompressed_size, header.ci_uncompressed_size),
        }
        offset = entry.ci_offset + entry.ci_compressed_size
        for name, (expected, got) in pairs.items():
            if expected != got:
                what = f"{name} in the compression table header: expected {expected}, got {got}"
                self.out.error(what, offset=offset)

    def read_table(self) -> None:
        """Decode the compression table and compare it with entry and bootstrap."""
        self.chunks = read_compression_table(self.blob, self.entry)
        data_size = chunk_data_size(self.entry)
        limit = align_up(self.entry.uncompressed_size, blobmeta.CI_ALIGNMENT)
        end = 0
        for number, chunk in enumerate(self.chunks):
            start = chunk.compressed_offset
            end = chunk.uncompressed_offset + chunk.uncompressed_size
            if start + chunk.compressed_size > data_size or end > limit:
                self.out.error(f"chunk {number} ends behind the data", offset=start)
        if align_up(end, blobmeta.CI_ALIGNMENT) != limit:
            self.out.error(f"uncompressed size: expected {limit}, the chunks end at {end}")
        for info in self.infos:
            self._compare(info)

    def _compare(self, info: ChunkInfo) -> None:
        number = info.chunk_index
        place = CompressionInfo(
            info.uncompressed_offset,
            info.uncompressed_size,
            info.compressed_offset,
            info.compressed_size,
        )
        if number >= len(self.chunks) or self.chunks[number] != place:
            self.out.error(f"chunk {number} is elsewhere in blob and bootstrap")

    def read_digests(self) -> None:
        """Gather the digests of the chunks, and compare array and bootstrap (spec 4.1)."""
        section = self.sections.get(blobmeta.SECTION_DIGEST)
        if section is None:
            if BlobFeatures.INLINED_CHUNK_DIGEST in self.features:
                self.out.error("blob without its digest array")
        elif section.size != DIGEST_SIZE * self.entry.chunk_count:
            self.out.error(f"digest array of {section.size} bytes", offset=section.offset)
        else:
            self.check_array(section)
        for info in self.infos:
            crc = info.crc32c if info.flags & ChunkFlags.HAS_CRC else None
            known = self.promises.get(info.chunk_index)
            if known is not None and known.digest != info.digest:
                self.out.error(f"chunk {info.chunk_index} has two digests, in blob and bootstrap")
            self.promises[info.chunk_index] = _Promise(info.digest, crc)

    def check_array(self, section: Section) -> None:
        data = bytes(self.blob.read_at(section.offset, section.size))
        for number in range(self.entry.chunk_count):
            start = DIGEST_SIZE * number
            self.promises[number] = _Promise(data[start : start + DIGEST_SIZE])

    def check_toc(self) -> None:
        """Check the table of contents and the digest of every section it names (spec 4.6)."""
        if BlobFeatures.HAS_TOC not in self.features and not self.entry.blob_toc_size:
            return
        toc = blobmeta.read_toc(self.blob)
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
        name = entry.name.decode(errors="backslashreplace")
        offset, size = entry.offset, entry.compressed_size
        section = self.sections.get(entry.name)
        if entry.name == blobmeta.SECTION_BLOB:
            # The digest takes in the header behind the chunks, and the offset was wrong once.
            offset, size = 0, size + TAR_HEADER_SIZE
            if size - TAR_HEADER_SIZE != chunk_data_size(self.entry):
                self.out.error(f"ToC: size of {name}: got {entry.compressed_size}")
        elif entry.name in (blobmeta.SECTION_DIGEST, blobmeta.SECTION_BOOTSTRAP) and (
            section is None or (section.offset, section.size) != (offset, size)
        ):
            self.out.error(f"ToC: section {name} is elsewhere", offset=offset)
        if entry.flags not in _TOC_CODECS or entry.uncompressed_size > _SECTION_MAX:
            raise CorruptStructure(f"ToC: impossible entry {name}", offset=offset)
        if entry.flags == blobmeta.TOC_NONE:
            found = _sha256(self.blob, offset, offset + size)
        else:
            stored = _read(self.blob, offset, size, name)
            plain = codec.decompress(_TOC_CODECS[entry.flags], stored, entry.uncompressed_size)
            found = hashlib.sha256(plain).digest()
        if found != entry.digest:
            raise IntegrityError(f"section {name} does not have its digest", offset=offset)

    def check_id(self) -> None:
        """Recompute the blob id: all but the digest array, or with a bootstrap inside all."""
        if self.entry.blob_id == INLINED_BLOB_ID:
            return
        skip = self.sections.get(blobmeta.SECTION_DIGEST)
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
        if self.entry.id not in (without.hexdigest(), whole.hexdigest()):
            self.out.warn(f"blob id {self.entry.id}: by content it is {without.hexdigest()}")

    def check_data(self) -> Iterator[Finding]:
        """Decompress every chunk, one at a time, and compare digest and CRC."""
        compressor, digester = Compressor(self.entry.compressor), Digester(self.entry.digester)
        unknown = 0
        for number, chunk in enumerate(self.chunks):
            with self.out.guard(), error_context(chunk=number):
                stored = _read(self.blob, chunk.compressed_offset, chunk.compressed_size, "data")
                if chunk.is_compressed:
                    stored = codec.decompress(compressor, stored, chunk.uncompressed_size)
                promise = self.promises.get(number)
                if promise is None:
                    unknown += 1
                elif digest(digester, stored) != promise.digest:
                    raise IntegrityError("wrong digest")
                elif promise.crc32c is not None and crc32c(stored) != promise.crc32c:
                    raise IntegrityError("wrong CRC-32C")
            yield from self.out.drain()
        if unknown:
            yield Finding(WARNING, f"{unknown} of {len(self.chunks)} chunks have no known digest")


def _unchecked(entry: BlobEntry) -> str | None:
    """Return why the sections of a blob are not there to be checked, if so."""
    features = entry.features
    if features & BlobFeatures.TARFS:
        return "the blob is a plain tar"
    if features & (BlobFeatures.ZRAN | BlobFeatures.SEPARATE):
        return "the data is the original layer, and the tables are in another file"
    if features & BlobFeatures.EXTERNAL:
        return "the data is external"
    if features & BlobFeatures.ENCRYPTED:
        return "it is encrypted"
    return None


def check_blob(
    entry: BlobEntry, blob: ReadAt, image: Bootstrap | None = None, *, data: bool = False
) -> Iterator[Finding]:
    """Yield what is wrong with a data blob; nothing means that readers take it.

    Sections, compression table, digests, ToC and id are compared with each other, with
    `entry` and with the chunk table of `image` (spec rafs-v6 4.1 to 4.7, 7.1). With `data`
    every chunk is decompressed and compared with its digest. Memory is bounded by the
    tables; data is read in windows, or chunk by chunk.

    Raises:
        OSError: `blob` cannot be read.
    """
    reason = _unchecked(entry)
    if reason is not None:
        yield Finding(WARNING, f"blob {entry.id} is not checked: {reason}")
        return
    out = Collector(WARNING)
    check = _BlobCheck(entry, blob, out)
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
        yield from check.check_data()
