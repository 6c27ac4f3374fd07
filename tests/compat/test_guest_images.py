"""Guest images: layout (V10 of spec vm-runtimes 7.4), partitions, hash tree, command line."""

import hashlib
import json
import re
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from guestimage.cli import main
from guestimage.image import ImageOptions, make_image
from guestimage.layout import DAX_BYTES, MIB, Layout, Table, dax_header, plan
from tests.capabilities import need_tool

RESULT = re.compile(
    r"root_hash=([0-9a-f]{64}),salt=([0-9a-f]{64}),data_blocks=(\d+),"
    r"data_block_size=4096,hash_block_size=4096\n"
)


@pytest.mark.parametrize(
    ("size", "measured", "msdos"),
    [
        # n = floor((bytes + 1 MiB) / 1 MiB) + 2, then floor(n * 100 / 99) + 1.
        (1, False, Layout(3, 3, 3)),
        (MIB, False, Layout(4, 4, 4)),
        (1, True, Layout(4, 3, 4)),
        (97 * MIB, True, Layout(102, 100, 102)),
        (1000 * MIB, True, Layout(1014, 1003, 1014)),
    ],
)
def test_sizes_are_those_of_katas_builder(size, measured, msdos):
    assert plan(size, Table.MSDOS, measured=measured) == msdos
    assert plan(size, Table.GPT, measured=measured) == msdos._replace(disk=msdos.disk + 1)


def test_v10_the_superblock_of_persistent_memory():
    header = dax_header(Layout(10, 9, 9))
    assert len(header) == DAX_BYTES
    block = header[4096:8192]
    assert hashlib.sha256(block).hexdigest() == (
        "b502df4b37a7b6ba1f3c93416b77768a9f6df41ce2ec7fe46804180ca2191553"
    )
    assert block[4088:].hex() == "303894e32b035b68"
    # A reader that knows nothing of it finds the first partition behind both tables.
    start, sectors = struct.unpack_from("<II", header, 446 + 8)
    assert (start * 512, sectors * 512) == (3 * MIB, 8 * MIB)
    assert header[510:512] == b"\x55\xaa"


@pytest.fixture
def source(tmp_path):
    top = tmp_path / "source"
    (top / "etc").mkdir(parents=True)
    (top / "etc/os-release").write_text('PRETTY_NAME="A guest"\n')
    (top / "data").write_bytes(bytes(range(256)) * 8000)
    return top


def image(source, directory, **options):
    directory.mkdir()
    line = make_image(source, directory, ImageOptions(**options))
    return directory / "guest.img", line


def partitions(disk):
    words = [need_tool("sfdisk"), "--json", disk]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)["partitiontable"]
    return table["label"], [
        (item["start"] * 512, item["size"] * 512) for item in table["partitions"]
    ]


@pytest.mark.parametrize("table", list(Table))
def test_veritysetup_verifies_the_second_partition(source, tmp_path, table):
    disk, line = image(source, tmp_path / "out", table=table)
    label, ((data, data_size), (hashes, hash_size)) = partitions(disk)
    assert label == ("gpt" if table is Table.GPT else "dos")
    assert data == MIB
    root, salt, blocks = RESULT.fullmatch((tmp_path / "out/root_hash.txt").read_text()).groups()
    # The tree is over all of the partition, not only the filesystem.
    assert int(blocks) * 4096 == data_size
    content = disk.read_bytes()
    parts = [tmp_path / "data", tmp_path / "hashes"]
    parts[0].write_bytes(content[data : data + data_size])
    parts[1].write_bytes(content[hashes : hashes + hash_size])
    words = ["verify", "--no-superblock", "-s", salt, f"--data-blocks={blocks}", *parts, root]
    subprocess.run([need_tool("veritysetup"), *words], check=True, capture_output=True)
    sectors = int(blocks) * 8
    assert line == (
        f'dm-mod.create="dm-verity,,,ro,0 {sectors} verity 1 /dev/vda1 /dev/vda2 4096 4096'
        f' {blocks} 0 sha256 {root} {salt}" dm-mod.waitfor=/dev/vda2'
        " root=/dev/dm-0 rootflags=ro rootfstype=erofs"
    )


def test_without_verity_there_is_one_partition(source, tmp_path):
    disk, line = image(source, tmp_path / "out", measured=False, device="/dev/pmem0", dax=True)
    assert line == "root=/dev/pmem0p1 rootflags=ro rootfstype=erofs"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "guest.img", "kernel.cmdline"
    ]  # fmt: skip
    plain = tmp_path / "plain"
    plain.write_bytes(disk.read_bytes()[DAX_BYTES:])
    assert len(partitions(plain)[1]) == 1
    # EROFS at 3 MiB.
    assert disk.read_bytes()[3 * MIB + 1024 :][:4].hex() == "e2e1f5e0"


def test_the_same_files_give_the_same_bytes(source, tmp_path):
    one, _ = image(source, tmp_path / "one")
    tar = tmp_path / "source.tar.gz"
    with tarfile.open(tar, "w:gz") as archive:
        archive.add(source, ".")
    other, _ = image(tar, tmp_path / "other")
    again, _ = image(tar, tmp_path / "again")
    assert other.read_bytes() == again.read_bytes()
    # A directory and a tar of it have the same files, their layouts may differ.
    assert one.stat().st_size == other.stat().st_size


def test_the_first_program_is_ours_unless_told(source, tmp_path):
    (source / "sbin").mkdir()
    (source / "sbin/init").write_text("#!/bin/sh\n# of the source\n")
    ours, _ = image(source, tmp_path / "ours", measured=False)
    assert b"guest image ready" in ours.read_bytes()
    theirs, _ = image(source, tmp_path / "theirs", measured=False, own_init=False)
    assert b"# of the source" in theirs.read_bytes()
    assert b"guest image ready" not in theirs.read_bytes()


def test_the_command_line(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    words = ["-o", str(out), "--rootfs", str(source), "--table", "msdos"]
    assert main(words) == 0
    assert capsys.readouterr().out == (out / "kernel.cmdline").read_text()
    assert main([*words, "--rootfs", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"Error: {tmp_path}/nowhere: no such directory or tar\n"
    assert main(["-o", str(tmp_path / "nowhere"), "--rootfs", str(source)]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"guest.img", "root_hash.txt", "kernel.cmdline"}


def test_init_is_a_script_that_shells_read():
    init = Path(__file__).parents[2] / "vm-images/guestimage/init"
    for shell in ("dash", "bash"):
        subprocess.run([need_tool(shell), "-n", init], check=True)
