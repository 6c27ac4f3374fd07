"""Hash trees beside veritysetup's own: the same bytes, the same verdict (spec vm-runtimes 7.4)."""

import hashlib
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from capabilities import need_tool

from builder.hashtree import add_hash_tree
from builder.output import OutputDisk
from erofs.verity import NYDUS_FILLER, TreeFormat

ROOT = Path(__file__).parents[2]
SIZES = [1, 2, 127, 128, 129, 16384, 16385]


@pytest.fixture
def veritysetup():
    program = need_tool("veritysetup")

    def run(*words):
        return subprocess.run([program, *map(str, words)], capture_output=True, text=True)

    return run


def make(path, blocks, form):
    """Put numbered blocks and their tree on a disk; return the tree."""
    data = b"".join(bytes([number % 256]) * form.data_block_size for number in range(blocks))
    with OutputDisk(path, 0o644) as disk:
        disk.write_at(0, data)
        tree = add_hash_tree(disk, len(data), form)
        disk.commit()
    return tree


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("blocks", SIZES)
def test_v1_tree_is_the_one_that_veritysetup_makes(tmp_path, veritysetup, block_size, blocks):
    tree = make(tmp_path / "disk", blocks, TreeFormat(block_size))
    content = (tmp_path / "disk").read_bytes()
    data, area = tmp_path / "data", tmp_path / "area"
    data.write_bytes(content[: blocks * block_size])
    done = veritysetup(
        "format", "--no-superblock", "-s", "-", f"--data-block-size={block_size}",
        "--hash-block-size=4096", data, area,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"Root hash:      \t{tree.root.hex()}" in done.stdout
    assert area.read_bytes() == content[tree.hash_offset :]


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("superblock", [False, True])
@pytest.mark.parametrize("salt", [b"", bytes(32)])
def test_v2_printed_words_verify_the_disk(tmp_path, veritysetup, block_size, superblock, salt):
    path = tmp_path / "disk"
    form = TreeFormat(block_size, salt=salt, superblock=superblock, uuid=b"u" * 16)
    tree = make(path, 300, form)
    words = shlex.split(tree.options())
    assert veritysetup("verify", path, path, *words).returncode == 0
    places = (0, 300 * block_size - 1, tree.tree_offset, tree.end - 4096, tree.end - 1)
    for place in places:
        flip(path, place)
        done = veritysetup("verify", path, path, *words)
        assert done.returncode != 0, f"a flipped byte at {place} is not seen"
        flip(path, place)
    assert veritysetup("verify", path, path, *words[:-1], "0" * 64).returncode != 0


def test_v3_superblock_says_what_veritysetup_reads(tmp_path, veritysetup):
    path = tmp_path / "disk"
    form = TreeFormat(512, salt=bytes(32), superblock=True, uuid=bytes(range(16)))
    tree = make(path, 300, form)
    done = veritysetup("dump", "--hash-offset", tree.hash_offset, path)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in found.items()}
    assert found["Data blocks"] == "300"
    assert found["Data block size"].split()[0] == "512"
    assert found["Hash block size"].split()[0] == "4096"
    assert found["Hash algorithm"] == "sha256"
    assert found["Salt"] == "00" * 32
    assert found["UUID"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    # What the superblock says need not be said again.
    verify = ["verify", path, path, tree.root.hex(), "--hash-offset", tree.hash_offset]
    assert veritysetup(*verify).returncode == 0


def test_the_real_tools_padding_is_refused(tmp_path, veritysetup):
    """So it is right that ours is another one."""
    path = tmp_path / "disk"
    tree = make(path, 300, TreeFormat(512, filler=NYDUS_FILLER))
    done = veritysetup("verify", path, path, *shlex.split(tree.options()))
    assert done.returncode != 0
    assert "Spare area is not zeroed" in done.stderr


_SPARSE = """
import resource, sys
from pathlib import Path
from builder.hashtree import add_hash_tree
from builder.output import OutputDisk
from erofs.verity import TreeFormat
with OutputDisk(Path(sys.argv[1]), 0o644) as disk:
    size = int(sys.argv[2])
    disk.resize(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tree = add_hash_tree(disk, size, TreeFormat(4096))
    print(tree.root.hex(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_large_disk_of_zeros_takes_neither_time_nor_memory(tmp_path):
    """8 GiB fill three levels, so its root is three digests away from that of a block."""
    digest = hashlib.sha256(bytes(4096)).digest()
    for _ in range(3):
        digest = hashlib.sha256(digest * 128).digest()
    words = [sys.executable, "-c", _SPARSE, tmp_path / "disk", str(4096 * 128**3)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    root, kibibytes = done.stdout.split()
    assert root == digest.hex()
    assert int(kibibytes) < 16 << 10


@pytest.mark.long
def test_disk_of_100_gib(tmp_path):
    """Its tree has 811 MiB, which reaches the disk but not the memory."""
    words = [sys.executable, "-c", _SPARSE, tmp_path / "disk", str(100 << 30)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout.split()[1]) < 32 << 10


def test_tree_of_a_disk_with_holes(tmp_path, veritysetup):
    path, rng = tmp_path / "disk", random.Random(5)
    length = 300 << 20
    with OutputDisk(path, 0o644) as disk:
        disk.write_at(5 << 20, rng.randbytes(3 << 20))
        disk.write_at(250 << 20, rng.randbytes(70000))
        disk.resize(length)
        tree = add_hash_tree(disk, length, TreeFormat(4096))
        disk.commit()
    assert path.stat().st_blocks * 512 < 20 << 20
    assert veritysetup("verify", path, path, *shlex.split(tree.options())).returncode == 0
