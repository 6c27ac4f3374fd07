"""Every mode of `create`, mounted by the kernel: the tree of the source, entry by entry.

The judges are GNU tar (what it extracts of the source, and what it says of the image
unpacked again), and fsck.erofs with the data files that the daemon has filled.
"""

import gzip
import hashlib
import io
import os
import stat
import subprocess

import pytest
from awkward import make_layers
from capabilities import need_tool, requires
from fakes.estargz import estargz
from fixtures_path import FIXTURES, needs_fixtures
from judges import check_by_fsck, expected_layers, expected_tar, extracted_by_fsck
from made_images import Truth, wrong
from serving import Built
from treecompare import differences

from builder import (
    BuildOptions,
    CompactOptions,
    FileRanges,
    MergeOptions,
    OptimizeOptions,
    SourceType,
    build,
    compact,
    merge,
    optimize,
    unpack,
)
from builder.backends import blob_directory
from builder.source.options import SourceOptions
from erofs import open_bootstrap
from erofs.cipher import BlobCipher
from erofs.rafs import Compressor
from fscache.mounts.mount import mount_erofs

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

SMALL = 0x4000
NATIVE = {
    "everything inside": {"inline_bootstrap": True, "toc": True},
    "inside without contents": {"inline_bootstrap": True, "compressor": Compressor.LZ4_BLOCK},
    "contents": {"toc": True},
    "batches": {"batch_size": SMALL},
    "batches inside": {"batch_size": SMALL, "inline_bootstrap": True, "toc": True},
    "encrypted": {"encryption": BlobCipher.generate()},
    "encrypted inside": {
        "encryption": BlobCipher.generate(), "inline_bootstrap": True, "toc": True,
    },
    "encrypted batches": {"encryption": BlobCipher.generate(), "batch_size": SMALL},
}  # fmt: skip


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    for tool in ("setfacl", "setcap", "setfattr", "tar"):
        need_tool(tool)
    return make_layers(tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def expected(layers, tmp_path_factory):
    return expected_tar(layers[0], tmp_path_factory.mktemp("truth") / "first")


def made(origin, where, kind=SourceType.TAR, **options):
    """Build into `where`; return the image as `serving` wants it."""
    blobs = where / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    options.setdefault("chunk_size", SMALL)
    bootstrap = where / "image.boot"
    if options.get("inline_bootstrap"):
        result = build(origin, BuildOptions(source_type=kind, blob_dir=blobs, **options))
        return Built(result.blob_path, blobs)
    build(origin, BuildOptions(source_type=kind, bootstrap=bootstrap, blob_dir=blobs, **options))
    return Built(bootstrap, blobs)


def referring(source, where, kind, **options):
    """Build over a layer, and put it where its blob is looked for."""
    image = made(source, where, kind, **options)
    data = source.read_bytes()
    (image.blob_dir / hashlib.sha256(data).hexdigest()).write_bytes(data)
    return image


def gzipped(tar, where):
    where.mkdir(parents=True)
    (where / "layer.tar.gz").write_bytes(gzip.compress(tar.read_bytes(), 1))
    return where / "layer.tar.gz"


def assert_same(expected, got, **options):
    lines = differences(expected, got, **options)
    assert not lines, "\n".join(lines[:20])


def assert_tar_agrees(serving, image, mountpoint):
    """Unpack the image, and let GNU tar compare that with the mount."""
    output = serving.directory / "again.tar"
    inlined = image.bootstrap.parent == image.blob_dir
    unpack(image.bootstrap, output, blob_directory(image.blob_dir), inlined=inlined)
    command = ["tar", "--compare", "--numeric-owner", "-f", output, "-C", mountpoint]
    done = subprocess.run(
        command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout[:2000] + done.stderr[:2000]


def assert_fsck_agrees(serving, daemon, expected):
    boot = serving.directory / "mounted.boot"
    boot.write_bytes(daemon.served.bootstrap_file.read_bytes())
    with open_bootstrap(boot) as bootstrap:
        ids = [blob.id for blob in bootstrap.blobs]
        most = max(blob.chunk_count for blob in bootstrap.blobs)
    devices = [serving.directory / "cache" / f"{blob_id}.blob.data" for blob_id in ids]
    if ids == ["x" * 64]:
        devices = list((serving.directory / "cache").glob("*.blob.data"))
    if most > 1 << 16:
        # To extract, version 1.5 takes the upper part of a chunk's number for one of the device's.
        check_by_fsck(boot, devices)
        return
    got = extracted_by_fsck(boot, devices, serving.directory / "by-fsck")
    restorable = {
        name: entry._replace(mode=_extracted(entry.mode)) for name, entry in expected.items()
    }
    assert_same(restorable, got, ignore=frozenset({"xattrs", "links"}))


def _extracted(mode):
    """Return which mode a file has when fsck.erofs has extracted it."""
    if stat.S_ISREG(mode):
        return mode & ~(stat.S_ISUID | stat.S_ISGID)
    return mode | 0o777 if stat.S_ISLNK(mode) else mode


def judge(serving, image, expected):
    """Compare the mount with what is expected, and with what others see in the same files."""
    daemon = serving.start(image)
    assert_same(expected, serving.snapshot(daemon.mountpoint))
    assert_tar_agrees(serving, image, daemon.mountpoint)
    with open_bootstrap(daemon.served.bootstrap_file) as bootstrap:
        # Version 1.5 understands no others.
        is_known = bootstrap.block_size == 4096
    if is_known and need_tool("fsck.erofs"):
        assert_fsck_agrees(serving, daemon, expected)


# Alike for the kernel; the others are tested in every run.
MANY = {"inside without contents", "contents", "batches", "encrypted", "encrypted batches"}


@pytest.mark.parametrize(
    "mode",
    [pytest.param(mode, marks=pytest.mark.long if mode in MANY else ()) for mode in NATIVE],
)
def test_native_modes(serving, layers, expected, mode):
    judge(serving, made(layers[0], serving.directory / "image", **NATIVE[mode]), expected)


@pytest.mark.long
def test_gzip_layer_as_source(serving, layers, expected):
    source = gzipped(layers[0], serving.directory / "in")
    judge(serving, made(source, serving.directory / "image"), expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"toc": True}, marks=pytest.mark.long),
        {"toc": True, "inline_bootstrap": True},
    ],
)
def test_gzip_layer_that_is_referred_to(serving, layers, expected, options):
    source = gzipped(layers[0], serving.directory / "in")
    image = referring(source, serving.directory / "image", SourceType.TARGZ_REF, **options)
    judge(serving, image, expected)


def test_plain_tar_that_is_referred_to(serving, layers, expected):
    image = referring(layers[0], serving.directory / "image", SourceType.TARGZ_REF)
    judge(serving, image, expected)


def test_tarfs(serving, layers, expected):
    """In blocks of 512 bytes."""
    image = referring(layers[0], serving.directory / "image", SourceType.TARFS)
    with open_bootstrap(image.bootstrap) as bootstrap:
        assert bootstrap.block_size == 512
    judge(serving, image, expected)


def test_tarfs_of_merged_layers(serving, layers):
    images = [
        referring(tar, serving.directory / f"image{number}", SourceType.TARFS)
        for number, tar in enumerate(layers)
    ]
    blobs = serving.directory / "blobs"
    blobs.mkdir()
    for image in images:
        for path in image.blob_dir.iterdir():
            path.rename(blobs / path.name)
    merged = serving.directory / "merged.boot"
    merge([image.bootstrap for image in images], MergeOptions(bootstrap=merged))
    truth = serving.directory / "truth"
    truth.mkdir()
    judge(serving, Built(merged, blobs), expected_layers(layers, truth))


@pytest.mark.long
def test_on_a_dictionary(serving, layers, expected):
    """Every chunk is in the dictionary's blob, or is stored here."""
    image = made(layers[1], serving.directory / "dict")
    again = made(layers[0], serving.directory / "image", chunk_dict=image.bootstrap)
    for path in image.blob_dir.iterdir():
        path.rename(again.blob_dir / path.name)
    judge(serving, again, expected)


@pytest.mark.long
def test_on_a_parent(serving, layers):
    where = serving.directory / "image"
    parent = None
    for number, tar in enumerate(layers):
        image = made(tar, where, parent_bootstrap=parent)
        parent = image.bootstrap.rename(where / f"layer{number}.boot")
    truth = serving.directory / "truth"
    truth.mkdir()
    judge(serving, Built(parent, where / "blobs"), expected_layers(layers, truth))


@pytest.mark.parametrize("command", ["optimize", "compact"])
def test_images_that_were_made_of_others(serving, layers, command):
    """Three generations; of the lower blobs not everything is in use any more."""
    where = serving.directory / "image"
    parent = None
    for number, tar in enumerate(layers):
        image = made(tar, where, parent_bootstrap=parent)
        parent = image.bootstrap.rename(where / f"layer{number}.boot")
    result, blobs = where / "result.boot", where / "blobs"
    backend = blob_directory(blobs)
    if command == "optimize":
        with open_bootstrap(parent) as bootstrap:
            names = [path for path, inode in bootstrap.walk() if inode.is_regular][::3]
        files = [FileRanges(name) for name in names]
        optimize(parent, files, backend, OptimizeOptions(result, blobs))
    else:
        compact(parent, backend, CompactOptions(result, blobs))
    with open_bootstrap(parent) as before, open_bootstrap(result) as after:
        assert {b.id for b in before.blobs} != {b.id for b in after.blobs}
    truth = serving.directory / "truth"
    truth.mkdir()
    judge(serving, Built(result, blobs), expected_layers(layers, truth))


@pytest.mark.long
def test_without_owners(serving, layers, expected):
    image = made(layers[0], serving.directory / "image", source=SourceOptions(keep_owners=False))
    nobody = {name: entry._replace(uid=0, gid=0) for name, entry in expected.items()}
    judge(serving, image, nobody)


def test_cache_files_are_mounted_without_a_daemon(serving, layers, expected):
    cache = serving.directory / "files"
    cache.mkdir()
    build(
        layers[0],
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=cache / "boot", blob_cache_dir=cache,
            chunk_size=SMALL,
        ),
    )  # fmt: skip
    mount = mount_erofs(cache / "boot", list(cache.glob("*.blob.data")), serving.mountpoint())
    serving.stack.callback(mount.detach)
    assert_same(expected, serving.snapshot(mount.mountpoint))


# eStargz: the layer of the fixtures, and one that has its table of contents in its place.

ESTARGZ = FIXTURES / "nydus/stargz/alpine-stargz.tar.gz"


@needs_fixtures
@pytest.mark.parametrize("mode", ["estargz-rafs", "estargz-ref"])
def test_estargz(serving, tmp_path, mode):
    where = serving.directory / "image"
    if mode == "estargz-rafs":
        image = made(ESTARGZ, where)
    else:
        image = referring(ESTARGZ, where, SourceType.ESTARGZ_REF)
    expected = Truth(tmp_path)("alpine-stargz")
    daemon = serving.start(image)
    assert wrong(expected, serving.snapshot(daemon.mountpoint)) == []
    assert_tar_agrees(serving, image, daemon.mountpoint)


def test_estargz_of_which_only_the_table_is_known(serving, tmp_path):
    files = {"dir": None, "dir/one": b"1" * 100_000, "empty": b"", "zeros": bytes(300_000)}
    stored, toc = estargz(files, chunk_size=SMALL, links=[("link", "dir/one"), ("h", "=zeros")])
    blob_id = hashlib.sha256(stored).hexdigest()
    image = made(
        io.BytesIO(toc.encode()), serving.directory / "image", SourceType.ESTARGZTOC_REF,
        blob_id=blob_id, blob_data_size=len(stored),
    )  # fmt: skip
    (image.blob_dir / blob_id).write_bytes(stored)
    (tmp_path / "layer.tar").write_bytes(gzip.decompress(stored))
    expected = expected_tar(tmp_path / "layer.tar", tmp_path / "top")
    expected.pop(b"/stargz.index.json", None)
    judge(serving, image, expected)
