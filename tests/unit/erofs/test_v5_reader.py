"""RAFS v5 images of our own making: what is read, and what is refused."""

import stat
import struct

import pytest
import tinyv5
from tiny import TinyImage

from erofs import (
    BadMagic,
    Bootstrap,
    BootstrapV5,
    CorruptStructure,
    FormatError,
    InodeV5,
    Node,
    OutOfBounds,
    UnsupportedFeature,
    load_tree,
    open_bootstrap,
    open_rafs,
)
from erofs.rafs import BlobFeatures, Compressor, Digester, SuperFlags
from erofs.v5.layout import (
    BlobName,
    InodeFlags,
    SuperblockV5,
    pack_blob_table,
    parse_blob_table,
)
from erofs.view import View


def opened(image, **options):
    return open_rafs(image.finish(**options))


def same_tree(left, right):
    """Compare trees by names, attributes and what is shared, both ways."""
    twins = {}
    stack = [(left, right)]
    while stack:
        one, other = stack.pop()
        if id(one) in twins:
            assert twins[id(one)] is other
            continue
        twins[id(one)] = other
        for field in ("mode", "uid", "gid", "mtime", "mtime_nsec", "rdev", "target", "xattrs"):
            assert getattr(one, field) == getattr(other, field), field
        assert [c.info()._replace(file_offset=0) for c in one.chunks] == [
            c.info()._replace(file_offset=0) for c in other.chunks
        ]
        assert one.is_dir == other.is_dir
        if one.is_dir:
            assert sorted(one.entries) == list(other.entries)
            stack += [(child, other.entries[name]) for name, child in one.entries.items()]
        elif stat.S_ISREG(one.mode):
            assert one.size == other.size
    assert len({id(node) for node in twins.values()}) == len(twins)


EVERY = [
    {},
    {"compressor": Compressor.ZSTD, "digester": Digester.BLAKE3},
    {"aligned": True, "extended": False},
    {"early": True, "compressor": Compressor.LZ4_BLOCK, "digester": Digester.BLAKE3},
]


@pytest.mark.parametrize("options", EVERY)
def test_what_is_written_is_what_is_read(options):
    image = tinyv5.everything(**options)
    bootstrap = opened(image)
    assert isinstance(bootstrap, BootstrapV5)
    same_tree(image.root, load_tree(bootstrap))
    assert bootstrap.version == 5
    assert not bootstrap.is_tarfs
    assert bootstrap.is_early == image.early
    assert bootstrap.compressor is image.compressor
    assert bootstrap.digester is image.digester
    assert bootstrap.inode_count == len(image.inos)


def test_interface_of_images_and_inodes():
    image = tinyv5.everything()
    image.readahead = (4096, 8192)
    entries = image.root.entries
    bootstrap = opened(image, prefetch=[entries[b"dir"], entries[b"small"]])
    (blob,) = bootstrap.blobs
    assert (blob.id, blob.chunk_count) == ("5" * 64, len(image.chunks))
    assert (blob.compressed_size, blob.uncompressed_size) == (
        len(image.blob),
        image.uncompressed_size,
    )
    assert bootstrap.blob_hints == ((0, 4096, 8192),)
    nids = [bootstrap.lookup(path).nid for path in (b"/dir", b"small")]
    assert list(bootstrap.prefetch_nids) == nids
    assert bootstrap.tables.prefetch_entries == 2
    small = bootstrap.lookup(b"/dir/./linked too")
    assert (small.nlink, small.mtime, small.mtime_nsec, small.sectors) == (3, -5, 7, 1)
    assert small.nid == small.index == bootstrap.lookup(b"/linked").nid
    assert bootstrap.lookup(b"/dir/linked") is None
    assert bootstrap.lookup(b"/small/below") is None
    assert bootstrap.lookup(b"/link").readlink() == b"dir/nested"
    assert bootstrap.lookup(b"/null").rdev == 0x103
    assert bootstrap.lookup(b"/fifo").rdev == 0
    assert bootstrap.lookup(b"/marked").xattrs() == {b"user.a": b"1", b"trusted.b": b"\0\xff"}
    with pytest.raises(CorruptStructure, match="not a directory"):
        list(small.entries())
    with pytest.raises(CorruptStructure, match="not a symbolic link"):
        small.readlink()
    walked = [path for path, _ in bootstrap.walk()]
    assert walked[:2] == [b"/", b"/dir"]
    assert len(walked) == 15


def test_every_name_is_found():
    image = tinyv5.TinyV5()
    names = [b"%03d" % number for number in range(300)]
    for name in names:
        image.root.entries[name] = image.file(name)
    root = opened(image).root
    assert all(root.lookup(name).name == name for name in names)
    assert not any(root.lookup(name + b"x") or root.lookup(name[:-1]) for name in names)


def test_image_without_data():
    image = tinyv5.TinyV5()
    image.root.entries[b"link"] = Node(stat.S_IFLNK | 0o777, target=b"nowhere")
    bootstrap = opened(image)
    assert bootstrap.blobs == bootstrap.prefetch_nids == ()


def test_no_blob_sizes_without_the_extended_table():
    (blob,) = opened(tinyv5.everything(extended=False)).blobs
    assert (blob.chunk_count, blob.compressed_size, blob.uncompressed_size) == (0, 0, 0)


def test_defaults_of_the_superblock_flags():
    data = bytearray(tinyv5.everything().finish())
    data[16:24] = bytes(8)
    bootstrap = open_rafs(bytes(data))
    assert bootstrap.compressor is Compressor.LZ4_BLOCK
    assert bootstrap.digester is Digester.BLAKE3


def test_blob_table():
    names = [BlobName(1, 2, b"first"), BlobName(0, 0, b"x" * 64), BlobName(5, 6, b"last")]
    table = pack_blob_table(names)
    assert len(table) % 8 == 0
    assert parse_blob_table(memoryview(table)) == names
    assert parse_blob_table(memoryview(b"")) == []


def test_path_bytes_and_the_other_version(tmp_path):
    data = tinyv5.everything().finish()
    path = tmp_path / "boot"
    path.write_bytes(data)
    with open_rafs(path) as image:
        assert isinstance(image, BootstrapV5)
        assert image.lookup(b"/dir/nested").size == 6
    with pytest.raises(BadMagic, match="not an EROFS image"):
        open_bootstrap(path)
    v6 = tmp_path / "v6"
    v6.write_bytes(TinyImage().finish())
    with open_rafs(v6) as image:
        assert isinstance(image, Bootstrap)
    path.write_bytes(data[:8192])
    with pytest.raises(FormatError, match="boot"):
        open_rafs(path)


def superblock(data, **fields):
    """Change fields of the superblock."""
    changed = SuperblockV5.parse(View(data))._replace(**fields)
    return changed.pack() + bytes(data[8192:])


@pytest.mark.parametrize(
    ("fields", "kind", "what"),
    [
        ({"version": 0x400}, BadMagic, "not an EROFS image"),
        ({"sb_size": 4096}, CorruptStructure, "size of the superblock"),
        ({"block_size": 0x3000}, CorruptStructure, "chunk size"),
        ({"block_size": 0x800}, CorruptStructure, "chunk size"),
        ({"block_size": 1 << 25}, CorruptStructure, "chunk size"),
        ({"flags": 1 << 40}, UnsupportedFeature, "flags"),
        ({"flags": SuperFlags.TARTFS_MODE}, UnsupportedFeature, "flags"),
        ({"flags": SuperFlags.ENCRYPTION_ASE_128_XTS}, UnsupportedFeature, "flags"),
        ({"flags": 0x3}, CorruptStructure, "more than one compressor"),
        ({"flags": 0xC}, CorruptStructure, "more than one digest"),
        ({"inodes_count": 1000}, CorruptStructure, "more inodes than names"),
        ({"inode_table_entries": 0, "inodes_count": 0}, CorruptStructure, "no inodes"),
        ({"inode_table_entries": 1 << 31}, OutOfBounds, "inode table at an impossible place"),
        ({"inode_table_offset": 4096}, OutOfBounds, "inode table at an impossible place"),
        ({"blob_table_offset": 8193}, OutOfBounds, "blob table at an impossible place"),
        ({"blob_table_offset": 8192}, CorruptStructure, "overlap"),
        ({"extended_blob_table_offset": 1 << 62}, OutOfBounds, "extended blob table"),
        ({"extended_blob_table_entries": 1 << 30}, OutOfBounds, "extended blob table"),
        ({"prefetch_table_entries": 1 << 30}, OutOfBounds, "prefetch table"),
    ],
)
def test_superblocks_that_are_refused(fields, kind, what):
    data = superblock(tinyv5.everything().finish(), **fields)
    with pytest.raises(kind, match=what):
        open_rafs(data)


def test_lengths_that_are_refused():
    data = tinyv5.everything().finish()
    for length in (0, 7, 8, 100, 8191, 8192, len(data) - 1):
        with pytest.raises(FormatError):
            open_rafs(data[:length])
    with pytest.raises(OutOfBounds, match="impossible length"):
        open_rafs(data + b"1234")


def test_extended_table_that_is_too_short():
    image = tinyv5.everything()
    data = image.finish()
    table = pack_blob_table([BlobName(0, 0, b"a" * 20), BlobName(0, 0, b"b" * 35)])
    start = open_rafs(data).tables.blob_offset
    assert len(table) == open_rafs(data).tables.blob_size
    with pytest.raises(CorruptStructure, match="without this blob"):
        open_rafs(data[:start] + table + data[start + len(table) :])


def test_blob_of_impossible_size():
    data = bytearray(tinyv5.everything().finish())
    start = open_rafs(bytes(data)).superblock.extended_blob_table_offset
    data[start + 8 : start + 16] = b"\xff" * 8
    with pytest.raises(OutOfBounds, match="impossible sizes of a blob"):
        open_rafs(bytes(data))


def test_no_blob_without_digests():
    data = bytearray(tinyv5.everything().finish())
    start = open_rafs(bytes(data)).superblock.extended_blob_table_offset
    data[start + 4] = BlobFeatures.TARFS
    with pytest.raises(CorruptStructure, match="tar as a blob"):
        open_rafs(bytes(data))


def patched(path, at=0, **fields):
    """Return an image with fields of one record changed, or bytes `at` an offset behind it."""
    data = bytearray(tinyv5.everything().finish())
    bootstrap = open_rafs(bytes(data))
    inode = bootstrap.lookup(path)
    new = fields.pop("raw", None)
    if new is not None:
        data[inode.offset + at : inode.offset + at + len(new)] = new
    record = inode.record._replace(**fields).pack()
    data[inode.offset : inode.offset + len(record)] = record
    return bytes(data), inode.index


def read_inode(image, index):
    inode = InodeV5(image, index)
    return list(inode.file_chunks()) if inode.is_regular else inode.readlink()


@pytest.mark.parametrize(
    ("path", "fields", "what"),
    [
        (b"/small", {"mode": 0o170644}, "unknown type"),
        (b"/small", {"mode": 1 << 16 | stat.S_IFREG}, "unknown type"),
        (b"/small", {"size": 1 << 63}, "negative file size"),
        (b"/small", {"name_size": 0}, "impossible file name"),
        (b"/small", {"name_size": 257}, "impossible file name"),
        (b"/small", {"ino": 0}, "inode number of a name"),
        (b"/small", {"ino": 1 << 40}, "inode number of a name"),
        (b"/dir", {"ino": 1}, "inode number of a name"),
        (b"/dir", {"child_index": 1}, "content of a directory"),
        (b"/dir", {"child_count": 100}, "content of a directory"),
        (b"/small", {"child_count": 1 << 31}, "inode with its chunks"),
        (b"/small", {"flags": 4}, "xattr area"),
        (b"/small", {"child_count": 0}, "number of chunks: expected 1, got 0"),
        (b"/small", {"size": 4097}, "number of chunks: expected 2, got 1"),
        (b"/small", {"size": 15}, "file offset and size of a chunk"),
        (b"/link", {"symlink_size": 0}, "to nowhere"),
    ],
)
def test_inodes_that_are_refused(path, fields, what):
    data, index = patched(path, **fields)
    image = open_rafs(data)
    with pytest.raises(FormatError, match=what):
        load_tree(image)
    with pytest.raises(FormatError, match=what):
        read_inode(image, index)


def test_files_with_holes_are_another_matter():
    data, index = patched(b"/small", size=8000, flags=InodeFlags.HAS_HOLE)
    with pytest.raises(UnsupportedFeature, match="holes"):
        list(open_rafs(data).inode(index).file_chunks())


@pytest.mark.parametrize(
    ("name", "what"),
    [(b"a/b", "impossible file name"), (b"a\0", "impossible file name"), (b"..", "reserved")],
)
def test_names_that_are_refused(name, what):
    data, _ = patched(b"/fifo", at=128, raw=name.ljust(4, b"x"), name_size=len(name))
    with pytest.raises(CorruptStructure, match=what):
        list(open_rafs(data).root.entries())


@pytest.mark.parametrize(
    ("at", "raw", "what"),
    [
        (136, b"\xff\xff", "xattr area outside"),
        (144, b"\xff\xff", "xattr outside of its area"),
        (148, b"user.a.1", "xattr outside|without a name"),
        (148, b"\0", "xattr without a name"),
        (136, b"\x02", "xattr outside"),
    ],
)
def test_xattrs_that_are_refused(at, raw, what):
    data, index = patched(b"/marked", at=at, raw=raw)
    with pytest.raises(FormatError, match=what):
        open_rafs(data).inode(index).xattrs()


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        (32, 1, "chunk of a blob that is not in the table"),
        (44, 3, "file offset and size of a chunk"),
        (64, 4096, "file offset and size of a chunk"),
        (48, 0, "two chunks at one place"),
    ],
)
def test_chunks_that_are_refused(field, value, what):
    data, index = patched(b"/marked", at=128 + 8 + 40 + field, raw=struct.pack("<I", value))
    image = open_rafs(data)
    assert len(list(image.lookup(b"/small").file_chunks())) == 1
    with pytest.raises(CorruptStructure, match=what) as raised:
        list(image.inode(index).file_chunks())
    assert raised.value.where["chunk"] == 0


def test_inode_table_is_checked():
    data = bytearray(tinyv5.everything().finish())
    image = open_rafs(bytes(data))
    for index in (0, image.name_count + 1, 1 << 31):
        with pytest.raises(OutOfBounds, match="no such inode"):
            image.inode(index)
    data[8192 + 4 : 8192 + 8] = struct.pack("<I", 8192 >> 3)
    with pytest.raises(OutOfBounds, match="inside of the superblock"):
        open_rafs(bytes(data)).inode(2)
    data[8192 + 4 : 8192 + 8] = b"\xff" * 4
    with pytest.raises(OutOfBounds):
        open_rafs(bytes(data)).inode(2)
    data[8192:8196] = data[8200:8204]
    with pytest.raises(CorruptStructure, match="root is not a directory"):
        open_rafs(bytes(data))


def test_further_name_is_not_an_inode():
    image = opened(tinyv5.everything())
    names = [InodeV5(image, index) for index in range(1, image.name_count + 1)]
    further = [name for name in names if name.nid != name.index]
    assert len(further) == 2
    with pytest.raises(CorruptStructure, match="further name"):
        image.inode(further[0].index)


def test_directories_that_share_their_entries():
    image = tinyv5.TinyV5()
    for number in range(40):
        image.root.entries[b"d%02d" % number] = Node.directory()
    last = Node.directory()
    image.root.entries[b"z"] = last
    for number in range(200):
        last.entries[b"%03d" % number] = image.file(b"")
    data = bytearray(image.finish())
    bootstrap = open_rafs(bytes(data))
    record = bootstrap.lookup(b"/z").record
    for number in range(40):
        inode = bootstrap.lookup(b"/d%02d" % number)
        raw = inode.record._replace(
            child_index=record.child_index, child_count=record.child_count
        ).pack()
        data[inode.offset : inode.offset + len(raw)] = raw
    for read in (load_tree, lambda image: list(image.walk())):
        with pytest.raises(CorruptStructure, match="share their data"):
            read(open_rafs(bytes(data)))
