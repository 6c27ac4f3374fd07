import hashlib
import io
import tarfile

import pytest
import tiny

from erofs import blobmeta
from erofs.blobmeta import CompressionInfo, CompressionTableHeader
from erofs.errors import BadMagic, CorruptStructure, FormatError, OutOfBounds, UnsupportedFeature
from erofs.rafs import Compressor
from erofs.view import View


def test_section_header_is_a_tar_header():
    header = blobmeta.pack_section_header(b"blob.meta", 4144)
    assert len(header) == 512
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (info.name, info.size, info.type) == ("blob.meta", 4144, tarfile.REGTYPE)
    assert header[257:265] == b"ustar  \0"
    section = blobmeta.parse_section_header(header, 10_000)
    assert section == (b"blob.meta", 10_000 - 512 - 4144, 4144)
    assert section.header_offset == 10_000 - 512


@pytest.mark.parametrize(
    ("position", "value", "kind"),
    [
        (257, b"x", BadMagic),
        (0, b"z", CorruptStructure),
        (124, b"-", CorruptStructure),
        (124, b"\xb2", CorruptStructure),
        (148, b"zz", CorruptStructure),
    ],
)
def test_broken_section_headers(position, value, kind):
    header = bytearray(blobmeta.pack_section_header(b"blob.meta", 8))
    header[position : position + len(value)] = value
    with pytest.raises(kind):
        blobmeta.parse_section_header(header, 1000)


def test_section_that_begins_before_its_blob():
    with pytest.raises(OutOfBounds):
        blobmeta.parse_section_header(blobmeta.pack_section_header(b"a", 100), 600)


def test_sections_and_toc_of_a_blob():
    image = tiny.everything(compressor=Compressor.ZSTD, toc=True)
    image.finish()
    blob = View(bytes(image.blob))
    sections = blobmeta.read_sections(blob)
    assert [section.name for section in sections] == [
        b"image.blob",
        b"blob.meta",
        b"blob.digest",
        b"rafs.blob.toc",
    ]
    assert sections[0].offset == 0
    assert sections[-1].header_offset + 512 == blob.size()
    toc = blobmeta.read_toc(blob)
    assert toc.find(b"image.blob").compressed_size == sections[0].size
    assert toc.find(b"nothing") is None
    assert hashlib.sha256(toc.raw).digest() == image.entry.blob_toc_digest
    entry = toc.find(b"blob.digest")
    data = bytes(blob.read_at(entry.offset, entry.compressed_size))
    assert hashlib.sha256(data).digest() == entry.digest


@pytest.mark.parametrize("blob", [b"", b"x" * 100, bytes(512), bytes(5000)])
def test_blobs_without_sections(blob):
    with pytest.raises(FormatError):
        blobmeta.read_toc(View(blob))
    if blob:
        with pytest.raises(FormatError):
            blobmeta.read_sections(View(blob))


def test_toc_that_places_a_section_outside():
    entry = blobmeta.TocEntry(1, b"image.boot", bytes(32), 1 << 60, 5, 5)
    with pytest.raises(OutOfBounds, match=r"image\.boot"):
        blobmeta.read_toc(View(blobmeta.pack_toc([entry])))


def test_other_tars_are_not_a_toc():
    with pytest.raises(BadMagic, match="no ToC"):
        blobmeta.read_toc(View(bytes(128) + blobmeta.pack_section_header(b"blob.meta", 128)))


@pytest.mark.parametrize("size", [1, 127, 3584 + 128])
def test_toc_of_an_impossible_size(size):
    header = blobmeta.pack_section_header(b"rafs.blob.toc", size)
    with pytest.raises(OutOfBounds):
        blobmeta.read_toc(View(bytes(8192) + header))


@pytest.mark.parametrize(
    "entries",
    [
        [CompressionInfo(0x1000, 1, 0, 1)],
        [CompressionInfo(0, 1, 0, 1), CompressionInfo(0x2000, 1, 1, 1)],
        [CompressionInfo(0, 0x1001, 0, 1), CompressionInfo(0x1000, 1, 1, 1)],
        [CompressionInfo(0, 1, 0, 2), CompressionInfo(0x1000, 1, 1, 1)],
    ],
)
def test_tables_with_gaps_or_overlaps(entries):
    table = b"".join(entry.pack() for entry in entries)
    with pytest.raises(CorruptStructure):
        blobmeta.parse_compression_table(table, len(entries))


def test_table_of_the_wrong_length():
    with pytest.raises(OutOfBounds):
        blobmeta.parse_compression_table(bytes(31), 2)


def test_version_2_is_named():
    with pytest.raises(UnsupportedFeature, match="version 2"):
        CompressionTableHeader(0x85, 0, 0, 0, 0, 0).require_v1()


def test_framed_blob_with_the_last_header_cut_off():
    image = tiny.everything(toc=True)
    image.finish()
    with pytest.raises(FormatError):
        blobmeta.read_sections(View(bytes(image.blob[:-1])))
    assert io.BytesIO(image.blob).getbuffer().nbytes == image.entry.compressed_size
