"""dm-verity: layout, superblock and words; spec vm-runtimes 2.4 and 5.5 have the vectors."""

import hashlib

import pytest

from erofs.blockhash import block_digests
from erofs.errors import BadMagic, CorruptStructure, OutOfBounds, UnsupportedFeature
from erofs.verity import (
    NYDUS_FILLER,
    HashTree,
    TreeFormat,
    TreeLevel,
    VeritySuperblock,
    tree_levels,
)
from erofs.view import View

ROOT = bytes(range(32))


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("salt", [b"", b"salt", bytes(256)])
def test_each_block_is_digested_behind_the_salt(block_size, salt):
    data = b"".join(bytes([number]) * block_size for number in range(5))
    expected = [
        hashlib.sha256(salt + data[start : start + block_size]).digest()
        for start in range(0, len(data), block_size)
    ]
    assert block_digests(data, block_size, salt) == b"".join(expected)
    assert block_digests(memoryview(bytearray(data)), block_size, salt) == b"".join(expected)
    assert block_digests(b"", block_size, salt) == b""


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (1, []),
        (2, [(0, 1, 2)]),
        (128, [(0, 1, 128)]),
        (129, [(4096, 2, 129), (0, 1, 2)]),
        (16384, [(4096, 128, 16384), (0, 1, 128)]),
        (16385, [(3 * 4096, 129, 16385), (4096, 2, 129), (0, 1, 2)]),
    ],
)
def test_levels_lie_top_first(blocks, expected):
    assert tree_levels(blocks) == [TreeLevel(*level) for level in expected]


def test_levels_of_other_hash_blocks():
    assert tree_levels(17, 512) == [TreeLevel(512, 2, 17), TreeLevel(0, 1, 2)]


def test_words_are_those_of_the_real_exporter():
    tree = HashTree(TreeFormat(512), 4576, 2342912, ROOT)
    assert tree.options() == (
        '--no-superblock --format=1 -s "" --hash=sha256 --data-block-size=512'
        " --hash-block-size=4096 --data-blocks 4576 --hash-offset 2342912 " + ROOT.hex()
    )
    # The project's own manual has this length (spec rafs-v6 6.2).
    assert tree.end == 2494464


def test_words_with_salt_and_superblock():
    form = TreeFormat(4096, salt=b"\xab\xcd", superblock=True)
    tree = HashTree(form, 129, 1 << 20, ROOT)
    assert tree.options().startswith('--format=1 -s "abcd" --hash')
    assert (tree.tree_offset, tree.end) == ((1 << 20) + 4096, (1 << 20) + 4 * 4096)
    assert tree.as_json() == {
        "version": 1,
        "hash_algorithm": "sha256",
        "data_block_size": 4096,
        "hash_block_size": 4096,
        "data_blocks": 129,
        "hash_offset": 1 << 20,
        "salt": "abcd",
        "superblock": True,
        "zero_padding": True,
        "root_hash": ROOT.hex(),
    }
    assert (
        HashTree(TreeFormat(512, filler=NYDUS_FILLER), 2, 4096, ROOT).as_json()["zero_padding"]
        is False
    )


def test_superblock_has_the_fields_where_veritysetup_looks():
    packed = VeritySuperblock(512, 4096, 129, b"salt", b"u" * 16).pack()
    assert len(packed) == 512
    assert packed[:16] == b"verity\0\0" + b"\1\0\0\0" * 2
    assert packed[16:32] == b"u" * 16
    assert packed[32:64].rstrip(b"\0") == b"sha256"
    assert int.from_bytes(packed[64:68], "little") == 512
    assert int.from_bytes(packed[68:72], "little") == 4096
    assert int.from_bytes(packed[72:80], "little") == 129
    assert packed[80:88] == b"\4\0" + bytes(6)
    assert packed[88:344].rstrip(b"\0") == b"salt"
    assert VeritySuperblock.parse(View(b"x" + packed), 1) == VeritySuperblock(
        512, 4096, 129, b"salt", b"u" * 16
    )


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (0, b"VERITY\0\0", BadMagic),
        (8, b"\2\0\0\0", UnsupportedFeature),
        (12, b"\0\0\0\0", UnsupportedFeature),
        (32, b"sha512", UnsupportedFeature),
        (64, b"\0\0\0\0", CorruptStructure),
        (64, b"\1\2\0\0", CorruptStructure),
        (68, b"\0\0\x10\0", CorruptStructure),
        (80, b"\1\1", CorruptStructure),
    ],
)
def test_hostile_superblocks(place, value, error):
    packed = bytearray(VeritySuperblock(512, 4096, 1).pack())
    packed[place : place + len(value)] = value
    with pytest.raises(error):
        VeritySuperblock.parse(View(packed))


def test_superblock_that_ends_early():
    with pytest.raises(OutOfBounds):
        VeritySuperblock.parse(View(bytes(511)))


@pytest.mark.parametrize(
    "fields",
    [
        {"data_block_size": 1000},
        {"data_block_size": 256},
        {"data_block_size": 512, "hash_block_size": 1 << 20},
        {"data_block_size": 512, "salt": bytes(257)},
        {"data_block_size": 512, "filler": b""},
        {"data_block_size": 512, "uuid": b"short"},
    ],
)
def test_impossible_formats(fields):
    with pytest.raises(CorruptStructure):
        TreeFormat(**fields)
