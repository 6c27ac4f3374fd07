"""Object storage: signatures against published vectors, and requests against a strict bucket."""

from __future__ import annotations

import logging
import socket
from datetime import UTC, datetime

import pytest
from fakes.object_store import KEY, SECRET, ObjectStoreServer

from fscache.backend import AuthError, BackendError, Credentials, open_backend
from fscache.backend.config import ConfigError, ConfigTable, backend_config
from fscache.backend.signing import EMPTY_DIGEST, query_text, sign_oss, sign_s3

AWS = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
AWS_MOMENT = datetime(2013, 5, 24, tzinfo=UTC)
AWS_HOST = "examplebucket.s3.amazonaws.com"
PUT_DIGEST = "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072"


def _config(kind, values):
    return backend_config(
        kind, ConfigTable(values, "backend.config"), ConfigTable({"type": kind}, "backend")
    )


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "payload", "signature"),
    [
        (
            "GET", "/test.txt", [], {"range": "bytes=0-9"}, EMPTY_DIGEST,
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
        ),
        (
            "PUT", "/test%24file.text", [],
            {"date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            PUT_DIGEST, "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
        ),
        (
            "GET", "/", [("lifecycle", "")], {}, EMPTY_DIGEST,
            "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
        ),
        (
            "GET", "/", [("prefix", "J"), ("max-keys", "2")], {}, EMPTY_DIGEST,
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
        ),
    ],
)  # fmt: skip
def test_vectors_of_aws(method, path, query, headers, payload, signature):
    """The examples of "Signature Calculations for the Authorization Header"."""
    found = sign_s3(
        AWS, "us-east-1", method, path, query, {"host": AWS_HOST, **headers}, payload, AWS_MOMENT
    )
    assert found["Authorization"].endswith(f",Signature={signature}")
    assert found["x-amz-date"] == "20130524T000000Z"


def test_vector_of_oss():
    """The example of "Include signatures in the Authorization header"."""
    keys = Credentials("44CF9590006BF252F707", "OtxrzxIsfpFjA7SwPzILwy8Bw21TLhquhboDYROV")
    headers = {
        "content-md5": "ODBGOERFMDMzQTczRUY3NUE3NzA5QzdFNUYzMDQxNEM=", "content-type": "text/html",
        "x-oss-magic": "abracadabra", "x-oss-meta-author": "foo@bar.com",
    }  # fmt: skip
    moment = datetime(2005, 11, 17, 18, 49, 58, tzinfo=UTC)
    found = sign_oss(keys, "PUT", "/oss-example/nelson", [], headers, moment)
    assert found == {
        "Date": "Thu, 17 Nov 2005 18:49:58 GMT",
        "Authorization": "OSS 44CF9590006BF252F707:26NBxoKdsyly4EDv6inkoDft/yA=",
    }


def test_query_is_quoted_and_sorted():
    assert query_text([("uploadId", "a b/&+~"), ("partNumber", "1")]) == (
        "partNumber=1&uploadId=a%20b%2F%26%2B~"
    )


@pytest.mark.parametrize("kind", ["oss", "s3"])
def test_prefix_and_strange_names(kind):
    name = "a b%?#~+é"
    with ObjectStoreServer(kind, {f"some/pre fix/{name}": b"0123456789"}) as server:
        backend = open_backend(_config(kind, server.config(object_prefix="some/pre fix/")))
        assert backend.open(name).read_at(2, 3) == b"234"
        assert backend.open(name).size() == 10
        backend.close()


def test_bucket_is_part_of_the_name_with_oss(monkeypatch):
    real = socket.getaddrinfo

    def resolve(host, *words, **more):
        name = host.decode() if isinstance(host, bytes) else host
        return real("127.0.0.1" if name == "bucket-1.oss.test" else host, *words, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with ObjectStoreServer("oss", {"id": b"0123456789"}) as server:
        port = server.host.partition(":")[2]
        backend = open_backend(_config("oss", server.config(endpoint=f"oss.test:{port}")))
        assert backend.open("id").read_at(2, 3) == b"234"
        assert server.headers[-1]["Host"] == f"bucket-1.oss.test:{port}"
        backend.close()


@pytest.mark.parametrize("kind", ["oss", "s3"])
def test_refused_keys_are_not_told(kind, caplog):
    caplog.set_level(logging.DEBUG)
    with ObjectStoreServer(kind, {"id": b"0123456789"}) as server:
        config = _config(kind, server.config(access_key_secret="0ther-secret"))
        assert "0ther-secret" not in repr(config)
        assert KEY not in repr(config)
        backend = open_backend(config)
        with pytest.raises(AuthError) as caught:
            backend.open("id").read_at(0, 1)
        backend.close()
    assert SECRET not in str(caught.value)
    assert "0ther-secret" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("kind", ["oss", "s3"])
def test_without_a_key_nothing_is_signed(kind):
    with ObjectStoreServer(kind, {"id": b"0123456789"}, anonymous=True) as server:
        values = server.config()
        del values["access_key_id"], values["access_key_secret"]
        backend = open_backend(_config(kind, values))
        assert backend.open("id").read_at(0, 10) == b"0123456789"
        assert "Authorization" not in server.headers[-1]
        backend.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"endpoint": ""}, "backend.config.endpoint: missing"),
        ({"endpoint": "http://h"}, "backend.config.endpoint: expected host or host:port"),
        ({"bucket_name": "a/b"}, "backend.config.bucket_name: expected a bucket"),
        ({"region": ""}, "backend.config.region: missing"),
        ({"region": "a b"}, "backend.config.region: expected a region"),
        ({"scheme": "ftp"}, "backend.config.scheme: expected https, http"),
        ({"object_prefix": "a\nb"}, "backend.config.object_prefix: expected printable"),
        ({"access_key_secret": ""}, "backend.config.access_key_secret: missing"),
        ({"access_key_id": ""}, "backend.config.access_key_id: missing"),
        ({"access_key_id": "s3cr3t\r\nHost: x"}, "access_key_id: expected an access key"),
    ],
)
def test_refused_configurations(change, text):
    values = {
        "endpoint": "h", "bucket_name": "b", "region": "r", "access_key_id": "i",
        "access_key_secret": "s3cr3t",
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        _config("s3", values | change)
    assert text in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_endpoint_without_a_host():
    values = {"endpoint": "h:0", "bucket_name": "b", "region": "r"}
    with pytest.raises(BackendError, match="endpoint of the bucket"):
        open_backend(_config("s3", values))
