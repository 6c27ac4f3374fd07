"""EROFS layers as several mounts: their list, VMDK, GPT and `.dmverity` (spec vm-runtimes 2.7)."""

import hashlib
import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from erofs.errors import FormatError
from erofs.verity import VeritySuperblock
from kata import OptionError
from kata.disk import make_disk, partition_options
from kata.dmverityfile import DEFAULT_SALT, DmVerityFile, LayerVerity, read_layer_verity
from kata.erofsmounts import (
    ErofsLayer,
    ErofsRootfs,
    erofs_mounts,
    is_erofs_rootfs,
    read_erofs_rootfs,
)
from kata.gpt import Partition, parse_gpt, place, write_gpt
from kata.mounts import Mount
from kata.vmdk import Extent, file_extents, parse_descriptor, write_descriptor

TOP, BASE = ErofsLayer("/s/8/layer.erofs"), ErofsLayer("/s/7/layer.erofs")
ROOT = "ab" * 32


def test_mounts_as_containerd_makes_them():
    assert erofs_mounts([TOP, BASE], "/s/9/rwlayer.img") == (
        Mount("ext4", "/s/9/rwlayer.img", ("rw", "loop")),
        Mount("erofs", "/s/8/layer.erofs", ("ro", "loop")),
        Mount("erofs", "/s/7/layer.erofs", ("ro", "loop")),
        Mount(
            "format/mkdir/overlay",
            "overlay",
            (
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                "lowerdir={{ overlay 1 2 }}",
            ),
        ),
    )
    assert erofs_mounts([TOP, BASE])[-1].options == ("lowerdir={{ overlay 0 1 }}",)
    assert erofs_mounts([TOP], "/rw")[-1].options[-1] == "lowerdir={{ mount 1 }}"


def test_a_merged_image_and_verity():
    merged = ErofsLayer("/s/8/fsmeta.erofs", devices=("/s/7/layer.erofs", "/s/8/layer.erofs"))
    words = ("ro", "loop", "device=/s/7/layer.erofs", "device=/s/8/layer.erofs")
    assert erofs_mounts([merged])[0] == Mount("erofs", "/s/8/fsmeta.erofs", words)
    checked = replace(TOP, dmverity="/s/8/.dmverity")
    assert erofs_mounts([checked, BASE])[0].options[-1] == "X-containerd.dmverity=/s/8/.dmverity"


@pytest.mark.parametrize("writable", ["", "/s/9/rwlayer.img"])
@pytest.mark.parametrize(
    "layers",
    [
        (TOP,),
        (TOP, BASE),
        (replace(TOP, dmverity="/s/8/.dmverity"), replace(BASE, dmverity="/s/7/.dmverity")),
        (ErofsLayer("/s/8/fsmeta.erofs", devices=("/s/7/layer.erofs",)),),
        tuple(ErofsLayer(f"/s/{number}/layer.erofs") for number in range(128)),
    ],
)
def test_mounts_are_read_as_they_are_written(layers, writable):
    mounts = erofs_mounts(layers, writable)
    mkdir = ("{{ mount 0 }}/upper:0755", "{{ mount 0 }}/work:0755") if writable else ()
    assert is_erofs_rootfs(mounts)
    expected = ErofsRootfs(layers, writable, mkdir)
    assert read_erofs_rootfs(mounts) == expected
    # Kata goes by types, whatever their case and place.
    turned = [mount._replace(type=mount.type.upper()) for mount in mounts]
    assert read_erofs_rootfs(turned[1:] + turned[:1]).writable == writable
    assert expected.guest_mkdir() == tuple(f"X-kata.mkdir.path={item}" for item in mkdir)


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [ErofsLayer(f"/s/{number}/layer.erofs") for number in range(129)],
        [ErofsLayer("layer.erofs")],
        [ErofsLayer("/s/../layer.erofs")],
        [ErofsLayer("/s/8/layer.erofs", dmverity="../.dmverity")],
        [ErofsLayer("/s/8/fsmeta.erofs", devices=("x",))],
        [ErofsLayer("/s/8/fsmeta.erofs", devices=("/x",)), BASE],
    ],
)
def test_layers_that_cannot_be(layers):
    with pytest.raises(OptionError):
        erofs_mounts(layers)


def test_lists_that_are_something_else():
    mounts = erofs_mounts([TOP, BASE], "/rw")
    for wrong in (
        mounts[:1],
        mounts[:2],
        mounts[:-1],
        mounts[3:],
        [mounts[0], *mounts],
        [*mounts, Mount("btrfs", "/x", ())],
        [mounts[1]._replace(options=("X-containerd.dmverity=/a", "X-containerd.dmverity=/b")),
         mounts[-1]],
    ):  # fmt: skip
        with pytest.raises(OptionError):
            read_erofs_rootfs(wrong)


def test_descriptor_text():
    extents = [Extent("/a/fsmeta.erofs", 8), *file_extents("/a/layer.erofs", (2 << 30) + 1)]
    assert write_descriptor(extents) == (
        "# Disk DescriptorFile\n"
        "version=1\n"
        "CID=fffffffe\n"
        "parentCID=ffffffff\n"
        'createType="twoGbMaxExtentFlat"\n'
        'RW 8 FLAT "/a/fsmeta.erofs" 0\n'
        'RW 4194304 FLAT "/a/layer.erofs" 0\n'
        'RW 1 FLAT "/a/layer.erofs" 4194304\n'
    )


@given(
    st.lists(
        st.builds(
            Extent,
            st.from_regex(r'\A/[^"\x00-\x1f]{1,20}\Z'),
            st.integers(1, 4194304),
            st.integers(0, 1 << 40),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_descriptors_are_read_as_they_are_written(extents):
    assert parse_descriptor(write_descriptor(extents)) == extents


@pytest.mark.parametrize(
    "extent",
    [Extent('/a" 0\nRW 1 FLAT "/etc/shadow', 1), Extent("/a\n", 1), Extent("", 1),
     Extent("/a", 0), Extent("/a", -1), Extent("/a", 4194305)],
)  # fmt: skip
def test_extents_that_would_be_read_as_others(extent):
    with pytest.raises(OptionError):
        write_descriptor([extent])
    with pytest.raises(OptionError):
        write_descriptor([])


def test_descriptors_of_other_kinds():
    text = write_descriptor([Extent("/a", 1)])
    for wrong in (
        "",
        "KDMV",
        text.replace("twoGbMaxExtentFlat", "monolithicSparse"),
        text.replace("FLAT", "SPARSE"),
        text + "RW x\n",
        text * 100_000,
    ):
        with pytest.raises(OptionError):
            parse_descriptor(wrong)


def test_bytes_of_a_table():
    partitions = place(["erofs-0-s8", "erofs-1-s7"], [10, 5000])
    assert partitions == [Partition("erofs-0-s8", 2048, 10), Partition("erofs-1-s7", 4096, 5000)]
    head = write_gpt(partitions)
    assert len(head) == 1 << 20
    assert head[510:512] == b"\x55\xaa"
    # Boot flag, type, first sector and length of the protective partition.
    assert (head[446], head[450]) == (0, 0xEE)
    assert struct.unpack("<II", head[454:462]) == (1, 9095)
    fields = struct.unpack("<8sIIIIQQQQ16sQIII", head[512:604])
    assert fields[:3] == (b"EFI PART", 0x10000, 92)
    # Own place, the second table's, first and last usable sector.
    assert fields[5:9] == (1, 9096, 2048, 9095)
    assert fields[10:13] == (2, 128, 128)
    assert fields[13] == zlib.crc32(head[1024 : 1024 + 16384])
    assert fields[3] == zlib.crc32(head[512:528] + bytes(4) + head[532:604])
    entry = head[1024:1152]
    assert entry[:16] == bytes.fromhex("af3dc60f838472478e793d69d8477de4")
    assert struct.unpack("<QQQ", entry[32:56]) == (2048, 2057, 0)
    assert entry[56:].decode("utf-16-le").rstrip("\0") == "erofs-0-s8"
    assert not any(head[1024 + 16384 :])


def test_a_table_depends_on_nothing_but_the_layers():
    partitions = place(["a", "b"], [1, 2])
    assert write_gpt(partitions) == write_gpt(list(partitions))
    assert hashlib.sha256(write_gpt(partitions)).hexdigest() == (
        "805ce40e61559db5b6b9f2854fb7734e0a477ec3743b4b5f4a5c7fd40c7427aa"
    )
    assert write_gpt(partitions) != write_gpt(place(["a", "c"], [1, 2]))


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=8))
@example([1] * 128)
def test_tables_are_read_as_they_are_written(sizes):
    partitions = place([f"erofs-{number}-s{size}" for number, size in enumerate(sizes)], sizes)
    assert all(partition.first % 2048 == 0 for partition in partitions)
    assert parse_gpt(write_gpt(partitions)) == partitions


def test_names_are_cut():
    (partition,) = place(["erofs-0-s" + "x" * 60], [1])
    assert len(partition.name) == 36
    assert parse_gpt(write_gpt([partition])) == [partition]


@pytest.mark.parametrize("sizes", [[], [0], [-1], [1] * 129])
def test_disks_that_cannot_be_partitioned(sizes):
    with pytest.raises(OptionError):
        place([str(number) for number in range(len(sizes))], sizes)


@given(st.data())
def test_a_changed_byte_of_a_table_is_found_or_means_nothing(data):
    partitions = place(["a", "b"], [10, 20])
    head = bytearray(write_gpt(partitions))
    place_of_byte = data.draw(st.integers(512, 1024 + 300))
    head[place_of_byte] ^= data.draw(st.integers(1, 255))
    try:
        assert parse_gpt(bytes(head)) == partitions
        assert 604 <= place_of_byte < 1024
    except FormatError:
        assert not 604 <= place_of_byte < 1024


@given(st.binary(max_size=2000))
def test_any_bytes_are_a_table_or_a_format_error(data):
    with pytest.raises(FormatError):
        parse_gpt(data)


def test_side_files():
    record = DmVerityFile(ROOT, 8192)
    assert record.pack() == f'{{"roothash":"{ROOT}","hashoffset":8192}}'.encode()
    assert DmVerityFile.parse(record.pack()) == record
    salted = replace(record, salt="00ff")
    assert DmVerityFile.parse(salted.pack()) == salted
    assert DmVerityFile.parse(b' {"hashoffset": 8192, "x": 1, "roothash": "%s"}\n' % ROOT.encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"roothash":"ab","hashoffset":8192}',
        b'{"hashoffset":8192}',
        b'{"roothash":"%s"}' % ROOT.encode(),
        b'{"roothash":"%s","hashoffset":"8192"}' % ROOT.encode(),
        b'{"roothash":"%s","hashoffset":0}' % ROOT.encode(),
        b'{"roothash":"%s","hashoffset":-4096}' % ROOT.encode(),
        b'{"roothash":"%s","hashoffset":8193}' % ROOT.encode(),
        b'{"roothash":"%s","hashoffset":8192,"salt":"0"}' % ROOT.encode(),
        b'{"roothash":"%s","hashoffset":8192,"salt":7}' % ROOT.encode(),
        b'{"roothash":"%s","hashoffset":8192}' % ROOT.encode() + b" " * (64 << 10),
    ],
)
def test_side_files_that_are_none(data):
    with pytest.raises(OptionError) as caught:
        DmVerityFile.parse(data)
    assert "\n" not in str(caught.value)


@pytest.fixture
def layer(tmp_path):
    """A layer of two blocks with room for a hash area, and its side file."""
    image, side = tmp_path / "layer.erofs", tmp_path / ".dmverity"
    image.write_bytes(b"d" * 8192 + bytes(8192))
    side.write_bytes(DmVerityFile(ROOT, 8192).pack())
    return image, side


def put_superblock(image, **fields):
    record = VeritySuperblock(**{"data_block_size": 4096, "hash_block_size": 4096, **fields})
    with image.open("r+b") as file:
        file.seek(8192)
        file.write(record.pack())


def test_where_the_salt_comes_from(layer):
    image, side = layer
    found = read_layer_verity(side, image)
    assert found == LayerVerity(ROOT, 8192, DEFAULT_SALT, has_superblock=False)
    assert found.parameters().table("/dev/x").endswith(f"4096 4096 2 2 sha256 {ROOT} {'00' * 32}")
    put_superblock(image, data_blocks=2, salt=b"\1\2")
    found = read_layer_verity(side, image)
    assert found == LayerVerity(ROOT, 8192, "0102", has_superblock=True)
    assert found.parameters().table("/dev/x").endswith(f"4096 4096 2 3 sha256 {ROOT} 0102")
    side.write_bytes(DmVerityFile(ROOT, 8192, "aa").pack())
    assert read_layer_verity(side, image).salt == "aa"
    put_superblock(image, data_blocks=16, data_block_size=512, hash_block_size=512)
    found = read_layer_verity(side, image)
    assert found.guest_options()[-2:] == (
        "X-kata.dmverity.blocksize=512",
        "X-kata.dmverity.hashsize=512",
    )
    assert found.parameters().data_blocks == 16


def test_layers_and_side_files_that_do_not_belong_together(layer, tmp_path):
    image, side = layer
    put_superblock(image, data_blocks=3)
    with pytest.raises(OptionError, match="end of the data"):
        read_layer_verity(side, image)
    put_superblock(image, data_blocks=2, data_block_size=4096)
    image.write_bytes(image.read_bytes()[:8200])
    with pytest.raises(OptionError, match="not in the layer"):
        read_layer_verity(side, image)
    with pytest.raises(OptionError, match="No such file"):
        read_layer_verity(tmp_path / "none", image)
    side.write_bytes(b"{}")
    with pytest.raises(OptionError, match=r"\.dmverity: roothash is missing"):
        read_layer_verity(side, image)


def test_words_for_the_agent():
    verity = LayerVerity(ROOT, 8192, "00ff", has_superblock=True)
    assert partition_options(3, verity) == (
        "X-kata.overlay-lower",
        "X-kata.multi-layer=true",
        "X-kata.gpt-partitioned=true",
        "X-kata.partition-number=3",
        "X-kata.dmverity-enabled=true",
        f"X-kata.dmverity.roothash={ROOT}",
        "X-kata.dmverity.hashoffset=8192",
        "X-kata.dmverity.no-superblock=false",
        "X-kata.dmverity.salt=00ff",
    )
    assert verity.device_name(3) == f"kata-verity-3-off8192-{ROOT[:32]}"


def make_layers(tmp_path, *sizes):
    layers = []
    for number, size in enumerate(sizes):
        path = tmp_path / str(number) / "layer.erofs"
        path.parent.mkdir()
        path.write_bytes(bytes([number + 1]) * size)
        layers.append(ErofsLayer(str(path)))
    return layers


def read_disk(disk):
    """Return what a VM reads: extents in a row, files padded to sectors."""
    content = b""
    for extent in parse_descriptor(disk.path.read_text()):
        with open(extent.path, "rb") as file:
            file.seek(extent.offset_sectors * 512)
            content += file.read(extent.sectors * 512).ljust(extent.sectors * 512, b"\0")
    return content


def test_one_layer_is_the_disk(tmp_path):
    (layer,) = make_layers(tmp_path, 5000)
    disk = make_disk(ErofsRootfs((layer,), mkdir=("/u:0755",)), tmp_path)
    assert (str(disk.path), disk.format, disk.partitions) == (layer.path, "raw", ())
    assert disk.options == (
        ("ro", "X-kata.overlay-lower", "X-kata.multi-layer=true", "X-kata.mkdir.path=/u:0755"),
    )


def test_a_merged_image_is_followed_by_its_devices(tmp_path):
    layers = make_layers(tmp_path, 4096, 700, 8192)
    merged = replace(layers[0], devices=(layers[1].path, layers[2].path))
    disk = make_disk(ErofsRootfs((merged,)), tmp_path)
    assert disk.format == "vmdk"
    assert read_disk(disk) == b"\1" * 4096 + (b"\2" * 700).ljust(1024, b"\0") + b"\3" * 8192
    with pytest.raises(OptionError, match="merged image"):
        make_disk(ErofsRootfs((replace(merged, dmverity="/x"),)), tmp_path)


def test_layers_are_partitions_of_one_disk(tmp_path):
    layers = make_layers(tmp_path, 5000, (1 << 20) + 1, 512)
    disk = make_disk(ErofsRootfs(tuple(layers), mkdir=("/u:0755",)), tmp_path)
    content = read_disk(disk)
    partitions = parse_gpt(content)
    assert tuple(partitions) == disk.partitions
    assert [partition.name for partition in partitions] == [
        "erofs-0-s0",
        "erofs-1-s1",
        "erofs-2-s2",
    ]
    assert len(content) == (partitions[-1].last + 1) * 512
    for number, partition in enumerate(partitions):
        data = content[partition.first * 512 : (partition.last + 1) * 512]
        size = (tmp_path / str(number) / "layer.erofs").stat().st_size
        assert data == (bytes([number + 1]) * size).ljust(len(data), b"\0")
    assert disk.options[0][-1] == "X-kata.mkdir.path=/u:0755"
    assert disk.options[2][-1] == "X-kata.partition-number=3"
    before = disk.path.read_bytes()
    assert make_disk(ErofsRootfs(tuple(layers)), tmp_path).path.read_bytes() == before
    assert not list(tmp_path.glob("tmp*"))


def test_verity_makes_a_partition_of_a_single_layer(tmp_path, layer):
    image, side = layer
    rootfs = ErofsRootfs((ErofsLayer(str(image), str(side)),))
    disk = make_disk(rootfs, tmp_path)
    assert len(disk.partitions) == 1
    assert "X-kata.dmverity-enabled=true" in disk.options[0]
    side.write_bytes(b"{}")
    with pytest.raises(OptionError, match="roothash"):
        make_disk(rootfs, tmp_path)


def test_layers_that_are_missing_or_empty(tmp_path):
    (tmp_path / "empty").touch()
    for path in ("none", "empty", "."):
        layer = ErofsLayer(str(tmp_path / path))
        for layers in ((layer,), (layer, layer)):
            with pytest.raises(OptionError):
                make_disk(ErofsRootfs(layers), tmp_path)
    assert not (tmp_path / "layers.vmdk").exists()
