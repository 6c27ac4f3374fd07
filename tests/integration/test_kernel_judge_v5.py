"""The kernel as the judge of translated RAFS v5 metadata, over complete local data files.

What is expected comes from others: GNU tar, and what the real tool's tests compare with.
"""

import contextlib
import gzip
import hashlib
import json
import os
import stat
import subprocess

import pytest
import tinyv5
from capabilities import need_tool, requires
from fixtures_path import FIXTURES, needs_fixtures
from judges import expected_tar, extracted_by_fsck
from treecompare import Entry, differences, read_tree

from builder import unpack
from builder.backends import blob_directory
from builder.chunkreader import read_chunk
from erofs import Chunk, load_tree, open_rafs, translate
from erofs.rafs import Compressor, Digester
from erofs.tree import iter_names
from fscache.mounts.mount import mount_erofs

pytestmark = [pytest.mark.root, pytest.mark.erofs_mount, requires("root", "erofs_mount")]

MADE = FIXTURES / "made-by-nydus-image"
PUBLISHED = FIXTURES / "nydus" / "v5"
SET_ID = stat.S_ISUID | stat.S_ISGID


class Place:
    """A translated image on disk: bootstrap, complete data files, and its mount."""

    def __init__(self, directory, bootstrap, blobs, *, fill=True):
        with open_rafs(bootstrap) as image:
            self.tree = load_tree(image)
            translation = translate(image)
        self.bootstrap = directory / "translated.boot"
        self.bootstrap.write_bytes(translation.bootstrap)
        self.devices = []
        for number, blob in enumerate(translation.blobs):
            path = directory / f"data{number}"
            with path.open("xb") as file:
                file.truncate(blob.entry.uncompressed_size)
                if fill:
                    reader = blobs.open(blob.entry.id)
                    for chunk in blob.chunks:
                        data = read_chunk(reader, blob.entry, Chunk.from_info(chunk))
                        os.pwrite(file.fileno(), data, chunk.uncompressed_offset)
            self.devices.append(path)
        self.mountpoint = directory / "mnt"
        self.mountpoint.mkdir()

    @contextlib.contextmanager
    def mounted(self):
        mount = mount_erofs(self.bootstrap, self.devices, self.mountpoint)
        try:
            yield self.mountpoint
        finally:
            mount.unmount()

    def read(self, **options):
        with self.mounted() as top:
            return read_tree(top, **options)


def assert_same(expected, got, **options):
    lines = differences(expected, got, **options)
    assert not lines, "\n".join(lines[:20])


def check_by_fsck(place, expected, directory):
    got = extracted_by_fsck(place.bootstrap, place.devices, directory / "by-fsck")
    expected = {
        name: entry._replace(mode=entry.mode & ~SET_ID) if stat.S_ISREG(entry.mode) else entry
        for name, entry in expected.items()
    }
    assert_same(expected, got, ignore=frozenset({"xattrs", "links"}))


@needs_fixtures
@pytest.mark.parametrize(
    ("case", "layer"), [("tar-v5", "l2"), ("tar-v5-none-sha256-aligned", "l3")]
)
def test_layers_made_by_the_real_tool(case, layer, tmp_path):
    need_tool("fsck.erofs")
    folder = MADE / "cases" / case
    tar = tmp_path / "layer.tar"
    tar.write_bytes(gzip.decompress((MADE / "inputs" / f"{layer}.tar.gz").read_bytes()))
    place = Place(tmp_path, folder / "boot", blob_directory(folder))
    expected = expected_tar(tar, tmp_path / "expected")
    # Of the times of the names of one inode, v5's first one counts.
    for name in {b"/own2", b"/own2-link"} & expected.keys():
        expected[name] = expected[name]._replace(mtime_ns=1700000022 * 10**9)
    got = place.read()
    assert_same(expected, got)
    check_by_fsck(place, got, tmp_path)


@needs_fixtures
@pytest.mark.parametrize(
    "name", ["blake3-lz4_block-non_repeatable", "sha256-nocompress-repeatable"]
)
def test_published_images(name, tmp_path):
    need_tool("fsck.erofs")
    blobs = blob_directory(PUBLISHED / "blobs")
    place = Place(tmp_path, PUBLISHED / name, blobs)
    got = place.read()
    text = (PUBLISHED / f"{name}.result").read_text()
    _, end = json.JSONDecoder().raw_decode(text)
    with place.mounted() as top:
        sums = {
            os.fsdecode(path): hashlib.md5((top / os.fsdecode(path[1:])).read_bytes()).hexdigest()
            for path, entry in got.items()
            if stat.S_ISREG(entry.mode)
        }
    assert sums == dict(reversed(line.split("  ", 1)) for line in text[end:].splitlines() if line)
    unpack(PUBLISHED / name, tmp_path / "tar", blobs)
    top = tmp_path / "by-tar"
    top.mkdir()
    command = [need_tool("tar"), "-x", "-p", "--numeric-owner", "--delay-directory-restore"]
    subprocess.run([*command, "-f", tmp_path / "tar", "-C", top], check=True)
    expected = read_tree(top)
    expected[b"/"] = expected[b"/"]._replace(mtime_ns=0)
    assert_same(expected, got)
    check_by_fsck(place, got, tmp_path)


def tree_entries(root):
    """Return what a mount has to show of a tree, without contents."""
    paths, nodes = {}, {}
    for directory, name, node in iter_names(root):
        path = directory + b"/" + name
        nodes[path] = node
        paths.setdefault(id(node), []).append(path)
    return {
        path: Entry(
            mode=node.mode, uid=node.uid, gid=node.gid,
            mtime_ns=node.mtime * 10**9 + node.mtime_nsec, rdev=node.rdev,
            links=() if node.is_dir else tuple(sorted(paths[id(node)])),
            xattrs=tuple(sorted((k.decode(), v) for k, v in node.xattrs.items())),
            size=len(node.target) or node.size, content="",
        )
        for path, node in nodes.items()
    }  # fmt: skip


@needs_fixtures
def test_the_large_early_image_without_its_data(tmp_path):
    path = PUBLISHED / "nydusd_daemon_test_bootstrap"
    place = Place(tmp_path, path, None, fill=False)
    got = place.read(content=False)
    assert len(got) == 16832
    assert_same(tree_entries(place.tree), got)


OPTIONS = {
    "zstd": {"compressor": Compressor.ZSTD, "digester": Digester.BLAKE3},
    "none-64k": {"chunk_size": 0x10000},
    "lz4-aligned": {"compressor": Compressor.LZ4_BLOCK, "aligned": True},
    "unknown-sizes": {"extended": False, "chunk_size": 0x100000},
    "early": {"early": True, "compressor": Compressor.LZ4_BLOCK, "digester": Digester.BLAKE3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_types_and_sizes_around_blocks(options, tmp_path):
    need_tool("fsck.erofs")
    image = tinyv5.everything(**options)
    contents = {}
    for size in (1, 4095, 4096, 4097, 8191, 65536, 65537, 200_000):
        # Pieces of files are equal, so that files refer to chunks of others.
        data = (b"%07d\n" % size + bytes(range(256)) * (size // 256 + 1))[:size]
        contents[b"/size%d" % size] = data
        image.root.entries[b"size%d" % size] = image.file(data)
        contents[b"/zeros%d" % size] = bytes(size)
        image.root.entries[b"zeros%d" % size] = image.file(bytes(size))
    bootstrap = tmp_path / "v5.boot"
    bootstrap.write_bytes(image.finish())
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / tinyv5.BLOB_ID.decode()).write_bytes(image.blob)
    place = Place(tmp_path, bootstrap, blob_directory(blobs))
    got = place.read()
    assert_same(tree_entries(image.root), got, ignore=frozenset({"content"}))
    contents |= {b"/small": b"small content\n", b"/same chunk": bytes(range(256)) * 16}
    assert {path: got[path].content for path in contents} == {
        path: hashlib.sha256(data).hexdigest() for path, data in contents.items()
    }
    check_by_fsck(place, got, tmp_path)
