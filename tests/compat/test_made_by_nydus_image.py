"""Replay the real tool's command lines with ours: the same bytes, reports and exit statuses.

Every case is a folder of `fixtures/made-by-nydus-image`; its README explains the layout.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from builder.bootstrap import open_any_bootstrap
from builder.build import build
from builder.merge import MergeOptions, merge
from builder.options import BuildOptions, SourceType
from erofs import open_bootstrap
from erofs.blobcheck import check_blob
from erofs.cipher import BlobCipher
from erofs.inlined import read_inlined_bootstrap
from erofs.rafs import Compressor, SuperFlags
from erofs.view import View
from tests.compat.made_cases import SAME_BYTES, SAME_BYTES_OF_DIRECTORIES, SAME_REFUSAL
from tests.fixtures_path import FIXTURES, needs_fixtures

pytestmark = needs_fixtures

MADE = FIXTURES / "made-by-nydus-image"
CHECKOUT = Path(__file__).resolve().parents[2]

# The real tool writes an empty second bootstrap beside each one of a directory; nobody
# reads it, and we leave it out (docs/compatibility.md).
NOT_WRITTEN = re.compile(r"\.external$|^external$")
NOT_OUTPUT = re.compile(r"^(cmd|same-as|std(out|err)(\.\d+)?)\.txt$|\.json$")
# These commands read a blob with inlined metadata, which is tested with `check`.
OTHER_COMMAND = re.compile(r"nydus-image (check|inspect|unpack)")


def expand(path: Path) -> bytes | None:
    if path.exists():
        return path.read_bytes()
    packed = path.with_name(path.name + ".gz")
    return gzip.decompress(packed.read_bytes()) if packed.exists() else None


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with `inputs/` and `cases/`, and commands on PATH."""
    fixtures = tmp_path_factory.mktemp("fixtures")
    # Some inputs belong to others.
    (fixtures / "nydus").symlink_to(FIXTURES / "nydus")
    top = fixtures / "made-by-nydus-image"
    top.mkdir()
    (top / "inputs").mkdir()
    for path in (MADE / "inputs").iterdir():
        (top / "inputs" / path.name).write_bytes(path.read_bytes())
        if path.name.endswith(".tar.gz"):
            unpacked = top / "inputs" / path.name.removesuffix(".gz")
            unpacked.write_bytes(gzip.decompress(path.read_bytes()))
    tools = top / "bin"
    tools.mkdir()
    programs = {
        "nydus-image": "from builder.cli import main; sys.exit(main())",
        "extract-image-boot": "from builder.bootstrap import inlined_bootstrap; "
        "from pathlib import Path; "
        "Path(sys.argv[2]).write_bytes(inlined_bootstrap(Path(sys.argv[1])))",
    }
    for name, text in programs.items():
        script = tools / name
        script.write_text(
            f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{text}\n"
        )
        script.chmod(0o755)
    return top


def commands(case):
    """Yield (command line, exit status) of a case."""
    lines = (MADE / "cases" / case / "cmd.txt").read_text().splitlines()
    return [
        (line[2:], int(status.removeprefix("# exit ")))
        for line, status in zip(lines[::2], lines[1::2], strict=True)
    ]


def replay(case, workplace):
    """Run a case, check its exit statuses, and return its folder and the outputs of commands."""
    folder = workplace / "cases" / case
    folder.mkdir(parents=True)
    environment = dict(os.environ, PATH=f"{workplace / 'bin'}:{os.environ['PATH']}")
    outputs = []
    where = "."
    for line, status in commands(case):
        if OTHER_COMMAND.search(line) and "create" not in line:
            continue
        # The transcript's `cd` holds only within its own line.
        result = subprocess.run(
            ["bash", "-c", line], cwd=folder / where, env=environment,
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert result.returncode == status, (line, result.stderr)
        outputs.append(result)
    return folder, outputs


def expected_files(case):
    """Return what a case must have made: names, and the bytes that may lie in another case."""
    folder = MADE / "cases" / case
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder)).removesuffix(".gz")
        if path.is_file() and not NOT_OUTPUT.search(path.name):
            found[name] = expand(folder / name)
    same = folder / "same-as.txt"
    if same.exists():
        for line in same.read_text().splitlines():
            name, other = line.split()
            found[name] = expand(folder / other.removesuffix(".gz"))
    return {
        name: data
        for name, data in found.items()
        if not NOT_WRITTEN.search(name) and not NOT_OUTPUT.search(name)
    }


def check_case(case, workplace):
    folder, outputs = replay(case, workplace)
    expected = expected_files(case)
    assert expected, "a case without an output shows nothing"
    for name, data in expected.items():
        assert data is not None, f"{name}: the fixture names a file that it does not hold"
        made = folder / name
        assert made.exists(), f"{name} was not made"
        assert made.read_bytes() == data, f"{name} differs"
    made_files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    surplus = {n for n in made_files - set(expected) if not NOT_OUTPUT.search(n)}
    assert not surplus, "files that the real tool does not leave"
    check_reports(case, folder)
    return folder, outputs


def check_reports(case, folder):
    """Compare reports: the same keys; equal values but for version and times."""
    for path in (MADE / "cases" / case).glob("out*.json"):
        ours, theirs = json.loads((folder / path.name).read_text()), json.loads(path.read_text())
        assert ours.keys() == theirs.keys()
        for key in ("bootstrap", "blobs", "fs_version", "compressor"):
            assert ours[key] == theirs[key], key
        # What the real tool names there is the copy of nothing that we leave out.
        assert (ours["external_bootstrap"], ours["external_blobs"]) == ("", [])
        assert ours["trace"].keys() == theirs["trace"].keys()
        events, expected = (r["trace"]["registered_events"] for r in (ours, theirs))
        assert events.keys() == expected.keys()
        for key in events.keys() - {"euid", "egid"}:
            assert events[key] == expected[key], key


@pytest.mark.parametrize("case", SAME_BYTES)
def test_same_bytes(case, workplace):
    check_case(case, workplace)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="owners and device nodes need root")
@pytest.mark.parametrize("case", SAME_BYTES_OF_DIRECTORIES)
def test_same_bytes_from_a_directory(case, workplace):
    check_case(case, workplace)


def test_merge_of_inlined_bootstraps(workplace):
    folder, _ = replay("merge-inline", workplace)
    for name, data in expected_files("merge-inline").items():
        if "/" not in name:
            assert (folder / name).read_bytes() == data, f"{name} differs"


ENCRYPTED = {
    "encrypt-zstd": {},
    "encrypt-none-inline-toc": {
        "compressor": Compressor.NONE, "inline_bootstrap": True, "toc": True,
    },
    "encrypt-batch": {"batch_size": 0x10000},
}  # fmt: skip


@pytest.mark.parametrize("case", ENCRYPTED)
def test_encrypted_images_with_the_same_key(case, workplace, tmp_path):
    """Keys are random, so that of the fixture is used."""
    expected = expected_files(case)
    if "boot" in expected:
        boot, places = expected["boot"], {"bootstrap": tmp_path / "boot", "blob_dir": tmp_path}
    else:
        boot = read_inlined_bootstrap(View(expected["blob.nydus"]))
        places = {"blob": tmp_path / "blob.nydus"}
    with open_bootstrap(boot) as image:
        (blob,) = image.blobs
    options = BuildOptions(
        source_type=SourceType.TAR, encryption=BlobCipher(*blob.encryption()), **places,
        **ENCRYPTED[case],
    )  # fmt: skip
    build(workplace / "inputs" / "l3.tar", options)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made.keys() == expected.keys()
    for name, data in expected.items():
        assert made[name] == data, f"{name} differs"


@pytest.mark.parametrize("case", ENCRYPTED)
def test_every_encrypted_image_has_another_key(case, workplace):
    folder, result = run_case(case, workplace)
    assert result.returncode == 0, result.stderr
    path = folder / "boot" if (folder / "boot").exists() else folder / "blob.nydus"
    with open_any_bootstrap(path, inlined=True) as image:
        (blob,) = image.blobs
        key, iv = blob.encryption()
        assert len(set(key)) > 8
        assert SuperFlags.ENCRYPTION_ASE_128_XTS in image.flags
        stored = path if path.name == "blob.nydus" else folder / blob.id
        findings = list(check_blob(blob, View(stored.read_bytes()), image, data=True))
        assert findings == []
    assert key.hex() not in result.stderr
    assert iv.hex() not in result.stderr


def test_merge_of_encrypted_layers(tmp_path):
    layers = MADE / "cases" / "merge-encrypted" / "b"
    merge([layers / "l2", layers / "l3"], MergeOptions(bootstrap=tmp_path / "merged.boot"))
    expected = expected_files("merge-encrypted")["merged.boot"]
    assert (tmp_path / "merged.boot").read_bytes() == expected


def test_success_is_told_as_the_real_tool_does(workplace):
    folder, result = run_case("tar-zstd", workplace)
    lines = result.stderr.splitlines()
    theirs = (MADE / "cases" / "tar-zstd" / "stderr.txt").read_text().splitlines()
    assert re.sub(r"^\[.*?\] ", "", lines[0]) == theirs[0]
    assert lines[1:] == theirs[1:]
    assert result.stdout == ""
    assert stat.S_IMODE((folder / "boot").stat().st_mode) == 0o644
    blob = next(path for path in folder.iterdir() if len(path.name) == 64)
    assert stat.S_IMODE(blob.stat().st_mode) == 0o600


# Where the real tool is wrong and ours does not follow (docs/compatibility.md).
def run_case(case, workplace, number=0):
    """Run a command of a case in a folder of its own; return the folder and result."""
    folder = workplace / "cases" / f"{case}-better{number or ''}"
    folder.mkdir(parents=True)
    environment = dict(os.environ, PATH=f"{workplace / 'bin'}:{os.environ['PATH']}")
    line = commands(case)[number][0]
    result = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
    )
    return folder, result


@pytest.mark.parametrize(
    "case", ["err-fifo-blank-dev", "err-inline-blob-without-type", "err-sparse", "err-symhard"]
)
def test_what_the_real_tool_refuses_without_need(case, workplace):
    _, result = run_case(case, workplace)
    assert result.returncode == 0, result.stderr


def test_entries_without_their_parents(workplace):
    folder, result = run_case("tar-missing-parents", workplace)
    assert result.returncode == 0, result.stderr
    with tarfile.open(workplace / "inputs" / "noparents.tar") as archive:
        members = {f"/{member.name}".encode() for member in archive if not member.isdir()}
    with open_bootstrap(folder / "boot") as ours:
        found = {path for path, inode in ours.walk() if not inode.is_dir}
    assert found == members
    # The content is the same; where it hangs is what is different.
    expected = expected_files("tar-missing-parents")
    for name in expected.keys() - {"boot"}:
        assert (folder / name).read_bytes() == expected[name], name
    with open_bootstrap(expected["boot"]) as wrong:
        assert {path for path, inode in wrong.walk() if not inode.is_dir} != members


@pytest.mark.parametrize("case", SAME_REFUSAL)
def test_errors_have_the_same_status_and_leave_nothing(case, workplace):
    folder, outputs = replay(case, workplace)
    last = outputs[-1]
    if case != "err-no-args":
        assert last.stderr.strip(), "an error without a word"
        assert "Traceback" not in last.stderr
    leftovers = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert not leftovers
    if not case.startswith("err-merge"):
        assert not list(folder.iterdir())


def test_dotdot_is_an_error_and_no_panic(workplace):
    folder = workplace / "cases" / "dotdot"
    folder.mkdir()
    result = subprocess.run(
        [workplace / "bin" / "nydus-image", "create", "--type", "tar-rafs", "-B", "boot",
         "-D", ".", "../../inputs/dots.tar"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    assert ".." in result.stderr
    assert not list(folder.iterdir())
