"""What a data blob carries behind its chunks: compression table, digests, ToC (spec 4.4 to 4.6).

Pure records and their parsers. Sections of a blob with tar framing are *followed* by a
tar header, so a blob is read from its end.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from erofs.errors import BadMagic, CorruptStructure, OutOfBounds, UnsupportedFeature
from erofs.rafs import MAX_CHUNK_SIZE, BlobFeatures
from erofs.view import ReadAt, View, align_down, align_up

CI_MAGIC = 0xB10BB10B
CI_ENTRY_V1_SIZE = 16
CI_HEADER_SIZE = 4096
CI_ALIGNMENT = 4096
MAX_COMPRESSED_OFFSET = 1 << 40
DIGEST_SIZE = 32

TAR_HEADER_SIZE = 512
TOC_ENTRY_SIZE = 128
TOC_READ_MAX = 4096
TOC_NONE = 1
TOC_ZSTD = 2
TOC_LZ4 = 4

SECTION_BLOB = b"image.blob"
SECTION_META = b"blob.meta"
SECTION_META_HEADER = b"blob.meta.header"
SECTION_DIGEST = b"blob.digest"
SECTION_BOOTSTRAP = b"image.boot"
SECTION_TOC = b"rafs.blob.toc"

_CI_ENTRY_V1 = struct.Struct("<QQ")
_CI_HEADER = struct.Struct("<IIIIQQQQQI4032sI")
_TOC_ENTRY = struct.Struct("<II16s32sQQQ48s")
_TAR_HEADER = struct.Struct("<100s24s12s12s8s1s100s8s247s")
_UNCOMPRESSED_OFFSET_MASK = 0xFFFFFFFF000


class CompressionInfo(NamedTuple):
    """Version 1 entry of the compression table ("CI"): one chunk, offsets and sizes in bytes."""

    uncompressed_offset: int
    uncompressed_size: int
    compressed_offset: int
    compressed_size: int

    @property
    def is_compressed(self) -> bool:
        """Whether the stored bytes have to be decompressed."""
        return self.compressed_size != self.uncompressed_size

    def pack(self) -> bytes:
        """Encode the entry: sizes are stored minus one, their top four bits apart."""
        usize, csize = self.uncompressed_size - 1, self.compressed_size - 1
        return _CI_ENTRY_V1.pack(
            self.uncompressed_offset | (usize & 0xFFFFF) << 44 | (usize >> 20) << 8,
            self.compressed_offset | (csize & 0xFFFFF) << 44 | (csize >> 20) << 40,
        )


def _parse_ci_words(first: int, second: int) -> CompressionInfo:
    return CompressionInfo(
        first & _UNCOMPRESSED_OFFSET_MASK,
        (first >> 44 | (first >> 8 & 0xF) << 20) + 1,
        second & 0xFFFFFFFFFF,
        (second >> 44 | (second >> 40 & 0xF) << 20) + 1,
    )


def parse_compression_table(table: bytes | memoryview, count: int) -> list[CompressionInfo]:
    """Decode `count` version 1 entries and check that they are adjacent (spec 4.3).

    Raises:
        OutOfBounds: the table is not 16 bytes an entry.
        CorruptStructure: neighbours are not adjacent, or a chunk is too large.
    """
    if len(table) != count * CI_ENTRY_V1_SIZE:
        raise OutOfBounds(
            "compression table of the wrong length",
            expected=f"{count * CI_ENTRY_V1_SIZE} bytes",
            got=len(table),
        )
    entries = [_parse_ci_words(*words) for words in _CI_ENTRY_V1.iter_unpack(table)]
    position = compressed = 0
    for index, entry in enumerate(entries):
        if entry.uncompressed_offset != position or entry.uncompressed_size > MAX_CHUNK_SIZE:
            raise CorruptStructure(
                "chunk is not adjacent to the one before it",
                chunk=index,
                expected=f"offset {position:#x}",
                got=f"{entry.uncompressed_offset:#x}",
            )
        if entry.compressed_offset < compressed:
            raise CorruptStructure("compressed chunks overlap", chunk=index)
        position += align_up(entry.uncompressed_size, CI_ALIGNMENT)
        compressed = entry.compressed_offset + entry.compressed_size
    return entries


class CompressionTableHeader(NamedTuple):
    """Header of the compression table, 4096 bytes behind it (spec 4.4)."""

    features: int
    ci_compressor: int
    ci_entries: int
    ci_offset: int
    ci_compressed_size: int
    ci_uncompressed_size: int
    context_offset: int = 0
    context_size: int = 0
    context_count: int = 0

    @classmethod
    def parse(cls, view: View, offset: int = 0) -> CompressionTableHeader:
        """Decode the header; raise `BadMagic` or `OutOfBounds`."""
        fields = view.unpack(_CI_HEADER, offset, "compression table header")
        for magic, position in ((fields[0], offset), (fields[-1], offset + CI_HEADER_SIZE - 4)):
            if magic != CI_MAGIC:
                raise BadMagic(
                    "not a compression table header",
                    offset=position,
                    expected=f"{CI_MAGIC:#x}",
                    got=f"{magic:#x}",
                )
        return cls._make(fields[1:10])

    def pack(self) -> bytes:
        """Encode the header."""
        return _CI_HEADER.pack(CI_MAGIC, *self, bytes(4032), CI_MAGIC)

    def require_v1(self) -> None:
        """Raise `UnsupportedFeature` unless the entries are plain version 1."""
        if self.features & BlobFeatures.CHUNK_INFO_V2:
            raise UnsupportedFeature(
                "compression table of version 2 (batch, zran or encrypted blob)",
                got=f"features {self.features:#x}",
            )


class TocEntry(NamedTuple):
    """Entry of the table of contents, 128 bytes; `digest` is over the uncompressed section."""

    flags: int
    name: bytes
    digest: bytes
    offset: int
    compressed_size: int
    uncompressed_size: int

    @classmethod
    def parse(cls, view: View, offset: int) -> TocEntry:
        """Decode the entry at `offset`, the name without padding; raise `OutOfBounds`."""
        flags, _, name, digest, start, csize, usize, _ = view.unpack(
            _TOC_ENTRY, offset, "ToC entry"
        )
        return cls(flags, name.rstrip(b"\0"), digest, start, csize, usize)

    def pack(self) -> bytes:
        """Encode the entry."""
        return _TOC_ENTRY.pack(
            self.flags,
            0,
            self.name,
            self.digest,
            self.offset,
            self.compressed_size,
            self.uncompressed_size,
            bytes(48),
        )


def pack_section_header(name: bytes, size: int) -> bytes:
    """Return the GNU tar header that follows a section of `size` bytes (spec 4.5)."""
    fields = [
        name,
        bytes(24),
        b"%011o\0" % size,
        b"00000000000\0",
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar  \0",
        bytes(247),
    ]
    checksum = sum(_TAR_HEADER.pack(*fields))
    fields[4] = b"%07o\0" % checksum
    return _TAR_HEADER.pack(*fields)


class Section(NamedTuple):
    """A section of a framed blob; offsets in the blob, in bytes."""

    name: bytes
    offset: int
    size: int

    @property
    def header_offset(self) -> int:
        """Where the tar header of the section begins."""
        return self.offset + self.size


def parse_section_header(header: bytes | memoryview, end: int) -> Section:
    """Decode the tar header that lies right before byte `end` of the blob.

    Raises:
        BadMagic: no tar header.
        CorruptStructure: wrong checksum or size field.
        OutOfBounds: the section would begin before the blob.
    """
    fields = View(header).unpack(_TAR_HEADER, 0, "section header")
    name, size_field, checksum_field, magic = fields[0], fields[2], fields[4], fields[7]
    offset = end - TAR_HEADER_SIZE
    if magic[:5] != b"ustar":
        raise BadMagic("no tar header behind a section", offset=offset)
    try:
        size = int(size_field.rstrip(b"\0 "), 8)
        checksum = int(checksum_field.rstrip(b"\0 "), 8)
    except ValueError as error:
        raise CorruptStructure("section header is not a tar header", offset=offset) from error
    blank = bytes(header[:148]) + b" " * 8 + bytes(header[156:TAR_HEADER_SIZE])
    if sum(blank) != checksum:
        raise CorruptStructure(
            "wrong checksum of a section header", offset=offset, expected=checksum, got=sum(blank)
        )
    if size < 0 or size > offset:
        raise OutOfBounds("section begins before its blob", offset=offset, got=f"{size} bytes")
    return Section(name.rstrip(b"\0"), offset - size, size)


def read_sections(blob: ReadAt) -> list[Section]:
    """Walk the sections of a framed blob, in file order; raise `FormatError`."""
    sections: list[Section] = []
    end = blob.size()
    while end > 0:
        if end < TAR_HEADER_SIZE:
            raise OutOfBounds("rest of the blob is shorter than a section header", offset=0)
        section = parse_section_header(blob.read_at(end - TAR_HEADER_SIZE, TAR_HEADER_SIZE), end)
        sections.append(section)
        end = section.offset
    return sections[::-1]


class Toc(NamedTuple):
    """Table of contents of a blob: its entries and the bytes that its digest covers."""

    entries: tuple[TocEntry, ...]
    raw: bytes

    def find(self, name: bytes) -> TocEntry | None:
        """Return the entry of a section, if there is one."""
        return next((entry for entry in self.entries if entry.name == name), None)


def pack_toc(entries: Sequence[TocEntry]) -> bytes:
    """Return the entries and the tar header behind them."""
    body = b"".join(entry.pack() for entry in entries)
    return body + pack_section_header(SECTION_TOC, len(body))


def read_toc(blob: ReadAt) -> Toc:
    """Read the table of contents from the last bytes of a blob; raise `FormatError`."""
    end = blob.size()
    length = min(TOC_READ_MAX, align_down(end, TOC_ENTRY_SIZE))
    if length < TAR_HEADER_SIZE:
        raise OutOfBounds("blob is too short for a ToC", expected=TAR_HEADER_SIZE, got=end)
    tail = bytes(blob.read_at(end - length, length))
    section = parse_section_header(tail[-TAR_HEADER_SIZE:], end)
    if section.name != SECTION_TOC:
        raise BadMagic("blob has no ToC", expected=SECTION_TOC, got=section.name)
    if section.size > length - TAR_HEADER_SIZE or section.size % TOC_ENTRY_SIZE:
        raise OutOfBounds("ToC of an impossible size", offset=section.offset, got=section.size)
    raw = tail[length - TAR_HEADER_SIZE - section.size :]
    view = View(raw)
    entries = tuple(
        TocEntry.parse(view, position) for position in range(0, section.size, TOC_ENTRY_SIZE)
    )
    for entry in entries:
        if entry.name != SECTION_BLOB and entry.offset + entry.compressed_size > end:
            raise OutOfBounds(
                f"ToC places section {entry.name.decode(errors='backslashreplace')} outside",
                offset=entry.offset,
                got=entry.compressed_size,
            )
    return Toc(entries, raw)
