"""Dump an image as text that accounts for every byte of it exactly once, in offset order.

A line is `offset+length kind fields`. Records are decoded field by field, fields that are
zero are left out, and bytes that a record does not explain follow as `raw=`. What no record
claims is `zeros` or `unknown` in hex, so two images with the same dump are the same. Lines of
length 0 are remarks. Data blobs are dumped in `erofs.blobdump`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from erofs import layout, rafs
from erofs.errors import FormatError
from erofs.layout import (
    Dirent,
    InodeCompact,
    InodeExtended,
    XattrEntry,
    XattrHeader,
)
from erofs.reader import Bootstrap, Image, Inode
from erofs.view import ReadAt, View

__all__ = ["Claim", "dump_image", "tile"]

_WINDOW = 1 << 20
_ROW = 32
# Zeros at the borders of a gap, or long enough to be worth a line of their own.
_ZEROS = re.compile(rb"\A\0+|\0{16,}|\0+\Z")
_HEX = frozenset(
    {
        "magic", "checksum", "feature_compat", "feature_incompat", "flags", "features", "i_format",
        "advise", "device_id", "blkaddr", "crc32c", "compressed_offset", "uncompressed_offset",
        "offset", "ci_offset", "blob_table_offset", "chunk_table_offset", "prefetch_table_offset",
    }
)  # fmt: skip


class Claim(NamedTuple):
    """A range of bytes and what it is: a record, plain bytes, or None for a remark.

    `value` is a record with `pack`, bytes that are shown as they are, or a text. A text is
    shown after `kind` and has to determine the bytes.
    """

    offset: int
    length: int
    kind: str
    value: Any
    note: str = ""


def _show_bytes(data: bytes) -> str:
    """Return printable ASCII in quotes, without NUL padding, and all else as hex."""
    stripped = data.rstrip(b"\0")
    if stripped.isascii() and stripped.decode("ascii").isprintable():
        return repr(stripped)[1:]
    return data.hex()


def _show_field(name: str, value: int | bytes) -> str:
    if isinstance(value, bytes):
        return _show_bytes(value)
    if name == "i_mode":
        return f"{int(value):#o}"
    return f"{int(value):#x}" if name in _HEX else str(int(value))


def _show_record(record: Any, raw: bytes) -> str:
    fields = zip(record._fields, record, strict=True)
    words = [
        f"{name}={_show_field(name, value)}"
        for name, value in fields
        if (value.strip(b"\0") if isinstance(value, bytes) else value)
    ]
    # Whatever a parser drops (padding, reserved fields) is shown as it is.
    if raw and record.pack() != raw:
        words.append(f"raw={raw.hex()}")
    return " ".join(words)


def _show_claim(claim: Claim, raw: bytes) -> str:
    if isinstance(claim.value, str):
        text = claim.value
    elif isinstance(claim.value, bytes):
        text = repr(raw)[1:]
    else:
        text = _show_record(claim.value, raw)
    words = [claim.kind, text, f"# {claim.note}" if claim.note else ""]
    return " ".join(word for word in words if word)


def _line(offset: int, length: int, text: str) -> str:
    return f"{offset:08x}+{length:x} {text}"


def _gap(source: ReadAt, start: int, end: int) -> Iterator[str]:
    """Yield lines for bytes that nothing claims."""
    for window in range(start, end, _WINDOW):
        data = bytes(source.read_at(window, min(_WINDOW, end - window)))
        position = 0
        for match in _ZEROS.finditer(data):
            yield from _unknown(data, window, position, match.start())
            length = match.end() - match.start()
            yield _line(window + match.start(), length, f"zeros {length}")
            position = match.end()
        yield from _unknown(data, window, position, len(data))


def _unknown(data: bytes, base: int, start: int, end: int) -> Iterator[str]:
    for position in range(start, end, _ROW):
        row = data[position : min(position + _ROW, end)]
        yield _line(base + position, len(row), f"unknown {row.hex()}")


def tile(source: ReadAt, claims: list[Claim]) -> Iterator[str]:
    """Yield a line for every claim, and lines for what lies between them.

    A claim that begins inside of another one becomes a remark: its bytes are shown once.
    """
    claims.sort(key=lambda claim: claim[:2])
    size, cursor = source.size(), 0
    for claim in claims:
        end = claim.offset + claim.length
        if claim.length and (claim.offset < cursor or end > size):
            yield _line(claim.offset, 0, f"overlap: {claim.length:x} bytes of {claim.kind}")
            continue
        if claim.offset > cursor:
            yield from _gap(source, cursor, min(claim.offset, size))
            cursor = min(claim.offset, size)
        # Texts stand for ranges that may be large; they are not read here.
        whole = claim.length and not isinstance(claim.value, str)
        raw = bytes(source.read_at(claim.offset, claim.length)) if whole else b""
        yield _line(claim.offset, claim.length, _show_claim(claim, raw))
        cursor = max(cursor, end)
    yield from _gap(source, cursor, size)


class _ImageClaims:
    """Collects what the structures of an image claim; never raises for what it finds."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.view = image.view
        self.claims: list[Claim] = []
        self._claimed = 0

    def record(self, offset: int, kind: str, record: Any, note: str = "") -> int:
        """Claim a record; return its length."""
        length = len(record.pack())
        self.claims.append(Claim(offset, length, kind, record, note))
        self._claimed += length
        return length

    def remark(self, error: FormatError, path: bytes, offset: int) -> None:
        where = error.where.get("offset", offset)
        place = where if isinstance(where, int) else offset
        text = f"{repr(path)[1:]} {error.reason}" if path else error.reason
        self.claims.append(Claim(place, 0, "error", text))

    def superblocks(self) -> None:
        image = self.image
        self.record(layout.SUPERBLOCK_OFFSET, "superblock", image.superblock)
        try:
            start = image.superblock.devt_slotoff * layout.DEVICE_SLOT_SIZE
            for number, slot in enumerate(image.devices):
                offset = start + number * layout.DEVICE_SLOT_SIZE
                self.record(offset, "device", slot, f"device {number + 1}")
        except FormatError as error:
            self.remark(error, b"", layout.SUPERBLOCK_OFFSET)

    def tables(self, image: Bootstrap) -> None:
        extended = image.extended
        self.record(rafs.EXTENDED_SUPERBLOCK_OFFSET, "extended_superblock", extended)
        for index, blob in enumerate(image.blobs):
            offset = extended.blob_table_offset + rafs.BLOB_ENTRY_SIZE * index
            self.record(offset, "blob", blob)
        try:
            for number, info in enumerate(image.chunk_infos):
                offset = extended.chunk_table_offset + rafs.CHUNK_INFO_SIZE * number
                self.record(offset, "chunk", info)
        except FormatError as error:
            self.remark(error, b"", extended.chunk_table_offset)
        if extended.prefetch_table_offset:
            for number in range(extended.prefetch_table_size // rafs.PREFETCH_ENTRY_SIZE):
                offset = extended.prefetch_table_offset + rafs.PREFETCH_ENTRY_SIZE * number
                nid = int.from_bytes(self.view.data[offset : offset + 4], "little")
                self.claims.append(Claim(offset, 4, "prefetch", f"nid={nid}"))

    def tree(self) -> None:
        """Claim all inodes and their data, from the root on."""
        seen: set[int] = set()
        stack = [(b"/", self.image.superblock.root_nid)]
        while stack:
            path, nid = stack.pop()
            if nid in seen:
                continue
            seen.add(nid)
            if self._claimed > self.view.length:
                # Parts that do not overlap sum up to less than the image; this bounds the work.
                self.claims.append(Claim(0, 0, "error", "inodes overlap, the rest is unknown"))
                return
            try:
                stack.extend(reversed(self.inode(path, self.image.inode(nid))))
            except FormatError as error:
                self.remark(error, path, self.image.inode_offset(nid))

    def inode(self, path: bytes, inode: Inode) -> list[tuple[bytes, int]]:
        """Claim an inode with what belongs to it; return the children of a directory."""
        compact = inode.record_size == layout.INODE_COMPACT_SIZE
        record = (InodeCompact if compact else InodeExtended).parse(self.view, inode.offset)
        self.record(inode.offset, "inode_compact" if compact else "inode", record,
                    f"nid {inode.nid} {repr(path)[1:]}")  # fmt: skip
        self.xattrs(path, inode)
        if inode.is_dir:
            return self.directory(path, inode)
        if inode.is_symlink:
            inode.readlink()
            for offset, length in inode.flat_parts():
                self.data(offset, length, "target")
        elif inode.layout == layout.LAYOUT_CHUNK_BASED:
            self.indexes(inode)
        elif inode.is_regular:
            for offset, length in inode.flat_parts():
                for row in range(offset, offset + length, _ROW):
                    self.data(row, min(_ROW, offset + length - row), "data")
        return []

    def data(self, offset: int, length: int, kind: str) -> None:
        self.claims.append(Claim(offset, length, kind, b""))
        self._claimed += length

    def xattrs(self, path: bytes, inode: Inode) -> None:
        if not inode.xattr_size:
            return
        start = inode.offset + inode.record_size
        try:
            self.record(start, "xattr_header", XattrHeader.parse(self.view, start))
            for offset, _, value in inode.xattr_entries():
                entry = XattrEntry.parse(self.view, offset)
                position = offset + self.record(offset, "xattr", entry)
                if entry.name_len:
                    self.data(position, entry.name_len, "xattr_name")
                if value:
                    self.data(position + entry.name_len, len(value), "xattr_value")
        except FormatError as error:
            self.remark(error, path, start)

    def directory(self, path: bytes, inode: Inode) -> list[tuple[bytes, int]]:
        prefix = path if path == b"/" else path + b"/"
        children: list[tuple[bytes, int]] = []
        for offset, block in inode.blocks():
            self._claimed += len(block)
            try:
                self.directory_block(offset, View(block), prefix, children)
            except FormatError as error:
                self.remark(error, path, offset)
        return children

    def directory_block(
        self, offset: int, block: View, prefix: bytes, children: list[tuple[bytes, int]]
    ) -> None:
        count = Dirent.parse(block, 0).nameoff // layout.DIRENT_SIZE
        entries = [
            Dirent.parse(block, number * layout.DIRENT_SIZE)
            for number in range(min(count, block.length // layout.DIRENT_SIZE))
        ]
        for number, entry in enumerate(entries):
            last = number + 1 == len(entries)
            end = block.length if last else entries[number + 1].nameoff
            name = bytes(block.data[entry.nameoff : end])
            if last:
                name = name.split(b"\0", 1)[0]
            position = offset + number * layout.DIRENT_SIZE
            possible = 0 < len(name) <= layout.NAME_MAX
            note = repr(name)[1:] if possible else "without a possible name"
            self.claims.append(Claim(position, layout.DIRENT_SIZE, "dirent", entry, note))
            if possible:
                self.claims.append(Claim(offset + entry.nameoff, len(name), "name", b""))
            if possible and name not in (b".", b".."):
                children.append((prefix + name, entry.nid))

    def indexes(self, inode: Inode) -> None:
        start, _ = inode.index_area()
        for number, index in enumerate(inode.chunk_indexes()):
            self.record(
                start + number * layout.CHUNK_INDEX_SIZE, "chunk_index", index,
                f"blob {index.blob_index} chunk {index.chunk_index}",
            )  # fmt: skip


def dump_image(image: Image) -> Iterator[str]:
    """Yield the lines of an injective dump of an image: its whole file, in offset order.

    The structures of a bootstrap that RAFS adds are only decoded for a `Bootstrap`. Broken
    structures never raise: they become remarks, and their bytes are shown as unknown. Memory
    and work are in proportion to the length of the image.
    """
    claims = _ImageClaims(image)
    claims.superblocks()
    if isinstance(image, Bootstrap):
        claims.tables(image)
    claims.tree()
    yield from tile(image.view, claims.claims)
