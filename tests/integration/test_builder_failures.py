"""What goes wrong in the middle of a command: one line, the exit status, nothing half-written."""

import contextlib
import gzip
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from capabilities import need_tool, requires

from builder import BuildOptions, SourceType, build
from erofs.rafs import Compressor
from tests.fakes.built import member, tar_of

TIMEOUT = 60
CONTENT = {f"file {number}": random.Random(number).randbytes(400_000) for number in range(8)}
TAR = tar_of(*(member(name, data=data) for name, data in CONTENT.items()))
# A layer that is inflated by a process of its own.
KINDS = {"tar-rafs": TAR, "targz-ref": gzip.compress(TAR, 1)}


def started(*words, wrapper=()):
    command = [*wrapper, sys.executable, "-m", "builder.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """Return exit status and what is on standard error, but for lines of the log."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert out == ""
    return process.returncode, [line for line in err.splitlines() if not line.startswith("[")]


def run(*words):
    return ended(started(*words))


def assert_told(result, text, status=1):
    """Assert that there is one line, which has the text, and the exit status."""
    found, lines = result
    assert found == status
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert re.search(text, lines[0])


@pytest.fixture
def image(tmp_path):
    """An image of the tar: its bootstrap, and the directory of its blob."""
    top = tmp_path / "image"
    top.mkdir()
    (tmp_path / "layer.tar").write_bytes(TAR)
    (tmp_path / "layer.tar.gz").write_bytes(gzip.compress(TAR, 1))
    build(
        tmp_path / "layer.tar",
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=top / "boot", blob_dir=top,
            compressor=Compressor.NONE,
        ),
    )  # fmt: skip
    return top


# A full disk, which is a small tmpfs: no command leaves anything, hidden files included.

WRITERS = {
    "tar": "create --type tar-rafs -B FULL/boot -D FULL TAR",
    "tar into a file": "create --type tar-rafs -B FULL/boot --blob FULL/blob TAR",
    "tar with everything inside": "create --type tar-rafs --blob-inline-meta -D FULL TAR",
    "batches": "create --type tar-rafs --batch-size 0x100000 -B FULL/boot -D FULL TAR",
    "cache files": "create --type tar-rafs --blob-cache-dir FULL -B FULL/boot TAR",
    "directory": "create -B FULL/boot -D FULL SOURCE",
    "tables of a layer": "create --type targz-ref --chunk-size 0x1000 -B FULL/boot -D FULL GZ",
    "unpack": "unpack -D IMAGE --output FULL/out.tar IMAGE/boot",
    "export": "export --block -B IMAGE/boot -D IMAGE -O FULL/disk",
    "export with a hash tree": "export --block --verity -B IMAGE/boot -D IMAGE -O FULL/disk",
    "optimize": "optimize -B IMAGE/boot -D IMAGE -p LIST -O FULL/boot --output-blob-dir FULL",
}


@pytest.fixture
def full(tmp_path):
    """A directory on a disk of 256 KiB."""
    top = tmp_path / "full"
    top.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "tmpfs", str(top)], check=True
    )
    yield top
    subprocess.run(["umount", str(top)], check=True)


@pytest.mark.root
@requires("root")
@pytest.mark.parametrize("case", WRITERS)
def test_full_disk(case, full, image, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, data in CONTENT.items():
        (source / name).write_bytes(data)
    hints = ",".join(f'{{"path": "/{name}"}}' for name in CONTENT)
    (tmp_path / "list").write_text(f'{{"version": "v1", "files": [{hints}]}}')
    places = {
        "FULL": full, "TAR": tmp_path / "layer.tar", "GZ": tmp_path / "layer.tar.gz",
        "SOURCE": source, "IMAGE": image, "LIST": tmp_path / "list",
    }  # fmt: skip
    line = re.sub("[A-Z]{2,}", lambda found: str(places.get(found[0], found[0])), WRITERS[case])
    before = sorted(os.listdir(image))
    assert_told(run(*line.split()), "No space left on device")
    assert os.listdir(full) == []
    assert sorted(os.listdir(image)) == before


SMALL_WRITERS = {
    "merge": "merge -B FULL/boot IMAGE/boot",
    "report of merge": "merge -B OUT/boot -J FULL/report IMAGE/boot",
    "report of check": "check -J FULL/report IMAGE/boot",
    "report of create": "create --type tar-rafs -B OUT/boot -D OUT -J FULL/report TAR",
    "tarfs": "create --type tar-tarfs -B FULL/boot -D FULL TAR",
    "statistics": "stat -B IMAGE/boot -J FULL/report",
    "dictionary": "chunkdict generate -B FULL/boot OUT/image:1/boot",
}


@pytest.mark.root
@requires("root")
@pytest.mark.parametrize("case", SMALL_WRITERS)
def test_disk_without_any_room(case, full, image, tmp_path):
    out = tmp_path / "out"
    (out / "image:1").mkdir(parents=True)
    (out / "image:1/boot").write_bytes((image / "boot").read_bytes())
    with open(full / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    places = {"FULL": full, "TAR": tmp_path / "layer.tar", "IMAGE": image, "OUT": out}
    line = re.sub("[A-Z]{2,}", lambda found: str(places[found[0]]), SMALL_WRITERS[case])
    process = started(*line.split())
    _, err = process.communicate(timeout=TIMEOUT)
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert (process.returncode, len(lines)) == (1, 1), err
    assert "No space left on device" in lines[0]
    assert os.listdir(full) == ["filler"]


# Input that cannot be read, or is broken.


def zstd_frame(data):
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def flipped(data):
    broken = bytearray(data)
    broken[len(data) // 2] ^= 0xFF
    return bytes(broken)


BROKEN = {
    "truncated gzip": ("targz-rafs", lambda: gzip.compress(TAR, 1)[:-1000], "gzip"),
    "truncated gzip that is referred to": (
        "targz-ref", lambda: gzip.compress(TAR, 1)[:-1000], "gzip",
    ),
    "gzip with a wrong checksum": (
        "targz-rafs", lambda: gzip.compress(TAR, 1)[:-8] + bytes(8), "gzip",
    ),
    "broken zstd frame": ("tar-rafs", lambda: flipped(zstd_frame(TAR)), "zstd"),
    "truncated zstd frame": ("tar-rafs", lambda: zstd_frame(TAR)[:-1000], "zstd"),
    "truncated tar": ("tar-rafs", lambda: TAR[:1_000_000], "ends inside content"),
    "truncated tar of tarfs": ("tar-tarfs", lambda: TAR[:1_000_000], "ends inside content"),
    "no tar": ("tar-rafs", lambda: b"nothing of a tar" * 1000, "checksum|header"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input(case, tmp_path):
    kind, data, text = BROKEN[case]
    (tmp_path / "layer").write_bytes(data())
    (tmp_path / "out").mkdir()
    words = ["create", "--type", kind, "-B", tmp_path / "out/boot", "-D", tmp_path / "out"]
    result = run(*words, tmp_path / "layer")
    assert_told(result, text)
    assert str(tmp_path / "layer") in result[1][0]
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["tar-rafs", "targz-ref", "tar-tarfs"])
def test_input_that_gives_an_io_error(kind, tmp_path):
    words = ["create", "--type", kind, "-B", tmp_path / "boot", "-D", tmp_path]
    assert_told(run(*words, "/proc/self/mem"), r"/proc/self/mem: .*Input/output error")
    assert os.listdir(tmp_path) == []


@pytest.mark.root
@requires("root")
@pytest.mark.parametrize("name", ["layer.tar", "source"])
def test_input_without_permission(name, tmp_path):
    """As root without the rights that let it read everything."""
    (tmp_path / "source/sub").mkdir(parents=True)
    (tmp_path / "source/sub/secret").write_bytes(b"x")
    (tmp_path / "source/sub/secret").chmod(0)
    (tmp_path / "layer.tar").write_bytes(TAR)
    (tmp_path / "layer.tar").chmod(0)
    out = tmp_path / "out"
    out.mkdir()
    kind = "tar-rafs" if name == "layer.tar" else "dir-rafs"
    words = ["create", "--type", kind, "-B", out / "boot", "-D", out, tmp_path / name]
    setpriv = [need_tool("setpriv"), "--bounding-set=-dac_override,-dac_read_search"]
    assert_told(ended(started(*words, wrapper=setpriv)), "Permission denied")
    assert os.listdir(out) == []


def test_wrong_dictionaries(image, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "garbage").write_bytes(random.Random(1).randbytes(20_000))
    words = ["create", "--type", "tar-rafs", "-B", out / "boot", "-D", out]
    cases = {
        tmp_path / "garbage": ([], "garbage.*not"),
        tmp_path / "nowhere": ([], "No such file"),
        image / "boot": (["--chunk-size", "0x10000"], "chunk.size"),
    }
    for dictionary, (more, text) in cases.items():
        result = run(*words, *more, "--chunk-dict", f"bootstrap={dictionary}",
                     tmp_path / "layer.tar")  # fmt: skip
        assert_told(result, text)
        assert os.listdir(out) == []


# A command that is ended from outside, in the middle of its input.


def fed(tmp_path, out, kind="tar-rafs"):
    """Start a build from a FIFO; return it and the FIFO, when half of the input was taken."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = started("create", "--type", kind, "-B", out / "boot", "-D", out, fifo)
    feeder = os.open(fifo, os.O_WRONLY)
    half = KINDS[kind][: len(KINDS[kind]) // 2]
    sent = 0
    while sent < len(half):
        sent += os.write(feeder, half[sent:])
    return process, feeder


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted(kind, number, status, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    process, feeder = fed(tmp_path, out, kind)
    assert os.listdir(out)
    process.send_signal(number)
    assert_told(ended(process), "interrupted, nothing was left behind", status)
    os.close(feeder)
    assert os.listdir(out) == []


@pytest.mark.parametrize("kind", KINDS)
def test_killed(kind, tmp_path):
    """Nobody can tidy up then; nothing has a final name, and the next run is not disturbed."""
    out = tmp_path / "out"
    out.mkdir()
    process, feeder = fed(tmp_path, out, kind)
    process.kill()
    # Which takes that no process still has the other end.
    assert ended(process) == (-signal.SIGKILL, [])
    os.close(feeder)
    assert all(name.startswith(".") for name in os.listdir(out))
    (tmp_path / "layer.tar").write_bytes(TAR)
    words = ["create", "--type", "tar-rafs", "-B", out / "boot", "-D", out]
    assert run(*words, "--log-level", "warn", tmp_path / "layer.tar") == (0, [])


@pytest.mark.parametrize("kind", KINDS)
def test_writer_of_the_source_is_killed(kind, tmp_path):
    """What comes through a pipe may end anywhere."""
    out = tmp_path / "out"
    out.mkdir()
    process, feeder = fed(tmp_path, out, kind)
    os.close(feeder)
    assert_told(ended(process), "ends inside content|ends too early")
    assert os.listdir(out) == []


def test_reader_of_the_blob_goes_away(tmp_path):
    (tmp_path / "layer.tar").write_bytes(TAR)
    os.mkfifo(tmp_path / "fifo")
    words = ["create", "--type", "tar-rafs", "-B", tmp_path / "boot", "--blob", tmp_path / "fifo"]
    process = started(*words, tmp_path / "layer.tar")
    with open(tmp_path / "fifo", "rb") as reader:
        assert reader.read(1000)
    assert_told(ended(process), "Broken pipe")
    assert not (tmp_path / "boot").exists()
