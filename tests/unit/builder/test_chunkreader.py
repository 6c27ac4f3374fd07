import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from builder import readahead
from builder.chunkreader import ChunkReader, read_chunk, require_plain
from builder.readahead import ReadAhead
from erofs import Chunk, CodecError, CorruptStructure, IntegrityError, OutOfBounds
from erofs.errors import NydusError, UnsupportedFeature
from erofs.rafs import MAX_CHUNK_SIZE, BlobFeatures, ChunkFlags, Compressor
from erofs.view import View
from fscache.backend import Unavailable
from tests.fakes.blob_image import Blob


class Provider:
    def __init__(self, stored, failures=0):
        self.stored = stored
        self.failures = failures
        self.opened = []
        self.reads = 0

    def open(self, blob_id):
        self.opened.append(blob_id)
        return self

    def size(self):
        return len(self.stored)

    def read_at(self, offset, length):
        self.reads += 1
        if self.failures:
            self.failures -= 1
            raise Unavailable("busy", temporary=True)
        return View(self.stored).read_at(offset, length)


def chunk_of(blob, number, **changes):
    return Chunk.from_info(blob.chunks[number]._replace(**changes))


@pytest.mark.parametrize("compressor", list(set(Compressor) - {Compressor.GZIP}))
def test_content_comes_back(compressor):
    blob = Blob([4096, 5000, 1], compressor=compressor)
    reader = ChunkReader([blob.entry], [blob.entry.id], Provider(blob.stored))
    for number, info in enumerate(blob.chunks):
        start = info.uncompressed_offset
        data = reader.read(chunk_of(blob, number))
        assert bytes(data) == blob.plain[start : start + info.uncompressed_size]


def test_threads_that_begin_at_once_open_a_blob_once():
    class Slow(Provider):
        def open(self, blob_id):
            time.sleep(0.05)
            return super().open(blob_id)

    blob = Blob([4096] * 4)
    provider = Slow(blob.stored)
    reader = ChunkReader([blob.entry], [blob.entry.id], provider)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: reader.read(chunk_of(blob, number)), range(4)))
    assert provider.opened == [blob.entry.id]


def test_names_blob_chunk_and_both_digests():
    blob = Blob([4096, 4096])
    chunk = chunk_of(blob, 1, digest=bytes(32))
    reader = ChunkReader([blob.entry], ["stored-name"], Provider(blob.stored))
    with pytest.raises(IntegrityError) as raised:
        reader.read(chunk)
    text = str(raised.value)
    assert "blob stored-name, chunk 1" in text
    assert f"expected {'00' * 32}, got {blob.chunks[1].digest.hex()}" in text


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"uncompressed_size": 0}, CorruptStructure),
        ({"uncompressed_size": 0xFFFFFFFF}, CorruptStructure),
        ({"compressed_size": 0}, CorruptStructure),
        ({"compressed_size": 0xFFFFFFFF}, CorruptStructure),
        ({"flags": 0}, CorruptStructure),
        ({"compressed_offset": 1 << 40}, OutOfBounds),
        ({"flags": ChunkFlags.COMPRESSED | ChunkFlags.ENCRYPTED}, CodecError),
        ({"flags": ChunkFlags.BATCH}, UnsupportedFeature),
        ({"uncompressed_size": 8192}, CodecError),
    ],
)
def test_hostile_chunk_infos(changes, error):
    blob = Blob([4096])
    with pytest.raises(error):
        read_chunk(View(blob.stored), blob.entry, chunk_of(blob, 0, **changes))


def test_flipped_byte_is_never_returned():
    blob = Blob([4096], compressor=Compressor.NONE)
    for place in (0, 2048, 4095):
        stored = bytearray(blob.stored)
        stored[place] ^= 1
        with pytest.raises(IntegrityError):
            read_chunk(View(stored), blob.entry, chunk_of(blob, 0))


@pytest.mark.parametrize("feature", ["EXTERNAL"])
def test_unsupported_blobs_are_named(feature):
    blob = Blob([4096])
    entry = blob.entry._replace(features=blob.entry.features | BlobFeatures[feature])
    with pytest.raises(UnsupportedFeature, match=feature.lower()):
        require_plain(entry)
    with pytest.raises(UnsupportedFeature):
        ChunkReader([entry], [entry.id], Provider(blob.stored))


def test_pieces_of_a_tar_are_taken_as_they_are():
    tar = bytes(512) + b"content" + bytes(505)
    entry = Blob([4096]).entry._replace(features=BlobFeatures.TARFS, compressor=Compressor.NONE)
    piece = Chunk(bytes(32), 0, 0, 7, 7, 512, 512, 0, 0, 0)
    assert read_chunk(View(tar), entry, piece) == b"content"
    piece.compressed_size = piece.uncompressed_size = 600
    with pytest.raises(OutOfBounds):
        read_chunk(View(tar), entry, piece)


def test_repeated_chunk_is_read_once_and_blobs_are_opened_once():
    blob = Blob([4096, 4096])
    provider = Provider(blob.stored)
    reader = ChunkReader([blob.entry], ["id"], provider)
    zeros, other = chunk_of(blob, 0), chunk_of(blob, 1)
    for chunk in (zeros, zeros, zeros, other, zeros):
        reader.read(chunk)
    assert provider.opened == ["id"]
    assert provider.reads == 3


def test_temporary_failures_are_repeated():
    blob = Blob([4096])
    provider = Provider(blob.stored, failures=1)
    ChunkReader([blob.entry], ["id"], provider).read(chunk_of(blob, 0))
    assert provider.reads == 2


def test_reading_ahead_gives_everything_in_order(monkeypatch):
    monkeypatch.setattr(readahead, "SPAN_BYTES", 8192)
    monkeypatch.setattr(readahead, "AHEAD_BYTES", 16384)
    blob = Blob([4096] * 9)
    provider = Provider(blob.stored)
    reader = ChunkReader([blob.entry], ["id"], provider)
    order = [0, 3, 3, 8, 1, 2, 7, 5, 4, 6, 0]
    chunks = [chunk_of(blob, number) for number in range(9)]
    with ReadAhead(reader, [chunks[number] for number in order]) as ahead:
        # No more than is to be in memory.
        assert ahead.read() == read_chunk(View(blob.stored), blob.entry, chunks[0])
        assert provider.reads <= 7
        for number in order[1:]:
            assert ahead.read() == read_chunk(View(blob.stored), blob.entry, chunks[number])


def test_reading_ahead_fails_when_it_is_the_turn_of_what_is_damaged():
    blob = Blob([4096] * 3)
    stored = bytearray(blob.stored)
    damaged = chunk_of(blob, 1)
    stored[damaged.compressed_offset + 10] ^= 1
    reader = ChunkReader([blob.entry], ["id"], Provider(bytes(stored)))
    with ReadAhead(reader, [chunk_of(blob, 0), damaged, chunk_of(blob, 2)]) as ahead:
        ahead.read()
        with pytest.raises((CodecError, IntegrityError)):
            ahead.read()


@pytest.mark.parametrize("compressor", list(set(Compressor) - {Compressor.GZIP}))
def test_neighbours_are_read_by_one_request(compressor):
    blob = Blob([4096, 5000, 1, 700, 4096], compressor=compressor)
    provider = Provider(blob.stored)
    reader = ChunkReader([blob.entry], ["id"], provider)
    chunks = [chunk_of(blob, number) for number in range(5)]
    order = [chunks[number] for number in (0, 1, 1, 2, 4)]
    found = reader.read_all(order)
    assert provider.reads == 2
    assert found == [read_chunk(View(blob.stored), blob.entry, chunk) for chunk in order]


@pytest.mark.parametrize("kind", [BlobFeatures.TARFS, ChunkFlags.ENCRYPTED])
def test_what_is_not_simple_is_read_by_itself(kind):
    blob = Blob([4096, 4096], compressor=Compressor.NONE)
    if isinstance(kind, BlobFeatures):
        entry = blob.entry._replace(features=kind)
        reader = ChunkReader([entry], ["id"], Provider(blob.stored))
        # Without digests.
        chunks = [chunk_of(blob, number, digest=bytes(32)) for number in range(2)]
        assert b"".join(reader.read_all(chunks)) == blob.plain
        return
    reader = ChunkReader([blob.entry], ["id"], Provider(blob.stored))
    with pytest.raises(CodecError, match="not encrypted"):
        reader.read_all([chunk_of(blob, 0), chunk_of(blob, 1, flags=int(kind))])


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": bytes(32)},
        {"uncompressed_size": 4095},
        {"uncompressed_size": 4097},
        {"uncompressed_size": 0xFFFFFFFF},
        {"compressed_size": 0},
        {"flags": 0},
        {"flags": int(ChunkFlags.BATCH)},
        {"compressed_offset": 1 << 40},
    ],
)
def test_hostile_chunks_among_others(changes):
    blob = Blob([4096] * 3)
    chunks = [chunk_of(blob, 0), chunk_of(blob, 1, **changes), chunk_of(blob, 2)]
    reader = ChunkReader([blob.entry], ["id"], Provider(blob.stored))
    with pytest.raises(NydusError):
        reader.read_all(chunks)


def test_hostile_sizes_do_not_add_up():
    blob = Blob([4096] * 2)
    sizes = []

    class Counting(Provider):
        def read_at(self, offset, length):
            sizes.append(length)
            return super().read_at(offset, length)

    reader = ChunkReader([blob.entry], ["id"], Counting(blob.stored))
    claims = [chunk_of(blob, 0, compressed_size=MAX_CHUNK_SIZE) for _ in range(100)]
    with pytest.raises(OutOfBounds):
        reader.read_all(claims)
    assert max(sizes) <= MAX_CHUNK_SIZE
