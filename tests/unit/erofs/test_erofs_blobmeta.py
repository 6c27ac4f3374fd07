"""Compression tables: versions 1 and 2, batches, zran, and the form of caches."""

import pytest

from erofs.blobmeta import (
    CiFlags,
    CompressionInfo,
    CompressionInfoV2,
    CompressionTableHeader,
    parse_digests,
)
from erofs.citable import cached_size, decompress_table, pack_cached, parse_cached, parse_table
from erofs.codec import compress
from erofs.contexts import BatchContext, ZranContext
from erofs.errors import (
    BadMagic,
    CodecError,
    CorruptStructure,
    FormatError,
    IntegrityError,
    OutOfBounds,
    UnsupportedFeature,
)
from erofs.rafs import BlobFeatures, ChunkInfo, Compressor

V2 = BlobFeatures.CHUNK_INFO_V2
BATCH = V2 | BlobFeatures.BATCH
ZRAN = V2 | BlobFeatures.ZRAN
PLAIN = CiFlags.HAS_CRC
PACKED = CiFlags.COMPRESSED | CiFlags.HAS_CRC
IN_BATCH = CiFlags.COMPRESSED | CiFlags.BATCH
IN_ZRAN = CiFlags.COMPRESSED | CiFlags.ZRAN

# Two chunks in a batch, a chunk by itself, and a batch of one.
BATCHED = [
    CompressionInfoV2(0, 100, 0, 0, IN_BATCH, 0, 0),
    CompressionInfoV2(0x1000, 5000, 0, 0, IN_BATCH, 100, 0),
    CompressionInfoV2(0x3000, 0x2000, 60, 0x1000, PACKED, 7, 0),
    CompressionInfoV2(0x5000, 3, 0x103C, 0, IN_BATCH, 0, 1),
]
BATCHES = [BatchContext(60, 5100), BatchContext(3, 3)]
ZRANNED = [
    CompressionInfoV2(0, 100, 10, 50, IN_ZRAN, 512, 0),
    CompressionInfoV2(0x1000, 100, 60, 0, IN_ZRAN, 1024, 0),
]
ZRANS = [ZranContext(10, 0, 0, 500, 4000, 4, 0x67, 5)]


def table_of(entries, contexts=(), features=0, tail=b""):
    """Return header and plain table."""
    size = 24 if features & V2 else 16
    plain = b"".join(item.pack() for item in [*entries, *contexts]) + tail
    header = CompressionTableHeader(features, 0, len(entries), 0x10000, len(plain), len(plain))
    if features & (BlobFeatures.BATCH | BlobFeatures.ZRAN):
        header = header._replace(
            context_offset=size * len(entries),
            context_size=len(plain) - size * len(entries),
            context_count=len(contexts),
        )
    return header, plain


def test_batches():
    table = parse_table(*table_of(BATCHED, BATCHES, BATCH))
    assert list(table.entries) == BATCHED
    assert list(table.batches) == BATCHES
    assert [table.context_of(index) for index in range(4)] == [0, 0, None, 1]
    assert [table.stored_range(index) for index in range(4)] == [
        (0, 60), (0, 60), (60, 0x1000), (0x103C, 3),
    ]  # fmt: skip
    assert table.uncompressed_size == 0x6000
    buffer = bytes(range(200)) * 26
    assert table.cut(1, buffer) == buffer[100:5100]
    with pytest.raises(IntegrityError, match="too short"):
        table.cut(1, buffer[:5099])


def test_a_batch_is_raw_when_its_sizes_are_equal():
    data = b"equal" * 20
    packed = compress(Compressor.ZSTD, data)
    assert BatchContext(100, 100).decompress(Compressor.ZSTD, data) == data
    assert BatchContext(len(packed), 100).decompress(Compressor.ZSTD, packed) == data
    with pytest.raises(CodecError):
        BatchContext(len(packed), 99).decompress(Compressor.ZSTD, packed)
    with pytest.raises(CodecError):
        BatchContext(99, 100).decompress(Compressor.ZSTD, data)


def test_zran():
    table = parse_table(*table_of(ZRANNED, ZRANS, ZRAN, tail=b"dict"))
    assert list(table.zran) == ZRANS
    assert table.dictionaries == b"dict"
    assert table.context_of(0) == 0


def test_what_the_bootstrap_says():
    table = parse_table(*table_of(BATCHED, BATCHES, BATCH))
    batched = ChunkInfo(bytes(32), 0, 0x10, 0, 5000, 0, 0x1000, 0, 1, 9)
    alone = ChunkInfo(bytes(32), 0, 0x11, 0x1000, 0x2000, 60, 0x3000, 0, 2, 7)
    assert table.agrees(batched)
    assert table.agrees(alone)
    for wrong in (
        batched._replace(uncompressed_size=5001),
        batched._replace(uncompressed_offset=0x2000),
        alone._replace(compressed_offset=61),
        alone._replace(compressed_size=61),
        alone._replace(flags=0),
    ):
        assert not table.agrees(wrong)


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.ZSTD, Compressor.LZ4_BLOCK])
def test_compressed_tables(compressor):
    entries = [CompressionInfo(0x1000 * n, 0x1000, n * 100, 100) for n in range(300)]
    header, plain = table_of(entries)
    stored = compress(compressor, plain) or plain
    header = header._replace(ci_compressor=compressor, ci_compressed_size=len(stored))
    assert list(parse_table(header, decompress_table(header, stored)).entries) == entries
    with pytest.raises(OutOfBounds, match="wrong length"):
        decompress_table(header, stored[:-1])
    if compressor is not Compressor.NONE:
        cut = header._replace(ci_compressed_size=len(stored) - 1)
        with pytest.raises(CodecError):
            decompress_table(cut, stored[:-1])


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
    with pytest.raises(CorruptStructure):
        parse_table(*table_of(entries))


def changed(index, **fields):
    return [*BATCHED[:index], BATCHED[index]._replace(**fields), *BATCHED[index + 1 :]]


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        (UnsupportedFeature, changed(0, flags=IN_BATCH | 0x20)),
        (CorruptStructure, changed(0, flags=IN_BATCH | CiFlags.HAS_CRC)),
        (CorruptStructure, changed(0, flags=IN_BATCH | CiFlags.ZRAN)),
        (CorruptStructure, changed(0, flags=IN_BATCH | CiFlags.ENCRYPTED)),
        (OutOfBounds, changed(0, context=2)),
        (OutOfBounds, changed(1, data=101)),
        (CorruptStructure, changed(1, data=99)),
        (CorruptStructure, changed(1, compressed_offset=1)),
        (CorruptStructure, changed(1, context=1, data=0, uncompressed_size=3)),
        (CorruptStructure, changed(2, flags=PLAIN)),
        (CorruptStructure, changed(2, compressed_size=0)),
        (CorruptStructure, changed(2, data=0)),
        (CorruptStructure, changed(2, compressed_offset=59)),
        (CorruptStructure, changed(3, compressed_offset=0x103B)),
        (CorruptStructure, changed(3, uncompressed_offset=0x6000)),
    ],
)
def test_broken_batch_tables(kind, entries):
    with pytest.raises(FormatError) as caught:
        parse_table(*table_of(entries, BATCHES, BATCH))
    assert type(caught.value) is kind
    assert "chunk" in caught.value.where


@pytest.mark.parametrize(
    "batch",
    [BatchContext(0, 5100), BatchContext(60, 0), BatchContext(60, (1 << 24) + 1),
     BatchContext(5101, 5100)],
)  # fmt: skip
def test_batches_of_impossible_sizes(batch):
    with pytest.raises(OutOfBounds, match="batch 0"):
        parse_table(*table_of(BATCHED, [batch, BATCHES[1]], BATCH))


@pytest.mark.parametrize(
    "change",
    [
        {"ctx_bits": 8},
        {"in_len": 0},
        {"out_len": 0},
        {"out_len": (1 << 25) + 1},
        {"in_len": (1 << 25) + 1},
        {"in_offset": 1 << 63},
        {"dict_size": 5},
        {"dict_offset": 1},
        {"dict_size": 0, "dict_offset": 1 << 63},
        {"out_len": 1123},
    ],
)
def test_broken_zran_tables(change):
    with pytest.raises(FormatError):
        parse_table(*table_of(ZRANNED, [ZRANS[0]._replace(**change)], ZRAN, tail=b"dict"))


@pytest.mark.parametrize(
    ("features", "fields"),
    [
        (BATCH, {"context_offset": 0}),
        (BATCH, {"context_size": 1 << 63}),
        (BATCH, {"context_count": 1}),
        (BATCH, {"context_count": 3}),
        (BATCH, {"context_count": 5, "context_size": 200, "ci_uncompressed_size": 296}),
        (BATCH | BlobFeatures.ZRAN, {}),
        (BATCH, {"features": BlobFeatures.BATCH}),
        (BATCH, {"features": V2}),
        (BATCH, {"features": 0}),
        (BATCH, {"ci_entries": 3}),
        (BATCH, {"ci_entries": (1 << 24) + 1}),
        (BATCH, {"ci_compressor": 4}),
        (BATCH, {"ci_compressed_size": 0}),
        (BATCH, {"ci_compressed_size": 1 << 30}),
        (BATCH, {"ci_uncompressed_size": 1 << 40}),
    ],
)
def test_headers_that_do_not_go_with_their_table(features, fields):
    header, plain = table_of(BATCHED, BATCHES, features)
    with pytest.raises(FormatError):
        parse_table(header._replace(**fields), plain)


def test_flags_of_another_kind_of_blob():
    header, plain = table_of(BATCHED, (), V2)
    with pytest.raises(CorruptStructure, match="BATCH chunk in another blob"):
        parse_table(header, plain)


def test_tables_of_the_wrong_length():
    header, plain = table_of([CompressionInfo(0, 1, 0, 1), CompressionInfo(0x1000, 1, 1, 1)])
    for wrong in (plain[:-1], plain + b"\0", b""):
        with pytest.raises(OutOfBounds):
            parse_table(header, wrong)
    with pytest.raises(OutOfBounds):
        parse_table(header._replace(ci_uncompressed_size=31, ci_compressed_size=31), plain[:31])


def test_a_header_that_is_a_bomb():
    header = CompressionTableHeader(0, Compressor.ZSTD, 1 << 24, 0, 100, 1 << 28)
    with pytest.raises(OutOfBounds, match="impossible sizes"):
        decompress_table(header, bytes(100))


def test_cached_form():
    header, plain = table_of(BATCHED, BATCHES, BATCH)
    # Bytes of the header that nobody knows stay as they are.
    packed = bytearray(header.pack())
    packed[100:104] = b"keep"
    content = pack_cached(plain, packed)
    assert len(content) == cached_size(len(plain)) == 8192
    assert content[-4096:] == packed
    table = parse_cached(content)
    assert list(table.entries) == BATCHED
    assert table.header == header
    for wrong in (content[:-1], content[1:], content + bytes(4096), bytes(4096) + content, b""):
        with pytest.raises(FormatError):
            parse_cached(wrong)
    with pytest.raises(BadMagic):
        parse_cached(bytes(8192))


def test_digest_arrays():
    assert parse_digests(b"a" * 32 + b"b" * 32, 2) == [b"a" * 32, b"b" * 32]
    for count in (1, 3):
        with pytest.raises(OutOfBounds):
            parse_digests(bytes(64), count)
