"""Tarfs and raw disks beside the real tool's: bytes, words, and where ours is right instead."""

import hashlib
import io
import os
import re
import shlex
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from builder import BuildOptions, SourceType, build, export_block
from builder.backends import blob_directory
from erofs import NydusError, check_image, layout, open_bootstrap, writer
from erofs.tree import iter_names
from erofs.verity import DIGEST_SIZE, NYDUS_FILLER
from tests.compat.test_made_by_nydus_image import (
    MADE,
    commands,
    expand,
    expected_files,
    workplace,
)
from tests.fakes.built import member, tar_of
from tests.fakes.disk_files import files_of
from tests.fixtures_path import FIXTURES, needs_fixtures

__all__ = ["workplace"]
pytestmark = needs_fixtures

SNAPSHOTTER = FIXTURES / "snapshotter-nydusd"
# The format that the snapshotter scans for, from the first byte (spec vm-runtimes 3.4).
LINE = re.compile(
    r'dm-verity options: --no-superblock --format=1 -s "" --hash=sha256 --data-block-size=512'
    r" --hash-block-size=4096 --data-blocks (\d+) --hash-offset (\d+) ([0-9a-f]{64})\n"
)
# What the real tool's cache leaves beside the blobs, and we do not.
CACHE = re.compile(r"\.blob\.(data|meta)|chunk_map")


class _Defective(writer._Emitter):
    """Writes names in visiting order, and the whole target of a symlink behind its inode."""

    def emit_nodes(self):
        plan = self.placed
        directories = {each.node.number: each for each in plan.directories}
        for _, _, node in iter_names(self.spec.root):
            number = node.number
            content = node.target
            self.is_link = bool(content)
            if node.is_dir:
                content = self.directory_content(directories[number])
            columns = (plan.inodes, plan.data, plan.layouts, plan.indexes, plan.links)
            self.emit_node(node, content, *(column[number] for column in columns))

    def emit_content(self, data, data_layout, tail, content):
        if self.is_link and data_layout == layout.LAYOUT_FLAT_INLINE:
            self.put(tail, content)
        else:
            super().emit_content(data, data_layout, tail, content)


def index(tar, bootstrap):
    options = BuildOptions(
        source_type=SourceType.TARFS, bootstrap=bootstrap, blob_dir=bootstrap.parent
    )
    return build(tar, options)


def test_long_symlinks_are_all_that_is_different(workplace, tmp_path, monkeypatch):
    tar = workplace / "inputs" / "l1.tar"
    theirs = expand(MADE / "cases" / "tarfs" / "boot")
    index(tar, tmp_path / "ours")
    monkeypatch.setattr(writer, "_Emitter", _Defective)
    index(tar, tmp_path / "defective")
    assert (tmp_path / "defective").read_bytes() == theirs
    ours = (tmp_path / "ours").read_bytes()
    assert len(ours) == len(theirs)
    assert ours != theirs
    with open_bootstrap(ours) as image:
        assert list(check_image(image)) == []
        targets = {path: inode.readlink() for path, inode in image.walk() if inode.is_symlink}
    lengths = {path: len(target) for path, target in targets.items() if len(target) > 511}
    assert lengths == {b"/link-600": 600, b"/link-3000": 3000, b"/link-4095": 4094}


def run(lines, folder, workplace):
    """Run command lines in a new folder; return what they print on standard output."""
    folder.mkdir(parents=True)
    environment = dict(os.environ, PATH=f"{workplace / 'bin'}:{os.environ['PATH']}")
    return [
        subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, check=True, capture_output=True,
            text=True,
        ).stdout
        for line in lines
    ]  # fmt: skip


def test_layers_with_long_symlinks_can_be_merged(workplace):
    """The real tool refuses its own damaged bootstrap."""
    folder = workplace / "cases" / "tarfs-merge"
    run([line for line, _ in commands("tarfs-merge")], folder, workplace)
    assert (folder / "l2.boot").read_bytes() == expected_files("tarfs-merge")["l2.boot"]
    with open_bootstrap(folder / "merged.boot") as image:
        assert list(check_image(image)) == []
        assert len(image.blobs) == 3


def padded_as_theirs(case):
    return [
        line.replace("--verity", "--verity --verity-padding nydus") for line, _ in commands(case)
    ]


@pytest.mark.parametrize("case", ["export-block", "export-block-zstd", "export-block-tarfs"])
def test_disks_have_the_same_bytes(case, workplace):
    folder = workplace / "cases" / f"{case}-padded"
    outputs = run(padded_as_theirs(case), folder, workplace)
    disks = {name: data for name, data in expected_files(case).items() if not CACHE.search(name)}
    assert any(name.endswith(".disk") for name in disks)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made.keys() == disks.keys()
    for name, data in disks.items():
        assert made[name] == data, f"{name} differs"
    for number, output in enumerate(outputs, 1):
        words = MADE / "cases" / case / f"stdout.{number}.txt"
        if words.exists() and "dm-verity" in words.read_text():
            assert output.splitlines()[0] == words.read_text().splitlines()[0]


def test_zeros_are_all_that_is_different_in_the_leaves(workplace):
    folder = workplace / "cases" / "export-block-tarfs-zeros"
    export = "nydus-image export --block --verity -B boot -D . -O ours.disk"
    lines = [*(line for line, _ in commands("export-block-tarfs")[:2]), export]
    output = run(lines, folder, workplace)[-1]
    blocks, offset, root = LINE.fullmatch(output).groups()
    ours = (folder / "ours.disk").read_bytes()
    theirs = expected_files("export-block-tarfs")["boot.disk"]
    assert len(ours) == len(theirs)
    assert ours[: int(offset)] == theirs[: int(offset)]
    leaves = len(ours) - -(-int(blocks) // 128) * 4096
    used = leaves + int(blocks) * DIGEST_SIZE
    assert ours[leaves:used] == theirs[leaves:used]
    assert not any(ours[used:])
    assert theirs[used:] == NYDUS_FILLER * ((len(ours) - used) // DIGEST_SIZE)
    # The last leaf block is another one, so everything above it is, too.
    assert root not in (MADE / "cases/export-block-tarfs/stdout.3.txt").read_text()


NATIVE = ["tar-zstd", "tar-lz4", "tar-toc", "tar-big-16m", "batch-64k-zstd", "batch-64k-none",
          "batch-4k-zstd", "batch-l1-toc", "encrypt-zstd", "encrypt-batch"]  # fmt: skip


@pytest.mark.parametrize("case", NATIVE)
def test_disks_of_the_real_tools_blobs_have_the_files(case, workplace, tmp_path):
    for name, data in expected_files(case).items():
        (tmp_path / name).write_bytes(data)
    result = export_block(tmp_path / "boot", tmp_path / "disk", blob_directory(tmp_path))
    tar = re.search(r"inputs/(\w+\.tar)", commands(case)[0][0])[1]
    expected = {}
    with tarfile.open(workplace / "inputs" / tar) as archive:
        for entry in archive:
            if entry.isreg() or entry.islnk():
                path = os.fsencode(os.path.normpath(entry.name))
                expected[path] = archive.extractfile(entry).read()
    expected.pop(b".prefetch.landmark", None)
    assert files_of(result.disk.read_bytes()) == expected


def test_missing_blob_leaves_nothing(tmp_path):
    for name, data in expected_files("zran").items():
        (tmp_path / name).write_bytes(data)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NydusError, match=r"no such blob|zran"):
        export_block(tmp_path / "boot", tmp_path / "disk", blob_directory(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("case", ["zran-big-64k", "zran-multi-member", "estargz-ref"])
def test_disks_of_original_layers(case, workplace, tmp_path):
    """Of the layer and the tables that the real tool made."""
    for name, data in expected_files(case).items():
        (tmp_path / name).write_bytes(data)
    (name,) = re.findall(r"\S+\.tar\.gz", commands(case)[0][0])
    layer = (workplace / "cases" / name.removeprefix("../")).resolve().read_bytes()
    (tmp_path / hashlib.sha256(layer).hexdigest()).write_bytes(layer)
    result = export_block(tmp_path / "boot", tmp_path / "disk", blob_directory(tmp_path))
    expected = {}
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        for entry in archive:
            if entry.isreg() or entry.islnk():
                path = os.fsencode(os.path.normpath(entry.name))
                expected[path] = archive.extractfile(entry).read()
    for left_out in (b".prefetch.landmark", b".no.prefetch.landmark", b"stargz.index.json"):
        expected.pop(left_out, None)
    assert files_of(result.disk.read_bytes()) == expected


# The commands of the snapshotter, one by one (spec vm-runtimes 7.3 K6).

MODES = sorted(path.parent.name for path in SNAPSHOTTER.glob("kata-tarfs-*/builder.txt"))
ROOT = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus"


def layer_tar(number):
    return tar_of(
        member(f"of layer {number}", data=b"x" * 700 * number),
        member("of all", data=b"%d" % number),
        member("directory", "dir"),
        member(f"directory/{number}", "symlink", linkname="t" * 700),
    )


class Snapshotter:
    """Does around the builder what the snapshotter does: directories, FIFOs, copies, renames."""

    def __init__(self, top, workplace):
        self.top = top
        self.program = workplace / "bin" / "nydus-image"
        self.layers = 0

    def call(self, *words):
        done = subprocess.run([self.program, *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def create(self, words):
        fifo, blob_id = Path(words[-1]), words[words.index("--blob-id") + 1]
        bootstrap = Path(words[words.index("--bootstrap") + 1])
        bootstrap.parent.mkdir(parents=True)
        os.mkfifo(fifo)
        self.layers += 1
        tar = layer_tar(self.layers)
        (self.top / "cache" / blob_id).write_bytes(tar)
        writer_thread = threading.Thread(target=fifo.write_bytes, args=[tar])
        writer_thread.start()
        self.call(*words)
        writer_thread.join()
        return bootstrap

    def run(self, words):
        """Run one recorded command; return the final path of what it makes, and its output."""
        output = ""
        if words[0] == "create":
            made = self.create(words)
        else:
            output = self.call(*words)
            option = "--output" if words[0] == "export" else "--bootstrap"
            made = Path(words[words.index(option) + 1])
        final = Path(str(made).removesuffix(".tarfs.tmp"))
        made.rename(final)
        return final, output


@pytest.mark.parametrize("mode", MODES)
def test_commands_of_the_snapshotter(mode, workplace, tmp_path):
    (tmp_path / "cache").mkdir()
    snapshotter = Snapshotter(tmp_path, workplace)
    disks = 0
    for line in (SNAPSHOTTER / mode / "builder.txt").read_text().splitlines():
        program, *words = shlex.split(line.replace(ROOT, str(tmp_path)))
        assert program == "nydus-image"
        if words[0] == "inspect":
            # One argument in truth (spec vm-runtimes 3.4), and asked of every bootstrap below.
            continue
        made, output = snapshotter.run(words)
        if words[0] != "export":
            assert output == ""
            blobs = snapshotter.call("inspect", "-R blobs", str(made))
            ids = re.findall(r'"blob_id":"([0-9a-f]{64})"', blobs)
            assert ids
            assert all((tmp_path / "cache" / blob_id).is_file() for blob_id in ids)
            continue
        disks += 1
        assert bool(LINE.fullmatch(output)) == ("--verity" in words)
        assert bool(output) == ("--verity" in words)
        with open_bootstrap(words[words.index("--bootstrap") + 1]) as image:
            slot = image.devices[-1]
            assert made.stat().st_size >= (slot.mapped_blkaddr + slot.blocks) * 512
    assert snapshotter.layers == 2
    assert bool(disks) == ("_" in mode)
    assert not list(tmp_path.rglob("*.tmp"))


def test_every_mode_was_recorded():
    assert len(MODES) == 8
