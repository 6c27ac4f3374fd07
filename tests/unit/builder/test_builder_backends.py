import json
import uuid

import pytest

from builder.backends import blob_directory, configured_backend
from builder.errors import BuildError
from erofs import NydusError
from tests.fakes.blob_disk import BASIC, disk
from tests.fakes.blob_server import BlobServer
from tests.fakes.object_store import ObjectStoreServer


def test_http_proxy_reads_blobs():
    with BlobServer({"id": b"0123456789"}) as server:
        backend = configured_backend(
            "http-proxy", json.dumps({"addr": server.address, "timeout": 3})
        )
        assert backend.open("id").read_at(2, 3) == b"234"
        backend.close()


@pytest.mark.parametrize("kind", ["oss", "s3"])
def test_object_storage_reads_blobs(kind):
    with ObjectStoreServer(kind, {"id": b"0123456789"}) as server:
        backend = configured_backend(kind, json.dumps(server.config()))
        assert backend.open("id").read_at(2, 3) == b"234"
        backend.close()


def test_disk_has_blobs(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(disk((BASIC, uuid.UUID(int=1), "i" * 32, b"0123456789")))
    backend = configured_backend("localdisk", json.dumps({"device_path": str(path)}))
    assert backend.open("i" * 64).read_at(2, 3) == b"234"
    backend.close()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", b"\xff",
        '{"addr": 1}', '{"addr": ""}', '{"addr": "nowhere"}',
        '{"addr": "http://h", "path": 1}',
        '{"addr": "http://h", "skip_verify": 1}',
        '{"addr": "http://h", "ca_cert_files": "x"}',
        '{"addr": "http://h", "timeout": true}',
        '{"addr": "http://h", "timeout": 0}',
        '{"addr": "http://h", "connect_timeout": "5"}',
    ],
)  # fmt: skip
def test_refused_configurations_are_not_quoted(text):
    with pytest.raises(NydusError) as raised:
        configured_backend("http-proxy", text)
    assert not text or str(text) not in str(raised.value)


def test_blob_directory_must_exist(tmp_path):
    with pytest.raises(BuildError, match="does not exist"):
        blob_directory(tmp_path / "nope")
