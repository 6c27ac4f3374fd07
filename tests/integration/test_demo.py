"""`make demo` as a newcomer runs it, on a small root filesystem, to its end and to Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from capabilities import need_tool, requires

from tests.demo.hostroot import Collector
from tests.demo.run import mounts_below

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.demo"]
TIMEOUT = 120


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory):
    """A shell with its libraries, and a bit of everything that a tree can hold."""
    need_tool("ldd")
    top = tmp_path_factory.mktemp("source") / "rootfs"
    top.mkdir(mode=0o755)
    collector = Collector(top)
    collector.add_programs([Path("/bin/sh")])
    assert collector.content_bytes > 100_000
    data = top / "data"
    data.mkdir(mode=0o750)
    for number in range(40):
        (data / f"file {number}").write_bytes(os.urandom(50_000) * (1 + number % 3))
    (data / "same").write_bytes((data / "file 1").read_bytes())
    (data / "linked").hardlink_to(data / "file 2")
    (data / "Ünïcode").symlink_to("file 3")
    (data / "old").touch()
    os.utime(data / "old", ns=(1, 1_000_000_001))
    return top


@pytest.fixture
def demo_dir(tmp_path_factory):
    """A place for work directories, short for their sockets, which is empty after the test."""
    place = tmp_path_factory.mktemp("d")
    yield place
    assert mounts_below(place) == []
    assert list(place.iterdir()) == []


@pytest.fixture
def memory(tmp_path_factory):
    """A directory in memory."""
    place = tmp_path_factory.mktemp("m")
    subprocess.run(["mount", "-t", "tmpfs", "memory", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def environment(source, demo_dir, **more):
    kept = {key: value for key, value in os.environ.items() if key != "KEEP"}
    return {**kept, "DEMO_SOURCE": str(source), "DEMO_DIR": str(demo_dir), **more}


def show(source, demo_dir, prefix=()):
    done = subprocess.run(
        [*prefix, *COMMAND],
        cwd=ROOT,
        env=environment(source, demo_dir),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.stderr == ""
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("Everything is cleaned up.\n")
    return done.stdout


def fetched(output):
    """Return (requests, chunks, all chunks) of each line that tells them."""
    found = re.findall(
        r"fetched so far: ([\d,]+) requests.* ([\d,]+) of ([\d,]+) chunks .*%\)\n", output
    )
    return [tuple(int(number.replace(",", "")) for number in line) for line in found]


def assert_identical(output, entries):
    found = re.search(r"trees are identical: ([\d,]+) entries, ([\d,]+) bytes", output)
    assert found, output
    assert int(found[1].replace(",", "")) == entries


def entries_of(directory):
    return 1 + sum(len(folders) + len(files) for _, folders, files in os.walk(directory))


def assert_lazy_run(output, entries):
    assert "hello from /bin/sh" in output
    assert "time to first output: " in output
    assert "--eager" not in output
    assert_identical(output, entries)
    mounted, shell, everything = fetched(output)
    assert mounted[:2] == (0, 0)
    assert 0 < shell[0] < everything[0]
    assert 0 < shell[1] < shell[2]
    assert everything[1] == everything[2]
    assert "To run the programs took " in output


@pytest.mark.root
@pytest.mark.fanotify
@requires("root", "fanotify")
def test_directory(rootfs, demo_dir):
    output = show(rootfs, demo_dir)
    assert_lazy_run(output, entries_of(rootfs))
    assert "deduplication saves 1 chunks" in output


@pytest.mark.root
@pytest.mark.fanotify
@requires("root", "fanotify")
def test_tar_that_does_not_list_a_folder(rootfs, demo_dir, tmp_path_factory):
    tar = tmp_path_factory.mktemp("tar") / "rootfs.tar.gz"
    with tarfile.open(tar, "w:gz") as archive:
        archive.add(rootfs, arcname=".", filter=lambda m: None if m.name == "./data" else m)
        for path in sorted((rootfs / "data").iterdir()):
            archive.add(path, arcname=f"./data/{path.name}")
    assert_lazy_run(show(tar, demo_dir), entries_of(rootfs))


@pytest.mark.root
@requires("root", "loop")
def test_switches_to_eager_where_the_kernel_cannot_be_lazy(rootfs, memory):
    before = mounts_below(memory)
    output = show(rootfs, memory)
    assert "lazy reading is not possible here: " in output
    assert re.search(r"^   \$ nydusd .* --eager$", output, re.MULTILINE)
    assert "hello from /bin/sh" in output
    assert_identical(output, entries_of(rootfs))
    assert fetched(output)[0][1] == fetched(output)[0][2]
    assert (list(memory.iterdir()), mounts_below(memory)) == ([], before)


def test_without_privilege_everything_is_verified_without_the_kernel(rootfs, demo_dir):
    prefix = ()
    if os.geteuid() == 0:
        drop = "-sys_admin"
        prefix = (need_tool("setpriv"), f"--bounding-set={drop}", f"--inh-caps={drop}")
    output = show(rootfs, demo_dir, prefix)
    assert "the steps that need the kernel are skipped: root (CAP_SYS_ADMIN) is needed" in output
    assert "every chunk is what its digest says: " in output
    assert "GNU tar finds no difference between the image and its source" in output
    assert "mounted" not in output


@pytest.mark.root
@pytest.mark.fanotify
@requires("root", "fanotify")
@pytest.mark.parametrize(
    ("seen", "number"),
    [("$ nydusd", signal.SIGINT), ("mounted ", signal.SIGINT), ("6. ", signal.SIGTERM)],
)
def test_signal_leaves_nothing_behind(rootfs, demo_dir, seen, number):
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment(rootfs, demo_dir), stdout=pipe, stderr=pipe, text=True
    )
    try:
        assert any(line.strip().startswith(seen) for line in process.stdout)
        for _ in range(3):
            process.send_signal(number)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert errors == f"Interrupted by {number.name}; everything is cleaned up\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [("missing", "no such file or directory"), ("broken.tar", "nydus-image fails")],
)
def test_errors_are_told_in_short(tmp_path_factory, demo_dir, source, text):
    place = tmp_path_factory.mktemp("wrong")
    (place / "broken.tar").write_bytes(b"no tar" * 1000)
    done = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=environment(place / source, demo_dir),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert text in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
