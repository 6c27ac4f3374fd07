"""Dump a data blob as text, every byte accounted for exactly once, in offset order.

Chunks, compressed tables and an inlined bootstrap are shown as ranges with the SHA-256 of
their stored bytes; everything else is decoded as in `erofs.dump`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from erofs import framing
from erofs.blobmeta import CI_HEADER_SIZE, DIGEST_SIZE, CompressionInfoV2, CompressionTableHeader
from erofs.citable import CompressionTable, decompress_table, parse_table
from erofs.contexts import CONTEXT_SIZE
from erofs.dump import Claim, tile
from erofs.errors import NydusError
from erofs.framing import TAR_HEADER_SIZE, Section
from erofs.rafs import BlobEntry, BlobFeatures, Compressor
from erofs.view import ReadAt, View

__all__ = ["dump_blob"]

_WINDOW = 1 << 20


class _SectionHeader(Section):
    """A section that packs to its header, so that the header dumps like any record."""

    __slots__ = ()

    def pack(self) -> bytes:
        return framing.pack_section_header(self.name, self.size)


class _BlobClaims:
    def __init__(self, blob: ReadAt, entry: BlobEntry | None) -> None:
        self.blob = blob
        self.size = blob.size()
        self.entry = entry
        self.claims: list[Claim] = []

    def remark(self, error: NydusError, offset: int = 0) -> None:
        where = error.where.get("offset", offset)
        place = max(0, where if isinstance(where, int) else offset)
        self.claims.append(Claim(place, 0, "error", error.reason))

    def opaque(self, offset: int, length: int, kind: str) -> None:
        """Claim a range that stays as it is; its digest stands for its bytes."""
        if length <= 0 or offset < 0 or offset + length > self.size:
            return
        state = hashlib.sha256()
        for position in range(offset, offset + length, _WINDOW):
            state.update(self.blob.read_at(position, min(_WINDOW, offset + length - position)))
        self.claims.append(Claim(offset, length, kind, f"sha256={state.hexdigest()}"))

    def sections(self) -> dict[bytes, Section]:
        """Claim the tar headers and what lies before them; nothing if there are none."""
        try:
            sections = framing.read_sections(self.blob)
        except NydusError as error:
            features = 0 if self.entry is None else self.entry.features
            if features & BlobFeatures.HAS_TAR_HEADER:
                self.remark(error)
            return {}
        for section in sections:
            header = _SectionHeader(*section)
            self.claims.append(Claim(section.header_offset, TAR_HEADER_SIZE, "section", header))
        return {section.name: section for section in sections}

    def header_offset(self, sections: dict[bytes, Section]) -> int:
        """Return where the header of the compression table should be."""
        meta = sections.get(framing.SECTION_META)
        if meta is not None:
            return meta.header_offset - CI_HEADER_SIZE
        if self.entry is not None:
            return self.entry.ci_offset + self.entry.ci_compressed_size
        return self.size - CI_HEADER_SIZE

    def table(self, offset: int) -> None:
        """Claim the compression table, its header, and the chunks that it places."""
        if offset < 0 or offset + CI_HEADER_SIZE > self.size:
            return
        view = View(self.blob.read_at(offset, CI_HEADER_SIZE))
        try:
            header = CompressionTableHeader.parse(view)
        except NydusError as error:
            self.remark(error, offset)
            return
        self.claims.append(Claim(offset, CI_HEADER_SIZE, "ci_header", header))
        start, length = offset - header.ci_compressed_size, header.ci_compressed_size
        try:
            stored = self.blob.read_at(start, length) if start >= 0 else b""
            table = parse_table(header, decompress_table(header, stored))
        except NydusError as error:
            self.remark(error, start)
            self.opaque(start, length, "ci_table")
            return
        self.entries(table, start)
        if not header.features & BlobFeatures.SEPARATE:
            self.chunks(table)

    def entries(self, table: CompressionTable, start: int) -> None:
        """Claim the table; what is compressed is shown as remarks behind the whole of it."""
        header = table.header
        plain = header.ci_compressor == Compressor.NONE
        if not plain:
            self.opaque(start, header.ci_compressed_size, "ci_table")

        def claim(place: int, length: int, kind: str, record: Any, label: str) -> None:
            shown = (start + place, length) if plain else (start, 0)
            self.claims.append(Claim(*shown, kind, record, label))

        for number, entry in enumerate(table.entries):
            kind = "ci2" if isinstance(entry, CompressionInfoV2) else "ci"
            claim(number * header.entry_size, header.entry_size, kind, entry, f"chunk {number}")
        for kind, contexts in (("batch", table.batches), ("zran", table.zran)):
            for number, context in enumerate(contexts):
                place = header.context_offset + number * CONTEXT_SIZE
                claim(place, CONTEXT_SIZE, kind, context, f"context {number}")
        if plain:
            place = start + header.context_offset + len(table.zran) * CONTEXT_SIZE
            self.opaque(place, len(table.dictionaries), "dictionaries")

    def chunks(self, table: CompressionTable) -> None:
        """Claim the stored chunks, a batch as a whole."""
        last = None
        for number in range(len(table.entries)):
            batch = table.context_of(number)
            if batch is None:
                self.opaque(*table.stored_range(number), f"chunk {number}")
            elif batch != last:
                self.opaque(*table.stored_range(number), f"batch {batch}")
            last = batch

    def digests(self, section: Section) -> None:
        for position in range(section.offset, section.header_offset, DIGEST_SIZE):
            length = min(DIGEST_SIZE, section.header_offset - position)
            data = bytes(self.blob.read_at(position, length))
            self.claims.append(Claim(position, length, "digest", data.hex()))

    def toc(self) -> None:
        try:
            toc = framing.read_toc(self.blob)
        except NydusError as error:
            self.remark(error, self.size)
            return
        start = self.size - len(toc.raw)
        for number, entry in enumerate(toc.entries):
            offset = start + number * framing.TOC_ENTRY_SIZE
            self.claims.append(Claim(offset, framing.TOC_ENTRY_SIZE, "toc", entry))


def dump_blob(blob: ReadAt, entry: BlobEntry | None = None) -> Iterator[str]:
    """Yield the lines of a dump of a data blob: its whole file, in offset order.

    `entry` says where the tables are if the blob has no tar headers and ends otherwise than
    with its compression table. Broken structures become remarks. Memory is bounded by the
    tables; data is only digested.

    Raises:
        OSError: `blob` cannot be read.
    """
    claims = _BlobClaims(blob, entry)
    sections = claims.sections()
    claims.table(claims.header_offset(sections))
    if (digests := sections.get(framing.SECTION_DIGEST)) is not None:
        claims.digests(digests)
    if (bootstrap := sections.get(framing.SECTION_BOOTSTRAP)) is not None:
        claims.opaque(bootstrap.offset, bootstrap.size, "bootstrap")
    if framing.SECTION_TOC in sections:
        claims.toc()
    yield from tile(blob, claims.claims)
