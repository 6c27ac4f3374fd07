import stat

import pytest
import tiny

from erofs import CorruptStructure, Node, open_bootstrap, write_bootstrap
from erofs.tree import iter_names, split_xattr_name, validate


def _with(name=b"x", **fields):
    image = tiny.TinyImage()
    node = image.file(b"content", **fields)
    image.root.entries[name] = node
    image.finish()
    return image, node


def _refused(image, match):
    with pytest.raises(CorruptStructure, match=match) as caught:
        write_bootstrap(image.spec)
    return caught.value


@pytest.mark.parametrize("name", [b"", b"n" * 256, b"a/b", b"a\0b", b".", b".."])
def test_names(name):
    image, node = _with()
    image.root.entries[name] = node
    assert _refused(image, "file name").where["entry"] == b"/" + name


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mode": 0o644}, "file type"),
        ({"mode": 0x1_0000 | stat.S_IFREG}, "file type"),
        ({"mode": stat.S_IFDIR}, "directory without children"),
        ({"children": {}}, "children without a directory"),
        ({"mtime_nsec": 1_000_000_000}, "time"),
        ({"mtime_nsec": -1}, "time"),
        ({"rdev": 1 << 32}, "device number"),
        ({"uid": 1 << 32}, "owner"),
        ({"gid": -1}, "owner"),
        ({"size": -1}, "file size"),
        ({"size": 1 << 63}, "file size"),
        ({"size": 4097}, "number of chunks: expected 2, got 1"),
        ({"xattrs": {b"lustre.x": b""}}, "cannot hold"),
        ({"xattrs": {b"system.posix_acl_access2": b""}}, "cannot hold"),
        ({"xattrs": {b"user." + b"n" * 251: b""}}, "Linux cannot hold"),
        ({"xattrs": {b"user.a\0trusted.b": b""}}, "Linux cannot hold"),
        ({"xattrs": {b"user.a": bytes(65536)}}, "too long"),
        ({"xattrs": {b"user.%d" % n: bytes(65535) for n in range(4)}}, "too long together"),
    ],
)
def test_nodes(changes, match):
    image, node = _with()
    for field, value in changes.items():
        setattr(node, field, value)
    assert _refused(image, match).where["entry"] == b"/x"


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("blob_index", 1, "not in the table"),
        ("blob_index", -1, "not in the table"),
        ("uncompressed_offset", 5, "impossible place"),
        ("uncompressed_offset", 0xFFFFFFFF << 12, "impossible place"),
        ("chunk_index", 1 << 24, "impossible place"),
    ],
)
def test_chunks(field, value, match):
    image, node = _with()
    setattr(node.chunks[0], field, value)
    _refused(image, match)


@pytest.mark.parametrize("target", [b"", b"t" * 4096, b"a\0b"])
def test_symlink_targets(target):
    image, _ = _with()
    image.root.entries[b"link"] = tiny.symlink(target)
    _refused(image, "symlink")


def test_root_and_blobs():
    image, node = _with()
    with pytest.raises(CorruptStructure, match="root"):
        validate(node, image.spec.blobs, 4096)
    with pytest.raises(CorruptStructure, match="too many blobs"):
        validate(image.root, image.spec.blobs * 255, 4096)


def test_the_longest_xattrs_that_fit():
    image, node = _with()
    node.xattrs = {b"user.%d" % n: bytes(65528) for n in range(3)} | {b"user.3": bytes(65518)}
    assert open_bootstrap(write_bootstrap(image.spec)).lookup(b"/x").xattrs() == node.xattrs
    node.xattrs |= {b"trusted.x": b""}
    _refused(image, "too long together")


def test_blobs_that_block_numbers_cannot_place():
    image, _ = _with()
    huge = image.entry._replace(uncompressed_size=(1 << 43) - (1 << 31))
    validate(image.root, [huge, huge], 4096)
    with pytest.raises(CorruptStructure, match="blobs too large"):
        validate(image.root, [huge, huge, huge], 4096)


def test_directory_under_two_names():
    image, _ = _with()
    directory = Node.directory()
    image.root.entries[b"a"] = image.root.entries[b"b"] = directory
    _refused(image, "two names")


def test_what_validation_counts():
    image = tiny.everything()
    image.finish()
    tree = validate(image.root, image.spec.blobs, 4096)
    assert tree.has_xattr
    assert tree.names == len(list(iter_names(image.root))) == 46


def test_xattr_prefixes():
    assert split_xattr_name(b"system.posix_acl_default") == (3, b"")
    assert split_xattr_name(b"trusted.overlay.opaque") == (4, b"overlay.opaque")


def test_entries_of_a_file():
    with pytest.raises(CorruptStructure):
        _ = Node(stat.S_IFREG).entries
