"""Turns a dump back into the bytes: the proof that a dump loses nothing."""

import ast
import re

from erofs import blobmeta, contexts, framing, layout, rafs
from erofs.blobdump import _SectionHeader

_LINE = re.compile(r"([0-9a-f]+)\+([0-9a-f]+) (\S+) ?(.*)")
_FIELD = re.compile(r"(\w+)=('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+) ?")
_RECORDS = {
    "superblock": layout.Superblock,
    "extended_superblock": rafs.ExtendedSuperblock,
    "device": layout.DeviceSlot,
    "blob": rafs.BlobEntry,
    "chunk": rafs.ChunkInfo,
    "inode": layout.InodeExtended,
    "inode_compact": layout.InodeCompact,
    "dirent": layout.Dirent,
    "xattr_header": layout.XattrHeader,
    "xattr": layout.XattrEntry,
    "chunk_index": layout.ChunkIndex,
    "section": _SectionHeader,
    "ci_header": blobmeta.CompressionTableHeader,
    "ci": blobmeta.CompressionInfo,
    "ci2": blobmeta.CompressionInfoV2,
    "batch": contexts.BatchContext,
    "zran": contexts.ZranContext,
    "toc": framing.TocEntry,
}
_QUOTED = {"name", "target", "data", "xattr_name", "xattr_value"}
_BYTES = {
    "digest", "tag", "blob_id", "uuid", "volume_name", "reserved", "reserved2", "name",
    "blob_toc_digest", "blob_meta_digest", "cipher_iv",
}  # fmt: skip


def _value(field, text, record):
    if field not in _BYTES or (field.startswith("reserved") and _is_number(record, field)):
        return int(text, 0)
    return ast.literal_eval("b" + text) if text[0] in "'\"" else bytes.fromhex(text)


def _is_number(record, field):
    return record in (layout.InodeCompact, layout.Dirent, contexts.ZranContext) or (
        record is layout.InodeExtended and field == "reserved"
    )


def _record(kind, text):
    record = _RECORDS[kind]
    fields = {}
    position = 0
    while (match := _FIELD.match(text, position)) is not None:
        fields[match[1]] = match[2]
        position = match.end()
    if "raw" in fields:
        return bytes.fromhex(fields["raw"])
    values = {field: _value(field, value, record) for field, value in fields.items()}
    defaults = {
        field: bytes(0) if field in _BYTES and not _is_number(record, field) else 0
        for field in record._fields
    }
    return record(**(defaults | values)).pack()


def undump(lines):
    """Return the bytes that a dump describes; None stands for a range known by its digest."""
    parts = []
    position = 0
    for line in lines:
        offset, length, kind, text = _LINE.fullmatch(line).groups()
        if not int(length, 16):
            continue
        assert int(offset, 16) == position, line
        data = _content(kind, text, int(length, 16))
        assert data is None or len(data) == int(length, 16), line
        parts.append((int(length, 16), data))
        position += int(length, 16)
    return position, parts


def _content(kind, text, length):
    if kind == "zeros":
        return bytes(int(text))
    if kind in ("unknown", "digest"):
        return bytes.fromhex(text)
    if kind == "prefetch":
        return int(text.removeprefix("nid=")).to_bytes(4, "little")
    if "sha256=" in text:
        return None
    if kind in _QUOTED and text[0] in "'\"":
        return ast.literal_eval("b" + text)
    return _record(kind, text)


def rebuild(lines, original):
    """Return what a dump says of `original`, whose ranges known by digest are filled in."""
    size, parts = undump(lines)
    data = bytearray()
    for length, part in parts:
        data += original[len(data) : len(data) + length] if part is None else part
    assert len(data) == size
    return bytes(data)
