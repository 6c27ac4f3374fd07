import io
import random
import struct
import threading

import pytest
from fakes.built import built, member, tar_of
from fakes.nbd_rig import RETRY, DiskRig, read

from builder import BuildOptions, SourceType, build, merge
from builder.backends import blob_directory
from builder.export import export_block
from builder.merge import MergeOptions
from erofs import open_bootstrap
from erofs.cipher import BlobCipher
from erofs.errors import CorruptStructure, NydusError, OutOfBounds, UnsupportedFeature
from erofs.layout import DEVICE_TABLE_OFFSET
from erofs.rafs import Compressor
from fscache.backend import LocalFsConfig, open_backend
from fscache.nbd.disk import Disk, Segment, Slice, read_disk_plan, tar_disk

NOISE = random.Random(7).randbytes(1 << 20)
FILES = {
    "small": b"content",
    "large": NOISE[:300_005],
    "zeros": bytes(50000),
    "text": b"compressible text\n" * 5000,
    "other": NOISE[400_000:500_000],
}
GONE = FILES["other"]


def layer(names=FILES):
    return tar_of(*(member(name, data=FILES[name]) for name in names))


def exported(bootstrap):
    result = export_block(bootstrap, bootstrap.with_name("disk"), blob_directory(bootstrap.parent))
    return result.disk.read_bytes()


@pytest.fixture
def rigs(tmp_path):
    made = []

    def make(bootstrap, **options):
        made.append(DiskRig(bootstrap, tmp_path / "work", **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def merged(folder, *, compressor, **options):
    """Merge a layer with one that takes away a file in the middle of its blob."""
    bootstraps = []
    upper = tar_of(member(".wh.other"), member("new", data=NOISE[-70_000:]))
    for number, tar in enumerate((layer(), upper)):
        where = folder / str(number)
        where.mkdir()
        bootstrap = built(where, tar, compressor=compressor, **options)
        with open_bootstrap(bootstrap) as image:
            blob_id = image.blobs[0].id
        (where / blob_id).rename(folder / blob_id)
        bootstraps.append(bootstrap.rename(folder / f"{blob_id}.boot"))
    merge(bootstraps, MergeOptions(bootstrap=folder / "merged"))
    return folder / "merged"


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.ZSTD])
@pytest.mark.parametrize("chunk_size", [0x1000, 0x100000])
def test_disk_is_that_of_export(tmp_path, rigs, compressor, chunk_size):
    bootstrap = built(tmp_path, layer(), compressor=compressor, chunk_size=chunk_size)
    disk = rigs(bootstrap).disk
    expected = exported(bootstrap)
    assert disk.size == len(expected)
    assert disk.block_size == 4096
    assert read(disk) == expected


@pytest.mark.parametrize("batch_size", [0, 0x40000])
@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.LZ4_BLOCK])
@pytest.mark.parametrize("encryption", [None, BlobCipher.generate()], ids=["plain", "encrypted"])
def test_chunks_that_no_file_has_are_there_too(tmp_path, rigs, compressor, batch_size, encryption):
    options = {"batch_size": batch_size, "encryption": encryption}
    bootstrap = merged(tmp_path, compressor=compressor, chunk_size=0x100000, **options)
    rig = rigs(bootstrap)
    expected = exported(bootstrap)
    assert GONE in expected
    assert read(rig.disk) == expected
    place = expected.index(GONE)
    assert read(rig.disk, place + 5000, 10_000) == expected[place + 5000 : place + 15_000]
    # They are not in the cache, whose map knows nothing of them.
    assert all(GONE not in blob.path.read_bytes() for blob in rig.blobs)
    for path in tmp_path.glob("?" * 64):
        path.write_bytes(b"")
    assert read(rig.disk, 0, place) == expected[:place]


def test_chunks_that_no_file_has_need_their_blob(tmp_path, rigs):
    bootstrap = merged(tmp_path, compressor=Compressor.ZSTD)
    rig = rigs(bootstrap)
    place = exported(bootstrap).index(GONE)
    with open_bootstrap(bootstrap) as image:
        (tmp_path / image.blobs[0].id).write_bytes(b"")
    with pytest.raises(NydusError):
        read(rig.disk, place, 4096)


def test_places_of_bytes(tmp_path, rigs):
    bootstrap = built(tmp_path, layer())
    disk = rigs(bootstrap).disk
    with open_bootstrap(bootstrap) as image:
        length = image.view.length
    ((source, place, size),) = disk.parts(length - 4096, 4096)
    assert isinstance(source.read(place, size), Slice)
    gap = disk.parts(length - 1, 10)
    assert [part.length for part in gap] == [1, 9]
    assert gap[1].source is None
    assert disk.parts(disk.size, 0) == []
    for offset, count in ((-1, 1), (0, disk.size + 1), (disk.size, 1), (0, -1)):
        with pytest.raises(OutOfBounds):
            disk.parts(offset, count)


def test_between_and_behind_segments_are_zeros():
    disk = Disk(100, 1, [Segment(10, 20, "a", 5), Segment(20, 30, "b", 0)])
    assert disk.parts(0, 100) == [
        (None, 0, 10),
        ("a", 5, 10),
        ("b", 0, 10),
        (None, 0, 70),
    ]
    assert disk.parts(12, 3) == [("a", 7, 3)]
    assert disk.parts(29, 2) == [("b", 9, 1), (None, 0, 1)]
    assert Disk(0, 1, []).parts(0, 0) == []


def test_disk_of_tarfs(tmp_path):
    tar = layer()
    result = build(
        io.BytesIO(tar),
        BuildOptions(source_type=SourceType.TARFS, bootstrap=tmp_path / "boot", blob_dir=tmp_path),
    )
    (tmp_path / result.blobs[0]).write_bytes(tar)
    backend = open_backend(LocalFsConfig(dir=tmp_path))
    with open(tmp_path / "boot", "rb") as file:
        plan = read_disk_plan(tmp_path / "boot")
        readers = [backend.open(result.blobs[0])]
        disk = tar_disk(plan, file.fileno(), readers, RETRY, threading.Event())
        assert read(disk) == exported(tmp_path / "boot")
        assert disk.block_size == 512
    backend.close()


@pytest.mark.parametrize(
    ("place", "error"),
    [(0, UnsupportedFeature), (1, CorruptStructure)],
)
def test_impossible_places_are_refused(tmp_path, place, error):
    bootstrap = built(tmp_path, layer())
    data = bytearray(bootstrap.read_bytes())
    struct.pack_into("<I", data, DEVICE_TABLE_OFFSET + 68, place)
    bootstrap.write_bytes(data)
    with pytest.raises(error, match="blob"):
        read_disk_plan(bootstrap)
