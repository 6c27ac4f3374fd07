"""containerd's `hosts.toml`: what is in it, and who is asked and shown what."""

from __future__ import annotations

import ssl

import pytest
from fakes.registry import AUTH, REPO, RegistryServer, make_certificate

from fscache.backend import Credentials, RegistryConfig, open_backend
from fscache.backend.hosts import registry_hosts, with_hosts
from fscache.backend.settings import MirrorConfig, ProxyConfig
from fscache.backend.table import ConfigError
from fscache.environment import with_environment

DATA = bytes(range(256)) * 64
BLOB = "a" * 64


def _write(directory, host, text):
    (directory / host).mkdir(parents=True, exist_ok=True)
    (directory / host / "hosts.toml").write_text(text)


def test_everything_that_is_understood(tmp_path):
    _write(tmp_path, "docker.io", """
server = "https://registry-1.docker.io"
[host."https://mirror.example:5001"]
  capabilities = ["pull", "resolve"]
  ca = "ca.pem"
  ping_url = "https://mirror.example:5001/ping"
  health_check_interval = 3
  failure_limit = 2
  [host."https://mirror.example:5001".header]
    X-One = "1"
    X-Two = ["2", "3"]
[host."http://10.0.0.1/proxy/"]
  capabilities = ["pull"]
  skip_verify = true
  ca = ["/a.pem", "b.pem"]
[host."https://other.example/v2/docker"]
  override_path = true
[host."https://push.example"]
  capabilities = ["push"]
""")  # fmt: skip
    found = registry_hosts(tmp_path, "docker.io")
    first = MirrorConfig(
        host="https://mirror.example:5001", base_path="/v2",
        headers={"X-One": "1", "X-Two": "2, 3"}, ping_url="https://mirror.example:5001/ping",
        health_check_interval=3, failure_limit=2, ca_cert_files=(tmp_path / "docker.io/ca.pem",),
        shares_credentials=False,
    )  # fmt: skip
    assert found.mirrors[0] == first
    second, third = found.mirrors[1:]
    assert (second.host, second.base_path) == ("http://10.0.0.1", "/proxy/v2")
    assert (second.skip_verify, second.resolves) == (True, False)
    assert [str(path) for path in second.ca_cert_files] == [
        "/a.pem", str(tmp_path / "docker.io/b.pem"),
    ]  # fmt: skip
    assert (third.host, third.base_path) == ("https://other.example", "/v2/docker")
    assert registry_hosts(tmp_path, "registry-1.docker.io") == found


@pytest.mark.parametrize(
    ("host", "folder"),
    [
        ("h:5000", "h_5000_"), ("h:5000", "h:5000"), ("h:5000", "h"), ("h", "h"),
        ("h:5000", "_default"), ("[::1]:5000", "[::1]_5000_"), ("index.docker.io", "docker.io"),
    ],
)  # fmt: skip
def test_names_of_folders(tmp_path, host, folder):
    _write(tmp_path, folder, '[host."https://m"]')
    assert [one.host for one in registry_hosts(tmp_path, host).mirrors] == ["https://m"]


def test_nearest_folder_counts(tmp_path):
    for name in ("h_5000_", "h", "_default"):
        _write(tmp_path, name, f'[host."https://{name.replace("_", "x")}"]')
    assert registry_hosts(tmp_path, "h:5000").mirrors[0].host == "https://hx5000x"
    assert registry_hosts(tmp_path, "h:1").mirrors[0].host == "https://h"
    assert registry_hosts(tmp_path, "other").mirrors[0].host == "https://xdefault"
    assert registry_hosts(tmp_path / "nowhere", "h").mirrors == ()


def test_registry_itself_and_another_server(tmp_path):
    _write(tmp_path, "h", 'server="https://up"\n[host."http://h"]\nskip_verify=true\nca="c"')
    config = with_hosts(RegistryConfig("h", "r"), tmp_path)
    assert (config.scheme, config.skip_verify) == ("http", True)
    assert config.ca_cert_files == (tmp_path / "h" / "c",)
    assert [one.host for one in config.mirrors] == ["https://up"]


def test_configured_ways_win(tmp_path):
    _write(tmp_path, "_default", '[host."https://m"]')
    for more in ({"mirrors": (MirrorConfig("http://n"),)}, {"proxy": ProxyConfig("http://p")}):
        config = RegistryConfig("h", "r", **more)
        assert with_hosts(config, tmp_path) == config
    found = with_environment(RegistryConfig("h", "r"), {"NYDUS_HOSTS_DIR": str(tmp_path)})
    assert found.mirrors[0].host == "https://m"


@pytest.mark.parametrize(
    "text",
    [
        "[", 'host = "s3cr3t"', '[host."ftp://s3cr3t"]', '[host."https://u:s3cr3t@h"]',
        '[host."https://m"]\nheader = "s3cr3t"', '[host."https://m".header]\nX = 3',
        '[host."https://m".header]\nX = "a\\nb: s3cr3t"',
        '[host."https://m"]\nskip_verify = "s3cr3t"',
        "server = 3", '[host]\n"https://m" = "s3cr3t"', '[host."https://m"]\nca = [3]', "\xff",
        '[host."https://m"]\ncapabilities = "pull"', "a = " + "[" * 100_000,
    ],
)  # fmt: skip
def test_files_that_are_none(tmp_path, text):
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "hosts.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        registry_hosts(tmp_path, "h")
    assert "hosts.toml" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


@pytest.fixture
def registry():
    with RegistryServer({BLOB: DATA}, auth="basic") as server:
        yield server


def _read(registry, directory):
    config = RegistryConfig(
        registry.host, REPO, scheme="http", credentials=Credentials.from_base64(AUTH)
    )
    backend = open_backend(with_hosts(config, directory))
    try:
        return backend.open(BLOB).read_at(5, 10)
    finally:
        backend.close()


def test_mirror_is_asked_and_not_shown_the_password(registry, tmp_path):
    with RegistryServer({BLOB: DATA}) as mirror:
        _write(tmp_path, "_default", f'[host."{mirror.address}/some/where"]')
        assert _read(registry, tmp_path) == DATA[5:15]
        assert mirror.paths == [f"/some/where/v2/{REPO}/blobs/sha256:{BLOB}"]
        assert mirror.authorizations == [None]
        assert registry.paths == []


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_mirror_that_wants_a_password_is_gone_past(registry, tmp_path, auth):
    with RegistryServer({BLOB: DATA}, auth=auth) as mirror:
        _write(tmp_path, "_default", f'[host."{mirror.address}"]')
        assert _read(registry, tmp_path) == DATA[5:15]
        assert set(mirror.authorizations) == {None}
        assert mirror.token_requests == []


def test_mirror_with_a_certificate_of_its_own(registry, tmp_path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = make_certificate(tmp_path)
    context.load_cert_chain(certificate)
    for words, asked in (("", 0), ("skip_verify = true", 1), (f'ca = "{certificate}"', 1)):
        with RegistryServer({BLOB: DATA}, tls=context) as mirror:
            _write(tmp_path, "_default", f'[host."{mirror.address}"]\n{words}')
            assert _read(registry, tmp_path) == DATA[5:15]
            assert len(mirror.paths) == asked


def test_a_folder_that_is_not_there_is_told_of(tmp_path, caplog):
    config = RegistryConfig("h", "r")
    assert with_hosts(config, tmp_path) == config
    assert caplog.messages == []
    assert with_hosts(config, tmp_path / "none") == config
    assert caplog.messages == [f"the folder of mirrors is not there: {tmp_path}/none"]
