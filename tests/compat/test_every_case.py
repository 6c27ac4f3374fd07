"""No recorded case of the real nydus-image is forgotten: it is the same, or its reason is told."""

from __future__ import annotations

import gzip
import hashlib
import re

import pytest

from builder.backends import blob_directory
from builder.datacheck import check_data
from erofs import check_image, open_bootstrap, open_rafs
from erofs.errors import FormatError
from erofs.findings import ERROR
from erofs.inlined import blob_ids, read_inlined_bootstrap
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
CASES = "made-by-nydus-image/cases/"
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


def unpacked_files():
    """Yield every file of the fixtures by its path, without the packing of large ones."""
    for path in sorted(path for path in FIXTURES.rglob("*") if path.is_file()):
        data = path.read_bytes()
        name = str(path.relative_to(FIXTURES))
        if path.suffix == ".gz":
            yield name, data
            yield name.removesuffix(".gz"), gzip.decompress(data)
        else:
            yield name, data


def bootstraps():
    """Yield (path, bootstrap, file) of either version, also of those inside of their blobs."""
    for name, data in unpacked_files():
        found = data
        if data[-255:-250] == b"ustar" and b"image.boot" in data[-16_384:]:
            found = read_inlined_bootstrap(View(data))
        if found[:8] == V5_START or found[1024:1028] == EROFS_MAGIC:
            yield name, found, data


def test_every_bootstrap_is_decoded():
    """Names, attributes, xattrs and chunks."""
    refused = set()
    count = 0
    for name, data, _ in bootstraps():
        count += 1
        try:
            with open_rafs(data) as image:
                read_everything(image)
        except FormatError:
            refused.add(name.removeprefix(CASES))
    assert count > 130
    assert refused == REFUSED


def read_everything(image):
    for _, inode in image.walk():
        inode.xattrs()
        if inode.is_symlink:
            inode.readlink()
        elif inode.is_regular:
            assert sum(chunk.uncompressed_size for chunk in image.file_chunks(inode)) == inode.size


def test_every_blob_is_decoded(tmp_path):
    """All chunks of all blobs that the fixtures have, and their tables, by their digests."""
    for name, data in unpacked_files():
        if re.fullmatch("[0-9a-f]{64}", name.rpartition("/")[2]):
            (tmp_path / name.rpartition("/")[2]).write_bytes(data)
        elif name.endswith((".gz", ".tar")):
            (tmp_path / hashlib.sha256(data).hexdigest()).write_bytes(data)
    backend = blob_directory(tmp_path)
    seen, wrong = set(), {}
    for name, data, file in bootstraps():
        if name.removeprefix(CASES) in REFUSED:
            continue
        # A bootstrap from inside of its blob, or of its tables, takes their name from its own.
        place = tmp_path / name.rpartition("/")[2].split(".")[0]
        is_apart = file is data and name.split("/")[-2] == "b"
        with open_rafs(data) as image:
            ids = blob_ids(image, place)
            if file is not data:
                place.write_bytes(file)
            if ids and not is_apart and all((tmp_path / blob_id).exists() for blob_id in ids):
                seen.add((name, *ids))
                findings = check_data(image, ids, backend, place)
                found = [str(finding) for _, finding in findings if finding.severity == ERROR]
                wrong |= {name: found} if found else {}
            if len(place.name) != 64:
                place.unlink(missing_ok=True)
    # The numbers of a generated dictionary are not the blob's (`fscache.cache.dictionary`).
    wrong.pop(f"{CASES}chunkdict-generate-versions/use.boot")
    assert wrong == {}
    assert len(seen) > 100
