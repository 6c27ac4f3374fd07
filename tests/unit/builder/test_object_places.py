"""`nydusify` with buckets of S3 and OSS as places of blobs."""

from __future__ import annotations

import hashlib
import json
import logging
import threading

import pytest

from builder.oci import objects
from builder.oci.objects import ObjectBlobs
from builder.oci.records import Descriptor
from erofs.errors import IntegrityError
from fscache.backend import AuthError, BackendError, Unavailable
from fscache.backend.config import ConfigTable, backend_config
from fscache.backend.retry import RetryPolicy
from tests.fakes.object_store import SECRET, ObjectStoreServer
from tests.fakes.oci_image import Image
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify

PART = 1000
DATA = bytes(range(256)) * 10


@pytest.fixture(params=["s3", "oss"])
def bucket(request):
    with ObjectStoreServer(request.param) as server:
        yield server


@pytest.fixture
def place(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_PART_BYTES", PART)
    bucket.least_part = PART
    found = _open(bucket, tmp_path)
    yield found
    found.close()


def _open(bucket, tmp_path, **more):
    values = ConfigTable(bucket.config(object_prefix="blobs/"), "config")
    config = backend_config(bucket.kind, values, values)
    return ObjectBlobs(config, tmp_path, RetryPolicy(attempts=3, first_delay=0.001), **more)


def _describe(data):
    return Descriptor("x/y", f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def _pieces(data, size=300):
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, len(DATA)])
def test_blob_of_unknown_digest(bucket, place, size):
    upload = place.begin()
    for piece in _pieces(DATA[:size]):
        upload.write(piece)
    found = upload.finish("x/y")
    assert found == _describe(DATA[:size])
    assert bucket.objects == {f"blobs/{found.hex}": DATA[:size]}
    assert bucket.uploads == {}
    assert any("uploads" in row for row in bucket.log) == (size > PART)
    assert b"".join(place.open(found.hex).read_at(0, size) for _ in range(1)) == DATA[:size]
    assert place.has(found)


def test_known_blob_is_not_sent_unless_it_has_to(bucket, place, tmp_path):
    found = _describe(DATA)
    place.put(found, _pieces(DATA))
    sent = len(bucket.log)
    place.put(found, _pieces(DATA))
    assert [row.partition(" ")[0] for row in bucket.log[sent:]] == ["HEAD"]
    forced = _open(bucket, tmp_path, force=True)
    forced.put(found, _pieces(DATA))
    assert bucket.log[-1].startswith("POST")
    forced.close()
    # A blob of another length was not put there by us.
    bucket.objects[f"blobs/{found.hex}"] = b"half"
    assert not place.has(found)


@pytest.mark.parametrize("size", [10, len(DATA)])
def test_other_bytes_are_not_stored(bucket, place, size):
    with pytest.raises(IntegrityError):
        place.put(_describe(DATA[:size]), _pieces(DATA[1 : size + 1]))
    assert bucket.objects == {}
    assert bucket.uploads == {}


@pytest.mark.parametrize(
    "fault",
    [
        ("PUT .*partNumber=2", 503), ("PUT .*partNumber=3", "reset"), ("POST .*uploads", 500),
        ("POST .*uploadId", "lose"), ("POST .*uploadId", 503), ("HEAD", 503),
    ],
)  # fmt: skip
def test_store_that_fails_for_a_moment(bucket, place, fault):
    bucket.faults.append(fault)
    place.put(_describe(DATA), _pieces(DATA))
    assert list(bucket.objects.values()) == [DATA]
    assert not bucket.faults
    assert bucket.uploads == {}


def test_error_within_a_good_answer(bucket, place):
    bucket.late_error = 1
    place.put(_describe(DATA), _pieces(DATA))
    assert list(bucket.objects.values()) == [DATA]
    bucket.objects.clear()
    bucket.late_error = 9
    with pytest.raises(Unavailable, match="InternalError"):
        place.put(_describe(DATA), _pieces(DATA))
    assert bucket.objects == bucket.uploads == {}


def test_store_that_refuses(bucket, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    bucket.faults.append(("PUT", 403))
    place = _open(bucket, tmp_path)
    with pytest.raises(AuthError):
        place.put(_describe(b"x"), [b"x"])
    place.close()
    values = ConfigTable(bucket.config(access_key_secret="an0ther"), "config")
    place = ObjectBlobs(backend_config(bucket.kind, values, values), tmp_path, RetryPolicy())
    with pytest.raises(AuthError, match=r"PUT|SignatureDoesNotMatch|not permitted") as caught:
        place.store("name", [b"x"], 1)
    place.close()
    assert "SignatureDoesNotMatch" in str(caught.value)
    for text in (str(caught.value), caplog.text):
        assert SECRET not in text
        assert "an0ther" not in text


def test_many_threads(bucket, place):
    blobs = [DATA[number:] for number in range(12)]
    threads = [
        threading.Thread(target=place.put, args=(_describe(one), _pieces(one))) for one in blobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bucket.objects.values()) == sorted(blobs)


# Commands.


@pytest.fixture
def registry():
    with OciRegistry() as server:
        Image().add(server.repository("app"), "v1")
        yield server


def _manifest(registry, repo, tag):
    found = registry.repository(repo)
    return json.loads(found.manifests[found.tags[tag]][1])


def test_images_whose_data_is_in_a_bucket(bucket, registry, tmp_path):
    """Converted, checked, reversed, optimised, copied back, and made a dictionary of."""
    config = json.dumps(bucket.config(object_prefix="data/"))
    work = ("--plain-http", "--work-dir", str(tmp_path / "work"))
    said = ""

    def run(command, *words, prefix=""):
        nonlocal said
        where = (f"--{prefix}backend-type", bucket.kind, f"--{prefix}backend-config", config)
        words = [one.replace("@", f"{registry.host}/") for one in words]
        done = nydusify(*command.split(), *words, *where, *work)
        said += done.stderr + done.stdout
        assert done.status == 0, done.stderr

    run("convert", "--source", "@app:v1", "--target", "@out:n")
    manifest = _manifest(registry, "out", "n")
    assert len(manifest["layers"]) == 1
    blobs = dict(bucket.objects)
    assert len(blobs) == 2
    assert all(name == f"data/{hashlib.sha256(data).hexdigest()}" for name, data in blobs.items())
    run("check", "--source", "@app:v1", "--target", "@out:n", prefix="target-")
    run("convert", "--reverse", "--source", "@out:n", "--target", "@back:v", prefix="source-")
    done = nydusify(
        "check", "--source", f"{registry.host}/back:v", "--target", f"{registry.host}/out:n",
        "--target-backend-type", bucket.kind, "--target-backend-config", config, *work,
    )  # fmt: skip
    assert done.status == 0, done.stderr

    run("copy", "--source", "@out:n", "--target", "@whole:n", prefix="source-")
    layers = _manifest(registry, "whole", "n")["layers"]
    assert {f"data/{one['digest'][7:]}" for one in layers[:-1]} == blobs.keys()
    assert layers[-1] == manifest["layers"][0]
    done = nydusify(
        "check", "--source", f"{registry.host}/app:v1", "--target", f"{registry.host}/whole:n",
        *work,
    )  # fmt: skip
    assert done.status == 0, done.stderr

    files = tmp_path / "files.json"
    files.write_text('{"version":"v1","files":[{"path":"/etc/conf"}]}')
    run("optimize", "--source", "@out:n", "--target", "@out:o", "--prefetch-files", str(files),
        prefix="source-")  # fmt: skip
    (layer,) = _manifest(registry, "out", "o")["layers"]
    mark = "containerd.io/snapshot/nydus-separated-blob-with-prefetch-files"
    assert bucket.objects.keys() - blobs.keys() == {f"data/{layer['annotations'][mark]}"}
    run("check", "--source", "@app:v1", "--target", "@out:o", prefix="target-")

    run("chunkdict generate", "--sources", "@out:n,@out:n", "--target", "@dict:d")
    assert registry.repository("dict").blobs
    assert SECRET not in said
    stored = b"".join(
        data for repo in registry.repositories.values()
        for data in (*repo.blobs.values(), *(value for _, value in repo.manifests.values()))
    )  # fmt: skip
    assert SECRET.encode() not in stored


def test_blobs_that_are_there_are_not_sent_again(bucket, registry, tmp_path):
    words = (
        "convert", "--source", f"{registry.host}/app:v1", "--target", f"{registry.host}/out:n",
        "--backend-type", bucket.kind, "--plain-http", "--work-dir", tmp_path, "--no-proof",
    )  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(bucket.config()))
    for force, expected in (((), 2), ((), 0), (("--backend-force-push",), 2)):
        bucket.log.clear()
        done = nydusify(*words, "--backend-config-file", file, *force)
        assert done.status == 0, done.stderr
        assert sum(row.startswith("PUT") for row in bucket.log) == expected


def test_bucket_that_fails_publishes_nothing(bucket, registry, tmp_path):
    bucket.faults += [("PUT", 503)] * 9
    done = nydusify(
        "convert", "--source", f"{registry.host}/app:v1", "--target", f"{registry.host}/out:n",
        "--backend-type", bucket.kind, "--backend-config", json.dumps(bucket.config()),
        "--plain-http", "--work-dir", tmp_path, "--push-retry-delay", "1ms",
    )  # fmt: skip
    assert done.status == 1
    assert not registry.repository("out").tags


def test_unreadable_configuration_is_not_quoted(registry, tmp_path):
    for text in (f'{{"access_key_secret": "{SECRET}"', "[]"):
        done = nydusify(
            "convert", "--source", f"{registry.host}/app:v1", "--target", f"{registry.host}/o:n",
            "--backend-type", "s3", "--backend-config", text, "--work-dir", tmp_path,
        )  # fmt: skip
        assert done.status == 1
        assert SECRET not in done.stderr


def test_part_sizes_keep_to_ten_thousand_parts(bucket, place, monkeypatch):
    monkeypatch.setattr(objects, "_MAX_PARTS", 2)
    place.put(_describe(DATA), _pieces(DATA))
    assert sum("partNumber" in row for row in bucket.log) == 2


def test_answer_that_is_none(bucket, place, monkeypatch):
    monkeypatch.setattr(objects, "_UPLOAD_ID", objects._CODE)
    with pytest.raises(BackendError, match="begins no upload"):
        place.put(_describe(DATA), _pieces(DATA))
