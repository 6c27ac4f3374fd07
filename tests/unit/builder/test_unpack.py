import io
import logging
import os
import stat
import tarfile
import threading

import pytest

from builder.backends import blob_directory, blob_file
from builder.errors import BuildError
from builder.unpack import unpack
from erofs import BootstrapSpec, IntegrityError, Node, write_bootstrap
from erofs.rafs import Compressor, Digester
from fscache.backend import NotFound
from tests.fakes.built import built, member, tar_of

# In visiting order (spec rafs-v6 3.1), so that content keeps its place in the blob.
MEMBERS = (
    member("./", "dir", mode=0o750, mtime=7),
    member("a", data=b"x" * 5000, mtime=1, xattrs={"user.k": "v"}, uid=2**21, gid=2**32 - 1),
    member("b", "link", linkname="a", mtime=1, uid=2**21, gid=2**32 - 1),
    member("d", "dir", mtime=2),
    member("dev", "char", devmajor=1, devminor=0x12345, mtime=-5),
    member("disk", "block", devmajor=8, devminor=1),
    member("é\udcff" + "n" * 200, data=b"", mtime=2**40),
    member("p", "fifo", mtime=1.5),
    member("s", "symlink", linkname="t" * 300),
    member("d/.wh.gone", data=b""),
    member("d/f", data=bytes(12288), mode=0o4711),
    member("d/h", "link", linkname="a", mtime=1, uid=2**21, gid=2**32 - 1),
)


def read(data):
    archive = tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape")  # noqa: SIM115
    return {info.name: (info, archive) for info in archive}


def test_everything_comes_back_and_builds_the_same_image(tmp_path):
    path = built(tmp_path, tar_of(*MEMBERS))
    out = io.BytesIO()
    result = unpack(path, out, blob_directory(tmp_path))
    found = read(out.getvalue())
    assert set(found) == {info.name.removeprefix("./") or "." for info, _ in MEMBERS}
    for info, data in MEMBERS:
        got, archive = found[info.name.removeprefix("./") or "."]
        for key in ("type", "mode", "uid", "gid", "size", "mtime", "linkname"):
            assert getattr(got, key) == getattr(info, key), (info.name, key)
        assert (got.devmajor, got.devminor) == (info.devmajor, info.devminor)
        if got.isreg():
            assert archive.extractfile(got).read() == data
    assert (result.members, result.content_bytes, result.left_out) == (12, 17288, 0)
    assert built(tmp_path, out.getvalue(), name="again").read_bytes() == path.read_bytes()


def test_a_root_that_says_nothing_is_left_out(tmp_path):
    path = built(tmp_path, tar_of(member("f")))
    out = io.BytesIO()
    unpack(path, out, blob_directory(tmp_path))
    assert list(read(out.getvalue())) == ["f"]


def test_sockets_are_left_out_with_a_warning(tmp_path, caplog):
    root = Node.directory()
    root.entries[b"sock"] = Node(stat.S_IFSOCK | 0o600)
    root.entries[b"z"] = Node(stat.S_IFIFO | 0o600)
    path = tmp_path / "boot"
    spec = BootstrapSpec(
        root=root, blobs=[], chunk_size=4096, compressor=Compressor.NONE, digester=Digester.SHA256
    )
    path.write_bytes(write_bootstrap(spec))
    out = io.BytesIO()
    with caplog.at_level(logging.WARNING):
        result = unpack(path, out, blob_directory(tmp_path))
    assert list(read(out.getvalue())) == ["z"]
    assert result.left_out == 1
    assert "/sock is a socket" in caplog.text


def test_output_appears_whole(tmp_path):
    path = built(tmp_path, tar_of(*MEMBERS))
    unpack(path, tmp_path / "out.tar", blob_directory(tmp_path))
    out = io.BytesIO()
    unpack(path, out, blob_directory(tmp_path))
    assert (tmp_path / "out.tar").read_bytes() == out.getvalue()
    assert len(out.getvalue()) % 512 == 0


def test_damaged_blob_leaves_what_was_there(tmp_path):
    path = built(tmp_path, tar_of(*MEMBERS), compressor=Compressor.NONE)
    blob = next(p for p in tmp_path.iterdir() if len(p.name) == 64)
    data = bytearray(blob.read_bytes())
    data[4500] ^= 1
    blob.write_bytes(data)
    target = tmp_path / "out.tar"
    target.write_bytes(b"old")
    with pytest.raises(IntegrityError) as raised:
        unpack(path, target, blob_directory(tmp_path))
    text = str(raised.value)
    for word in ("entry /a", f"blob {blob.name}", "chunk 1", "offset 0x1000", "expected", "got"):
        assert word in text
    assert target.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 3


def test_missing_blob_and_bad_targets(tmp_path):
    path = built(tmp_path, tar_of(*MEMBERS))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="no such blob"):
        unpack(path, tmp_path / "out.tar", blob_directory(tmp_path / "empty"))
    with pytest.raises(BuildError, match="is a directory"):
        unpack(path, tmp_path, blob_directory(tmp_path))
    with pytest.raises(BuildError, match="cannot be written"):
        unpack(path, tmp_path / "no" / "out.tar", blob_directory(tmp_path))
    assert not (tmp_path / "out.tar").exists()


def test_one_file_for_the_blob_and_progress(tmp_path):
    path = built(tmp_path, tar_of(*MEMBERS), chunk_size=0x10000)
    blob = next(p for p in tmp_path.iterdir() if len(p.name) == 64).rename(tmp_path / "data")
    seen = []
    unpack(path, io.BytesIO(), blob_file(blob), progress=seen.append)
    assert seen == [5000, 12288]


def test_blob_with_inlined_bootstrap(tmp_path):
    blob = built(tmp_path, tar_of(*MEMBERS), inline_bootstrap=True, toc=True)
    out = io.BytesIO()
    unpack(blob, out, blob_directory(tmp_path), inlined=True)
    assert len(read(out.getvalue())) == len(MEMBERS)


def test_fifo_as_output(tmp_path):
    path = built(tmp_path, tar_of(*MEMBERS))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    taken = []
    reader = threading.Thread(target=lambda: taken.append(fifo.read_bytes()))
    reader.start()
    unpack(path, fifo, blob_directory(tmp_path))
    reader.join(60)
    assert len(read(taken[0])) == len(MEMBERS)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_no_more_than_a_chunk_is_written_at_once(tmp_path):
    """Each write is at most a chunk long, whatever the size of the file; the next are read."""
    path = built(tmp_path, tar_of(member("f", data=bytes(range(256)) * 1024)))
    sizes = []

    class Sink(io.RawIOBase):
        def write(self, data):
            sizes.append(len(data))
            return len(data)

    unpack(path, Sink(), blob_directory(tmp_path))
    assert sum(sizes) == 512 + 256 * 1024 + 1024
    assert max(sizes) == 4096
