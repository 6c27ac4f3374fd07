"""`nydus-image` on RAFS v5: read by every command, written by none."""

import io
import json
import tarfile

import pytest
import tinyv5

from builder import BuildError, MergeOptions, merge
from builder.cli import main
from builder.datacheck import check_data
from builder.merge import InconsistentLayers
from erofs import load_tree, open_rafs
from erofs.rafs import Compressor
from erofs.view import View
from tests.fakes.built import built, member, tar_of

CREATE = ["create", "--type", "tar-rafs", "-B", "out", "-D", "."]


@pytest.fixture
def boot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = tinyv5.everything(compressor=Compressor.ZSTD)
    image.readahead = (1, 2)
    path = tmp_path / "boot"
    path.write_bytes(image.finish([image.root.entries[b"small"]]))
    (tmp_path / tinyv5.BLOB_ID.decode()).write_bytes(image.blob)
    return path


def inspect(boot, capsys, request):
    assert main(["inspect", str(boot), "-R", request]) == 0
    out, err = capsys.readouterr()
    assert "RAFS v5 super block features: HASH_SHA256 | EXPLICIT_UID_GID" in err
    return out


def test_inspect(boot, capsys):
    assert json.loads(inspect(boot, capsys, "stats")) == {"inodes_count": 13}
    (blob,) = json.loads(inspect(boot, capsys, "blobs"))
    assert (blob["readahead_offset"], blob["readahead_size"]) == (1, 2)
    assert blob["decompressed_size"] == 4096 + 4 + 14 + 1 + 6 + 9
    (hint,) = json.loads(inspect(boot, capsys, "prefetch"))
    assert hint == {"inode": 7, "path": ["/dir/linked too", "/linked", "/small"]}
    listed = inspect(boot, capsys, "ls").splitlines()
    assert listed[0] == 'd    2        "dir"'
    text = inspect(boot, capsys, "stat small")
    assert "Inode Number:       7\n" in text
    assert "Mtime:              18446744073709551611\n" in text
    assert "chunk index: 0\n" in text
    assert text.endswith("null")
    assert inspect(boot, capsys, "icheck 7").count("Nlink:              3") == 3
    assert inspect(boot, capsys, "chunk 0").count("File: ") == 3


def test_inspect_shell(boot, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"stats\nblobs\ncd dir\nls\nq\n")))
    assert main(["inspect", str(boot)]) == 0
    out = capsys.readouterr().out
    for line in (
        "    Version:                5\n",
        "    Root Inode:             1\n",
        "    Chunk table offset:     0x0\n",
        "Features:               (empty)\n",
        "Prefetch Table Offset:  1\n",
        "Prefetch Table Size:    2\n",
        "Compressor:             zstd\n",
    ):
        assert line in out
    assert '"nested"' in out


def test_check(boot, capsys, tmp_path):
    report = tmp_path / "report.json"
    assert main(["check", str(boot), "-v", "-J", str(report), "-D", ".", "--data"]) == 0
    out = capsys.readouterr().out
    assert (
        'inode: dir "/dir": index 0 ino 2 real_ino 2 child_index 13 child_count 3 i_nlink 2'
        " i_size 4096 i_blocks 0 i_name_size 3 i_symlink_size 0 has_xattr false link None"
        " i_mtime 0 i_mtime_nsec 0\n"
    ) in out
    assert 'link Some("dir/nested")' in out
    assert "i_symlink_size 10" in out
    assert out.count("inode: hardlink") == 3
    assert ", uncompressed size 4130, chunk size: 4096, chunk count: 6, features: \n" in out
    content = json.loads(report.read_text())
    assert (content["fs_version"], content["compressor"]) == ("5", "zstd")


def test_check_finds_a_wrong_digest_in_the_metadata(boot, capsys):
    data = bytearray(boot.read_bytes())
    with open_rafs(boot) as image:
        data[image.lookup(b"/dir/nested").offset] ^= 1
    boot.write_bytes(data)
    assert main(["check", str(boot)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Error: /dir/nested, offset" in err
    assert "inode digest: expected" in err


def test_check_finds_a_wrong_chunk(boot, tmp_path, capsys):
    blob = tmp_path / tinyv5.BLOB_ID.decode()
    data = bytearray(blob.read_bytes())
    data[3] ^= 1
    blob.write_bytes(data)
    assert main(["check", str(boot), "-D", "."]) == 0
    assert main(["check", str(boot), "-D", ".", "--data"]) == 1
    err = capsys.readouterr().err
    assert f"Error: blob {blob.name}: offset 0x0: chunk 0: " in err
    blob.write_bytes(data[:-1])
    assert main(["check", str(boot), "-D", ".", "--data"]) == 1
    assert "stored blob is too short" in capsys.readouterr().err
    blob.unlink()
    assert main(["check", str(boot), "-D", ".", "--data"]) == 1
    assert "no such blob" in capsys.readouterr().err


def test_data_of_each_chunk_is_read_once(boot):
    class Counting(View):
        reads = 0

        def read_at(self, offset, length):
            self.reads += 1
            return super().read_at(offset, length)

    with open_rafs(boot) as image:
        blob = Counting((boot.parent / image.blobs[0].id).read_bytes())
        provider = type("Provider", (), {"open": lambda self, blob_id: blob})()
        assert list(check_data(image, [image.blobs[0].id], provider)) == []
        assert blob.reads == image.blobs[0].chunk_count == 6


def test_unpacked_and_created_again_it_is_v6(boot, tmp_path):
    """The way to a v6 image that others can use, too."""
    assert main(["unpack", str(boot), "-D", ".", "--output", "tar"]) == 0
    with tarfile.open("tar") as archive:
        assert archive.extractfile("small").read() == b"small content\n"
        assert archive.getmember("small").linkname == "linked"
    assert main([*CREATE, "--chunk-size", "0x1000", "--digester", "sha256", "tar"]) == 0
    with open_rafs(boot) as old, open_rafs(tmp_path / "out") as new:
        assert new.version == 6
        assert [path for path, _ in old.walk()] == [path for path, _ in new.walk()]
        left, right = load_tree(old), load_tree(new)
        assert left.entries[b"marked"].xattrs == right.entries[b"marked"].xattrs
        digests = [[c.digest for c in t.entries[b"two chunks"].chunks] for t in (left, right)]
        assert len(digests[0]) == 2
        assert digests[0] == digests[1]


def test_create_refuses_to_write_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tar").write_bytes(tar_of(member("f")))
    assert main([*CREATE, "--fs-version", "5", "tar"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Error: RAFS v5 is not written, only v6 is supported\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tar"]


def test_merge_refuses_it(boot, tmp_path, capsys):
    with pytest.raises(BuildError, match="RAFS v5 is not written: `unpack` it") as raised:
        merge([boot, boot], MergeOptions(bootstrap=tmp_path / "merged"))
    assert raised.value.where["path"] == boot
    v6 = built(tmp_path, tar_of(member("f", data=b"x")), name="v6")
    with pytest.raises(InconsistentLayers, match="RAFS version: expected 6, got 5"):
        merge([v6, boot], MergeOptions(bootstrap=tmp_path / "merged"))
    assert main(["merge", "-B", "merged", str(v6), str(boot)]) == 2
    assert main(["merge", "-B", "merged", "--parent-bootstrap", str(boot), str(v6)]) == 1
    assert not (tmp_path / "merged").exists()
