"""Calls every reader entry point on bytes, for property tests and fuzzers.

The invariant: whatever the bytes are, reading succeeds or raises `FormatError`, and check
and dump never raise.
"""

import struct
from contextlib import suppress

from undump import rebuild

from erofs import (
    CodecError,
    FormatError,
    IntegrityError,
    check_blob,
    check_image,
    dump_blob,
    dump_image,
    framing,
    open_bootstrap,
    open_image,
)
from erofs.blobcheck import read_compression_header, read_compression_table
from erofs.blobmeta import CompressionTableHeader
from erofs.citable import decompress_table, parse_cached, parse_table
from erofs.inlined import read_inlined_bootstrap
from erofs.rafs import BlobEntry, BlobFeatures
from erofs.view import View

_FEATURES = (
    BlobFeatures.CHUNK_INFO_V2,
    BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH,
    BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.ZRAN,
)


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
    for read in (framing.read_sections, framing.read_toc, read_inlined_bootstrap):
        with suppress(FormatError, CodecError, IntegrityError):
            read(blob)
    if entry is not None:
        with suppress(FormatError, CodecError):
            read_compression_header(blob, entry)
        with suppress(FormatError, CodecError):
            read_compression_table(blob, entry)
        list(check_blob(entry, blob, data=True))
    assert rebuild(list(dump_blob(blob, entry)), data) == bytes(data)


def read_table(data):
    """Read the input as a cached table, and as a table behind a header of its first bytes."""
    with suppress(FormatError):
        parse_cached(data)
    words = struct.unpack("<IIIIQQQQQI", bytes(data[:60]).ljust(60, b"\0"))
    header = CompressionTableHeader._make(words[1:])
    plain = data[60:]
    for features in (header.features, *_FEATURES):
        count = min(header.ci_entries, len(plain) // 24)
        for fixed in (
            header,
            header._replace(
                features=features,
                ci_compressor=0,
                ci_entries=count,
                ci_compressed_size=len(plain),
                ci_uncompressed_size=len(plain),
                context_offset=24 * count,
                context_size=len(plain) - 24 * count,
                context_count=header.context_count % (count + 1),
            ),
        ):
            with suppress(FormatError, CodecError):
                decompress_table(fixed, plain)
            with suppress(FormatError):
                _use(parse_table(fixed, plain))


def _use(table):
    for index in range(len(table.entries)):
        assert sum(table.stored_range(index)) <= 1 << 41
    assert table.uncompressed_size <= 1 << 45


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
