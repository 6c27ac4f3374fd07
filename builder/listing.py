"""Text about an image as the real tool writes it: inodes, chunks, blobs, flags, names.

Only text is made here; what is wrong with an image is found by `erofs.check`.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator, Sequence
from enum import Flag
from typing import NamedTuple

from erofs import AnyBootstrap, AnyInode, InodeV5
from erofs.rafs import BlobEntry, BlobFeatures, ChunkFlags, ChunkInfo

__all__ = [
    "blob_line",
    "blob_lines",
    "child_entries",
    "flag_names",
    "inode_lines",
    "log_features",
    "quoted",
    "readable",
    "unsigned",
]

logger = logging.getLogger(__name__)

_ESCAPES = {"\0": "\\0", "\t": "\\t", "\n": "\\n", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_COMBINING = frozenset({"Mn", "Me"})
# In the order in which the real tool prints them.
_FEATURE_WORDS = (
    (BlobFeatures.ALIGNED, "aligned"),
    (BlobFeatures.BATCH, "batch"),
    (BlobFeatures.CAP_TAR_TOC, "cap_toc"),
    (BlobFeatures.INLINED_CHUNK_DIGEST, "chunk-digest"),
    (BlobFeatures.CHUNK_INFO_V2, "chunk-v2"),
    (BlobFeatures.INLINED_FS_META, "fs-meta"),
    (BlobFeatures.SEPARATE, "separate"),
    (BlobFeatures.HAS_TAR_HEADER, "tar-header"),
    (BlobFeatures.HAS_TOC, "toc"),
    (BlobFeatures.ZRAN, "zran"),
    (BlobFeatures.ENCRYPTED, "encrypted"),
    (BlobFeatures.IS_CHUNKDICT_GENERATED, "is-chunkdict-generated"),
)


def quoted(name: bytes) -> str:
    r"""Return a name in quotes as Rust's `{:?}` shows it: `\n`, `\u{301}`, `\xFF`.

    The tables of what is printable are Python's, whose Unicode version may be another one.
    """
    return '"' + "".join(map(_escaped, name.decode("utf-8", "surrogateescape"))) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02X}"
    # Imported here: what only logs names nothing.
    import unicodedata

    if not character.isprintable() or unicodedata.category(character) in _COMBINING:
        return f"\\u{{{ord(character):x}}}"
    return character


def readable(name: bytes) -> str:
    """Return a name as text, with U+FFFD for what is not UTF-8."""
    return name.decode("utf-8", "replace")


def unsigned(seconds: int) -> int:
    """Return a time as the real tool shows it: negative ones wrap around at 64 bits."""
    return seconds & 0xFFFFFFFFFFFFFFFF


def flag_names(flags: Flag) -> str:
    """Return the names of set flags, `A | B`, as Rust's bitflags show them."""
    return " | ".join(flag.name or "" for flag in flags) or "(empty)"


def log_features(image: AnyBootstrap) -> None:
    """Log what the superblock says of the whole image."""
    what = "RAFS v5 super block features" if image.version == 5 else "RAFS features"
    logger.info("%s: %s", what, flag_names(image.flags))


def child_entries(inode: AnyInode) -> list[tuple[bytes, int]]:
    """Return (name, nid) of what is in a directory; raise `FormatError`."""
    return [(e.name, e.nid) for e in inode.entries() if e.name not in (b".", b"..")]


def _kind(inode: AnyInode) -> str:
    if inode.is_dir:
        return "dir"
    if inode.is_symlink:
        return "symlink"
    if inode.is_regular:
        return "hardlink" if inode.nlink > 1 else "file"
    return ""


class _Stored(NamedTuple):
    """Fields of v5's inodes, for v6 with what the real tool makes up."""

    child_index: int
    child_count: int
    name_size: int
    symlink_size: int


def _stored(image: AnyBootstrap, path: bytes, inode: AnyInode) -> _Stored:
    if isinstance(inode, InodeV5):
        record = inode.record
        return _Stored(
            record.child_index, record.child_count, record.name_size, record.symlink_size
        )
    name_size = len(path.rsplit(b"/", 1)[1]) or 1
    return _Stored(0, _child_count(image, inode), name_size, inode.size & 0xFFFF)


def _child_count(image: AnyBootstrap, inode: AnyInode) -> int:
    """Return the number of children, or of chunks; the target of a symlink counts as content."""
    if inode.is_dir:
        return len(child_entries(inode))
    is_special = not stat.S_ISREG(inode.mode) and not inode.is_symlink
    return 0 if is_special else -(-inode.size // image.chunk_size)


def _inode_line(image: AnyBootstrap, path: bytes, inode: AnyInode) -> str:
    stored = _stored(image, path, inode)
    link = f"Some({quoted(inode.readlink())})" if inode.is_symlink else "None"
    has_xattr = "true" if inode.xattr_size else "false"
    return (
        f"inode: {_kind(inode)} {quoted(path)}: index 0 ino {inode.nid} real_ino {inode.nid}"
        f" child_index {stored.child_index} child_count {stored.child_count}"
        f" i_nlink {inode.nlink} i_size {inode.size} i_blocks {inode.sectors}"
        f" i_name_size {stored.name_size} i_symlink_size {stored.symlink_size}"
        f" has_xattr {has_xattr} link {link} i_mtime {unsigned(inode.mtime)}"
        f" i_mtime_nsec {inode.mtime_nsec}"
    )


def _chunk_line(chunk: ChunkInfo) -> str:
    crc = f", crc32 {chunk.crc32c:#x}" if chunk.flags & ChunkFlags.HAS_CRC else ""
    return (
        f"\t chunk: id {chunk.digest.hex()}, index {chunk.chunk_index},"
        f" blob_index {chunk.blob_index}, file_offset {chunk.file_offset},"
        f" compressed {chunk.compressed_offset}/{chunk.compressed_size},"
        f" uncompressed {chunk.uncompressed_offset}/{chunk.uncompressed_size}{crc}"
    )


def inode_lines(image: AnyBootstrap) -> Iterator[str]:
    """Yield a line for each name, depth first, and one for each chunk; raise `FormatError`."""
    for path, inode in image.walk():
        yield _inode_line(image, path, inode)
        if inode.is_regular:
            yield from map(_chunk_line, inode.file_chunks())


def blob_line(number: int, blob_id: str, blob: BlobEntry) -> str:
    """Return what `check` says of a blob."""
    words = " ".join(word for feature, word in _FEATURE_WORDS if blob.features & feature)
    return (
        f"\t {number}: {blob_id}, compressed size {blob.compressed_size},"
        f" uncompressed size {blob.uncompressed_size}, chunk size: {blob.chunk_size},"
        f" chunk count: {blob.chunk_count}, features: {words}"
    )


def blob_lines(image: AnyBootstrap, ids: Sequence[str]) -> list[str]:
    """Return a line for each blob; `ids` as `builder.bootstrap.blob_ids` gives them."""
    return [blob_line(*item) for item in zip(range(len(ids)), ids, image.blobs, strict=True)]
