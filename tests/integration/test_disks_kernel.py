"""Exported disks and tarfs, judged by the kernel, veritysetup and fsck.erofs.

The kernel mounts what was made; the tree that it shows has to be the one that GNU tar and
overlayfs make of the same layers.
"""

import shlex
import stat
import subprocess

import pytest
from awkward import make_layers
from capabilities import need_tool, requires
from judges import expected_layers, expected_tar, extracted_by_fsck
from serving import build_image, build_layers
from treecompare import differences

from builder import (
    BuildError,
    BuildOptions,
    ExportOptions,
    MergeOptions,
    SourceType,
    VerityOptions,
    build,
    export_block,
    merge,
    unpack,
)
from builder.backends import blob_directory
from builder.source.options import SourceOptions
from erofs import open_bootstrap
from erofs.rafs import Compressor
from fscache.mounts.loop import LoopDevice
from fscache.mounts.mount import mount_erofs

pytestmark = [
    pytest.mark.root,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount"),
]

NATIVE = {
    "none-4k": {"compressor": Compressor.NONE, "chunk_size": 0x1000},
    "zstd-1m": {"compressor": Compressor.ZSTD, "chunk_size": 0x100000},
    "lz4-64k": {"compressor": Compressor.LZ4_BLOCK, "chunk_size": 0x10000},
}


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    for tool in ("setfacl", "setcap", "setfattr", "tar"):
        need_tool(tool)
    return make_layers(tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def merged(layers, tmp_path_factory):
    return expected_layers(layers, tmp_path_factory.mktemp("merged"))


def index_layer(tar, where, **options):
    """Make tarfs metadata for a tar, and put the tar beside it under its id."""
    bootstrap = where / f"{tar.stem}.boot"
    result = build(
        tar,
        BuildOptions(source_type=SourceType.TARFS, bootstrap=bootstrap, blob_dir=where, **options),
    )
    for blob_id in result.blobs:
        (where / blob_id).symlink_to(tar)
    return bootstrap


@pytest.fixture
def tarfs(layers, tmp_path):
    """All layers as one tarfs bootstrap, with its tars in the same directory."""
    where = tmp_path / "tarfs"
    where.mkdir()
    sources = [index_layer(tar, where) for tar in layers]
    merge(sources, MergeOptions(bootstrap=where / "merged.boot"))
    return where / "merged.boot"


def disk_of(bootstrap, blob_dir):
    """Export with a hash tree, and let veritysetup verify it; return the path."""
    result = export_block(
        bootstrap,
        blob_dir / "disk",
        blob_directory(blob_dir),
        ExportOptions(verity=VerityOptions()),
    )
    program, words = need_tool("veritysetup"), shlex.split(result.tree.options())
    subprocess.run([program, "verify", result.disk, result.disk, *words], check=True)
    return result.disk


def shown(serving, source, devices=()):
    """Mount and return the whole tree."""
    mount = mount_erofs(source, list(devices), serving.mountpoint())
    serving.stack.callback(mount.detach)
    return serving.snapshot(mount.mountpoint)


def assert_same(expected, got, **options):
    lines = differences(expected, got, **options)
    assert not lines, "\n".join(lines[:20])


def test_disk_of_merged_tarfs(serving, tarfs, merged):
    assert_same(merged, shown(serving, disk_of(tarfs, tarfs.parent)))


@requires("loop")
def test_disk_over_a_loop_device_as_a_guest_has_it(serving, tarfs, merged):
    """What stands in the manuals: `mount -t erofs -o ro,loop`, which is a block device."""
    disk = disk_of(tarfs, tarfs.parent)
    mountpoint = serving.mountpoint()
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", disk, mountpoint], check=True)
    assert_same(merged, serving.snapshot(mountpoint))


def test_tars_themselves_as_devices(serving, tarfs, merged):
    """As the snapshotter mounts tarfs on a host: metadata, and a device for each tar."""
    with open_bootstrap(tarfs) as image:
        devices = [(tarfs.parent / blob.id).resolve() for blob in image.blobs]
    assert_same(merged, shown(serving, tarfs, devices))


@requires("loop")
def test_tars_on_loop_devices(serving, tarfs, merged):
    with open_bootstrap(tarfs) as image:
        paths = [tarfs, *((tarfs.parent / blob.id).resolve() for blob in image.blobs)]
    loops = [serving.stack.enter_context(LoopDevice.attach(path)) for path in paths]
    devices = ",".join(f"device={loop.path}" for loop in loops[1:])
    mountpoint = serving.mountpoint()
    words = ["mount", "-t", "erofs", "-o", f"ro,{devices}", loops[0].path, mountpoint]
    subprocess.run(words, check=True)
    assert_same(merged, serving.snapshot(mountpoint))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_disk_of_one_tarfs_layer(serving, layers, tmp_path, number):
    bootstrap = index_layer(layers[number], tmp_path)
    expected = expected_tar(layers[number], serving.directory / "expected")
    assert_same(expected, shown(serving, disk_of(bootstrap, tmp_path)))


def test_times_of_pax_records_in_tarfs(serving, layers, tmp_path):
    bootstrap = index_layer(layers[0], tmp_path, source=SourceOptions(pax_mtime=True))
    expected = expected_tar(layers[0], serving.directory / "expected", pax_mtime=True)
    got = shown(serving, disk_of(bootstrap, tmp_path))
    # GNU tar makes missing parents now, and nobody else knows when that was.
    for name in (b"/implied", b"/implied/parent"):
        if name in expected:
            got[name] = got[name]._replace(mtime_ns=expected[name].mtime_ns)
    assert_same(expected, got)


@pytest.mark.parametrize("options", NATIVE)
def test_disk_of_merged_layers_and_fsck_agrees(serving, layers, merged, options):
    image = build_layers(layers, serving.directory / "image", **NATIVE[options])
    disk = disk_of(image.bootstrap, image.blob_dir)
    assert_same(merged, shown(serving, disk))
    check_by_fsck(serving, disk, merged)


def check_by_fsck(serving, disk, expected):
    """Let fsck.erofs extract the disk; version 1.5 wants the devices that lie in it as files."""
    need_tool("fsck.erofs")
    data, devices = disk.read_bytes(), []
    with open_bootstrap(disk) as image:
        for number, slot in enumerate(image.devices):
            start = slot.mapped_blkaddr * image.block_size
            device = serving.directory / f"device{number}"
            device.write_bytes(data[start : start + slot.blocks * image.block_size])
            devices.append(device)
    got = extracted_by_fsck(disk, devices, serving.directory / "by-fsck")
    set_id = stat.S_ISUID | stat.S_ISGID
    expected = {
        name: entry._replace(mode=entry.mode & ~set_id) if stat.S_ISREG(entry.mode) else entry
        for name, entry in expected.items()
    }
    assert_same(expected, got, ignore=frozenset({"xattrs", "links"}))


def test_disk_of_a_layer_with_its_metadata_inside(serving, layers):
    where = serving.directory / "blobs"
    where.mkdir()
    result = build(
        layers[0],
        BuildOptions(source_type=SourceType.TAR, blob_dir=where, inline_bootstrap=True, toc=True),
    )
    expected = expected_tar(layers[0], serving.directory / "expected")
    assert_same(expected, shown(serving, disk_of(result.blob_path, where)))


def test_disk_of_an_image_without_data(serving):
    source = serving.directory / "source"
    (source / "directory").mkdir(parents=True)
    (source / "link").symlink_to("nowhere")
    image = build_image(source, serving.directory / "image")
    got = shown(serving, disk_of(image.bootstrap, image.blob_dir))
    assert set(got) == {b"/", b"/directory", b"/link"}


def test_unpacked_tarfs_is_what_the_tars_were(serving, tarfs, merged):
    output = serving.directory / "unpacked.tar"
    unpack(tarfs, output, blob_directory(tarfs.parent))
    top = serving.directory / "extracted"
    assert_same(merged, expected_tar(output, top, pax_mtime=True))


def test_full_disk_leaves_nothing(serving, tarfs):
    """A file system that is too small: while data is written, and while the tree is."""
    small = serving.mountpoint("small")
    with open_bootstrap(tarfs) as image:
        slot = image.devices[-1]
        size = (slot.mapped_blkaddr + slot.blocks) * image.block_size
    for room in (size // 4, size * 3 // 4):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", small], check=True)
        with pytest.raises(BuildError, match="No space left"):
            export_block(
                tarfs,
                small / "disk",
                blob_directory(tarfs.parent),
                ExportOptions(verity=VerityOptions()),
            )
        assert not list(small.iterdir())
        subprocess.run(["umount", small], check=True)
