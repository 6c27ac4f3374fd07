"""nydusify with Debian's registry; skopeo and umoci are the judges, a Debian tree the content."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from builder.oci import media
from builder.oci.config import ImageConfig
from builder.oci.layout import LayoutSource
from builder.oci.records import Manifest
from builder.proof.checking import read_mounted
from builder.proof.compare import require_equal
from builder.proof.entry import Entry, walk
from builder.proof.prover import SourceReader
from erofs.rafs import Digester
from tests.capabilities import need_tool
from tests.debian_image import debian_tar, make_debian_layout
from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 1 << 20
START_SECONDS = 60
_CONFIG = """\
version: 0.1
storage:
  filesystem:
    rootdirectory: {root}
http:
  addr: 127.0.0.1:0
"""
# The kernel chooses the port.
_LISTENS = re.compile(r'msg="listening on 127\.0\.0\.1:(\d+)')


def _skopeo(*words):
    done = subprocess.run(
        ["skopeo", *map(str, words)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    for name in ("docker-registry", "skopeo", "umoci"):
        need_tool(name)
    return tmp_path_factory.mktemp("nydusify")


@pytest.fixture(scope="module")
def registry(work):
    config = work / "registry.yml"
    config.write_text(_CONFIG.format(root=work / "registry"))
    with (work / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", config], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + START_SECONDS
        while not (found := _LISTENS.search((work / "registry.log").read_text())):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"localhost:{found[1]}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def layouts(work):
    """The image with gzip layers and with zstd layers."""
    tar = debian_tar(work)
    return {form: make_debian_layout(tar, work / form, form) for form in ("gzip", "zstd")}


@pytest.fixture(scope="module")
def pushed(registry, layouts):
    for form, layout in layouts.items():
        _skopeo("copy", "--all", "--dest-tls-verify=false", f"oci:{layout}:latest",
                f"docker://{registry}/debian:{form}")  # fmt: skip
    return registry


def _convert(pushed, work, form, tag, *more):
    done = nydusify(
        "convert", "--source", f"{pushed}/debian:{form}", "--target", f"{pushed}/nydus:{tag}",
        "--work-dir", work / "work", *more,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return json.loads(_skopeo("inspect", "--raw", "--tls-verify=false",
                              f"docker://{pushed}/nydus:{tag}"))  # fmt: skip


@pytest.mark.parametrize(
    ("form", "more"),
    [("gzip", ()), ("zstd", ()), ("gzip", ("--oci-ref",)), ("gzip", ("--batch-size", "0x10000"))],
)
def test_debian_image(pushed, work, form, more):
    tag = f"{form}{len(more)}"
    manifest = _convert(pushed, work, form, tag, *more)
    assert len(manifest["layers"]) == 4
    source, target = f"{pushed}/debian:{form}", f"{pushed}/nydus:{tag}"
    done = nydusify("check", "--source", source, "--target", target, "--work-dir", work / "out")
    assert done.status == 0, done.stderr


def test_layers_do_not_depend_on_the_compression_of_the_source(pushed, work, layouts):
    """What gzip and zstd hold differs in random bytes only in the third layer."""
    one, other = (_convert(pushed, work, form, f"same-{form}", "--no-proof") for form in layouts)
    assert one["layers"][:2] == other["layers"][:2]


def test_two_platforms_in_a_merged_index(pushed, work):
    index = _convert(pushed, work, "gzip", "merged", "--all-platforms", "--merge-platform")
    assert len(index["manifests"]) == 4
    # skopeo verifies every digest on its way.
    _skopeo("copy", "--all", "--src-tls-verify=false", f"docker://{pushed}/nydus:merged",
            f"dir:{work}/merged")  # fmt: skip


def _unpacked(layout: Path, bundle: Path) -> Entry:
    """Return what umoci makes of an image."""
    subprocess.run(
        ["umoci", "raw", "unpack", "--image", f"{layout}:latest", bundle],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return read_mounted(bundle, CHUNK, Digester.BLAKE3)


def _without_times(root: Entry) -> Entry:
    """Leave out what unpacking changes: times of directories that are written into."""
    for named in walk(root):
        named.entry.mtime = None if named.entry.children is not None else named.entry.mtime
        if named.entry.target:
            # A symlink has no permissions on Linux.
            named.entry.mode |= 0o777
    return root


def _laid_together(layout: Path) -> Entry:
    """Return what the proof's walker makes of the image of a layout."""
    place = LayoutSource(layout)
    manifest = Manifest.parse(place.document(place.resolve()))
    reader = SourceReader(place, CHUNK, Digester.BLAKE3)
    try:
        return reader.tree(manifest, ImageConfig.parse(place.document(manifest.config)))
    finally:
        reader.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="umoci makes devices and owners as root only")
def test_umoci_unpacks_the_tree_that_the_proof_compares(layouts, work):
    """An independent program, which knows no zstd, lays the layers together as our walker does."""
    one = work / "one"
    _skopeo("copy", f"oci:{layouts['gzip']}:latest", f"oci:{one}:latest")
    theirs = _unpacked(one, work / "unpacked")
    require_equal(_without_times(_laid_together(one)), _without_times(theirs))


@pytest.mark.skipif(os.geteuid() != 0, reason="umoci makes devices and owners as root only")
def test_umoci_follows_links_of_lower_layers(work):
    """Entries through a symlink of a layer below lie where it leads."""
    lower = layer(
        member("usr", kind=tarfile.DIRTYPE), member("usr/bin", kind=tarfile.DIRTYPE, mode=0o711),
        member("usr/bin/old", b"old"), member("usr/bin/gone", b"gone"),
        member("bin", kind=tarfile.SYMTYPE, linkname="usr/bin"),
    )  # fmt: skip
    upper = layer(member("bin/new", b"new"), member("bin/.wh.gone"))
    layout = work / "links"
    with OciRegistry() as server:
        Image([lower, upper]).add(server.repository("app"), "v1")
        words = ("--source", f"{server.host}/app:v1", "--plain-http")
        done = nydusify("copy", *words, "--target", f"oci:{layout}:latest")
        assert done.status == 0, done.stderr
        done = nydusify("convert", *words, "--target", f"{server.host}/out:n", "--work-dir",
                        work / "work")  # fmt: skip
        assert done.status == 0, done.stderr
    theirs = _unpacked(layout, work / "links-unpacked")
    require_equal(_without_times(_laid_together(layout)), _without_times(theirs))


@pytest.mark.skipif(os.geteuid() != 0, reason="umoci makes devices and owners as root only")
def test_umoci_unpacks_what_was_converted_back(pushed, work):
    _convert(pushed, work, "gzip", "forth")
    done = nydusify(
        "convert", "--reverse", "--source", f"{pushed}/nydus:forth", "--target",
        f"{pushed}/nydus:back", "--work-dir", work / "work",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    for name, tag in (("debian:gzip", "a"), ("nydus:back", "b")):
        _skopeo("copy", "--src-tls-verify=false", f"docker://{pushed}/{name}",
                f"oci:{work}/{tag}:latest")  # fmt: skip
    first, second = (
        _without_times(_unpacked(work / tag, work / f"bundle-{tag}")) for tag in ("a", "b")
    )
    require_equal(first, second)


@contextmanager
def _mounted(target, work):
    """Mount an image by its name; reads go to the registry."""
    top = work / "mnt"
    with (work / "mount.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "builder.nydusify", "mount", "--target", target, "--mount-path",
             top, "--work-dir", work / "mount-work"],
            cwd=ROOT, stdin=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
    try:
        end = time.monotonic() + START_SECONDS
        while not top.is_mount():
            assert process.poll() is None, (work / "mount.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield top
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert not top.is_mount()


@pytest.mark.skipif(os.geteuid() != 0, reason="umoci makes devices and owners as root only")
def test_umoci_unpacks_what_is_mounted(pushed, work):
    _convert(pushed, work, "gzip", "mounted", "--no-proof")
    _skopeo("copy", "--src-tls-verify=false", f"docker://{pushed}/debian:gzip",
            f"oci:{work}/source:latest")  # fmt: skip
    theirs = _unpacked(work / "source", work / "source-unpacked")
    with _mounted(f"{pushed}/nydus:mounted", work) as top:
        ours = read_mounted(top, CHUNK, Digester.BLAKE3)
    require_equal(_without_times(theirs), _without_times(ours))


def test_archives_of_skopeo_and_for_skopeo(pushed, work):
    _skopeo("copy", "--src-tls-verify=false", f"docker://{pushed}/debian:gzip",
            f"docker-archive:{work}/docker.tar:debian:x")  # fmt: skip
    done = nydusify(
        "convert", "--source", "debian", "--source-archive", work / "docker.tar", "--target",
        f"file://{work}/nydus.tar", "--oci", "--proof", work / "proof.json", "--work-dir",
        work / "work",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    raw = json.loads(_skopeo("inspect", "--raw", f"oci-archive:{work}/nydus.tar"))
    assert raw["mediaType"] == media.OCI_MANIFEST
    assert json.loads((work / "proof.json").read_text())["predicate"]["result"] == "equal"
