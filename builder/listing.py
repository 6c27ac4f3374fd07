"""Text about an image as the real tool writes it: inodes, chunks, blobs, flags, names.

Only text is made here; what is wrong with an image is found by `erofs.check`.
"""

from __future__ import annotations

import logging
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from enum import Flag

from erofs import Bootstrap, Inode
from erofs.rafs import BlobEntry, BlobFeatures, ChunkInfo

__all__ = [
    "blob_line",
    "blob_lines",
    "child_entries",
    "flag_names",
    "inode_lines",
    "log_features",
    "quoted",
    "readable",
    "sectors",
    "unsigned",
]

logger = logging.getLogger(__name__)

SECTOR_SIZE = 512
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
    if not character.isprintable() or unicodedata.category(character) in _COMBINING:
        return f"\\u{{{ord(character):x}}}"
    return character


def readable(name: bytes) -> str:
    """Return a name as text, with U+FFFD for what is not UTF-8."""
    return name.decode("utf-8", "replace")


def unsigned(seconds: int) -> int:
    """Return a time as the real tool shows it: negative ones wrap around at 64 bits."""
    return seconds & 0xFFFFFFFFFFFFFFFF


def sectors(size: int) -> int:
    """Return what stat calls blocks, in units of 512 bytes."""
    return -(-size // SECTOR_SIZE)


def flag_names(flags: Flag) -> str:
    """Return the names of set flags, `A | B`."""
    return " | ".join(flag.name or "" for flag in flags)


def log_features(image: Bootstrap) -> None:
    """Log what the superblock says of the whole image."""
    logger.info("RAFS features: %s", flag_names(image.flags))


def child_entries(inode: Inode) -> list[tuple[bytes, int]]:
    """Return (name, nid) of what is in a directory; raise `FormatError`."""
    return [(e.name, e.nid) for e in inode.entries() if e.name not in (b".", b"..")]


def _kind(inode: Inode) -> str:
    if inode.is_dir:
        return "dir"
    if inode.is_symlink:
        return "symlink"
    if inode.is_regular:
        return "hardlink" if inode.nlink > 1 else "file"
    return ""


def _child_count(image: Bootstrap, inode: Inode) -> int:
    """Return the number of children, or of chunks; the target of a symlink counts as content."""
    if inode.is_dir:
        return len(child_entries(inode))
    is_special = not stat.S_ISREG(inode.mode) and not inode.is_symlink
    return 0 if is_special else -(-inode.size // image.chunk_size)


def _inode_line(image: Bootstrap, path: bytes, inode: Inode) -> str:
    name_size = len(path.rsplit(b"/", 1)[1]) or 1
    link = f"Some({quoted(inode.readlink())})" if inode.is_symlink else "None"
    has_xattr = "true" if inode.xattr_size else "false"
    return (
        f"inode: {_kind(inode)} {quoted(path)}: index 0 ino {inode.nid} real_ino {inode.nid}"
        f" child_index 0 child_count {_child_count(image, inode)} i_nlink {inode.nlink}"
        f" i_size {inode.size} i_blocks {sectors(inode.size)} i_name_size {name_size}"
        f" i_symlink_size {inode.size & 0xFFFF} has_xattr {has_xattr} link {link}"
        f" i_mtime {unsigned(inode.mtime)} i_mtime_nsec {inode.mtime_nsec}"
    )


def _chunk_line(chunk: ChunkInfo) -> str:
    return (
        f"\t chunk: id {chunk.digest.hex()}, index {chunk.chunk_index},"
        f" blob_index {chunk.blob_index}, file_offset {chunk.file_offset},"
        f" compressed {chunk.compressed_offset}/{chunk.compressed_size},"
        f" uncompressed {chunk.uncompressed_offset}/{chunk.uncompressed_size},"
        f" crc32 {chunk.crc32c:#x}"
    )


def inode_lines(image: Bootstrap) -> Iterator[str]:
    """Yield a line for each name, depth first, and one for each chunk; raise `FormatError`."""
    for path, inode in image.walk():
        yield _inode_line(image, path, inode)
        if inode.is_regular and not image.is_tarfs:
            yield from map(_chunk_line, image.file_chunks(inode))


def blob_line(number: int, blob_id: str, blob: BlobEntry) -> str:
    """Return what `check` says of a blob."""
    words = " ".join(word for feature, word in _FEATURE_WORDS if blob.features & feature)
    return (
        f"\t {number}: {blob_id}, compressed size {blob.compressed_size},"
        f" uncompressed size {blob.uncompressed_size}, chunk size: {blob.chunk_size},"
        f" chunk count: {blob.chunk_count}, features: {words}"
    )


def blob_lines(image: Bootstrap, ids: Sequence[str]) -> list[str]:
    """Return a line for each blob; `ids` as `builder.bootstrap.blob_ids` gives them."""
    return [blob_line(*item) for item in zip(range(len(ids)), ids, image.blobs, strict=True)]
