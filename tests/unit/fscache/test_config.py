"""Configuration: both versions, unknown keys with their path, wrong types with theirs."""

import json
import logging
from pathlib import Path

import pytest

from fscache.backend import HttpProxyConfig, LocalFsConfig
from fscache.config import ConfigError, load_config, parse_config

V1 = {
    "device": {
        "id": "one",
        "backend": {"type": "localfs", "config": {"dir": "/blobs"}},
        "cache": {"type": "blobcache", "config": {"work_dir": "/cache"}},
    },
    "mode": "direct",
    "digest_validate": False,
    "enable_xattr": True,
}
V2 = """
version = 2
id = "two"
[backend]
type = "http-proxy"
[backend.http-proxy]
addr = "http://127.0.0.1:80"
path = "/b"
timeout = 7
ca_cert_files = ["/a.pem"]
[cache]
type = "filecache"
[cache.filecache]
work_dir = "/cache"
[rafs]
mode = "direct"
"""


def changed(path, value):
    config = json.loads(json.dumps(V1))
    place = config
    *parents, last = path.split(".")
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(config)


def test_version_1():
    config = parse_config(json.dumps(V1))
    assert config.backend == LocalFsConfig(dir=Path("/blobs"))
    assert (config.work_dir, config.id) == (Path("/cache"), "one")


def test_version_2_in_toml_and_json():
    import tomllib

    from_toml = parse_config(V2)
    assert from_toml == parse_config(json.dumps(tomllib.loads(V2)))
    assert from_toml.backend == HttpProxyConfig(
        "http://127.0.0.1:80", "/b", timeout=7.0, ca_cert_files=(Path("/a.pem"),)
    )
    assert (from_toml.work_dir, from_toml.id) == (Path("/cache"), "two")


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("device", [], "device: expected an object, got a list"),
        ("device.backend.type", "", "device.backend.type: missing"),
        ("device.backend.type", 3, "device.backend.type: expected text, got a whole number"),
        ("device.backend.type", "oss", "backend 'oss' is not supported in this version"),
        ("device.backend.type", "nfs", "unknown backend 'nfs'"),
        ("device.backend.config", {}, "device.backend.config.dir: missing"),
        ("device.backend.config", {"dir": "/a", "alt_dirs": [1]}, "alt_dirs[0]: expected text"),
        ("device.cache.type", "", "device.cache.type: expected blobcache or filecache"),
        ("device.cache.config", {}, "device.cache.config.work_dir: missing"),
        ("device.cache.validate", "yes", "device.cache.validate: expected true or false"),
        ("enable_xattr", 1, "enable_xattr: expected true or false, got a whole number"),
        ("version", 3, "version: expected 2, got 3"),
    ],
)
def test_what_is_wrong_is_named(path, value, text):
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(path, value))
    assert text in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, 1e9])
def test_impossible_times(timeout):
    config = V2.replace("timeout = 7", f"timeout = {timeout}")
    with pytest.raises(ConfigError, match=r"backend\.http-proxy\.timeout"):
        parse_config(config)


def test_true_is_no_number():
    with pytest.raises(ConfigError, match="retry_limit"):
        parse_config(V2.replace("timeout = 7", "retry_limit = true"))


def test_unknown_keys_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        parse_config(changed("device.cache.config", {"work_dir": "/c", "bogus": 1}))
        parse_config(changed("fs_prefetch", {"enable": True}))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "configuration: unknown key device.cache.config.bogus",
        "configuration: fs_prefetch has no effect in this version",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "version = [", "\x00"])
def test_text_that_is_no_configuration(text):
    with pytest.raises(ConfigError):
        parse_config(text)


def test_files(tmp_path):
    path = tmp_path / "c.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    path.write_text(json.dumps(V1))
    assert load_config(path).id == "one"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path)
    path.write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(path)
