import hashlib
import io
import tarfile

import pytest
import tiny

from erofs import framing
from erofs.errors import (
    BadMagic,
    CodecError,
    CorruptStructure,
    FormatError,
    IntegrityError,
    OutOfBounds,
)
from erofs.inlined import read_inlined_bootstrap
from erofs.rafs import Compressor
from erofs.view import View


def test_section_header_is_a_tar_header():
    header = framing.pack_section_header(b"blob.meta", 4144)
    assert len(header) == 512
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (info.name, info.size, info.type) == ("blob.meta", 4144, tarfile.REGTYPE)
    assert header[257:265] == b"ustar  \0"
    section = framing.parse_section_header(header, 10_000)
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
    header = bytearray(framing.pack_section_header(b"blob.meta", 8))
    header[position : position + len(value)] = value
    with pytest.raises(kind):
        framing.parse_section_header(header, 1000)


def test_section_that_begins_before_its_blob():
    with pytest.raises(OutOfBounds):
        framing.parse_section_header(framing.pack_section_header(b"a", 100), 600)


def test_sections_and_toc_of_a_blob():
    image = tiny.everything(compressor=Compressor.ZSTD, toc=True)
    image.finish()
    blob = View(bytes(image.blob))
    sections = framing.read_sections(blob)
    assert [section.name for section in sections] == [
        b"image.blob",
        b"blob.meta",
        b"blob.digest",
        b"rafs.blob.toc",
    ]
    assert sections[0].offset == 0
    assert sections[-1].header_offset + 512 == blob.size()
    toc = framing.read_toc(blob)
    assert toc.find(b"image.blob").compressed_size == sections[0].size
    assert toc.find(b"nothing") is None
    assert hashlib.sha256(toc.raw).digest() == image.entry.blob_toc_digest
    entry = toc.find(b"blob.digest")
    data = bytes(blob.read_at(entry.offset, entry.compressed_size))
    assert hashlib.sha256(data).digest() == entry.digest


@pytest.mark.parametrize("blob", [b"", b"x" * 100, bytes(512), bytes(5000)])
def test_blobs_without_sections(blob):
    with pytest.raises(FormatError):
        framing.read_toc(View(blob))
    if blob:
        with pytest.raises(FormatError):
            framing.read_sections(View(blob))


def test_toc_that_places_a_section_outside():
    entry = framing.TocEntry(1, b"image.boot", bytes(32), 1 << 60, 5, 5)
    with pytest.raises(OutOfBounds, match=r"image\.boot"):
        framing.read_toc(View(framing.pack_toc([entry])))


def test_names_of_sections_are_one_printable_line():
    """Found by fuzzing: a name with a line feed made two lines of a message."""
    entry = framing.TocEntry(1, b"a\nb\x1b[m", bytes(32), 1 << 60, 5, 5)
    blob = framing.pack_toc([entry])
    with pytest.raises(OutOfBounds) as caught:
        framing.read_toc(View(blob))
    assert "section a\\nb\\x1b[m outside" in str(caught.value)


def test_other_tars_are_not_a_toc():
    with pytest.raises(BadMagic, match="no ToC"):
        framing.read_toc(View(bytes(128) + framing.pack_section_header(b"blob.meta", 128)))


@pytest.mark.parametrize("size", [1, 127, 3584 + 128])
def test_toc_of_an_impossible_size(size):
    header = framing.pack_section_header(b"rafs.blob.toc", size)
    with pytest.raises(OutOfBounds):
        framing.read_toc(View(bytes(8192) + header))


def test_framed_blob_with_the_last_header_cut_off():
    image = tiny.everything(toc=True)
    image.finish()
    with pytest.raises(FormatError):
        framing.read_sections(View(bytes(image.blob[:-1])))
    assert io.BytesIO(image.blob).getbuffer().nbytes == image.entry.compressed_size


def _framed(*sections):
    """Return a blob of (name, data) sections with their headers."""
    return b"".join(data + framing.pack_section_header(name, len(data)) for name, data in sections)


def _toc_blob(entry, data):
    body = b"some chunks" + data
    return body + framing.pack_toc([entry])


def test_inlined_bootstrap_without_a_toc():
    blob = _framed((b"image.blob", b"chunks"), (b"blob.meta", b"ci"), (b"image.boot", b"boot"))
    assert read_inlined_bootstrap(View(blob)) == b"boot"


@pytest.mark.parametrize("flags", [framing.TOC_NONE, framing.TOC_ZSTD, framing.TOC_LZ4])
def test_inlined_bootstrap_of_a_toc(flags):
    from erofs.codec import compress

    plain = b"bootstrap " * 100
    kinds = {framing.TOC_ZSTD: Compressor.ZSTD, framing.TOC_LZ4: Compressor.LZ4_BLOCK}
    stored = compress(kinds[flags], plain) if flags in kinds else plain
    digest = hashlib.sha256(plain).digest()
    entry = framing.TocEntry(flags, b"image.boot", digest, 11, len(stored), len(plain))
    blob = _toc_blob(entry, stored)
    assert read_inlined_bootstrap(View(blob)) == plain
    with pytest.raises(IntegrityError, match=r"image\.boot does not have its digest"):
        read_inlined_bootstrap(View(_toc_blob(entry._replace(digest=bytes(32)), stored)))
    for wrong in (entry._replace(flags=8), entry._replace(uncompressed_size=1 << 33)):
        with pytest.raises(CorruptStructure, match="impossible entry"):
            read_inlined_bootstrap(View(_toc_blob(wrong, stored)))
    shorter = entry._replace(uncompressed_size=len(plain) - 1)
    with pytest.raises(CodecError):
        read_inlined_bootstrap(View(_toc_blob(shorter, stored)))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        bytes(600),
        _framed((b"image.blob", b"chunks"), (b"blob.meta", b"ci")),
        framing.pack_toc([framing.TocEntry(1, b"image.blob", bytes(32), 0, 0, 0)]),
    ],
)
def test_blobs_without_a_bootstrap(blob):
    with pytest.raises(FormatError):
        read_inlined_bootstrap(View(blob))
