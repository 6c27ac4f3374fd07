"""Every image that the real nydusify made is made by ours with the same documents.

What differs is put aside by `_known` and said in docs/nydusify.md: the compressed bytes of the
bootstrap layer (Go's deflate is not zlib's), the version of the builder, and the host.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib

import pytest

from erofs.citable import parse_cached
from erofs.errors import NydusError
from tests.fakes.oci_registry import OciRegistry
from tests.fixtures_path import needs_fixtures
from tests.nydusify_images import CASES, HOST, Case, fill, nydusify

pytestmark = needs_fixtures

BUILDER = "containerd.io/snapshot/nydus-builder-version"
REFERENCE = "containerd.io/snapshot/nydus-source-reference"
BOOTSTRAP = "containerd.io/snapshot/nydus-bootstrap"

SINGLE = (
    "convert-batch-64k", "convert-chunk-64k", "convert-default", "convert-docker-source",
    "convert-docker-source-oci", "convert-docker-v2-format", "convert-fresh-repo",
    "convert-index-arm64", "convert-index-default", "convert-no-plain-http",
    "convert-none", "convert-oci-ref", "convert-oci-ref-other-repo", "convert-oci-ref-referrer",
    "convert-other-repo", "convert-output-json", "convert-prefetch-dir",
    "convert-prefetch-patterns", "convert-target-suffix", "convert-with-referrer",
    "convert-zstd-source", "convert-chunk-dict-registry",
)  # fmt: skip
SEVERAL = (
    "convert-index-all", "convert-index-two", "convert-index-all-merge",
    "convert-merge-platform", "convert-oci-ref-merge",
)  # fmt: skip


@pytest.fixture
def registry():
    with OciRegistry() as server:
        fill(server)
        yield server


def _words(case, registry, tmp_path):
    words = [word.replace(HOST, registry.host) for word in case.words]
    words = [word for word in words if word != "out.json"]
    if "--output-json" in words:
        words.insert(words.index("--output-json") + 1, str(tmp_path / "out.json"))
    return [*words, "--work-dir", tmp_path / "work"]


def _run(case, registry, tmp_path):
    if case.name == "convert-chunk-dict-registry":
        done = nydusify(
            "convert", "--source", f"{registry.host}/tiny:gz", "--plain-http", "--target",
            f"{registry.host}/tiny:n-default", "--work-dir", tmp_path / "work",
        )  # fmt: skip
        assert done.status == 0, done.stderr
    done = nydusify(*_words(case, registry, tmp_path), stdin=case.stdin)
    assert done.status == 0, done.stderr
    return done


def _target(case, registry):
    words = case.words
    if "--target-suffix" in words:
        return registry.repository("tiny"), "gz-nydus"
    reference = words[words.index("--target") + 1].removeprefix(f"{HOST}/")
    name, _, tag = reference.partition(":")
    return registry.repository(name), tag


def _known(manifest, registry):
    """Put aside what is known to differ, after looking that it is what it should be."""
    value = json.loads(json.dumps(manifest))
    annotations = value.get("annotations", {})
    if REFERENCE in annotations:
        annotations[REFERENCE] = annotations[REFERENCE].replace(registry.host, HOST)
    annotations.pop(BUILDER, None)
    for layer in value["layers"]:
        if BOOTSTRAP in layer.get("annotations", {}):
            assert layer.pop("digest")
            assert layer.pop("size")
    return value


def _check_image(repository, manifest, config, expected_manifest, expected_config, registry):
    assert list(manifest) == list(expected_manifest)
    assert _known(manifest, registry) == _known(expected_manifest, registry)
    assert config == expected_config
    for layer in manifest["layers"]:
        blob = repository.blobs.get(layer["digest"])
        if BOOTSTRAP in layer.get("annotations", {}):
            # The configuration names the digest of the plain layer, so its bytes are the same.
            plain = zlib.decompress(blob, 31)
            digest = f"sha256:{hashlib.sha256(plain).hexdigest()}"
            assert digest == json.loads(config)["rootfs"]["diff_ids"][-1]
        else:
            assert len(blob) == layer["size"]


@pytest.mark.parametrize("name", SINGLE)
def test_image(name, registry, tmp_path):
    case = Case(name)
    _run(case, registry, tmp_path)
    repository, tag = _target(case, registry)
    kind, data = repository.manifests[repository.tags[tag]]
    manifest = json.loads(data)
    assert kind == manifest["mediaType"]
    config = repository.blobs[manifest["config"]["digest"]]
    expected = case.document("manifest.json")
    _check_image(
        repository, manifest, config, expected, (case.folder / "config.json").read_bytes(),
        registry,
    )  # fmt: skip
    # Written in the same form: members in order, indented by two spaces.
    assert data == json.dumps(manifest, indent=2).encode()
    if name == "convert-output-json":
        assert json.loads((tmp_path / "out.json").read_text()).keys() == {
            "SourceImageSize", "TargetImageSize", "SourcePullElapsed", "ConversionElapsed",
            "TargetPushElapsed",
        }  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_index(name, registry, tmp_path):
    case = Case(name)
    _run(case, registry, tmp_path)
    repository, tag = _target(case, registry)
    kind, data = repository.manifests[repository.tags[tag]]
    index, expected = json.loads(data), case.document("index.json")
    assert kind == "application/vnd.oci.image.index.v1+json"
    assert list(index) == list(expected)
    assert (b"\n" in data) == ("\n" in (case.folder / "index.json").read_text())
    assert len(index["manifests"]) == len(expected["manifests"])
    for number, (entry, wanted) in enumerate(
        zip(index["manifests"], expected["manifests"], strict=True)
    ):
        manifest = json.loads(repository.manifests[entry["digest"]][1])
        config = repository.blobs[manifest["config"]["digest"]]
        _check_image(
            repository, manifest, config, case.document(f"{number}-manifest.json"),
            (case.folder / f"{number}-config.json").read_bytes(), registry,
        )  # fmt: skip
        original = "nydus-source-digest" in str(entry.get("annotations", {}))
        for member in wanted.keys() | entry.keys():
            # An original is the same to the byte.
            if original or member not in ("digest", "size"):
                assert entry.get(member) == wanted.get(member)


def test_chunk_tables_of_lz4_are_plain(registry, tmp_path):
    """The real tool puts the compressed table where a plain one belongs: no reader takes it."""
    case = Case("convert-lz4")
    _run(case, registry, tmp_path)
    repository, tag = _target(case, registry)
    manifest = json.loads(repository.manifests[repository.tags[tag]][1])
    expected = case.document("manifest.json")
    assert manifest["layers"][:2] == expected["layers"][:2]
    layer = repository.blobs[manifest["layers"][-1]["digest"]]
    theirs = (
        CASES / "blobs" / expected["layers"][-1]["digest"].removeprefix("sha256:")
    ).read_bytes()
    ours, real = _members(layer), _members(theirs)
    assert list(ours) == list(real)
    assert ours["image/image.boot"] == real["image/image.boot"]
    for name in list(ours)[2:]:
        assert parse_cached(ours[name]).entries
        with pytest.raises(NydusError):
            parse_cached(real[name])


def _members(layer):
    with tarfile.open(fileobj=io.BytesIO(layer), mode="r:gz") as tar:
        return {one.name: (tar.extractfile(one).read() if one.isreg() else None) for one in tar}
