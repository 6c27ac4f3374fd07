"""Recorded runs that read what the real nydusify made: copied, checked and mounted by ours."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import pytest

from builder.nydusify.mounting import Mounted, daemon_config
from builder.oci.names import parse_reference
from builder.oci.registry import RegistrySettings, Repository
from tests.fakes.oci_registry import OciRegistry
from tests.fixtures_path import needs_fixtures
from tests.nydusify_images import CASES, HOST, Case, fill, nydusify, recorded_images, store

pytestmark = needs_fixtures

# The other registry of the recordings, with TLS there and a repository of the same one here.
TLS_HOST = "localhost:5003"
MOUNTS = ("mount", "mount-absolute-path")

COPIES = (
    "copy-chunked", "copy-chunked-other-registry", "copy-chunked-small",
    "copy-chunked-small-other-registry", "copy-from-file", "copy-image", "copy-index-all",
    "copy-index-one", "copy-merge", "copy-oci", "copy-other-registry", "copy-zran",
)  # fmt: skip
# Verified there and here; the same lines about the blobs on standard output.
CHECKED = (
    "check-batch", "check-dict", "check-localfs-backend", "check-lz4", "check-merge",
    "check-not-nydus", "check-ok", "check-target-only", "check-v5", "check-zran", "check-zst",
)  # fmt: skip


@pytest.fixture
def registry():
    with OciRegistry() as server:
        fill(server)
        for reference, folder in recorded_images().items():
            store(server, reference, folder)
        yield server


def _do(case, registry, tmp_path):
    """Run a recorded command line with its places put into the test's."""
    words = [
        word.replace(HOST, registry.host)
        .replace(TLS_HOST, registry.host)
        .replace("be/localfs", str(tmp_path / "blobs"))
        .replace("file://..", f"file://{tmp_path}")
        for word in case.words
    ]
    return nydusify(*words, "--work-dir", tmp_path / "work", "--plain-http", stdin=case.stdin)


def _archive(registry, path):
    done = nydusify(
        "copy", "--source", f"{registry.host}/tiny:n-default", "--target", f"file://{path}",
        "--plain-http",
    )  # fmt: skip
    assert done.status == 0, done.stderr


@pytest.mark.parametrize("name", COPIES)
def test_copy(name, registry, tmp_path):
    case = Case(name)
    if name == "copy-from-file":
        _archive(registry, tmp_path / "copy.tar")
    done = _do(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 0), done.stderr
    target = case.words[case.words.index("--target") + 1].partition("/")[2]
    repo, _, tag = target.partition(":")
    found = registry.repository(repo)
    _, data = found.manifests[found.tags[tag]]
    # Documents and their digests are those of the recording, to the byte.
    documents = {path.name: path.read_bytes() for path in case.folder.glob("*.json")}
    documents.pop("dump.json")
    top = documents.pop("index.json", None) or documents.pop("manifest.json")
    if "manifests" in json.loads(data):
        # The real tool writes indexes anew, ours keeps them and their digests.
        assert json.loads(data) == json.loads(top)
        source = case.words[case.words.index("--source") + 1].partition(":n-")[2]
        assert found.tags[tag] == registry.repository("tiny").tags[f"n-{source}"]
    else:
        assert data == top
    stored = {value for _, value in found.manifests.values()} | set(found.blobs.values())
    assert set(documents.values()) <= stored
    layers = [
        layer for text in documents.values() for layer in json.loads(text).get("layers", ())
    ] + json.loads(data).get("layers", [])
    for layer in layers:
        assert len(found.blobs[layer["digest"]]) == layer["size"]
    if name == "copy-zran":
        # The real tool leaves the layers out that the blobs refer to.
        for layer in layers[:-1]:
            assert layer["annotations"]["containerd.io/snapshot/nydus-ref"] in found.blobs
    if "other-registry" not in name and name != "copy-from-file":
        # Blobs are taken over without their bytes, and the name comes last, as recorded.
        assert "POST" in (case.folder / "http.txt").read_text()
        assert not [row for row in registry.log if row.startswith(f"PUT /v2/{repo}/blobs")]
        written = [row for row in registry.log if row.startswith("PUT ")]
        assert written[-1].startswith(f"PUT /v2/{repo}/manifests/{tag} ")


def test_copy_from_a_folder_of_blobs(registry, tmp_path):
    """The real tool knows buckets only."""
    case = Case("copy-localfs-backend")
    _blob_folder(tmp_path, "convert-default")
    done = _do(case, registry, tmp_path)
    assert (case.status, done.status) == ("1", 0), done.stderr
    found = registry.repository("cp9")
    layers = json.loads(found.manifests[found.tags["n"]][1])["layers"]
    whole = Case("convert-default").document("manifest.json")["layers"]
    assert {one["digest"] for one in layers[:-1]} == {one["digest"] for one in whole[:-1]}


def test_copy_to_file(registry, tmp_path):
    case = Case("copy-to-file")
    done = _do(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 0), done.stderr
    with tarfile.open(tmp_path / "copy.tar") as tar:
        index = json.load(tar.extractfile("index.json"))
        digest = index["manifests"][0]["digest"].partition(":")[2]
        manifest = tar.extractfile(f"blobs/sha256/{digest}").read()
    assert manifest == (CASES / "convert-default" / "manifest.json").read_bytes()


def _blob_folder(tmp_path, folder):
    """Put the blobs where the recorded run had them: beside the registry, by their digests."""
    (tmp_path / "blobs").mkdir()
    for layer in Case(folder).document("manifest.json")["layers"][:-1]:
        name = layer["digest"].removeprefix("sha256:")
        (tmp_path / "blobs" / name).write_bytes((CASES / "blobs" / name).read_bytes())


@pytest.mark.parametrize("name", CHECKED)
def test_check_verifies(name, registry, tmp_path):
    case = Case(name)
    if name == "check-localfs-backend":
        _blob_folder(tmp_path, "convert-default")
    if name == "check-lz4":
        # Its blobs are too large to be among the fixtures; ours have the same digests.
        again = Case("convert-lz4").words
        again = [word.replace(HOST, registry.host) for word in again]
        assert nydusify(*again, "--no-proof", "--work-dir", tmp_path / "work").status == 0
    done = _do(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 0), done.stderr
    assert done.last == "verified image"
    path = case.folder / "stdout.txt"
    assert done.stdout == (path.read_text() if path.exists() else "")
    # The rules come in the recorded order.
    recorded = re.findall(
        r'msg="(checking \w+|comparing \w+)"', (case.folder / "stderr.txt").read_text()
    )
    ours = re.findall(r'msg="(checking \w+|comparing \w+)', done.stderr)
    assert ours == recorded
    dumped = {path.name for path in (tmp_path / "work").rglob("*.json")}
    assert {"oci_manifest.json", "oci_config.json"} & dumped or "nydus_manifest.json" in dumped


def test_check_finds_the_recorded_difference(registry, tmp_path):
    case = Case("check-mismatch")
    done = _do(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 1)
    real = json.loads((case.folder / "stderr.txt").read_text().splitlines()[-1].split("msg=")[1])
    # Ours hashes digests of pieces, and a file is no symlink (docs/nydusify.md).
    assert _plain(done.last).startswith(_plain(real))


def _plain(text):
    text = re.sub(r" symink: [^,]*,", "", text)
    return re.sub(r" hash: [0-9a-f]*", "", text)


def test_check_of_zran_without_its_layers(registry, tmp_path):
    """The real tool compares what it could not read; ours says what is missing."""
    case = Case("check-zran-other-repo")
    wanted = {
        layer["annotations"]["containerd.io/snapshot/nydus-ref"]
        for layer in Case("convert-oci-ref-other-repo").document("manifest.json")["layers"][:-1]
    }
    for digest in wanted:
        registry.repository("other/zran").blobs.pop(digest)
    done = _do(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 1)
    assert done.last.startswith("validate filesystem failed: ")
    assert "no such blob" in done.last
    assert any(digest[7:] in done.last for digest in wanted)


def test_check_of_another_image(registry, tmp_path):
    """The recorded source was Debian's image, of which there is the configuration alone."""
    case = Case("check-wrong-source")
    debian = registry.repository("debian")
    value = {"config": {"Cmd": ["bash"]}, "rootfs": {"type": "layers", "diff_ids": []}}
    value.update(architecture="amd64", os="linux")
    config = debian.add_blob(json.dumps(value).encode())
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config, "size": len(debian.blobs[config]),
        },
        "layers": [],
    }  # fmt: skip
    debian.add_manifest(json.dumps(manifest).encode(), manifest["mediaType"], "gz")
    done = _do(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 1)
    real = (case.folder / "stderr.txt").read_text().splitlines()[-1]
    assert done.last == json.loads(real.split("msg=")[1])


@pytest.mark.parametrize("name", MOUNTS)
def test_configuration_of_the_mount(name, tmp_path):
    """What the daemon is told is what it was told; mounts are in tests/integration."""
    text = (CASES / name / "builder.txt").read_text()
    recorded = json.loads(re.search(r"config: \n(\{.*\n\})", text, re.DOTALL)[1])
    source = Repository(
        parse_reference("localhost:5000/tiny:n-default"), RegistrySettings(insecure=True)
    )
    try:
        ours = daemon_config(Mounted(source, Path("b"), Path("m")), tmp_path)
    finally:
        source.close()
    theirs, mine = recorded["device"]["backend"], ours["device"]["backend"]
    assert mine["type"] == theirs["type"]
    for key in ("host", "repo", "skip_verify"):
        assert mine["config"][key] == theirs["config"][key]
    # An empty scheme lets the daemon find out; https with its fall-back comes to the same.
    assert mine["config"]["scheme"] in ("", "https")
    assert ours["device"]["cache"]["type"] == recorded["device"]["cache"]["type"]
    for key in ("mode", "iostats_files", "digest_validate", "enable_xattr"):
        assert ours[key] == recorded[key]
    assert recorded["fs_prefetch"].items() <= ours["fs_prefetch"].items()
