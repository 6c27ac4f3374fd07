"""A process that inflates ahead makes the same image, and its end is told in one line."""

import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess

import pytest
from fakes.layer_image import content, gzipped, layer_tar

import builder.reference
from builder import BuildError, BuildOptions, SourceType, build
from builder.blocksahead import BlocksAhead
from builder.source.opening import drain
from builder.zran import BlockStream

# More than the process may be ahead, with a block that is longer than a piece.
FILES = [content(size, size) for size in (1, 511, 70_000, 0, 3_000_000)] + [
    bytes(2_500_000),
    *(content(size, size) for size in range(1, 3000, 70)),
    content(1 << 20) * 6,
    bytes(5_000_000),
]
LAYERS = {
    "one member": gzipped(layer_tar(*FILES)),
    "members": gzipped(layer_tar(*FILES), 30),
    "stored": gzipped(layer_tar(*FILES), level=0),
    "no data": gzipped(layer_tar(b"")),
    "more behind it": gzipped(layer_tar(*FILES)) + gzipped(bytes(3 << 20)) + bytes(1000),
}


@pytest.fixture
def forks(monkeypatch):
    """Fork although the test runner has threads, which the process does not need."""
    monkeypatch.setattr(builder.reference, "can_fork", lambda: True)
    # Else nothing would tell this from what inflates itself.
    monkeypatch.setattr(BlockStream, "window", lambda _: pytest.fail("was inflated here"))


def made(folder, source, **options):
    """Build, and return what is there then: bytes by name."""
    folder.mkdir()
    options = {"chunk_size": 0x10000, **options}
    result = build(
        source,
        BuildOptions(
            source_type=SourceType.TARGZ_REF, bootstrap=folder / "boot", blob_dir=folder, **options
        ),
    )
    return result.blobs, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("chunk_size", [0x1000, 0x100000])
@pytest.mark.parametrize("name", LAYERS)
def test_same_bytes_as_are_made_without(tmp_path, request, name, chunk_size):
    layer = tmp_path / "layer"
    layer.write_bytes(LAYERS[name])
    expected = made(tmp_path / "here", io.BytesIO(LAYERS[name]), chunk_size=chunk_size)
    request.getfixturevalue("forks")
    assert made(tmp_path / "ahead", layer, chunk_size=chunk_size) == expected
    if expected[0]:
        assert expected[0] == [hashlib.sha256(LAYERS[name]).hexdigest()]


def test_layer_from_a_fifo_is_read_to_its_end(tmp_path, forks):
    layer, fifo = tmp_path / "layer", tmp_path / "fifo"
    layer.write_bytes(LAYERS["more behind it"])
    os.mkfifo(fifo)
    # Not a thread: the process that is forked would have the writing end, too.
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', layer, fifo]) as feeder:
        blobs, _ = made(tmp_path / "out", fifo)
    assert feeder.returncode == 0
    assert blobs == [hashlib.sha256(LAYERS["more behind it"]).hexdigest()]


def test_digest_that_the_caller_knows(tmp_path, forks):
    layer = tmp_path / "layer"
    layer.write_bytes(LAYERS["members"])
    assert made(tmp_path / "out", layer, layer_digest="ab" * 32)[0] == ["ab" * 32]


class Failing(io.BytesIO):
    """Bytes that end with something else."""

    def __init__(self, data, fail):
        super().__init__(data)
        self._fail = fail

    def read(self, size):
        return super().read(size) or self._fail()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("fail", "kind", "text"),
    [
        (refuse, OSError, "Input/output error"),
        (killed, BuildError, "process that inflates has"),
        (lambda: b"", BuildError, "ends too early"),
    ],
    ids=["unreadable", "killed", "broken"],
)
def test_what_was_inflated_before_is_there(fail, kind, text):
    plain = layer_tar(*FILES)
    source = Failing(LAYERS["stored"][: len(plain) // 2], fail)
    with BlocksAhead(source, 0x1000, digested=True) as ahead:
        found = io.BytesIO()
        with pytest.raises(kind, match=text):
            shutil.copyfileobj(ahead, found)
    length = len(found.getvalue())
    assert found.getvalue() == plain[:length]
    # Of a process that is killed, what it has said last may be lost.
    assert fail is killed or length > len(plain) // 2 - (2 << 20)


def test_process_ends_with_the_block():
    with BlocksAhead(io.BytesIO(LAYERS["stored"]), 0x1000, digested=True) as ahead:
        assert ahead.read(1) == b"0"
    with pytest.raises(ProcessLookupError):
        os.kill(ahead._pid, 0)


def test_chunk_where_the_process_did_not_stop():
    with BlocksAhead(io.BytesIO(LAYERS["stored"]), 0x1000, digested=False) as ahead:
        ahead.read(100)
        with pytest.raises(BuildError, match="has missed a chunk"):
            ahead.stop()
        drain(ahead)
        assert ahead.layer == ("", len(LAYERS["stored"]))
