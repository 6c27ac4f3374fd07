"""Places of translated RAFS v5 chunks are what the cache takes for a blob, shared or not."""

import pytest
import tinyv5

from erofs import CorruptStructure, open_rafs, translate
from fscache.cache.blobmap import BlobMap


def placed(image):
    (blob,) = translate(open_rafs(image.finish())).blobs
    return blob


def images(**options):
    """Return an image, and one of the same blob that knows some of its chunks."""
    whole, part = tinyv5.TinyV5(**options), tinyv5.TinyV5(**options)
    for number in range(20):
        node = whole.file(bytes([number + 1]) * (number * 397 + 1))
        whole.root.entries[b"%02d" % number] = node
        if number % 3 == 1:
            part.root.entries[b"%02d" % number] = node
    part.blob, part.chunks = whole.blob, whole.chunks
    part.uncompressed_size = whole.uncompressed_size
    return whole, part


@pytest.mark.parametrize("aligned", [False, True])
def test_images_share_the_data_file_of_a_blob(aligned):
    whole, part = map(placed, images(aligned=aligned))
    assert whole.is_stable
    assert part.is_stable
    left, right = (BlobMap(blob.entry, blob.chunks) for blob in (whole, part))
    assert len(left) > len(right)
    assert left.with_chunks(part.entry, part.chunks) is left
    assert len(right.with_chunks(whole.entry, whole.chunks)) == len(left)


def test_what_is_not_stable_is_not_shared():
    whole, part = map(placed, images(extended=False))
    assert not whole.is_stable
    with pytest.raises(CorruptStructure, match="images differ"):
        BlobMap(whole.entry, whole.chunks).with_chunks(part.entry, part.chunks)


@pytest.mark.parametrize("options", [{}, {"aligned": True}, {"extended": False}, {"early": True}])
def test_every_chunk_is_found_by_its_place(options):
    blob = placed(tinyv5.everything(**options))
    chunk_map = BlobMap(blob.entry, blob.chunks)
    for chunk in blob.chunks:
        found = chunk_map.chunks_in(chunk.uncompressed_offset, chunk.uncompressed_size)
        assert list(found) == [chunk.chunk_index]
        assert chunk_map.digest(chunk.chunk_index) == chunk.digest
    # Chunks that touch in the blob are fetched together, whatever gap their places have.
    known = chunk_map.positions()
    assert list(chunk_map.groups(known, 1 << 20)) == [range(len(known))]
