import tracemalloc

import pytest
import tinyv5
from fixtures_path import FIXTURES
from hypothesis import given
from hypothesis import strategies as st
from readers_v5 import read_v5
from test_erofs_property import Growth, mutations, same_trees

from erofs import check_image, load_tree, open_bootstrap, open_rafs, translate
from erofs.rafs import Compressor, Digester
from erofs.tree import iter_names

_PUBLISHED = FIXTURES / "nydus" / "v5"


@st.composite
def _images(draw):
    image = tinyv5.TinyV5(
        compressor=draw(st.sampled_from([Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD])),
        digester=draw(st.sampled_from(Digester)),
        aligned=draw(st.booleans()),
        extended=draw(st.booleans()),
    )
    growth = Growth(draw, image)
    growth.attributes(image.root)
    growth.fill(image.root, 3)
    return image


@given(_images())
def test_what_is_written_is_what_is_read_and_translated(image):
    data = image.finish()
    v5 = open_rafs(data)
    assert list(check_image(v5)) == []
    tree = load_tree(v5)
    # A chunk that files share has as many offsets in files.
    for node in (*_files(image.root), *_files(tree)):
        for chunk in node.chunks:
            chunk.file_offset = 0
    same_trees(image.root, tree, {})
    translation = translate(v5)
    for blob in translation.blobs:
        assert blob.is_stable == image.extended
    places = {
        (chunk.blob_index, chunk.compressed_offset): chunk
        for blob in translation.blobs
        for chunk in blob.chunks
    }
    for node in _files(tree):
        for chunk in node.chunks:
            new = places[chunk.blob_index, chunk.compressed_offset]
            assert new.digest == chunk.digest
            chunk.uncompressed_offset = new.uncompressed_offset
            chunk.chunk_index = new.chunk_index
    translated = load_tree(open_bootstrap(translation.bootstrap))
    for node in _files(translated):
        for chunk in node.chunks:
            chunk.file_offset = 0
    same_trees(tree, translated, {})
    read_v5(data)


def _files(tree):
    return [node for _, _, node in iter_names(tree) if node.chunks]


@given(st.binary(max_size=3000))
def test_arbitrary_bytes(data):
    read_v5(data)
    start = tinyv5.TinyV5().finish()[:80]
    read_v5(start + bytes(8112) + data[: len(data) - len(data) % 8])


_SEEDS = {
    "plain": tinyv5.everything().finish(),
    "early": tinyv5.everything(early=True).finish(),
    "unknown": tinyv5.everything(extended=False).finish(),
}
if _PUBLISHED.is_dir():
    _SEEDS["published"] = (_PUBLISHED / "sha256-nocompress-repeatable").read_bytes()


@pytest.mark.parametrize("name", _SEEDS)
@given(data=st.data())
def test_mutated_bootstraps(name, data):
    mutated = data.draw(mutations(_SEEDS[name]))
    tracemalloc.start()
    try:
        read_v5(mutated)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
