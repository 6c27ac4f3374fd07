"""`nydusify build`: pushed to a bucket, and on a parent that is compacted first."""

from __future__ import annotations

import hashlib
import json
import logging
import random

import pytest

from builder.backends import blob_directory
from builder.bootstrap import blob_ids
from builder.datacheck import check_data
from builder.errors import BuildError
from builder.nydusify.build import compact_settings
from erofs import open_bootstrap
from tests.fakes.object_store import SECRET, ObjectStoreServer
from tests.fixtures_path import FIXTURES, needs_fixtures
from tests.nydusify_images import nydusify


@pytest.fixture(params=["s3", "oss"])
def bucket(request):
    with ObjectStoreServer(request.param) as server:
        yield server


def _build(bucket, tmp_path, name, *words, **config):
    values = bucket.config(meta_prefix="meta/", blob_prefix="data/") | config
    done = nydusify(
        "build", "--source-dir", tmp_path / "tree", "--output-dir", tmp_path / "out", "--name",
        name, "--backend-type", bucket.kind, "--backend-config", json.dumps(values), *words,
    )  # fmt: skip
    assert SECRET not in done.stderr + done.stdout
    return done


def _tree(tmp_path, generation):
    tree = tmp_path / "tree"
    tree.mkdir(exist_ok=True)
    (tree / f"file{generation}").write_bytes(random.Random(generation).randbytes(20_000))


def _ids(path):
    with open_bootstrap(path) as image:
        return blob_ids(image, path)


def test_metadata_and_data_have_prefixes_of_their_own(bucket, tmp_path):
    _tree(tmp_path, 0)
    done = _build(bucket, tmp_path, "img", "--backend-push")
    assert done.status == 0, done.stderr
    (blob,) = _ids(tmp_path / "out" / "img.meta")
    data = (tmp_path / "out" / blob).read_bytes()
    assert hashlib.sha256(data).hexdigest() == blob
    assert bucket.objects == {
        f"data/{blob}": data, "meta/img": (tmp_path / "out" / "img.meta").read_bytes(),
    }  # fmt: skip
    # Data comes before what refers to it; what is there is not sent again, but for metadata.
    bucket.log.clear()
    assert _build(bucket, tmp_path, "img", "--backend-push").status == 0
    assert [row.split("?")[0].rpartition("/")[2] for row in bucket.log] == [blob, "img"]


def test_one_prefix_for_both(bucket, tmp_path):
    _tree(tmp_path, 0)
    values = bucket.config(object_prefix="x/")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    done = nydusify(
        "pack", "--source-dir", tmp_path / "tree", "--output-dir", tmp_path / "out", "--name",
        "img", "--backend-push", "--backend-type", bucket.kind, "--backend-config-file", file,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert bucket.objects
    assert all(name.startswith("x/") for name in bucket.objects)


def test_failing_bucket_gets_no_metadata(bucket, tmp_path):
    _tree(tmp_path, 0)
    bucket.faults.append(("PUT .*data/", 403))
    done = _build(bucket, tmp_path, "img", "--backend-push")
    assert done.status == 1
    assert bucket.objects == {}


def _generations(bucket, tmp_path, count):
    parent = ()
    for generation in range(count):
        _tree(tmp_path, generation)
        done = _build(bucket, tmp_path, f"g{generation}", "--backend-push", *parent)
        assert done.status == 0, done.stderr
        parent = ("--parent-bootstrap", tmp_path / "out" / f"g{generation}.meta")
    return parent


def test_parent_of_many_generations_is_compacted(bucket, tmp_path):
    parent = _generations(bucket, tmp_path, 3)
    assert len(_ids(parent[1])) == 3
    # The blobs of the parent are in the bucket only.
    for blob in _ids(parent[1]):
        (tmp_path / "out" / blob).unlink()
    _tree(tmp_path, 3)
    config = tmp_path / "compact.json"
    config.write_text('{"min_used_ratio": 5, "LayersToCompact": "2"}')
    done = _build(
        bucket, tmp_path, "g3", "--backend-push", "--compact", "--compact-config-file", config,
        *parent,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    path = tmp_path / "out" / "g3.meta"
    joined, own = _ids(path)
    assert {f"data/{joined}", f"data/{own}"} < bucket.objects.keys()
    assert (tmp_path / "out" / "compact-result.json").exists()
    assert len(_ids(tmp_path / "out" / "g2.meta.compact")) == 1
    local = blob_directory(tmp_path / "out")
    try:
        with open_bootstrap(path) as image:
            assert not list(check_data(image, [joined, own], local, path))
    finally:
        local.close()


def test_few_generations_are_left_alone(bucket, tmp_path):
    parent = _generations(bucket, tmp_path, 2)
    before = _ids(parent[1])
    _tree(tmp_path, 2)
    done = _build(bucket, tmp_path, "g2", "--compact", *parent)
    assert done.status == 0, done.stderr
    assert _ids(tmp_path / "out" / "g2.meta")[:2] == before


@pytest.mark.parametrize(
    "words",
    [("--backend-push", "--backend-type", "localfs", "--backend-config", "{}"),
     ("--backend-push",), ("--compact",), ("--backend-push", "--backend-config", "{")],
)  # fmt: skip
def test_bucket_that_is_none(tmp_path, words):
    _tree(tmp_path, 0)
    done = nydusify("build", "--source-dir", tmp_path / "tree", "--output-dir", tmp_path / "out",
                    "--name", "i", *words)  # fmt: skip
    assert done.status == 1
    assert "backend" in done.last
    assert not (tmp_path / "out" / "i.meta").exists()


def test_settings_of_compacting(tmp_path, caplog):
    assert compact_settings("") == {
        "min_used_ratio": 5, "compact_blob_size": 10485760, "max_compact_size": 104857600,
        "layers_to_compact": 32,
    }  # fmt: skip
    path = tmp_path / "c.json"
    path.write_text('{"MaxCompactSize": "7", "min_used_ratio": 9, "BlobsDir": "x"}')
    found = compact_settings(str(path))
    assert (found["max_compact_size"], found["min_used_ratio"]) == (7, 9)
    assert "blobsdir" in caplog.text
    for text in ("{", "[]", '{"min_used_ratio": -1}', '{"min_used_ratio": true}'):
        path.write_text(text)
        with pytest.raises(BuildError):
            compact_settings(str(path))


@needs_fixtures
def test_published_sample_is_understood(tmp_path, caplog):
    """It names a bucket nobody has: the keys are read, the request fails without them."""
    caplog.set_level(logging.DEBUG)
    _tree(tmp_path, 0)
    sample = json.loads((FIXTURES / "nydus" / "configs" / "backend-config.json").read_text())
    with ObjectStoreServer("oss") as bucket:
        sample |= {"endpoint": bucket.host, "scheme": "http"}
        done = nydusify(
            "build", "--source-dir", tmp_path / "tree", "--output-dir", tmp_path / "out", "--name",
            "i", "--backend-push", "--backend-config", json.dumps(sample),
        )  # fmt: skip
        assert done.status == 1
        assert bucket.log[0].startswith("HEAD /testbucket/")
    assert sample["access_key_secret"] not in done.stderr
