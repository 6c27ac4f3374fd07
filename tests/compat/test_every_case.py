"""No recorded case of the real nydus-image is forgotten: it is the same, or its reason is told."""

from __future__ import annotations

import gzip
import re

import pytest

from erofs import check_image, open_bootstrap, open_rafs
from erofs.errors import FormatError
from erofs.inlined import read_inlined_bootstrap
from erofs.view import View
from tests.compat import made_cases
from tests.compat.test_made_by_nydus_image import (
    CHECKOUT,
    MADE,
    expected_files,
    run_case,
    workplace,
)
from tests.fixtures_path import FIXTURES, needs_fixtures

__all__ = ["workplace"]
pytestmark = needs_fixtures

ROW = re.compile(r"^\| (`.+?`) \| (.+?) \| (.+?) \|$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][a-z0-9-]*")
# Nobody can read these: see "Recorded cases" of docs/compatibility.md.
REFUSED = {
    "optimize/opt.boot",
    "optimize-none/opt.boot",
    "optimize-toc/opt.boot",
    "tarfs/boot",
    "chunkdict-generate/dict.boot",
    "chunkdict-generate-12/dict.boot",
    "chunkdict-generate-versions/dict.boot",
    "parent-bootstrap/l12.boot",
}
V5_START = b"\x53\x46\x41\x52\x00\x05\x00\x00"
EROFS_MAGIC = b"\xe2\xe1\xf5\xe0"
VALUES = re.compile(r"\[possible values: ([^]]*)\]")


def exceptions():
    """Return what docs/compatibility.md tells of cases that are not the same: names and reason."""
    text = (CHECKOUT / "docs" / "compatibility.md").read_text("utf-8")
    table = text.split("\n### Recorded cases\n")[1].split("\n## ")[0]
    return [(re.findall("`([^`]+)`", cell), reason) for cell, *_, reason in ROW.findall(table)]


def test_every_case_is_the_same_or_has_a_reason():
    places = [
        case
        for name, cases in vars(made_cases).items()
        if name.startswith("SAME_")
        for case in cases
    ]
    for names, reason in exceptions():
        assert reason.strip()
        places += names
    assert sorted(places) == sorted(path.name for path in (MADE / "cases").iterdir())


def test_several_xattrs_of_an_inode_differ_only_in_their_order(workplace):
    """The real tool's order is random: three runs, three bootstraps."""
    folder, result = run_case("tar-xattrs-multi", workplace)
    assert result.returncode == 0, result.stderr
    expected = expected_files("tar-xattrs-multi")
    ours = (folder / "boot1").read_bytes()
    assert (folder / "boot2").read_bytes() == ours
    for name, data in expected.items():
        if not name.startswith("boot"):
            assert (folder / name).read_bytes() == data
            continue
        with open_bootstrap(ours) as mine, open_bootstrap(data) as theirs:
            areas = []
            for (path, one), (other_path, other) in zip(mine.walk(), theirs.walk(), strict=True):
                assert (path, one.xattrs()) == (other_path, other.xattrs())
                areas.append(range(one.body_offset - one.xattr_size, one.body_offset))
        places = [place for place in range(len(ours)) if ours[place] != data[place]]
        assert places
        assert len(data) == len(ours)
        assert all(any(place in area for area in areas) for place in places)


@pytest.mark.parametrize(
    "case", ["stargz_index-v6", "err-stargz-no-datasize", "err-stargz-snapshotter"]
)
def test_tables_of_contents_that_the_real_tool_fails_with(case, workplace):
    folder, result = run_case(case, workplace)
    assert result.returncode == 0, result.stderr
    with open_bootstrap(folder / "boot") as image:
        assert list(check_image(image)) == []
        names = {path for path, inode in image.walk() if inode.is_regular}
        assert names == {b"/bin/busybox", b"/bin/busybox2", b"/lib/ld-musl-x86_64.so.1"}
    assert (folder / "blob.meta").exists() == (case == "err-stargz-snapshotter")


def test_table_of_contents_of_a_real_layer(workplace):
    folder, result = run_case("estargztoc-ref", workplace)
    assert result.returncode == 0, result.stderr
    with open_bootstrap(folder / "boot") as image:
        assert list(check_image(image)) == []


@pytest.mark.parametrize("number", range(13))
def test_help_has_every_word_of_the_real_one(number, workplace):
    """Callers look for options and values in it (spec tools 15.12)."""
    theirs = (MADE / "cases" / "help" / f"stdout.{number + 1}.txt").read_text()
    _, result = run_case("help", workplace, number)
    assert result.returncode == 0
    assert not set(OPTION.findall(theirs)) - set(OPTION.findall(result.stdout))
    words = set(re.findall(r"[\w-]+", result.stdout))
    for values in VALUES.findall(theirs):
        assert set(values.split(", ")) <= words


def test_unknown_command(workplace):
    _, result = run_case("err-bad-sub", workplace)
    assert result.returncode == 2
    assert "frobnicate" in result.stderr
    assert result.stderr.startswith("error: ")
    assert "For more information, try '--help'." in result.stderr


def bootstraps():
    """Return every bootstrap of either version below the fixtures, packed ones included."""
    found = {}
    for path in sorted(path for path in FIXTURES.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b" and path.suffix == ".gz":
            data = gzip.decompress(data)
        if data[-255:-250] == b"ustar" and b"image.boot" in data[-16_384:]:
            data = read_inlined_bootstrap(View(data))
        if data[:8] == V5_START or data[1024:1028] == EROFS_MAGIC:
            found[str(path.relative_to(FIXTURES))] = data
    return found


def test_every_bootstrap_is_decoded():
    """Names, attributes, xattrs and chunks, also of those inside of blobs."""
    refused = {}
    known = bootstraps()
    for name, data in known.items():
        try:
            with open_rafs(data) as image:
                read_everything(image)
        except FormatError as error:
            refused[name] = str(error)
    assert len(known) > 100
    assert {re.sub(r".*cases/|\.gz$", "", name) for name in refused} == REFUSED


def read_everything(image):
    for _, inode in image.walk():
        inode.xattrs()
        if inode.is_symlink:
            inode.readlink()
        elif inode.is_regular:
            assert sum(chunk.uncompressed_size for chunk in image.file_chunks(inode)) == inode.size
