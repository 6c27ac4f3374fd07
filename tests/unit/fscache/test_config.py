"""Configuration: both versions, unknown keys with their path, wrong types with theirs."""

import json
import logging
from pathlib import Path

import pytest

from fscache.backend import (
    Credentials,
    HttpProxyConfig,
    LocalFsConfig,
    MirrorConfig,
    ObjectStoreConfig,
    ProxyConfig,
    RegistryConfig,
)
from fscache.backend.config import backend_config
from fscache.backend.table import WITHOUT_EFFECT, ConfigTable
from fscache.blobentry import parse_blob_entry
from fscache.config import ConfigError, DaemonConfig, load_config, parse_config
from fscache.settings import (
    CacheConfig,
    ExternalBackend,
    OverlayConfig,
    PrefetchConfig,
    RafsConfig,
)
from tests.fixtures_path import FIXTURES, needs_fixtures
from tests.leftovers import said

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
        ("device.backend.type", "localdisk", "device.backend.config.device_path: missing"),
        ("device.backend.type", "nfs", "unknown backend 'nfs'"),
        ("device.backend.config", {}, "device.backend.config.dir: missing"),
        ("device.backend.config", {"dir": "/a", "alt_dirs": [1]}, "alt_dirs[0]: expected text"),
        ("device.cache.type", "", "device.cache.type: expected blobcache or filecache"),
        ("device.cache.type", "memory", "device.cache.type: unknown cache 'memory'"),
        ("device.cache.type", "fscache", "device.cache.type: expected blobcache or filecache"),
        ("device.cache.config", [], "device.cache.config: expected an object, got a list"),
        (
            "device.cache.config",
            {"encryption_key": "abc"},
            "encryption_key: expected 64 hex digits",
        ),
        ("mode", "fast", "mode: expected direct or cached"),
        ("amplify_io", 1 << 29, "amplify_io: expected 0 to 268435456"),
        (
            "fs_prefetch",
            {"enable": True, "threads_count": 0},
            "fs_prefetch.threads_count: expected 1 to 1024",
        ),
        (
            "fs_prefetch",
            {"enable": True, "merging_size": 0x10000001},
            "fs_prefetch.merging_size: expected 0 to 268435456",
        ),
        ("fs_prefetch", {"threads_count": -1}, "fs_prefetch.threads_count: expected 0"),
        ("device.external_backends", [3], "device.external_backends[0]: expected an object"),
        ("device.external_backends", [{}], "device.external_backends[0].type: missing"),
        ("device.cache.validate", "yes", "device.cache.validate: expected true or false"),
        ("enable_xattr", 1, "enable_xattr: expected true or false, got a whole number"),
        ("version", 3, "version: expected 2"),
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
        parse_config(changed("mode", "cached"))
        parse_config(changed("device.cache.config", {}))
    messages = [record.getMessage() for record in said(caplog, "fscache.backend.table")]
    assert messages == [
        "configuration: unknown key device.cache.config.bogus",
        "configuration: mode has no effect in this version",
        "configuration: device.cache.config.work_dir is missing, the current directory is used",
    ]


FULL_V1 = """{
  "device": {
    "id": "i",
    "backend": {"type": "registry", "config": {
      "scheme": "", "host": "h:1", "repo": "a/b", "auth": "dTpw", "registry_token": "tok",
      "blob_url_scheme": "http", "blob_redirected_host": "cdn", "skip_verify": true,
      "ca_cert_files": ["/c.pem"], "timeout": 7, "connect_timeout": 8.5, "retry_limit": 9,
      "proxy": {"url": "http://p", "ping_url": "http://p/ping", "fallback": false,
        "check_interval": 6, "check_pause_elapsed": 60, "use_http": true,
        "dragonfly_scheduler_endpoint": "x"}}},
    "external_backends": [{"type": "local", "patch": {"a": "b"}, "config": {"c": "d"}}],
    "cache": {"type": "filecache", "compressed": true, "validate": true, "config": {
      "work_dir": "/w", "disable_indexed_map": true, "enable_encryption": true,
      "enable_convergent_encryption": true, "encryption_key": "KEY"}}
  },
  "mode": "cached", "digest_validate": true, "iostats_files": true, "access_pattern": true,
  "latest_read_files": true, "enable_xattr": true, "amplify_io": 4096,
  "fs_prefetch": {"enable": true, "threads_count": 3, "merging_size": 5, "bandwidth_rate": 6,
    "prefetch_all": false, "stream_prefetch": true}
}""".replace("KEY", "0f" * 32)
FULL_V2 = """
version = 2
id = "i"
metadata_path = "/m"
[backend]
type = "registry"
[backend.registry]
scheme = ""
host = "h:1"
repo = "a/b"
auth = "dTpw"
registry_token = "tok"
blob_url_scheme = "http"
blob_redirected_host = "cdn"
skip_verify = true
ca_cert_files = ["/c.pem"]
timeout = 7
connect_timeout = 8.5
retry_limit = 9
[backend.registry.proxy]
url = "http://p"
ping_url = "http://p/ping"
fallback = false
check_interval = 6
check_pause_elapsed = 60
use_http = true
dragonfly_scheduler_endpoint = "x"
[backend.oss]
anything = 1
[[external_backends]]
type = "local"
patch = {a = "b"}
config = {c = "d"}
[cache]
type = "filecache"
compressed = true
validate = true
[cache.filecache]
work_dir = "/w"
disable_indexed_map = true
enable_encryption = true
enable_convergent_encryption = true
encryption_key = "KEY"
[cache.fscache]
work_dir = "/f"
[rafs]
mode = "cached"
validate = true
iostats_files = true
access_pattern = true
latest_read_files = true
enable_xattr = true
batch_size = 4096
[rafs.prefetch]
enable = true
threads = 3
batch_size = 5
bandwidth_limit = 6
prefetch_all = false
stream_prefetch = true
""".replace("KEY", "0f" * 32)
FULL = DaemonConfig(
    RegistryConfig(
        "h:1",
        "a/b",
        scheme="",
        credentials=Credentials("u", "p"),
        registry_token="tok",
        blob_url_scheme="http",
        blob_redirected_host="cdn",
        skip_verify=True,
        ca_cert_files=(Path("/c.pem"),),
        timeout=7.0,
        connect_timeout=8.5,
        retry_limit=9,
        proxy=ProxyConfig("http://p", "http://p/ping", False, 6.0, 60.0, True),
    ),
    Path("/w"),
    "i",
    CacheConfig("filecache", True, True, True, True, True, "0f" * 32),
    RafsConfig("cached", 4096, True, True, True, True, True),
    external_backends=(ExternalBackend("local", {"a": "b"}, {"c": "d"}),),
)
PREFETCH = PrefetchConfig(True, 3, 5, 6, False, True)


@pytest.mark.parametrize("text", [FULL_V1, FULL_V2], ids=["v1", "v2"])
def test_every_key(text, caplog):
    expected = FULL._replace(
        cache=FULL.cache._replace(prefetch=PREFETCH),
        rafs=FULL.rafs._replace(prefetch=PREFETCH),
    )
    assert parse_config(text) == expected
    messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if "unknown" in message]
    for secret in ("dTpw", "tok'", "0f0f", "Credentials("):
        assert secret not in repr(expected) + caplog.text


def test_version_2_only(caplog):
    text = (
        FULL_V2
        + """
[overlay]
upper_dir = "/u"
work_dir = "/o"
[cache.prefetch]
enable = true
threads = 9
"""
    )
    config = parse_config(text)
    assert config.overlay == OverlayConfig(Path("/u"), Path("/o"))
    assert config.cache.prefetch == PrefetchConfig(True, 9)
    assert config.rafs.prefetch == PREFETCH


def test_numbers_of_a_prefetch_that_is_off_do_not_matter():
    """The original shows such zeros in the configuration of a daemon, and takes them."""
    off = {"enable": False, "threads_count": 0, "merging_size": 0}
    assert not parse_config(json.dumps({**V1, "fs_prefetch": off})).rafs.prefetch.enable
    large = {"threads_count": 2000, "merging_size": 0x10000001}
    assert not parse_config(json.dumps({**V1, "fs_prefetch": large})).rafs.prefetch.enable
    v2 = FULL_V2 + "[cache.prefetch]\nenable = false\nthreads = 0\nbatch_size = 0\n"
    assert parse_config(v2).cache.prefetch == PREFETCH


def test_prefetch_of_blob_entries_is_no_key_without_effect(caplog):
    parse_blob_entry(changed_entry(prefetch_config={"enable": True}))
    assert "has no effect" not in caplog.text


def test_the_list_of_keys_without_effect_is_true(caplog):
    """Every entry warns for some key."""
    parse_config(FULL_V1)
    parse_config(
        FULL_V2
        + """
[overlay]
upper_dir = "/u"
work_dir = "/o"
[cache.prefetch]
enable = true
"""
    )
    warned = {
        record.getMessage().split()[1]
        for record in caplog.records
        if record.getMessage().endswith("has no effect in this version")
    }
    unused = {
        end for end in WITHOUT_EFFECT if not any(f".{key}".endswith(f".{end}") for key in warned)
    }
    assert unused == set()


def test_defaults_do_not_warn(caplog):
    plain = json.loads(json.dumps(V1))
    plain |= {"iostats_files": False, "amplify_io": 1 << 20, "fs_prefetch": {"enable": False}}
    plain["device"]["cache"]["compressed"] = False
    parse_config(json.dumps(plain))
    assert said(caplog, "fscache.backend.table") == []


REGISTRY = {"host": "h", "repo": "r"}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("host", None, "config.host: missing"),
        ("host", "http://h", "config.host: expected host or host:port"),
        ("host", "u:s3cret@h", "config.host: expected host or host:port"),
        ("repo", "../x", "config.repo: expected a repository"),
        ("scheme", "ftp", "config.scheme: expected https, http or nothing"),
        ("auth", "s3cret", "config.auth: expected base64 of user:password"),
        ("auth", 3, "config.auth: expected text"),
        ("registry_token", "s3cret\nx", "config.registry_token: expected a token"),
        ("blob_redirected_host", "a/b", "config.blob_redirected_host: expected host"),
        ("retry_limit", -1, "config.retry_limit: expected 0 to 255"),
        ("proxy", {"url": 3}, "config.proxy.url: expected text"),
        ("proxy", {"check_interval": 0}, "config.proxy.check_interval: expected seconds"),
        ("proxy", {"check_interval": 10**400}, "config.proxy.check_interval: expected seconds"),
        ("mirrors", {}, "config.mirrors: expected a list"),
        ("mirrors", [{}], "config.mirrors[0].host: missing"),
        ("mirrors", [{"host": "h", "headers": {"a": 1}}], "mirrors[0].headers.a: expected text"),
        ("mirrors", [{"host": "h", "headers": {"a b": "s3cret"}}], "mirrors[0].headers: 'a b'"),
        ("mirrors", [{"host": "h", "failure_limit": 0}], "failure_limit: expected 1 to 255"),
    ],
)
def test_what_is_wrong_with_a_registry(key, value, text):
    config = json.loads(changed("device.backend", {"type": "registry", "config": REGISTRY}))
    config["device"]["backend"]["config"] = {**REGISTRY, key: value}
    with pytest.raises(ConfigError) as caught:
        parse_config(json.dumps(config))
    assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_mirrors_and_proxy():
    mirrors = [{"host": "http://m", "headers": {"X": "y"}, "failure_limit": 3}]
    config = {**REGISTRY, "mirrors": mirrors, "proxy": {"url": ""}}
    text = changed("device.backend", {"type": "registry", "config": config})
    assert parse_config(text).backend == RegistryConfig(
        "h", "r", mirrors=(MirrorConfig("http://m", {"X": "y"}, failure_limit=3),)
    )
    config["proxy"] = {"url": "http://p"}
    text = changed("device.backend", {"type": "registry", "config": config})
    with pytest.raises(ConfigError, match="mirrors: cannot be used together with proxy"):
        parse_config(text)


def test_misspelled_registry(caplog):
    text = FULL_V2.replace("[backend.registry]", "[backend.registy]")
    config = parse_config(text)
    assert config.backend == FULL.backend
    assert "backend.registy is taken for registry" in caplog.text


def test_encryption_at_the_wrong_place(caplog):
    config = parse_config(V2.replace("[cache]", "[cache]\nenable_encryption = true"))
    assert not config.cache.enable_encryption
    assert "cache.enable_encryption has no effect here, its place is cache.filecache" in caplog.text


# Blob entries


def changed_entry(**short):
    config = {"backend_type": "localfs", "backend_config": {"dir": "/b"}, "cache_type": "fscache",
              "cache_config": {"work_dir": "/w"}, "metadata_path": "/m", **short}  # fmt: skip
    return {"type": "bootstrap", "id": "i", "domain_id": "d", "config": config}


def test_blob_entry():
    entry = parse_blob_entry(changed_entry())
    assert (entry.id, entry.domain_id, entry.metadata_path) == ("i", "d", Path("/m"))
    assert entry.config == DaemonConfig(
        LocalFsConfig(dir=Path("/b")),
        Path("/w"),
        cache=CacheConfig("fscache", prefetch=PrefetchConfig(prefetch_all=True)),
    )


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({}, "type: missing"),
        ({**changed_entry(), "type": "datablob"}, "type: expected bootstrap"),
        ({"type": "bootstrap"}, "config: missing"),
        ({**changed_entry(), "id": "a/b"}, "id: contains a slash"),
        ({**changed_entry(), "domain_id": "a/b"}, "domain_id: contains a slash"),
        (changed_entry(cache_type="blobcache"), "cache type: expected fscache or filecache"),
        (changed_entry(cache_type="x"), "config.cache_type: unknown cache 'x'"),
        (changed_entry(backend_type="ram"), "config.backend_type: unknown backend 'ram'"),
    ],
)
def test_blob_entries_that_are_none(entry, text):
    with pytest.raises(ConfigError) as caught:
        parse_blob_entry(entry)
    assert text in str(caught.value)


# Published samples

SAMPLES = FIXTURES / "nydus" / "configs"


@needs_fixtures
@pytest.mark.parametrize("name", ["nydusd-config.json", "snapshotter-nydusd-config.fusedev.json"])
def test_sample_templates_of_version_1(name, tmp_path):
    """Whoever starts a daemon fills host and repository in."""
    with pytest.raises(ConfigError, match=r"device\.backend\.config\.host: missing"):
        load_config(SAMPLES / name)
    config = json.loads((SAMPLES / name).read_text())
    config["device"]["backend"]["config"] |= {"host": "h", "repo": "r"}
    found = parse_config(json.dumps(config))
    assert isinstance(found.backend, RegistryConfig)
    assert found.backend.retry_limit == 2
    assert found.rafs.prefetch == PrefetchConfig(True, 8, 1 << 20, 0, True)


@needs_fixtures
def test_sample_of_localfs():
    config = load_config(SAMPLES / "snapshotter-nydusd-config.localfs.json")
    assert isinstance(config.backend, LocalFsConfig)
    assert config.work_dir == Path()


@needs_fixtures
@pytest.mark.parametrize(
    "name", ["nydusd-config-v2.toml", "nydusd-blob-cache-entry-configuration-v2.toml"]
)
def test_samples_of_version_2(name, caplog):
    config = load_config(SAMPLES / name)
    assert config.backend == LocalFsConfig(
        dir=Path("/tmp"),
        blob_file=Path("/tmp/nydus.blob.data"),
        alt_dirs=(Path("/var/nydus/cache"),),
    )
    assert (config.cache.compressed, config.cache.validate) == (True, True)
    assert config.cache.prefetch == PrefetchConfig(True, 8, 1_000_000, 10_000_000)
    assert "backend.registy is taken for registry" in caplog.text
    assert "unknown key" not in caplog.text


@needs_fixtures
def test_samples_of_blob_entries(caplog):
    entry = parse_blob_entry((SAMPLES / "nydusd-boostrap-blob-cache-entry.json").read_text())
    assert entry.metadata_path == Path("/tmp/nydus/bootstrap1")
    assert "metadata_file is taken for metadata_path" in caplog.text
    entry = parse_blob_entry((SAMPLES / "nydusd-blob-cache-entry.toml").read_text())
    assert entry.metadata_path == Path("/path/to/rafs/meta/data/blob")
    template = json.loads((SAMPLES / "snapshotter-nydusd-config.fscache.json").read_text())
    template["config"]["backend_config"] = REGISTRY
    assert isinstance(parse_blob_entry(template).config.backend, RegistryConfig)
    assert "unknown key" not in caplog.text


@needs_fixtures
def test_sample_of_object_storage(caplog):
    """It is one of `nydusify build`, which has two prefixes more."""
    table = ConfigTable(json.loads((SAMPLES / "backend-config.json").read_text()), "backend.config")
    config = backend_config("oss", table, ConfigTable({"type": "oss"}, "backend"))
    assert isinstance(config, ObjectStoreConfig)
    assert caplog.text.count("unknown key") == 2


@needs_fixtures
def test_all_samples_are_tested():
    assert len(list(SAMPLES.iterdir())) == 9


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
