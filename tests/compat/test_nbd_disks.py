"""Disks over NBD beside those that the real tool exported: the same bytes."""

import hashlib
import os
import re
import tarfile
import threading

import pytest
from fakes.nbd_rig import RETRY, DiskRig, read

from builder.backends import blob_directory
from builder.export import export_block
from erofs import open_bootstrap
from fscache.cache.bootfile import mountable_bootstrap
from fscache.nbd.disk import UnusedSource, read_disk_plan, tar_disk
from tests.compat.test_made_by_nydus_image import MADE, commands, expected_files
from tests.fakes.disk_files import files_of
from tests.fixtures_path import needs_fixtures

pytestmark = needs_fixtures

SIMPLE = ["tar-none", "tar-zstd", "tar-lz4", "tar-toc", "tar-big-16m", "tar-big-64k-lz4",
          "batch-64k-zstd", "batch-4k-zstd", "batch-l1-toc", "dir-zstd", "encrypt-zstd",
          "encrypt-batch"]  # fmt: skip


def lay_out(case, folder):
    for name, data in expected_files(case).items():
        (folder / name).write_bytes(data)


@pytest.fixture
def served_rig(tmp_path):
    rigs = []

    def serve(bootstrap):
        rigs.append(DiskRig(bootstrap, tmp_path / "work"))
        return rigs[-1]

    yield serve
    for rig in rigs:
        rig.close()


@pytest.fixture
def served(served_rig):
    return lambda bootstrap: read(served_rig(bootstrap).disk)


@pytest.mark.parametrize("case", ["export-block", "export-block-zstd"])
def test_disks_of_the_real_tool(case, served, tmp_path):
    lay_out(case, tmp_path)
    # What its cache left there is another question.
    for path in tmp_path.glob("*.blob.*"):
        path.unlink()
    assert served(tmp_path / "boot") == (tmp_path / "image.disk").read_bytes()


def test_disk_of_tarfs_of_the_real_tool(tmp_path):
    lay_out("export-block-tarfs", tmp_path)
    backend = blob_directory(tmp_path)
    with open_bootstrap(tmp_path / "boot") as image:
        readers = [backend.open(blob.id) for blob in image.blobs]
    with open(tmp_path / "boot", "rb") as file:
        plan = read_disk_plan(tmp_path / "boot")
        disk = tar_disk(plan, file.fileno(), readers, RETRY, threading.Event())
        assert read(disk) == (tmp_path / "noverity.disk").read_bytes()


@pytest.mark.parametrize("case", SIMPLE)
def test_disks_of_the_real_tools_blobs_are_those_of_export(case, served, tmp_path):
    lay_out(case, tmp_path)
    export_block(tmp_path / "boot", tmp_path / "disk", blob_directory(tmp_path))
    assert served(tmp_path / "boot") == (tmp_path / "disk").read_bytes()


@pytest.mark.parametrize("case", ["zran-big-64k", "zran-multi-member", "estargz-ref"])
def test_disks_of_original_layers(case, served, tmp_path):
    lay_out(case, tmp_path)
    (name,) = re.findall(r"\S+\.tar\.gz", commands(case)[0][0])
    layer = (MADE / "cases" / name.removeprefix("../")).resolve().read_bytes()
    (tmp_path / hashlib.sha256(layer).hexdigest()).write_bytes(layer)
    export_block(tmp_path / "boot", tmp_path / "disk", blob_directory(tmp_path))
    assert served(tmp_path / "boot") == (tmp_path / "disk").read_bytes()


def test_files_of_rafs_v5(served_rig, tmp_path):
    """Translated, as they are mounted; what is between its chunks nobody knows, nor reads."""
    lay_out("tar-v5", tmp_path)
    disk = served_rig(mountable_bootstrap(tmp_path / "boot", tmp_path)).disk
    data, unused = b"", 0
    for part in disk.parts(0, disk.size):
        if isinstance(part.source, UnusedSource):
            data += bytes(part.length)
            unused += part.length
        else:
            data += read(disk, len(data), part.length)
    assert unused
    with tarfile.open(MADE / "inputs/l2.tar.gz") as archive:
        expected = {
            os.fsencode(os.path.normpath(entry.name)): archive.extractfile(entry).read()
            for entry in archive
            if entry.isreg() or entry.islnk()
        }
    assert files_of(data) == expected


def test_disk_of_merged_layers(served, tmp_path):
    """The lower layer has chunks that no file of the whole has."""
    lay_out("merge-separate", tmp_path)
    bootstrap = tmp_path / "merged.boot"
    # The merge has given the blobs the names of their bootstraps.
    by_size = {path.stat().st_size: path for path in tmp_path.glob("?" * 64)}
    with open_bootstrap(bootstrap) as image:
        for blob in image.blobs:
            by_size[blob.compressed_size].rename(tmp_path / blob.id)
    export_block(bootstrap, tmp_path / "disk", blob_directory(tmp_path))
    assert served(bootstrap) == (tmp_path / "disk").read_bytes()
