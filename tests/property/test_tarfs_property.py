"""Tarfs and hash trees: what is written is what is read, and any bytes parse or are refused."""

import hashlib
import stat
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st
from readers import read_bootstrap, read_image
from test_erofs_property import Growth, mutations, same_trees
from tiny import TinyTarfs

from builder.bootstrap import load_tree
from builder.hashtree import add_hash_tree
from builder.output import OutputDisk
from erofs import Node, check_image, open_bootstrap
from erofs.errors import FormatError
from erofs.verity import NYDUS_FILLER, TreeFormat, VeritySuperblock
from erofs.view import View


@st.composite
def tar_images(draw):
    image = TinyTarfs()
    growth = Growth(draw, image)
    growth.attributes(image.root)
    growth.fill(image.root, 3)
    return image


@given(tar_images())
def test_blocks_of_512_bytes_are_read_as_they_were_written(image):
    data = image.finish()
    bootstrap = open_bootstrap(data)
    assert bootstrap.block_size == 512
    same_trees(image.root, load_tree(bootstrap), {})
    assert list(check_image(bootstrap)) == []
    read_bootstrap(data)


@given(data=st.data())
def test_mutated_tarfs(data):
    image = TinyTarfs()
    image.root.entries[b"file"] = image.file(bytes(10000))
    image.root.entries[b"link"] = Node(stat.S_IFLNK | 0o777, target=b"t" * 1500)
    image.root.entries[b"dir"] = Node.directory()
    mutated = data.draw(mutations(image.finish()))
    read_bootstrap(mutated)
    read_image(mutated)


@given(st.binary(max_size=600), st.data())
def test_any_bytes_are_a_superblock_or_refused(noise, data):
    good = VeritySuperblock(512, 4096, 5, b"salt").pack()
    for content in (noise, data.draw(mutations(good))):
        with suppress(FormatError):
            VeritySuperblock.parse(View(content))


@given(
    st.sampled_from([512, 1024, 4096]),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=256),
    st.binary(min_size=16, max_size=16),
)
def test_superblocks_are_read_as_they_were_written(block_size, blocks, salt, uuid):
    superblock = VeritySuperblock(block_size, 4096, blocks, salt, uuid)
    assert VeritySuperblock.parse(View(superblock.pack())) == superblock


def plain_root(disk, form):
    """Return the root hash in the simplest way that there is."""
    size, level = form.data_block_size, disk
    while True:
        blocks = [level[at : at + size] for at in range(0, len(level), size)]
        digests = [hashlib.sha256(form.salt + block).digest() for block in blocks]
        if len(digests) == 1:
            return digests[0]
        size, level = form.hash_block_size, b"".join(digests)
        level += form.filler * (-len(level) % size // 32)


@settings(max_examples=30)
@given(
    blocks=st.integers(1, 300),
    data=st.dictionaries(st.integers(0, 299), st.binary(min_size=1, max_size=2000), max_size=5),
    form=st.builds(
        TreeFormat,
        st.sampled_from([512, 4096]),
        st.sampled_from([512, 1024, 4096]),
        st.binary(max_size=20),
        st.sampled_from([bytes(32), NYDUS_FILLER]),
        st.booleans(),
    ),
    workers=st.sampled_from([1, 2]),
)
def test_root_is_that_of_the_plain_way(tmp_path_factory, blocks, data, form, workers):
    path = tmp_path_factory.mktemp("disk") / "disk"
    length = blocks * form.data_block_size
    with OutputDisk(path, 0o644) as disk:
        for block, content in data.items():
            disk.write_at(block * form.data_block_size, content)
        disk.resize(length)
        tree = add_hash_tree(disk, length, form, workers=workers)
        disk.commit()
    content = path.read_bytes()
    assert tree.root == plain_root(content[:length], form)
    assert len(content) == tree.end
