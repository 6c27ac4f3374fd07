"""The hash tree on a disk: vectors of spec vm-runtimes 2.4, holes, workers, failures."""

import errno
import hashlib
import itertools
import os
import random
import sys

import pytest

from builder import hashtree
from builder.errors import BuildError
from builder.hashtree import add_hash_tree
from builder.output import OutputDisk
from erofs.errors import CorruptStructure
from erofs.verity import NYDUS_FILLER, TreeFormat, tree_levels

VECTORS = [
    # data block, blocks, salt, superblock, root, length and SHA-256 of the hash area
    (512, 129, b"", False, "5b1db2e3ec7acb1865a3782f0909e1e8d4d42106952041e303b5a88a5d739b99",
     12288, "3d9c368ff2b1c2c63da6e7082b9974d91aff80fe764c5a8e0d3f15b43799a56d"),
    (4096, 129, b"", False, "f0dbc433d6188c4e8e30ee2de31ee90ab1edf2fd7438d97feab12f75375886ad",
     12288, "410ef0a7cde20283700a89e12300d9bbc0d96043c2a7c830a62579487f6cce34"),
    (4096, 1, b"", False, "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7",
     0, hashlib.sha256().hexdigest()),
    (4096, 129, bytes(32), True,
     "1f80296d52e9502d1ec420acbe5c1c4f170ae9d262e899e57991ed8346ebc1a8",
     16384, "26dd1dffacf28c93e51153d4fb99814cc9be9ff86a5f3bea72990a11787745f9"),
]  # fmt: skip


def numbered(blocks, size):
    return b"".join(bytes([number % 256]) * size for number in range(blocks))


def add(path, data, form, *, length=None, **options):
    """Put data and its tree on a disk; return the tree and the bytes of the file."""
    with OutputDisk(path, 0o644) as disk:
        if isinstance(data, bytes):
            data = {0: data}
        for offset, piece in data.items():
            disk.write_at(offset, piece)
        length = length or max(offset + len(piece) for offset, piece in data.items())
        disk.resize(length)
        tree = add_hash_tree(disk, length, form, **options)
        disk.commit()
    return tree, path.read_bytes()


def plain_tree(data, form):
    """Return root and hash area in the simplest way that there is."""
    size = form.hash_block_size
    levels = []
    blocks = [data[i : i + form.data_block_size] for i in range(0, len(data), form.data_block_size)]
    digests = [hashlib.sha256(form.salt + block).digest() for block in blocks]
    while len(digests) > 1:
        level = b"".join(digests)
        level += form.filler * (-len(level) % size // 32)
        levels.append(level)
        blocks = [level[i : i + size] for i in range(0, len(level), size)]
        digests = [hashlib.sha256(form.salt + block).digest() for block in blocks]
    return digests[0], b"".join(reversed(levels))


@pytest.mark.parametrize(
    ("block_size", "blocks", "salt", "superblock", "root", "length", "digest"), VECTORS
)
def test_vectors(tmp_path, block_size, blocks, salt, superblock, root, length, digest):
    form = TreeFormat(block_size, salt=salt, superblock=superblock)
    tree, disk = add(tmp_path / "disk", numbered(blocks, block_size), form)
    assert tree.root.hex() == root
    assert tree.data_blocks == blocks
    area = disk[tree.hash_offset :]
    assert len(area) == length
    assert hashlib.sha256(area).hexdigest() == digest
    assert tree.end == len(disk)


@pytest.fixture
def little_work(monkeypatch):
    """Let a little data be enough for workers, and for holes."""
    monkeypatch.setattr(hashtree, "SPAN_BYTES", 1 << 16)
    monkeypatch.setattr(hashtree, "WORKER_BYTES", 1 << 16)
    monkeypatch.setattr(hashtree, "HOLE_BYTES", 1 << 13)


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("form", [{}, {"salt": b"s" * 5}, {"filler": NYDUS_FILLER}], ids=str)
def test_same_bytes_with_any_number_of_workers(tmp_path, little_work, block_size, form):
    form = TreeFormat(block_size, **form)
    data = random.Random(1).randbytes(700 * 512 * 8)
    root, area = plain_tree(data, form)
    for workers in (1, 2, 5, None):
        done = []
        tree, disk = add(tmp_path / "disk", data, form, workers=workers, progress=done.append)
        assert tree.root == root
        assert disk[tree.hash_offset :] == area
        digested = sum(level.digests for level in tree_levels(tree.data_blocks)[1:]) * 4096
        assert sum(done) == len(data) + digested


@pytest.mark.parametrize("block_size", [512, 4096, 65536])
@pytest.mark.parametrize("workers", [1, 3])
def test_holes_are_zeros(tmp_path, little_work, block_size, workers):
    # A hole that ends nowhere, one in whole blocks, one at the start, one at the end.
    rng = random.Random(2)
    pieces = {
        8 << 20: rng.randbytes(5000),
        (9 << 20) + 4096: rng.randbytes(1 << 17),
        (20 << 20) - 7: rng.randbytes(100),
    }
    form = TreeFormat(block_size, salt=b"x")
    length = 24 << 20
    tree, disk = add(tmp_path / "disk", pieces, form, length=length, workers=workers)
    assert (tmp_path / "disk").stat().st_blocks * 512 < length
    root, area = plain_tree(disk[:length], form)
    assert tree.root == root
    assert disk[tree.hash_offset :] == area


@pytest.mark.parametrize("filler", [bytes(32), NYDUS_FILLER])
def test_disk_of_nothing_but_zeros(tmp_path, filler):
    form = TreeFormat(4096, filler=filler)
    length = 129 * 128 * 4096 + 4096
    tree, disk = add(tmp_path / "disk", {}, form, length=length)
    root, area = plain_tree(disk[:length], form)
    assert (tree.root, disk[tree.hash_offset :]) == (root, area)


def test_hole_list_stays_short(tmp_path, monkeypatch):
    with OutputDisk(tmp_path / "disk", 0o644) as disk:
        for number in range(100):
            disk.write_at(number * 65536, b"data")
        disk.resize(8 << 20)
        runs = list(hashtree._holes(disk.descriptor, 8 << 20, 512))
    assert runs == [((99 * 65536 + 4096) // 512, (8 << 20) // 512)]


def test_what_lies_behind_the_data_is_replaced(tmp_path):
    data = numbered(3, 512)
    with OutputDisk(tmp_path / "disk", 0o644) as disk:
        disk.write_at(0, data + b"old" * 10000)
        tree = add_hash_tree(disk, len(data), TreeFormat(512))
        disk.commit()
    content = (tmp_path / "disk").read_bytes()
    assert not any(content[len(data) : tree.hash_offset])
    assert (tree.root, content[tree.hash_offset :]) == plain_tree(data, TreeFormat(512))


@pytest.mark.parametrize("length", [0, 1, 4095, 4096 + 512])
def test_data_has_to_be_whole_blocks(tmp_path, length):
    with OutputDisk(tmp_path / "disk", 0o644) as disk:
        disk.resize(length)
        with pytest.raises(CorruptStructure):
            add_hash_tree(disk, length, TreeFormat(4096))


def test_dead_worker_is_one_error(tmp_path, little_work, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.stdin.buffer.read(16)")
    monkeypatch.setattr(hashtree.blockhash, "__file__", str(program))
    with pytest.raises(BuildError, match="digests blocks"):
        add(tmp_path / "disk", b"x" * (1 << 20), TreeFormat(512), workers=2)
    assert os.listdir(tmp_path) == ["program.py"]


def test_worker_that_cannot_be_started_is_one_error(tmp_path, little_work, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(BuildError, match="no process"):
        add(tmp_path / "disk", b"x" * (1 << 20), TreeFormat(512), workers=2)
    assert not os.listdir(tmp_path)


def test_full_disk_is_one_error(tmp_path, little_work, monkeypatch):
    pwrite, writes = os.pwrite, itertools.count()

    def fill_up(*arguments):
        if next(writes) > 5:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", fill_up)
    with pytest.raises(BuildError, match="No space left"):
        add(tmp_path / "disk", b"x" * (1 << 20), TreeFormat(512), workers=1)
    assert not os.listdir(tmp_path)


def test_full_disk_is_told_by_workers(tmp_path, little_work, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; sys.stdin.buffer.read(32); sys.stdout.buffer.write(b'\\x1c');"
        "sys.stdout.flush(); sys.stdin.read()"
    )
    monkeypatch.setattr(hashtree.blockhash, "__file__", str(program))
    with pytest.raises(BuildError, match="No space left"):
        add(tmp_path / "disk", b"x" * (1 << 20), TreeFormat(512), workers=2)
    assert os.listdir(tmp_path) == ["program.py"]


def test_workers_tell_what_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        cannot_write = hashtree.blockhash.pack_request(0, 4096, 512, 4096)
        assert hashtree.blockhash._answer(descriptor, b"", cannot_write) == errno.EBADF
        too_short = hashtree.blockhash.pack_request(4096, 1, 512, 0)
        assert hashtree.blockhash._answer(descriptor, b"", too_short) == errno.EIO
    finally:
        os.close(descriptor)


def test_without_an_interpreter_to_start_the_work_is_done_here(tmp_path, little_work, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    data = random.Random(3).randbytes(1 << 20)
    tree, _ = add(tmp_path / "disk", data, TreeFormat(512), workers=4)
    assert tree.root == plain_tree(data, TreeFormat(512))[0]
