"""Disks of layers before real judges: QEMU reads the VMDK, sfdisk the GPT, veritysetup made it."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kata.disk import make_disk
from kata.dmverityfile import DmVerityFile, read_layer_verity
from kata.erofsmounts import ErofsLayer, ErofsRootfs
from tests.capabilities import need_tool

TIMEOUT = 60
# The last one begins where a piece of 2 GiB ends; holes cost nothing.
SIZES = (5000, (1 << 20) + 1, 4096, (2 << 30) + 4096)
ENDS = 4096


def run(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def layers(tmp_path):
    """Files with a mark at each end."""
    made = []
    for number, size in enumerate(SIZES):
        path = tmp_path / str(number) / "layer.erofs"
        path.parent.mkdir()
        with path.open("wb") as file:
            file.write(bytes([number + 1]) * (ENDS - 1))
            file.truncate(size)
            file.seek(size - 1)
            file.write(b"e")
        made.append(ErofsLayer(str(path)))
    return tuple(made)


def flat(disk, tmp_path):
    """Return the disk as QEMU reads it, as a sparse file."""
    tool = need_tool("qemu-img")
    target = tmp_path / "flat.img"
    info = json.loads(run(tool, "info", "--output=json", str(disk.path)))
    assert info["format"] == "vmdk"
    run(tool, "convert", "-f", "vmdk", "-O", "raw", str(disk.path), str(target))
    assert target.stat().st_size == info["virtual-size"]
    return target


def assert_holds(file, start, path):
    """Check both ends of a layer on the disk."""
    size = Path(path).stat().st_size
    with file.open("rb") as disk, open(path, "rb") as layer:
        for offset in (0, max(size - ENDS, 0)):
            disk.seek(start + offset)
            layer.seek(offset)
            data = layer.read(ENDS)
            assert disk.read(len(data)) == data


def test_qemu_reads_a_merged_image_as_one_device(tmp_path, layers):
    merged = replace(layers[0], devices=tuple(layer.path for layer in layers[1:]))
    file = flat(make_disk(ErofsRootfs((merged,)), tmp_path), tmp_path)
    start = 0
    for layer, size in zip(layers, SIZES, strict=True):
        assert_holds(file, start, layer.path)
        start += -(-size // 512) * 512
    assert file.stat().st_size == start


def test_qemu_and_sfdisk_read_partitions(tmp_path, layers):
    disk = make_disk(ErofsRootfs(layers), tmp_path)
    file = flat(disk, tmp_path)
    table = json.loads(run(need_tool("sfdisk"), "--json", str(file)))["partitiontable"]
    assert table["label"] == "gpt"
    found = [(part["name"], part["start"], part["size"]) for part in table["partitions"]]
    assert found == [tuple(partition) for partition in disk.partitions]
    assert {part["type"] for part in table["partitions"]} == {
        "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
    }
    assert len({part["uuid"] for part in table["partitions"]}) == len(layers)
    for partition, layer in zip(disk.partitions, layers, strict=True):
        assert_holds(file, partition.first * 512, layer.path)


@pytest.mark.parametrize("salt", ["-", "00" * 32, "a1b2"])
@pytest.mark.parametrize("superblock", [True, False])
def test_a_side_file_agrees_with_veritysetup(tmp_path, salt, superblock):
    tool = need_tool("veritysetup")
    image = tmp_path / "layer.erofs"
    image.write_bytes(b"".join(bytes([number]) * 4096 for number in range(20)))
    words = [tool, "format", str(image), str(image), "--hash-offset", str(20 * 4096), "-s", salt]
    words += ["--data-blocks", "20"] + ([] if superblock else ["--no-superblock"])
    output = run(*words)
    root = output.split("Root hash:")[1].split()[0]
    plain = "" if salt == "-" else salt
    side = tmp_path / ".dmverity"
    record = DmVerityFile(root, 20 * 4096, None if superblock else plain)
    side.write_bytes(record.pack())
    found = read_layer_verity(side, image)
    assert (found.has_superblock, found.salt) == (superblock, plain)
    assert found.parameters().data_blocks == 20
