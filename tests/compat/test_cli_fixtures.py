"""Replay `check`, `inspect` and `unpack` of the real tool: the same text and exit statuses.

Every case is a folder of `fixtures/made-by-nydus-image`; its README explains the layout.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
import shutil
import sys
import tarfile

import pytest

from builder.bootstrap import inlined_bootstrap
from builder.cli import main
from tests.fixtures_path import FIXTURES, needs_fixtures

pytestmark = needs_fixtures

MADE = FIXTURES / "made-by-nydus-image"
STAMP = re.compile(r"^\[[^]]*\] ", re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a case, two levels below `inputs/`."""
    (tmp_path / "inputs").mkdir()
    for path in (MADE / "inputs").glob("l[123].tar.gz"):
        name = path.name.removesuffix(".gz")
        (tmp_path / "inputs" / name).write_bytes(gzip.decompress(path.read_bytes()))
    folder = tmp_path / "cases" / "case"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(place, capsys, monkeypatch):
    """Run a shell line that calls us; return exit status, stdout, and stderr without times."""

    def run(line):
        words = shlex.split(line.replace("$(ls ", "").replace("?)", "?"))
        stdin = b""
        if words[0] == "printf":
            bar = words.index("|")
            stdin, words = "\n".join([*words[2:bar], ""]).encode(), words[bar + 1 :]
        assert words[0] == "nydus-image"
        # The transcripts let the shell find the one blob of the folder.
        blobs = [path.name for path in place.iterdir() if len(path.name) == 64]
        words = [blobs[0] if word == "?" * 64 else word for word in words]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            status = main(words[1:])
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        return status, out, STAMP.sub("", err)

    return run


def transcript(case):
    """Yield (number, command line, exit status, stdout, stderr) of a case."""
    folder = MADE / "cases" / case
    lines = (folder / "cmd.txt").read_text().splitlines()
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    for number, (line, status) in enumerate(pairs, 1):
        suffix = f".{number}" if len(pairs) > 1 else ""
        texts = []
        for stream in ("stdout", "stderr"):
            path = folder / f"{stream}{suffix}.txt"
            texts.append(path.read_text() if path.exists() else "")
        yield number, line[2:], int(status.removeprefix("# exit ")), *texts


@pytest.mark.parametrize("case", ["check", "inspect", "inspect-prefetch"])
def test_same_output(case, run):
    for _, line, status, stdout, stderr in transcript(case):
        if line.startswith("rm "):
            continue
        got = run(line)
        assert got[:2] == (status, stdout), line
        if status == 0:
            assert got[2] == stderr, line
        else:
            assert got[2].splitlines()[-1] == stderr.splitlines()[-1], line


def test_check_report(run, place):
    assert run("nydus-image create --type tar-rafs -B boot -D . ../../inputs/l1.tar")[0] == 0
    assert run("nydus-image check boot -J check.json")[0] == 0
    text = (place / "check.json").read_text()
    theirs_text = (MADE / "cases" / "check" / "check.json").read_text()
    assert text.count("\n") == theirs_text.count("\n") == 0
    ours, theirs = json.loads(text), json.loads(theirs_text)
    assert list(ours) == list(theirs)
    for report in (ours, theirs):
        del report["version"]
        times = report["trace"]["consumed_time"]
        times["load_tree_from_bootstrap"] = type(times["load_tree_from_bootstrap"])
    assert ours == theirs


@pytest.mark.parametrize(
    ("case", "meaning"),
    [
        ("err-check-missing", "No such file or directory"),
        ("err-check-not-boot", "not an EROFS image"),
        ("err-inspect-missing", "No such file or directory"),
    ],
)
def test_same_errors(case, meaning, run, place):
    ((_, line, status, stdout, _),) = transcript(case)
    got = run(line)
    assert got[:2] == (status, stdout)
    assert got[2].startswith("Error: ")
    assert meaning in got[2]
    assert not list(place.iterdir())


def test_inlined_bootstraps_need_the_directory(run, place):
    source = MADE / "cases" / "merge-inline"
    (place / "b").mkdir()
    shutil.copy(source / "l2", "l2")
    shutil.copy(source / "b" / "l2", "b/l2")
    steps = {number: rest for number, *rest in transcript("merge-inline")}
    line, status, stdout, _ = steps[14]
    assert line == "nydus-image check l2"
    assert run(line)[:2] == (status, stdout)
    line, status, stdout, stderr = steps[15]
    assert run(line.split(";")[0]) == (status, stdout, stderr)
    assert run("nydus-image check -D . --data l2") == (status, stdout, stderr)
    assert sorted(path.name for path in place.rglob("*")) == ["b", "l2", "l2"]


def members(source):
    """Return all that a tar says of each path."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(source), errors="surrogateescape") as archive:
        for member in archive:
            xattrs = {k: v for k, v in member.pax_headers.items() if k.startswith("SCHILY.xattr.")}
            content = archive.extractfile(member).read() if member.isreg() else None
            found[member.name] = (
                member.type, member.mode, member.uid, member.gid, member.size, member.mtime,
                member.linkname.lstrip("/"), member.devmajor, member.devminor, xattrs, content,
            )  # fmt: skip
    return found


def unpacked(case, name):
    return members(gzip.decompress((MADE / "cases" / case / f"{name}.gz").read_bytes()))


def test_unpack_gives_the_same_members(run, place):
    steps = [step for step in transcript("unpack") if "nydus-image" in step[1]]
    for _, line, status, stdout, stderr in steps:
        assert run(line) == (status, stdout, stderr)
    assert members((place / "out.tar").read_bytes()) == unpacked("unpack", "out.tar")


def test_unpack_of_a_blob_with_inlined_bootstrap(run, place):
    for number, line, status, stdout, stderr in transcript("unpack-inline"):
        if line.startswith("extract-image-boot"):
            (place / "image.boot").write_bytes(inlined_bootstrap(place / "blob.nydus"))
            continue
        got = run(line)
        assert got[:2] == (status, stdout)
        if number != 2:
            assert got[2] == stderr
    assert not (place / "out.tar").exists()
    assert members((place / "out2.tar").read_bytes()) == unpacked("unpack-inline", "out2.tar")


def test_unpack_needs_a_source_of_data(run, place):
    ((_, line, _, _, stderr),) = transcript("err-unpack-no-blob")
    create, unpack, _ = line.split("; ")
    assert run(create)[0] == 0
    status, stdout, error = run(unpack)
    assert (status, stdout, error) == (1, "", stderr.splitlines(keepends=True)[-1])
    assert not (place / "o.tar").exists()


def test_unpack_of_devices_where_the_real_tool_panics(run, place):
    lines = [line for _, line, *_ in transcript("unpack-l1") if line.startswith("nydus-image")]
    for line in lines:
        assert run(line)[0] == 0
    ours = members((place / "out.tar").read_bytes())
    source = members((place / "../../inputs/l1.tar").read_bytes())
    # Made by the builder, or left out by it; times of PAX headers and of links do not count.
    assert set(ours) - set(source) == {"zzz-implicit", "zzz-implicit/parent"}
    assert set(source) - set(ours) == {".prefetch.landmark"}
    for name in set(ours) & set(source):
        without_time = [[*record[:5], *record[7:]] for record in (ours[name], source[name])]
        assert without_time[0] == without_time[1], name
        assert ours[name][6] == source[name][6].removeprefix("./")


def test_unpacked_tar_gives_the_same_image(run, place):
    for source, extra in (("l2", "--whiteout-spec none"), ("l3", "--compressor none")):
        steps = [
            f"create --type tar-rafs {extra} -B a.boot -D . ../../inputs/{source}.tar",
            "unpack a.boot -D . --output first.tar",
            f"create --type tar-rafs {extra} -B b.boot -D . first.tar",
            "unpack b.boot -D . --output second.tar",
            f"create --type tar-rafs {extra} -B c.boot -D . second.tar",
            "check --data -D . c.boot",
        ]
        for step in steps:
            status, _, error = run("nydus-image " + step)
            assert status == 0, error
        assert (place / "first.tar").read_bytes() == (place / "second.tar").read_bytes()
        # The order of chunks in the blob is the tar's, so the first round may change it.
        assert (place / "b.boot").read_bytes() == (place / "c.boot").read_bytes()


SAME_ROUND_TRIP = (
    "dir-hardlink-symlink", "dir-l2-none", "dir-overlayfs", "tar-gnu", "tar-ustar", "tar-nodata",
)  # fmt: skip


@pytest.mark.parametrize("case", SAME_ROUND_TRIP)
def test_image_built_from_the_unpacked_tar_is_the_same(case, run, place):
    """Images whose content is in visiting order come back byte for byte, blob id included."""
    folder = MADE / "cases" / case
    shutil.copy(folder / "boot", "boot")
    found = [path for path in folder.iterdir() if len(path.name.removesuffix(".gz")) == 64]
    for path in found:
        data = path.read_bytes()
        name = path.name.removesuffix(".gz")
        (place / name).write_bytes(gzip.decompress(data) if path.suffix == ".gz" else data)
    (place / "again").mkdir()
    options = "" if case == "tar-nodata" else "--compressor none"
    for step in (
        "unpack boot -D . --output out.tar",
        f"create --pax-mtime --type tar-rafs {options} -B again/boot -D again out.tar",
    ):
        status, _, error = run("nydus-image " + step)
        assert status == 0, error
    assert (place / "again" / "boot").read_bytes() == (place / "boot").read_bytes()
    made = {path.name for path in (place / "again").iterdir()} - {"boot"}
    assert made == {path.name.removesuffix(".gz") for path in found}
