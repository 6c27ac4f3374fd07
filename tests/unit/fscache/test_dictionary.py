"""Generated chunk dictionaries: their images count chunks in their own way."""

import pytest
from fakes.blob_image import CHUNK_SIZE, Blob
from fakes.memory_reader import MemoryReader

from erofs.blobmeta import CompressionInfo, CompressionTableHeader
from erofs.errors import CorruptStructure, FormatError
from erofs.rafs import BlobFeatures
from fscache.backend import Unavailable
from fscache.backend.retry import RetryPolicy
from fscache.cache.cachedblob import CachedBlob
from fscache.cache.dictionary import resolve
from fscache.cache.plan import BlobPlan
from fscache.metrics import CacheMetrics

SIZES = [CHUNK_SIZE, 100, 5000, CHUNK_SIZE]
RETRY = RetryPolicy(attempts=2, first_delay=0.001)


@pytest.fixture
def blob():
    """A plain blob with its table."""
    blob = Blob(SIZES)
    table = b"".join(
        CompressionInfo(
            chunk.uncompressed_offset,
            chunk.uncompressed_size,
            chunk.compressed_offset,
            chunk.compressed_size,
        ).pack()
        for chunk in blob.chunks
    )
    features = blob.entry.features
    header = CompressionTableHeader(
        features, 0, len(SIZES), len(blob.stored), len(table), len(table)
    )
    blob.entry = blob.entry._replace(
        ci_offset=len(blob.stored),
        ci_compressed_size=len(table),
        ci_uncompressed_size=len(table),
        compressed_size=len(blob.stored) + len(table) + 4096,
    )
    blob.stored += table + header.pack()
    return blob


def generated(blob, *, count=40, indexes=(39, 3, 8)):
    """Return what an image built with a generated dictionary says (spec rafs-v6 4.12)."""
    chunks = [blob.chunks[1], blob.chunks[2], blob.chunks[3]]
    entry = blob.entry._replace(
        blob_index=1,
        features=blob.entry.features | BlobFeatures.IS_CHUNKDICT_GENERATED,
        chunk_count=count,
        compressed_size=0,
        uncompressed_size=123457,
        ci_compressor=3,
    )
    return BlobPlan(
        entry,
        [
            chunk._replace(blob_index=1, chunk_index=index)
            for chunk, index in zip(chunks, indexes, strict=True)
        ],
    )


def test_the_blob_knows_better(blob, tmp_path):
    reader = MemoryReader(blob)
    plan = resolve(generated(blob), tmp_path, reader, RETRY)
    assert [info.chunk_index for info in plan.chunks] == [1, 2, 3]
    entry = plan.entry
    assert (entry.chunk_count, entry.uncompressed_size) == (4, len(blob.plain))
    assert not entry.features & BlobFeatures.IS_CHUNKDICT_GENERATED
    assert reader.reads == [(blob.entry.ci_offset, 64 + 4096)]
    # The second time, and for other images, it is in the cache.
    resolve(generated(blob, count=1000), tmp_path, reader, RETRY)
    assert len(reader.reads) == 1


def test_one_cache_with_other_images_on_the_blob(blob, tmp_path):
    reader = MemoryReader(blob)
    metrics = CacheMetrics(tmp_path)
    cached = CachedBlob.open(tmp_path, blob.entry, blob.chunks[:2], reader, metrics)
    plan = resolve(generated(blob), tmp_path, reader, RETRY)
    assert cached.learn(plan.entry, plan.chunks)
    assert cached.map.positions() == [0, 1, 2, 3]
    cached.close()


def test_others_are_left_as_they_are(blob, tmp_path):
    plan = BlobPlan(blob.entry, blob.chunks)
    reader = MemoryReader(blob)
    assert resolve(plan, tmp_path, reader, RETRY) is plan
    assert reader.reads == []


@pytest.mark.parametrize(
    "change",
    [
        {"uncompressed_offset": 4096},
        {"uncompressed_size": 101},
        {"compressed_offset": 1},
        {"compressed_size": 1},
    ],
)
def test_chunks_that_the_blob_does_not_have(blob, tmp_path, change):
    plan = generated(blob)
    plan.chunks[0] = plan.chunks[0]._replace(**change)
    with pytest.raises(CorruptStructure, match="another chunk than its dictionary") as caught:
        resolve(plan, tmp_path, MemoryReader(blob), RETRY)
    assert caught.value.where["chunk"] == 39
    assert not list(tmp_path.iterdir())


def test_without_a_table(blob, tmp_path):
    reader = MemoryReader(blob)
    reader.error = Unavailable("gone", temporary=True)
    with pytest.raises(Unavailable):
        resolve(generated(blob), tmp_path, reader, RETRY)
    assert len(reader.reads) == 2
    reader.error = None
    reader.stored[blob.entry.ci_offset + 64] ^= 1
    with pytest.raises(FormatError):
        resolve(generated(blob), tmp_path, reader, RETRY)
    assert not list(tmp_path.iterdir())
