import pytest
from fakes.blob_image import CHUNK_SIZE, BatchBlob, Blob

from erofs.cipher import BlobCipher
from erofs.citable import parse_cached
from erofs.errors import CorruptStructure, FormatError, OutOfBounds, UnsupportedFeature
from erofs.rafs import BlobFeatures, ChunkFlags, Compressor
from fscache.cache.blobmap import BlobMap
from fscache.cache.places import Places

SIZES = [CHUNK_SIZE, 100, 4096, CHUNK_SIZE, 5000]


@pytest.fixture(scope="module")
def blob():
    return Blob(SIZES)


def test_chunks_in(blob):
    table = BlobMap(blob.entry, reversed(blob.chunks))
    assert len(table) == 5
    assert table.chunks_in(0, 4096) == range(1)
    assert table.chunks_in(CHUNK_SIZE - 4096, 8192) == range(2)
    assert table.chunks_in(CHUNK_SIZE, 4096) == range(1, 2)
    assert table.chunks_in(CHUNK_SIZE + 100, 1) == range(1, 2)
    assert table.chunks_in(0, len(blob.plain)) == range(5)
    assert table.chunks_in(len(blob.plain) - 1, 1) == range(4, 5)
    assert table.chunks_in(4096, 0) == range(0)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 1 << 40), (1 << 63, 4096)])
def test_ranges_outside(blob, offset, length):
    with pytest.raises(OutOfBounds, match="outside"):
        BlobMap(blob.entry, blob.chunks).chunks_in(offset, length)


def test_pages_of_no_chunk_are_refused(blob):
    table = BlobMap(blob.entry, [blob.chunks[0], blob.chunks[2]])
    gap = CHUNK_SIZE
    assert table.chunks_in(0, CHUNK_SIZE) == range(1)
    assert table.chunks_in(gap + 4096, 4096) == range(2, 3)
    for offset, length in ((gap, 4096), (0, gap + 4096), (gap, 8192), (0, gap + 8192)):
        with pytest.raises(OutOfBounds, match="no known chunk"):
            table.chunks_in(offset, length)
    with pytest.raises(OutOfBounds):
        table.chunks_in(gap + 8192, 4096)
    with pytest.raises(OutOfBounds):
        BlobMap(blob.entry, []).chunks_in(0, 4096)
    with pytest.raises(OutOfBounds):
        BlobMap(blob.entry, blob.chunks[1:]).chunks_in(0, 4096)


def test_groups(blob):
    table = BlobMap(blob.entry, blob.chunks)
    assert list(table.groups(range(5), 1 << 30)) == [range(5)]
    assert list(table.groups([0, 1, 3, 4], 1 << 30)) == [range(2), range(3, 5)]
    assert list(table.groups(range(5), 1)) == [range(p, p + 1) for p in range(5)]
    two = table.compressed_sizes[0] + table.compressed_sizes[1]
    assert next(iter(table.groups(range(5), two))) == range(2)
    assert next(iter(table.groups(range(5), two - 1))) == range(1)
    assert list(table.groups([], 1)) == []
    # Neighbours in the uncompressed space whose stored bytes do not touch.
    apart = BlobMap(blob.entry, blob.chunks[:1] + blob.chunks[2:])
    assert list(apart.groups(apart.positions(), 1 << 30)) == [range(1), range(2, 5)]


def test_chunks_of_a_further_image(blob):
    one = BlobMap(blob.entry, blob.chunks[:3])
    both = one.with_chunks(blob.entry._replace(blob_index=0), blob.chunks[2:])
    assert both.positions() == [0, 1, 2, 3, 4]
    whole = BlobMap(blob.entry, blob.chunks)
    assert both.chunks_in(0, len(blob.plain)) == whole.chunks_in(0, len(blob.plain))
    assert [both.digest(i) for i in range(5)] == [whole.digest(i) for i in range(5)]
    assert both.with_chunks(blob.entry, blob.chunks[1:4]) is both


@pytest.mark.parametrize(
    ("entry", "chunk"),
    [
        ({"chunk_count": 6}, {}),
        ({"uncompressed_size": 1 << 20}, {}),
        ({"compressor": Compressor.LZ4_BLOCK}, {}),
        ({}, {"digest": bytes(32)}),
        ({}, {"compressed_offset": 1}),
    ],
)
def test_images_that_contradict_each_other(blob, entry, chunk):
    one = BlobMap(blob.entry, blob.chunks[:3])
    with pytest.raises(CorruptStructure, match="images differ"):
        one.with_chunks(blob.entry._replace(**entry), [blob.chunks[0]._replace(**chunk)])


def test_covered_by(blob):
    table = BlobMap(blob.entry, blob.chunks)
    end = len(blob.plain)
    assert table.covered_by([]) == bytes(5)
    assert table.covered_by([(0, end)]) == b"\1" * 5
    assert table.covered_by([(4096, end - 4096)]) == bytes([0, 1, 1, 1, 0])
    assert table.covered_by([(0, CHUNK_SIZE), (CHUNK_SIZE + 4096, CHUNK_SIZE + 8192)]) == bytes(
        [1, 0, 1, 0, 0]
    )


@pytest.mark.parametrize("feature", ["EXTERNAL", "IS_CHUNKDICT_GENERATED"])
def test_unsupported_features_are_named(blob, feature):
    entry = blob.entry._replace(features=blob.entry.features | BlobFeatures[feature])
    with pytest.raises(UnsupportedFeature, match=feature) as caught:
        BlobMap(entry, blob.chunks)
    assert caught.value.where["blob"] == blob.id


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (UnsupportedFeature, {"features": 0x8000}),
        (UnsupportedFeature, {"cipher": 2}),
        (CorruptStructure, {"cipher": 1}),
        (CorruptStructure, {"features": 0x40000105}),
        (UnsupportedFeature, {"compressor": 77}),
        (UnsupportedFeature, {"digester": 2}),
        (CorruptStructure, {"chunk_size": 0}),
        (CorruptStructure, {"chunk_size": 5000}),
        (CorruptStructure, {"chunk_size": 1 << 25}),
        (CorruptStructure, {"chunk_count": 0}),
        (CorruptStructure, {"chunk_count": (1 << 24) + 1}),
        (OutOfBounds, {"chunk_count": 4}),
        (OutOfBounds, {"compressed_size": 1 << 63}),
        (OutOfBounds, {"compressed_size": 100}),
        (OutOfBounds, {"uncompressed_size": 0}),
        (OutOfBounds, {"uncompressed_size": 1 << 63}),
        (OutOfBounds, {"uncompressed_size": 4096}),
        (CorruptStructure, {"compressor": Compressor.NONE}),
    ],
)
def test_bad_entries(blob, kind, change):
    with pytest.raises(kind) as caught:
        BlobMap(blob.entry._replace(**change), blob.chunks)
    assert caught.value.where["blob"] == blob.id


def test_columns_at_once_are_those_of_rows(blob, monkeypatch):
    at_once = BlobMap(blob.entry, reversed(blob.chunks))
    monkeypatch.setattr("fscache.cache.blobmap.ordinary_columns", lambda entry, chunks: None)
    by_row = BlobMap(blob.entry, blob.chunks)
    columns = {name: value for name, value in vars(by_row).items() if name != "data"}
    assert {name: value for name, value in vars(at_once).items() if name != "data"} == columns


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (CorruptStructure, {"blob_index": 1}),
        (OutOfBounds, {"chunk_index": 5}),
        (CorruptStructure, {"chunk_index": 1}),
        (UnsupportedFeature, {"flags": ChunkFlags.BATCH}),
        (UnsupportedFeature, {"flags": ChunkFlags.HOLE}),
        (CorruptStructure, {"flags": ChunkFlags.ENCRYPTED}),
        (CorruptStructure, {"flags": 0}),
        (CorruptStructure, {"compressed_size": 0}),
        (CorruptStructure, {"compressed_size": 4097}),
        (OutOfBounds, {"compressed_size": 0xFFFFFFFF}),
        (OutOfBounds, {"compressed_offset": 0xFFFFFFFFFFFFFFFF}),
        (OutOfBounds, {"uncompressed_size": 0}),
        (OutOfBounds, {"uncompressed_size": CHUNK_SIZE + 1}),
        (CorruptStructure, {"uncompressed_size": CHUNK_SIZE}),
        (CorruptStructure, {"uncompressed_offset": 1}),
        (CorruptStructure, {"uncompressed_offset": 0}),
        (CorruptStructure, {"uncompressed_offset": CHUNK_SIZE - 4096}),
        (OutOfBounds, {"uncompressed_offset": 0xFFFFFFFFFFFFF000}),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_bad_chunks(blob, kind, change, complete):
    chunks = list(blob.chunks)
    chunks[2] = chunks[2]._replace(**change)
    if not complete:
        # Checked row by row, as it is not known whether all others are there.
        chunks.pop(0)
    with pytest.raises(FormatError) as caught:
        BlobMap(blob.entry, chunks)
    assert type(caught.value) is kind
    assert caught.value.where["blob"] == blob.id


def test_what_follows_in_the_same_file(blob):
    offsets = [0, CHUNK_SIZE, 2 * CHUNK_SIZE, 0, CHUNK_SIZE]
    chunks = [
        chunk._replace(file_offset=offset)
        for chunk, offset in zip(blob.chunks, offsets, strict=True)
    ]
    sizes = [chunk.uncompressed_size for chunk in chunks]
    table = BlobMap(blob.entry, chunks)
    assert table.following(0, 0) == range(1, 1)
    assert table.following(0, 1) == range(1, 2)
    expected = 3 if sizes[:2] == [CHUNK_SIZE] * 2 else 2
    assert table.following(0, 9) == range(1, expected)
    assert table.following(2, 9) == range(3, 3)
    assert table.following(4, 9) == range(5, 5)


LAYOUT = [[100, 431, 5000], CHUNK_SIZE, [7], 4096, [10, 20, 30]]


@pytest.fixture(scope="module")
def batched():
    return BatchBlob(LAYOUT)


@pytest.fixture(scope="module")
def places(batched):
    return Places(parse_cached(batched.cached))


def test_batches_have_no_place_without_their_table(batched):
    table = BlobMap(batched.entry, batched.chunks)
    assert not table.is_located
    assert table.chunks_in(0, len(batched.plain)) == range(9)
    # Enough to plan with: neighbours touch, and sizes are about right.
    assert list(table.groups(table.positions(), 1 << 30)) == [range(9)]
    assert table.stored_range(range(9)) == (0, len(batched.plain))
    located = table.with_places(None)
    assert not located.is_located


def test_batches_with_their_table(batched, places):
    table = BlobMap(batched.entry, batched.chunks).with_places(places)
    assert table.is_located
    stored = [table.stored_range([index]) for index in range(9)]
    one, alone, two, four, three = batched.places
    assert stored == [one] * 3 + [alone, two, four] + [three] * 3
    assert list(table.groups(table.positions(), 1 << 30)) == [range(9)]
    assert table.stored_range(range(9)) == (0, batched.data_size)
    # A batch is read as a whole, however small a run has to be.
    assert list(table.groups(table.positions(), 1)) == [
        range(3), range(3, 4), range(4, 5), range(5, 6), range(6, 9),
    ]  # fmt: skip
    assert list(table.runs([0, 2, 3, 6, 8], 1)) == [[0, 2], [3], [6, 8]]
    assert list(table.groups([0, 2, 3, 6, 8], 1 << 30)) == [range(4), range(6, 9)]


def test_ranges_grow_to_whole_contexts(batched, places):
    table = BlobMap(batched.entry, batched.chunks, places)
    assert table.whole_contexts(range(1, 2)) == range(3)
    assert table.whole_contexts(range(2, 4)) == range(4)
    assert table.whole_contexts(range(3, 4)) == range(3, 4)
    assert table.whole_contexts(range(4, 5)) == range(4, 5)
    assert table.whole_contexts(range(7, 8)) == range(6, 9)
    assert table.whole_contexts(range(3, 3)) == range(3, 3)
    plain = BlobMap(batched.entry, batched.chunks)
    assert plain.whole_contexts(range(1, 2)) == range(1, 2)


def test_a_further_image_on_batches(batched, places):
    some = BlobMap(batched.entry, batched.chunks[:2], places)
    more = some.with_chunks(batched.entry, batched.chunks[1:])
    assert more.is_located
    assert more.positions() == list(range(9))
    assert more.with_chunks(batched.entry, batched.chunks) is more
    assert more.with_places(None).with_chunks(batched.entry, batched.chunks).known_count == 9


@pytest.mark.parametrize(
    ("kind", "index", "change"),
    [
        (CorruptStructure, 0, {"uncompressed_size": 99}),
        (CorruptStructure, 3, {"compressed_offset": 1}),
        (CorruptStructure, 3, {"compressed_size": 5}),
        (CorruptStructure, 3, {"compressed_size": 0, "compressed_offset": 0}),
        (CorruptStructure, 5, {"flags": 0, "compressed_size": 4096}),
        (OutOfBounds, 6, {}),
    ],
)
def test_tables_that_say_other_things_than_the_bootstrap(batched, places, kind, index, change):
    entry = batched.entry
    if not change:
        entry = entry._replace(compressed_size=batched.data_size - 1)
    chunks = list(batched.chunks)
    chunks[index] = chunks[index]._replace(**change)
    table = BlobMap(entry, chunks)
    with pytest.raises(FormatError) as caught:
        table.with_places(places)
    assert type(caught.value) is kind
    assert caught.value.where["chunk"] == index


def test_tables_of_another_blob(batched):
    other = Places(parse_cached(BatchBlob(LAYOUT[:-1]).cached))
    with pytest.raises(CorruptStructure, match="number of chunks"):
        BlobMap(batched.entry, batched.chunks).with_places(other)


def test_images_with_different_keys_for_one_blob(blob):
    entries = [
        blob.entry._replace(features=0x40000105, **BlobCipher(key, bytes(16)).fields())
        for key in (bytes(range(32)), bytes(range(1, 33)))
    ]
    rows = [row._replace(flags=row.flags | ChunkFlags.ENCRYPTED) for row in blob.chunks]
    first = BlobMap(entries[0], rows[:2])
    assert first.is_encrypted
    assert first.with_chunks(entries[0], rows).known_count == len(rows)
    with pytest.raises(CorruptStructure, match="the blob's key") as caught:
        first.with_chunks(entries[1], rows)
    assert bytes(range(8)).hex() not in str(caught.value)


def test_small_chunks_side_by_side_are_batches():
    table = BlobMap((blob := Blob([100, 5000, 4096, 1, CHUNK_SIZE, 7, 8, 9])).entry, blob.chunks)

    def batches(run, size=32 << 10, count=64):
        return [(batch.start, batch.stop) for batch in table.batches(run, size, count)]

    # The first is alone, as is a large one.
    assert batches(range(8)) == [(0, 1), (1, 4), (4, 5), (5, 8)]
    assert batches(range(8), count=2) == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 7), (7, 8)]
    assert batches(range(8), size=12 << 10) == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 8)]
    assert batches(range(1)) == [(0, 1)]
    holes = BlobMap(blob.entry, [chunk for chunk in blob.chunks if chunk.chunk_index != 2])
    assert [len(batch) for batch in holes.batches([0, 1, 3, 5], 32 << 10, 64)] == [1, 1, 1, 1]


def test_chunks_of_contexts_are_no_batches(batched, places):
    table = BlobMap(batched.entry, batched.chunks).with_places(places)
    run = range(table.chunk_count)
    assert [len(batch) for batch in table.batches(run, 1 << 20, 64)] == [1] * len(run)
