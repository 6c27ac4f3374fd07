import pytest

from erofs import blobmeta, framing, layout, rafs
from erofs.blobmeta import CompressionInfo, CompressionInfoV2, CompressionTableHeader
from erofs.errors import BadMagic, CorruptStructure, OutOfBounds
from erofs.framing import TocEntry
from erofs.view import View, align_down, align_up

_SIZES = {
    layout.Superblock: 128,
    layout.InodeCompact: 32,
    layout.InodeExtended: 64,
    layout.Dirent: 12,
    layout.XattrHeader: 12,
    layout.XattrEntry: 4,
    layout.ChunkIndex: 8,
    layout.DeviceSlot: 128,
    rafs.ExtendedSuperblock: 256,
    rafs.BlobEntry: 256,
    rafs.ChunkInfo: 80,
}


def _bytes_of(size):
    # No byte is zero, and all differ from their neighbours, so no field can hide another.
    return bytes(1 + number % 255 for number in range(size))


@pytest.mark.parametrize("record", _SIZES)
def test_record_round_trip(record):
    size = _SIZES[record]
    data = _bytes_of(size)
    assert record.parse(View(b"##" + data), 2).pack() == data


@pytest.mark.parametrize("record", _SIZES)
def test_record_that_is_cut_off(record):
    with pytest.raises(OutOfBounds):
        record.parse(View(bytes(_SIZES[record] - 1)), 0)


def test_toc_entry_round_trip():
    entry = TocEntry(2, b"blob.meta.header", _bytes_of(32), 1, 2, 3)
    assert len(entry.pack()) == framing.TOC_ENTRY_SIZE
    assert TocEntry.parse(View(entry.pack()), 0) == entry


def test_compression_table_header_round_trip():
    header = CompressionTableHeader(*range(1, 10))
    assert len(header.pack()) == 4096
    assert CompressionTableHeader.parse(View(header.pack())) == header


@pytest.mark.parametrize("position", [0, 4092])
def test_compression_table_header_needs_both_magics(position):
    data = bytearray(CompressionTableHeader(*range(9)).pack())
    data[position] ^= 1
    with pytest.raises(BadMagic) as caught:
        CompressionTableHeader.parse(View(data))
    assert caught.value.where["offset"] == position


def test_defaults_are_what_rafs_v6_says():
    superblock = layout.Superblock().pack()
    assert superblock[:4] == bytes.fromhex("e2e1f5e0")
    assert superblock[0x58:0x5A] == b"\x0b\0"
    assert superblock[0x50:0x54] == b"\x0c\0\0\0"


@pytest.mark.parametrize(
    ("major", "minor", "encoded"),
    [(0, 0, 0), (1, 3, 0x103), (8, 0x12345, 0x12300845), (0xFFF, 0xFFFFF, 0xFFFFFFFF)],
)
def test_device_numbers(major, minor, encoded):
    assert layout.encode_device_number(major, minor) == encoded
    assert layout.decode_device_number(encoded) == (major, minor)


@pytest.mark.parametrize(
    ("blob", "chunk", "stored"),
    [(0, 0, "0000010000000000"), (253, 0xABCDEF, "efcdfeab07000000"), (2, 7, "0700030007000000")],
)
def test_chunk_index_hides_24_bits_beside_the_device(blob, chunk, stored):
    index = layout.ChunkIndex.of_chunk(blob, chunk, 7 if chunk else 0)
    assert index.pack().hex() == stored
    assert (index.blob_index, index.chunk_index) == (blob, chunk)


def test_compression_info_of_the_reference():
    # Spec rafs-v6 10.2: the table of a real blob.
    table = bytes.fromhex(
        "0000000000202204 0000000000b02d01 0050000000704503 dc12000000d0b900".replace(" ", "")
    )
    entries = blobmeta.parse_entries_v1(memoryview(table))
    assert entries == [
        CompressionInfo(0, 16931, 0, 4828),
        CompressionInfo(0x5000, 13400, 0x12DC, 2974),
    ]
    assert b"".join(entry.pack() for entry in entries) == table


@pytest.mark.parametrize(
    "entry",
    [
        CompressionInfo(0xFFFFFFFF000, 1 << 24, (1 << 40) - 1, 1 << 24),
        CompressionInfo(0, (1 << 20) + 1, 0, 1),
        CompressionInfo(0x1000, 1, 5, 1 << 20),
    ],
)
def test_compression_info_extremes(entry):
    assert blobmeta.parse_entries_v1(memoryview(entry.pack())) == [entry]


@pytest.mark.parametrize(
    "entry",
    [
        CompressionInfoV2(0xFFFFFFFF000, 1 << 24, (1 << 40) - 1, (1 << 24) - 1, 0xFF, 1, 2),
        CompressionInfoV2(0x1000, 1, 0, 0, 5, 0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_compression_info_v2_extremes(entry):
    assert blobmeta.parse_entries_v2(memoryview(entry.pack())) == [entry]


def test_view_refuses_what_is_outside():
    view = View(b"0123456789")
    assert bytes(view.slice(2, 8, "all")) == b"23456789"
    assert bytes(view.slice(10, 0, "nothing")) == b""
    for offset, length in ((-1, 1), (0, 11), (10, 1), (11, 0), (3, -1), (1 << 70, 1)):
        with pytest.raises(OutOfBounds) as caught:
            view.read_at(offset, length)
        assert caught.value.where["offset"] == offset


def test_alignment():
    assert [align_up(value, 4096) for value in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert [align_down(value, 4096) for value in (0, 4095, 4096)] == [0, 0, 4096]


def test_key_and_iv_of_a_blob():
    fields = dict.fromkeys(rafs.BlobEntry._fields[:14], 0) | {"blob_id": b"id"}
    key, iv = bytes(range(32)), bytes(range(100, 116))
    entry = rafs.BlobEntry(
        **fields,
        cipher=rafs.Cipher.AES_128_XTS,
        blob_meta_digest=key,
        blob_meta_size=int.from_bytes(iv[:8], "little"),
        cipher_iv=iv[8:],
    )
    assert entry.encryption() == (key, iv)
    assert entry._replace(cipher=0).encryption() is None
    with pytest.raises(CorruptStructure, match="halves") as caught:
        entry._replace(blob_meta_digest=b"secret key bytes" * 2).encryption()
    assert "secret" not in str(caught.value)
