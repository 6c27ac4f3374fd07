"""Calls every reader entry point on bytes, for property tests and fuzzers.

The invariant: whatever the bytes are, reading succeeds or raises `FormatError`, and check
and dump never raise.
"""

from contextlib import suppress

from undump import rebuild

from erofs import (
    CodecError,
    FormatError,
    blobmeta,
    check_blob,
    check_image,
    dump_blob,
    dump_image,
    open_bootstrap,
    open_image,
)
from erofs.blobcheck import read_compression_header, read_compression_table
from erofs.rafs import BlobEntry
from erofs.view import View


def _inode(image, inode):
    for read in (
        inode.xattrs,
        inode.flat_parts,
        inode.readlink,
        inode.index_area,
        lambda: list(inode.chunk_indexes()),
        lambda: list(inode.entries()),
        lambda: inode.lookup(b"name"),
    ):
        with suppress(FormatError):
            read()


def _tree(image):
    for path, inode in image.walk():
        _inode(image, inode)
        with suppress(FormatError):
            image.lookup(path)


def read_image(data):
    """Read everything of an image; return the image, or None if it does not open."""
    try:
        image = open_image(data)
    except FormatError:
        return None
    with suppress(FormatError):
        _tree(image)
    list(check_image(image))
    lines = list(dump_image(image))
    assert rebuild(lines, data) == bytes(data)
    return image


def read_bootstrap(data):
    """Read everything of a bootstrap; return it, or None if it does not open."""
    try:
        image = open_bootstrap(data)
    except FormatError:
        return None
    for read in (
        lambda: image.devices,
        lambda: image.chunk_infos,
        lambda: image.prefetch_nids,
        lambda: (image.compressor, image.digester, image.is_tarfs),
        lambda: [list(image.file_chunks(i)) for _, i in image.walk() if i.is_regular],
    ):
        with suppress(FormatError):
            read()
    with suppress(FormatError):
        _tree(image)
    list(check_image(image))
    lines = list(dump_image(image))
    assert rebuild(lines, data) == bytes(data)
    return image


def read_blob(data, entry=None):
    """Read everything of a blob."""
    blob = View(data)
    for read in (blobmeta.read_sections, blobmeta.read_toc):
        with suppress(FormatError):
            read(blob)
    with suppress(FormatError):
        header = blobmeta.CompressionTableHeader.parse(blob)
        header.require_v1()
    for count in (0, 1, len(data) // 16):
        with suppress(FormatError):
            blobmeta.parse_compression_table(data, count)
    if entry is not None:
        with suppress(FormatError):
            read_compression_header(blob, entry)
        with suppress(FormatError, CodecError):
            read_compression_table(blob, entry)
        list(check_blob(entry, blob, data=True))
    assert rebuild(list(dump_blob(blob, entry)), data) == bytes(data)


def entry_at(data):
    """Return a blob table entry made of arbitrary bytes, as a bootstrap would let it pass."""
    entry = BlobEntry.parse(View(bytes(data[:256]).ljust(256, b"\0")), 0)
    return entry._replace(
        compressor=entry.compressor % 4,
        digester=entry.digester % 2,
        ci_compressor=entry.ci_compressor % 4,
        chunk_count=entry.chunk_count % (1 << 24),
        uncompressed_size=entry.uncompressed_size % (1 << 44),
    )
