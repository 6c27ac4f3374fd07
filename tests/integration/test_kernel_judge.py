"""The kernel as the judge: a source and its lazily served mount are the same, to the byte.

What is expected comes from others: the source directory itself, GNU tar, the kernel's
overlayfs for layers. What is got is read through the mount, chunk by chunk on demand.
"""

import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from awkward import Layer, make_directory, make_layers
from capabilities import need_tool, requires
from fixtures_path import FIXTURES, needs_fixtures
from judges import expected_layers, expected_tar, extracted_by_fsck
from serving import build_image, build_layers
from treecompare import differences, read_tree

from builder.source.options import SourceOptions
from erofs import open_bootstrap
from erofs.rafs import Compressor, Digester

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

OPTIONS = {
    "none-4k-sha256": (Compressor.NONE, 0x1000, Digester.SHA256),
    "lz4-4k-blake3": (Compressor.LZ4_BLOCK, 0x1000, Digester.BLAKE3),
    "zstd-64k-sha256": (Compressor.ZSTD, 0x10000, Digester.SHA256),
    "none-1m-blake3": (Compressor.NONE, 0x100000, Digester.BLAKE3),
    "zstd-1m-blake3": (Compressor.ZSTD, 0x100000, Digester.BLAKE3),
    "lz4-16m-sha256": (Compressor.LZ4_BLOCK, 0x1000000, Digester.SHA256),
}
SET_ID = stat.S_ISUID | stat.S_ISGID
every_option = pytest.mark.parametrize("options", OPTIONS)


def build_options(name):
    return dict(zip(("compressor", "chunk_size", "digester"), OPTIONS[name], strict=True))


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    for tool in ("setfacl", "setcap", "setfattr", "tar"):
        need_tool(tool)
    return make_layers(tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def merged(layers, tmp_path_factory):
    return expected_layers(layers, tmp_path_factory.mktemp("merged"))


def served(serving, image):
    """Serve an image lazily and return the whole tree as its mount shows it."""
    return serving.snapshot(serving.start(image).mountpoint)


def assert_same(expected, got, **options):
    lines = differences(expected, got, **options)
    assert not lines, "\n".join(lines[:20])


def with_root_time_zero(tree):
    """RAFS keeps no time of a source directory itself (spec rafs-v6 3.8)."""
    tree[b"/"] = tree[b"/"]._replace(mtime_ns=0)
    return tree


@every_option
def test_three_layers_built_and_merged_as_nydusify_does(serving, layers, merged, options):
    image = build_layers(layers, serving.directory / "image", **build_options(options))
    assert_same(merged, served(serving, image))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_layer_with_whiteouts_as_files(serving, layers, number):
    tar = layers[number]
    image = build_image(tar, serving.directory / "image")
    expected = expected_tar(tar, serving.directory / "expected")
    assert_same(expected, served(serving, image))


@pytest.mark.parametrize("number", [0, 1])
def test_nanoseconds_of_pax_records_when_asked_for(serving, layers, number):
    tar = layers[number]
    options = SourceOptions(pax_mtime=True)
    image = build_image(tar, serving.directory / "image", source=options)
    expected = expected_tar(tar, serving.directory / "expected", pax_mtime=True)
    got = served(serving, image)
    # GNU tar makes missing parents now, and nobody else knows when that was.
    for name in (b"/implied", b"/implied/parent"):
        if name in expected:
            got[name] = got[name]._replace(mtime_ns=expected[name].mtime_ns)
    assert_same(expected, got)
    assert any(entry.mtime_ns % 10**9 for entry in got.values())


@needs_fixtures
def test_all_entry_types_of_the_fixture(serving):
    tar = FIXTURES / "nydus/tar/all-entry-type.tar"
    image = build_image(tar, serving.directory / "image")
    expected = expected_tar(tar, serving.directory / "expected")
    got = served(serving, image)
    assert_same(expected, got)
    assert len(got[b"/tar/dir2/hardlink3.txt"].links) == 4


@every_option
def test_directory_with_what_only_directories_have(serving, options):
    need_tool("setfacl")
    source = serving.directory / "source"
    make_directory(source)
    image = build_image(source, serving.directory / "image", **build_options(options))
    expected = with_root_time_zero(read_tree(source))
    assert_same(expected, served(serving, image))


def test_xattrs_larger_than_any_block(serving):
    """More than ext4 holds, so that nobody can extract them; the records are what is expected."""
    many = {f"user.number {number} {'n' * 200}": b"v" * number for number in range(150)}
    largest = {"user.largest": bytes(range(255)) * 257}
    sets = [{"user.block": b"b" * size} for size in (3996, 4000, 4004, 4096, 8100)]
    sets += [largest, many, {**largest, **many, "trusted.t": b"t" * 60000}]
    tar = Layer(serving.directory / "layer.tar", tarfile.PAX_FORMAT)
    expected = {}
    for number, xattrs in enumerate(sets):
        for name, kind in ((b"file", tarfile.REGTYPE), (b"directory", tarfile.DIRTYPE)):
            path = name + b" %d" % number
            tar.add(path, kind, data=b"x" if kind == tarfile.REGTYPE else b"", xattrs=xattrs)
            expected[b"/" + path] = tuple(sorted(xattrs.items()))
        tar.add(b"directory %d/below" % number, data=b"y" * number)
        tar.add(b"link %d" % number, tarfile.SYMTYPE, linkname="l" * 3000)
    tar.close()
    got = served(serving, build_image(tar.path, serving.directory / "image"))
    assert {name: got[name].xattrs for name in expected} == expected
    assert len(got) == 1 + 4 * len(sets)
    assert got[b"/link 7"].content == "l" * 3000


def test_image_without_data(serving):
    need_tool("fsck.erofs")
    source = serving.directory / "source"
    source.mkdir()
    (source / "directory").mkdir()
    (source / "link").symlink_to("nowhere")
    (source / "empty").touch()
    image = build_image(source, serving.directory / "image")
    assert image.blobs() == {}
    expected = with_root_time_zero(read_tree(source))
    assert_same(expected, served(serving, image))
    check_by_fsck(serving, image, expected)


def test_many_layers(serving):
    """As many devices as a deep image has; each layer changes one file and adds one."""
    tars = []
    for number in range(40):
        tar = Layer(serving.directory / f"layer{number}.tar", tarfile.PAX_FORMAT)
        tar.add(b"of all", data=b"last by %d" % number)
        tar.add(b"of %d" % number, data=b"%d" % number * 5000)
        tar.close()
        tars.append(tar.path)
    image = build_layers(tars, serving.directory / "image")
    expected = expected_layers(tars, serving.directory)
    assert len(expected) == 42
    assert_same(expected, served(serving, image))


def test_installed_software_and_fsck_agrees(serving):
    """Real directories of this machine, with a second opinion on every byte."""
    need_tool("fsck.erofs")
    source = serving.directory / "source"
    source.mkdir()
    for part in ("usr/share/zoneinfo", "usr/lib/python3"):
        if (Path("/") / part).is_dir():
            (source / part).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-a", Path("/") / part, source / part], check=True)
    image = build_image(source, serving.directory / "image")
    expected = with_root_time_zero(read_tree(source))
    assert_same(expected, served(serving, image))
    check_by_fsck(serving, image, expected)


def test_fsck_agrees_on_merged_layers(serving, layers, merged):
    need_tool("fsck.erofs")
    image = build_layers(layers, serving.directory / "image")
    assert_same(merged, served(serving, image))
    check_by_fsck(serving, image, merged)


def check_by_fsck(serving, image, expected):
    """Compare with what fsck.erofs extracts from bootstrap and complete data files."""
    with open_bootstrap(image.bootstrap) as bootstrap:
        ids = [blob.id for blob in bootstrap.blobs]
    devices = [serving.directory / "cache" / f"{blob_id}.blob.data" for blob_id in ids]
    top = serving.directory / "by-fsck"
    got = extracted_by_fsck(image.bootstrap, devices, top)
    expected = {
        name: entry._replace(mode=entry.mode & ~SET_ID) if stat.S_ISREG(entry.mode) else entry
        for name, entry in expected.items()
    }
    assert_same(expected, got, ignore=frozenset({"xattrs", "links"}))


def test_debian_minimal_system(serving, minbase):
    image = build_image(minbase, serving.directory / "image")
    expected = expected_tar(minbase, serving.directory / "expected")
    got = served(serving, image)
    assert len(got) > 3000
    assert_same(expected, got)
    check_by_fsck(serving, image, expected)
