"""Blobs as partitions: names, hostile tables, and tables of another program."""

from __future__ import annotations

import subprocess
import uuid

import pytest

from erofs.errors import FormatError
from erofs.gpt import parse_gpt
from fscache.backend import BackendError, LocalDiskConfig, NotFound, open_backend
from tests.capabilities import need_tool
from tests.fakes.blob_disk import BASIC, LINUX, disk

GUID = uuid.UUID("0fc63daf-0000-4000-8000-3d69d8477de4")
NAME = "d" * 32


def _open(path, **more):
    return open_backend(LocalDiskConfig(path, **more))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk"


def test_both_ways_to_name_a_blob(path):
    path.write_bytes(disk((BASIC, GUID, NAME, b"1" * 600), (LINUX, GUID, "e" * 32, b"2" * 512)))
    backend = _open(path)
    # Of a basic partition the rest of the id is not there to be looked at.
    for blob in (NAME, NAME + "0" * 32):
        assert backend.open(blob).read_at(0, 600) == b"1" * 600
        assert backend.open(blob).size() == 1024
    blob = "e" * 32 + GUID.hex
    assert backend.open(blob).read_at(500, 12) == b"2" * 12
    with backend.open(blob).stream(10) as pieces:
        assert b"".join(pieces) == b"2" * 502
    for missing in ("e" * 32, "e" * 32 + "0" * 32, "x"):
        with pytest.raises(NotFound):
            backend.open(missing).read_at(0, 1)


def test_reads_end_with_the_partition(path):
    path.write_bytes(disk((BASIC, GUID, NAME, b"1" * 512), (BASIC, GUID, "x", b"2" * 512)))
    with pytest.raises(BackendError, match="ends too early"):
        _open(path).open(NAME).read_at(500, 13)


def test_disk_that_is_one_blob(path):
    path.write_bytes(b"0123456789")
    reader = _open(path, disable_gpt=True).open("any")
    assert (reader.size(), reader.read_at(3, 3)) == (10, b"345")
    with pytest.raises(BackendError, match="no partition table"):
        _open(path).open("any").size()


@pytest.mark.parametrize(
    "partitions",
    [
        ((BASIC, GUID, "", b"1"),),
        ((BASIC, GUID, "a", b"1"), (BASIC, GUID, "a", b"1")),
    ],
)
def test_tables_of_no_use(path, partitions):
    path.write_bytes(disk(*partitions))
    with pytest.raises(BackendError, match="partition"):
        _open(path).open("a").size()


def test_disk_that_was_cut(path):
    path.write_bytes(disk((BASIC, GUID, NAME, b"1" * 5000))[:-1000])
    with pytest.raises(BackendError, match="behind the end"):
        _open(path).open(NAME).size()


def test_damaged_tables_are_refused(path):
    good = disk((BASIC, GUID, NAME, b"1"))
    for offset in (510, 512, 520, 530, 600 - 80, 1024, 1030):
        bad = bytearray(good)
        bad[offset] ^= 1
        with pytest.raises(FormatError):
            parse_gpt(bytes(bad))
    for size in (0, 511, 1023, 2000):
        path.write_bytes(good[:size])
        with pytest.raises(BackendError):
            _open(path).open(NAME).size()


def test_what_is_no_disk(tmp_path):
    with pytest.raises(BackendError, match="cannot open"):
        _open(tmp_path / "none").open("a").size()
    with pytest.raises(BackendError, match="neither a block device"):
        _open(tmp_path).open("a").size()


def test_table_of_another_program(path):
    """sfdisk makes the table: in no order, with GUIDs of its own choice."""
    sfdisk = need_tool("sfdisk")
    path.write_bytes(bytes(8 << 20))
    script = (
        f'label: gpt\nstart=8192, size=2048, type={BASIC}, name="{NAME}"\n'
        f'start=4096, size=2048, type={LINUX}, name="{"e" * 32}", uuid={GUID}\n'
    )
    subprocess.run([sfdisk, "-q", path], input=script, text=True, check=True, timeout=60)
    with path.open("r+b") as file:
        file.seek(8192 * 512)
        file.write(b"basic")
        file.seek(4096 * 512)
        file.write(b"linux")
    backend = _open(path)
    assert backend.open(NAME).read_at(0, 5) == b"basic"
    assert backend.open("e" * 32 + GUID.hex).read_at(0, 5) == b"linux"
    assert backend.open(NAME).size() == 2048 * 512
