"""The sections of a blob: the tar headers behind them, and the table of contents (spec 4.5, 4.6).

Pure records and their parsers. Sections of a blob with tar framing are *followed* by a tar
header, so a blob is read from its end. What is inside of a section is not known here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

from erofs import codec
from erofs.errors import BadMagic, CorruptStructure, IntegrityError, OutOfBounds
from erofs.rafs import Compressor
from erofs.view import ReadAt, View, align_down

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

# What a ToC may make us decompress at once; a real bootstrap is far smaller.
SECTION_MAX = 1 << 32

_CODECS = {
    TOC_NONE: Compressor.NONE,
    TOC_ZSTD: Compressor.ZSTD,
    TOC_LZ4: Compressor.LZ4_BLOCK,
}
_TOC_ENTRY = struct.Struct("<II16s32sQQQ48s")
_TAR_HEADER = struct.Struct("<100s24s12s12s8s1s100s8s247s")


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

    @property
    def text(self) -> str:
        """The name for messages, what is not printable escaped."""
        text = self.name.decode(errors="backslashreplace")
        return text if text.isprintable() else ascii(text)[1:-1]

    def check_digest(self, plain: bytes | memoryview) -> None:
        """Raise `IntegrityError` unless the uncompressed section has its digest."""
        found = hashlib.sha256(plain).digest()
        if found != self.digest:
            raise IntegrityError(
                f"section {self.text} does not have its digest",
                offset=self.offset,
                expected=self.digest.hex(),
                got=found.hex(),
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


def section_before(blob: ReadAt, end: int) -> Section:
    """Return the section whose tar header ends at byte `end`; raise `FormatError`."""
    if end < TAR_HEADER_SIZE:
        raise OutOfBounds("rest of the blob is shorter than a section header", offset=0)
    return parse_section_header(blob.read_at(end - TAR_HEADER_SIZE, TAR_HEADER_SIZE), end)


def read_sections(blob: ReadAt) -> list[Section]:
    """Walk the sections of a framed blob, in file order; raise `FormatError`."""
    sections: list[Section] = []
    end = blob.size()
    while end > 0:
        section = section_before(blob, end)
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
    return parse_toc(bytes(blob.read_at(end - length, length)), end)


def parse_toc(tail: bytes, end: int) -> Toc:
    """Decode the table of contents at the end of `tail`, the last bytes of a blob of `end` bytes.

    Raises:
        FormatError: it is not there, or places a section outside of the blob.
    """
    section = parse_section_header(tail[-TAR_HEADER_SIZE:], end)
    if section.name != SECTION_TOC:
        raise BadMagic("blob has no ToC", expected=SECTION_TOC, got=section.name)
    if section.size > len(tail) - TAR_HEADER_SIZE or section.size % TOC_ENTRY_SIZE:
        raise OutOfBounds("ToC of an impossible size", offset=section.offset, got=section.size)
    raw = tail[len(tail) - TAR_HEADER_SIZE - section.size :]
    view = View(raw)
    entries = tuple(
        TocEntry.parse(view, position) for position in range(0, section.size, TOC_ENTRY_SIZE)
    )
    for entry in entries:
        if entry.name != SECTION_BLOB and entry.offset + entry.compressed_size > end:
            raise OutOfBounds(
                f"ToC places section {entry.text} outside",
                offset=entry.offset,
                got=entry.compressed_size,
            )
    return Toc(entries, raw)


def read_toc_section(blob: ReadAt, entry: TocEntry) -> bytes:
    """Return a section that a ToC names, decompressed and verified.

    Raises:
        FormatError: impossible size or compression.
        CodecError: it does not decompress.
        IntegrityError: it does not have its digest.
    """
    if entry.flags not in _CODECS or entry.uncompressed_size > SECTION_MAX:
        raise CorruptStructure(f"ToC: impossible entry {entry.text}", offset=entry.offset)
    if entry.offset + entry.compressed_size > blob.size():
        raise OutOfBounds(f"{entry.text} outside of the blob", offset=entry.offset)
    stored = bytes(blob.read_at(entry.offset, entry.compressed_size))
    plain = codec.decompress(_CODECS[entry.flags], stored, entry.uncompressed_size)
    entry.check_digest(plain)
    return plain
