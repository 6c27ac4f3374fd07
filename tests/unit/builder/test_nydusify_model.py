"""Model artifacts become mountable: their tars stay, one layer of metadata comes to them."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from builder.blobfiles import BlobProvider
from builder.unpack import unpack
from tests.fakes.model_artifact import ARTIFACT, add_model
from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import Fault, OciRegistry
from tests.nydusify_images import nydusify

WEIGHT = "application/vnd.cnai.model.weight.v1.tar"
OTHER = "application/vnd.cnai.model.weight.config.v1.tar"
MARK = "containerd.io/snapshot/"
CONTENT = bytes(range(256)) * 9000
TARS = [
    (WEIGHT, layer(member("weights/model.bin", CONTENT), member("weights/.wh.kept", b"x"))),
    (OTHER, layer(member("config.json", b"{}"))),
]


@pytest.fixture
def registry():
    with OciRegistry() as server:
        yield server


def _convert(registry, tmp_path, source, target, *more):
    return nydusify(
        "convert", "--source", f"{registry.host}/{source}", "--target", f"{registry.host}/{target}",
        "--source-backend-type", "model-artifact", "--source-backend-config", "{}", "--plain-http",
        "--work-dir", tmp_path / "work", *more,
    )  # fmt: skip


def _manifest(registry, repo, tag):
    found = registry.repository(repo)
    return json.loads(found.manifests[found.tags[tag]][1])


class _Tars(BlobProvider):
    def __init__(self, repo):
        self._repo = repo

    def open(self, blob_id):
        data = self._repo.blobs[f"sha256:{blob_id}"]

        class Reader:
            def size(self):
                return len(data)

            def read_at(self, offset, length):
                return data[offset : offset + length]

        return Reader()


@pytest.mark.parametrize("target", ["models:n", "elsewhere:n"])
def test_documents_are_those_of_the_real_tool(registry, tmp_path, target):
    """As observed: artifact type, layers and configuration stay, the source is the subject."""
    models = registry.repository("models")
    source = add_model(models, "v1", TARS)
    done = _convert(registry, tmp_path, "models:v1", target)
    assert done.status == 0, done.stderr
    repo = registry.repository(target.partition(":")[0])
    manifest = _manifest(registry, target.partition(":")[0], "n")
    assert list(manifest) == [
        "schemaVersion", "mediaType", "artifactType", "config", "layers", "subject",
    ]  # fmt: skip
    assert manifest["artifactType"] == ARTIFACT
    assert manifest["config"] == source["config"]
    *layers, last = manifest["layers"]
    assert layers == source["layers"]
    assert {one["digest"] for one in layers} <= repo.blobs.keys()
    assert last["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    assert last["annotations"] == {
        f"{MARK}nydus-artifact-type": ARTIFACT, f"{MARK}nydus-bootstrap": "true",
        f"{MARK}nydus-fs-version": "6",
    }  # fmt: skip
    assert manifest["subject"]["digest"] == models.tags["v1"]
    with tarfile.open(fileobj=io.BytesIO(repo.blobs[last["digest"]])) as tar:
        assert tar.getnames() == ["image", "image/backend.json", "image/image.boot"]
        backends = json.load(tar.extractfile("image/backend.json"))
        boot = tar.extractfile("image/image.boot").read()
    assert (backends["version"], backends["backends"]) == ("v1", [{"type": "registry"}])
    assert backends["blobs"][0] == {
        "backend": 0,
        "config": {"media_type": WEIGHT, "digest": layers[0]["digest"][7:],
                   "size": str(layers[0]["size"]), "chunk_size": "1MiB"},
    }  # fmt: skip
    path, packed = tmp_path / "boot", io.BytesIO()
    path.write_bytes(boot)
    unpack(path, packed, _Tars(repo))
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar:
        assert tar.extractfile("weights/model.bin").read() == CONTENT
        # Layers of models have no deletion marks.
        assert tar.extractfile("weights/.wh.kept").read() == b"x"
        assert tar.extractfile("config.json").read() == b"{}"
    done = nydusify(
        "check", "--target", f"{registry.host}/{target}", "--plain-http", "--work-dir",
        tmp_path / "check",
    )  # fmt: skip
    assert done.status == 0, done.stderr


@pytest.mark.parametrize(
    ("tars", "more", "text"),
    [
        ([(WEIGHT.replace(".tar", ".raw"), b"x" * 1000)], {}, "no plain tar"),
        ([("application/vnd.cnai.model.weight.v1.tar+gzip", b"x")], {}, "no plain tar"),
        ([(WEIGHT, b"x" * 1000)], {}, "blob sha256:"),
        ([], {}, "no layers"),
        (TARS, {"artifactType": "application/x"}, "no model artifact"),
    ],
)
def test_artifacts_that_are_none(registry, tmp_path, tars, more, text):
    add_model(registry.repository("models"), "v1", tars, **more)
    done = _convert(registry, tmp_path, "models:v1", "models:n")
    assert done.status == 1
    assert text in done.last
    assert "n" not in registry.repository("models").tags


def test_image_and_converted_model_are_refused(registry, tmp_path):
    Image().add(registry.repository("app"), "v1")
    assert "no model artifact" in _convert(registry, tmp_path, "app:v1", "app:n").last
    add_model(registry.repository("models"), "v1", TARS)
    assert _convert(registry, tmp_path, "models:v1", "models:n").status == 0
    assert "bootstrap already" in _convert(registry, tmp_path, "models:n", "models:n2").last


def test_damaged_tar_is_found(registry, tmp_path):
    add_model(registry.repository("models"), "v1", TARS)
    digest = _manifest(registry, "models", "v1")["layers"][0]["digest"]
    registry.faults.append(Fault("GET", digest, "damage"))
    done = _convert(registry, tmp_path, "models:v1", "models:n")
    assert done.status == 1
    assert digest[7:20] in done.last
    assert "n" not in registry.repository("models").tags


def test_storage_of_modctl_is_refused_with_the_way_out(tmp_path):
    done = nydusify(
        "convert", "--source", "a/b/c:d", "--target", "a/b/c:e", "--source-backend-type",
        "modelfile", "--source-backend-config", "{}", "--work-dir", tmp_path,
    )  # fmt: skip
    assert done.status == 1
    assert "model-artifact" in done.last
