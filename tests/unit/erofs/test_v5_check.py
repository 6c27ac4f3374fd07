"""What `check_image` finds in RAFS v5 bootstraps: one defect each."""

import struct

import pytest
import tinyv5

from erofs import InodeV5, Node, check_image, open_rafs
from erofs.__main__ import main as run_erofs
from erofs.digest import digest
from erofs.findings import ERROR, WARNING
from erofs.rafs import Compressor, Digester
from erofs.v5.layout import ExtendedBlob


def findings(data):
    return list(check_image(open_rafs(bytes(data))))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compressor": Compressor.LZ4_BLOCK, "digester": Digester.BLAKE3, "extended": False},
        {"early": True, "digester": Digester.BLAKE3},
        {"aligned": True, "compressor": Compressor.ZSTD},
    ],
)
def test_sound_images_have_no_findings(options):
    image = tinyv5.everything(**options)
    assert findings(image.finish([image.root, image.root.entries[b"small"]])) == []
    assert findings(tinyv5.TinyV5(**options).finish()) == []


def patch(data, index, *, resign=False, **fields):
    """Change fields of a record; `resign` then gives the root the digest of its content."""
    data = bytearray(data)
    inode = InodeV5(open_rafs(bytes(data)), index)
    raw = inode.record._replace(**fields).pack()
    data[inode.offset : inode.offset + len(raw)] = raw
    if resign:
        image = open_rafs(bytes(data))
        root = image.root
        below = b"".join(bytes(image.stored_digest(index)) for index in root.child_indexes())
        data[root.offset : root.offset + 32] = digest(image.digester, below)
    return bytes(data)


def found(path, **fields):
    data = tinyv5.everything().finish()
    return findings(patch(data, open_rafs(data).lookup(path).index, **fields))


@pytest.mark.parametrize(
    ("path", "fields", "severity", "what"),
    [
        (b"/small", {"nlink": 0}, ERROR, "link count of 0"),
        (b"/null", {"nlink": 2}, WARNING, "link count: expected 1, got 2"),
        (b"/dir", {"nlink": 5}, WARNING, "link count: expected 2, got 5"),
        (b"/null", {"mtime_nsec": 10**9}, WARNING, "impossible nanoseconds"),
        (b"/null", {"parent": 4}, ERROR, "parent: expected 1, got 4"),
        (b"/dir/nested", {"parent": 1}, ERROR, "parent: expected 2, got 1"),
        (b"/hollow", {"digest": bytes(32), "resign": True}, ERROR, "inode digest: expected "),
        (b"/link", {"digest": bytes(32), "resign": True}, ERROR, "inode digest: expected "),
        (b"/marked", {"digest": bytes(32), "resign": True}, ERROR, "inode digest: expected "),
        (b"/", {"digest": b"\1" * 32}, ERROR, f"got {'01' * 32}"),
        (b"/null", {"mode": 0}, ERROR, "inode of unknown type"),
        (b"/two chunks", {"size": 1}, ERROR, "number of chunks"),
    ],
)
def test_one_defect(path, fields, severity, what):
    assert any(f.severity == severity and what in f.what for f in found(path, **fields))


def test_a_directory_that_cannot_be_read_does_not_end_the_check():
    data = tinyv5.everything().finish()
    image = open_rafs(data)
    data = patch(data, image.lookup(b"/dir").index, child_count=1 << 20)
    data = patch(data, image.lookup(b"/null").index, nlink=7)
    texts = [str(finding) for finding in findings(data)]
    assert any("content of a directory outside" in text for text in texts)
    assert any("link count: expected 1, got 7" in text for text in texts)


def test_digests_stand_for_each_other():
    """A chunk digest that changes is found in the file, not above."""
    data = bytearray(tinyv5.everything().finish())
    image = open_rafs(bytes(data))
    data[image.lookup(b"/two chunks").offset + 128 + 16] ^= 1
    (finding,) = [f for f in findings(data) if "digest" in f.what]
    assert finding.path == b"/two chunks"


def test_names_out_of_order_and_twice():
    image = tinyv5.TinyV5()
    for name in (b"aa", b"bb", b"cc"):
        image.root.entries[name] = image.file(b"")
    data = bytearray(image.finish())
    offset = open_rafs(bytes(data)).lookup(b"/bb").offset + 128
    data[offset : offset + 2] = b"zz"
    assert [f.what for f in findings(data)] == ["name b'cc' behind b'zz'"]
    data[offset : offset + 2] = b"aa"
    assert [f.what for f in findings(data)] == ["name b'aa' twice in the directory"]


def test_further_names_say_what_the_inode_says():
    data = tinyv5.everything().finish()
    image = open_rafs(data)
    names = [InodeV5(image, index) for index in range(1, image.name_count + 1)]
    further = next(name for name in names if name.nid != name.index)
    assert findings(patch(data, further.index, mtime=99)) == []
    (finding,) = findings(patch(data, further.index, uid=99))
    assert finding.what == f"not the same as inode {further.nid}"


def test_entries_of_two_directories():
    image = tinyv5.TinyV5()
    for name in (b"a", b"b"):
        image.root.entries[name] = Node.directory()
    image.root.entries[b"b"].entries[b"x"] = image.file(b"")
    data = image.finish()
    record = open_rafs(data).lookup(b"/b").record
    taken = {"child_index": record.child_index, "child_count": 1, "digest": record.digest}
    texts = [f.what for f in findings(patch(data, 2, resign=True, **taken))]
    assert "directory shares its entries with another one" in texts


def test_xattr_twice_and_without_the_flag():
    image = tinyv5.TinyV5()
    image.root.entries[b"f"] = image.file(b"", xattrs={b"user.a": b"1", b"user.b": b"2"})
    data = bytearray(image.finish())
    assert findings(data) == []
    place = data.index(b"user.b")
    data[place : place + 6] = b"user.a"
    assert [f.what for f in findings(data)] == ["xattr b'user.a' twice"]
    data[place : place + 6] = b"user.b"
    data[16] &= ~0x20
    (finding,) = findings(data)
    assert "no flag that says so" in finding.what


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        (36, 0x2, "chunk 0: unknown flags 0x2"),
        (36, 0x4, "chunk 0: unknown flags 0x4"),
        (40, 0, "chunk 0: no stored bytes"),
        (40, 5, "chunk 0: two sizes, but not compressed"),
        (48, 1 << 20, "chunk 0: ends behind its blob, stored at 0x100000"),
        (56, 1 << 20, "chunk 0: ends behind its blob, at 0x100000"),
        (72, 77, "chunk 0: index 77 of a blob with 6 chunks"),
    ],
)
def test_chunks_against_the_extended_table(field, value, what):
    data = bytearray(tinyv5.everything().finish())
    inode = open_rafs(bytes(data)).lookup(b"/marked")
    place = inode.offset + 128 + 8 + 40 + field
    data[place : place + 4] = struct.pack("<I", value)
    assert [f.what for f in findings(data)] == [what]


def test_blob_ids():
    image = tinyv5.everything()
    image.blob_id = b"\xff" * 64
    (finding,) = findings(image.finish())
    assert "not printable ASCII" in finding.what


def test_counts_and_prefetch():
    image = tinyv5.everything()
    data = bytearray(image.finish([image.root]))
    start = open_rafs(bytes(data)).tables.prefetch_offset
    data[start : start + 4] = struct.pack("<I", 1000)
    assert [f.what for f in findings(data)] == [
        "prefetch table names inode 1000, which is not in the tree"
    ]
    data[start : start + 4] = bytes(4)
    assert findings(data) == []
    # Builders up to 2.1 did not count the root.
    for less, expected in ((1, []), (2, [WARNING])):
        changed = bytearray(data)
        changed[24] -= less
        assert [f.severity for f in findings(changed)] == expected


def test_no_extended_table_no_sizes_to_keep():
    data = bytearray(tinyv5.everything(extended=False).finish())
    inode = open_rafs(bytes(data)).lookup(b"/marked")
    place = inode.offset + 128 + 8 + 40 + 48
    data[place : place + 4] = struct.pack("<I", 1 << 20)
    assert findings(data) == []
    assert ExtendedBlob(0, 0, 0, 0).pack() == bytes(64)


def test_the_target_that_linux_does_not_follow():
    for target in (b"a\0b", b"a" * 4096):
        image = tinyv5.TinyV5()
        image.root.entries[b"l"] = Node(0o120777, target=target)
        (finding,) = findings(image.finish())
        assert finding.what == "symlink target that Linux does not follow"


def test_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "boot"
    data = tinyv5.everything().finish()
    path.write_bytes(data)
    assert run_erofs(["check", str(path)]) == 0
    assert capsys.readouterr().out == ""
    path.write_bytes(patch(data, 1, digest=bytes(32)))
    assert run_erofs(["check", str(path)]) == 1
    assert "error: /, offset 0x20c8: inode digest" in capsys.readouterr().out
    path.write_bytes(bytes(9000))
    assert run_erofs(["check", str(path)]) == 1
    assert "not an EROFS image" in capsys.readouterr().err
