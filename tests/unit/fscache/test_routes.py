"""Proxies, mirrors and their health."""

import contextlib
import time
from types import SimpleNamespace

import pytest
from fakes.blob_server import BlobServer
from fakes.registry import AUTH, REPO, ProxyServer, RegistryServer

from fscache.backend import (
    AuthError,
    BackendError,
    Credentials,
    HttpProxyConfig,
    MirrorConfig,
    ProxyConfig,
    RegistryConfig,
    ShortRead,
    Unavailable,
    open_backend,
)
from fscache.backend import health as health_module
from fscache.backend.health import Health
from fscache.backend.proxy import RateLimit

DATA = bytes(range(256)) * 64
BLOB = "a" * 64


@pytest.fixture
def server():
    with RegistryServer({BLOB: DATA}) as server:
        yield server


@pytest.fixture
def proxy():
    with ProxyServer({BLOB: DATA}) as proxy:
        yield proxy


@pytest.fixture
def connect(server):
    opened = []

    def connect(**options):
        options = {"scheme": "http", "timeout": 0.5, **options}
        backend = open_backend(RegistryConfig(server.host, REPO, **options))
        opened.append(backend)
        return backend.open(BLOB)

    yield connect
    for backend in opened:
        backend.close()


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_through_the_proxy(server, proxy, connect):
    url = proxy.address.replace("//", "//us%65r:p4ss@")
    reader = connect(proxy=ProxyConfig(url), headers={"X-Team": "blue"})
    assert reader.read_at(0, 10) == DATA[:10]
    assert server.paths == []
    target, headers = proxy.proxied[0]
    assert target == f"{server.address}/v2/{REPO}/blobs/sha256:{BLOB}"
    assert headers["X-Dragonfly-Use-P2P"] == "true"
    assert headers["X-Dragonfly-Priority"] == "6"
    assert headers["X-Dragonfly-Prefetch"] == "false"
    assert headers["X-Team"] == "blue"
    assert {name.lower(): value for name, value in headers.items()}[
        "proxy-authorization"
    ] == "Basic dXNlcjpwNHNz"


def test_a_stream_through_the_proxy_is_a_prefetch_of_the_whole(server, proxy, connect):
    with connect(proxy=ProxyConfig(proxy.address)).stream(0) as pieces:
        assert b"".join(pieces) == DATA
    _, headers = proxy.proxied[0]
    assert "Range" not in headers
    assert headers["X-Dragonfly-Use-P2P"] == "true"
    assert headers["X-Dragonfly-Priority"] == "3"
    assert headers["X-Dragonfly-Prefetch"] == "true"


def test_proxy_for_the_http_proxy_backend(server, proxy):
    config = HttpProxyConfig("http://unreachable.invalid/blobs", proxy=ProxyConfig(proxy.host))
    proxy.blobs[BLOB] = DATA
    backend = open_backend(config)
    assert backend.open(BLOB).read_at(0, 10) == DATA[:10]
    assert proxy.proxied[0][0] == f"http://unreachable.invalid/blobs/{BLOB}"
    backend.close()


def test_https_as_http_for_the_proxy_but_not_for_tokens(proxy):
    proxy.auth, proxy.realm = "bearer", "https://127.0.0.1:1/token"
    config = RegistryConfig(
        "registry.invalid",
        REPO,
        proxy=ProxyConfig(proxy.address, use_http=True, fallback=False),
        credentials=Credentials.from_base64(AUTH),
    )
    backend = open_backend(config)
    with pytest.raises(BackendError):
        backend.open(BLOB).read_at(0, 10)
    assert [target for target, _ in proxy.proxied] == [
        f"http://registry.invalid/v2/{REPO}/blobs/sha256:{BLOB}"
    ]
    assert proxy.token_requests == []
    backend.close()


@pytest.mark.parametrize("fault", [(500, False), (502, True)])
def test_fallback_on_errors_of_the_proxy(server, proxy, connect, fault):
    proxy.proxy_fault = fault
    assert connect(proxy=ProxyConfig(proxy.address)).read_at(0, 10) == DATA[:10]
    assert (len(proxy.proxied), len(server.paths)) == (1, 1)
    with pytest.raises(Unavailable):
        connect(proxy=ProxyConfig(proxy.address, fallback=False)).read_at(0, 10)
    assert len(server.paths) == 1


def test_dead_proxy_is_left_out_and_tried_again(server, proxy, connect, caplog):
    reader = connect(proxy=ProxyConfig(proxy.address, check_interval=0.2))
    proxy.stop()
    for _ in range(4):
        assert reader.read_at(0, 10) == DATA[:10]
    assert len(server.paths) == 4
    assert caplog.text.count("left out") == 1
    proxy.start()
    until(lambda: reader.read_at(0, 10) == DATA[:10] and proxy.proxied)
    assert "in use again" in caplog.text


def test_dead_proxy_without_fallback(proxy, connect):
    reader = connect(proxy=ProxyConfig(proxy.address, fallback=False))
    proxy.stop()
    with pytest.raises(Unavailable) as caught:
        reader.read_at(0, 10)
    assert caught.value.temporary
    proxy.start()
    assert reader.read_at(0, 10) == DATA[:10]


def test_the_proxy_itself_forbids(server, proxy, connect):
    proxy.proxy_fault = (403, True)
    with pytest.raises(AuthError, match="proxy forbids"):
        connect(proxy=ProxyConfig(proxy.address)).read_at(0, 10)
    # The same status from behind it is an answer like any other.
    proxy.proxy_fault = (403, False)
    with pytest.raises(AuthError, match="not permitted"):
        connect(proxy=ProxyConfig(proxy.address)).read_at(0, 10)
    assert server.paths == []


def test_an_overloaded_proxy_is_gone_past(server, proxy, connect):
    proxy.proxy_fault = (429, True)
    assert connect(proxy=ProxyConfig(proxy.address)).read_at(0, 10) == DATA[:10]
    assert len(server.paths) == 1


def test_pings_decide(server, proxy, connect):
    proxy.ping_status = 500
    config = ProxyConfig(proxy.address, ping_url=f"{proxy.address}/ping", check_interval=0.02)
    reader = connect(proxy=config)
    until(lambda: reader.read_at(0, 10) == DATA[:10] and server.paths)
    assert reader.read_at(0, 10) == DATA[:10]


@pytest.mark.parametrize("url", ["http://", "ftp://p", "http://p:x", "socks5://p"])
def test_bad_proxy_addresses(url):
    with pytest.raises(BackendError):
        open_backend(RegistryConfig("h", "r", proxy=ProxyConfig(url)))


def test_turns_are_a_second_apart():
    limit = RateLimit(1.0)
    assert [limit.take(10.0, 5.0) for _ in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(Unavailable) as caught:
        limit.take(10.0, 5.0)
    assert caught.value.retry_after == 6.0
    assert limit.take(20.0, 5.0) == 0.0


# Mirrors


def test_mirror_comes_first(server, proxy, connect):
    server.auth = proxy.auth = "basic"
    mirror = MirrorConfig(proxy.address, {"X-Dragonfly-Registry": "https://origin"})
    reader = connect(mirrors=(mirror,), credentials=Credentials.from_base64(AUTH))
    assert reader.read_at(0, 10) == DATA[:10]
    assert server.paths == []
    blobs = [headers for target, headers in proxy.proxied if "blobs" in target]
    assert blobs[-1]["X-Dragonfly-Registry"] == "https://origin"
    assert blobs[-1]["Authorization"] == f"Basic {AUTH}"


@pytest.mark.parametrize("fault", [403, 404, 429, 500, 503, "reset", "stall"])
def test_mirror_that_fails_costs_no_read(server, connect, fault):
    with RegistryServer({BLOB: DATA}) as mirror:
        mirror.fault = fault
        reader = connect(mirrors=(MirrorConfig(mirror.address),))
        assert reader.read_at(0, 10) == DATA[:10]
        assert (len(mirror.paths), len(server.paths)) == (1, 1)


def test_mirror_is_left_out_after_its_limit(server, connect, caplog):
    with RegistryServer({BLOB: DATA}) as mirror:
        config = MirrorConfig(mirror.address, failure_limit=2, health_check_interval=0.05)
        mirror.fault, mirror.ping_status = 500, 500
        reader = connect(mirrors=(config,))
        for _ in range(6):
            assert reader.read_at(0, 10) == DATA[:10]
        assert len(mirror.paths) <= 2
        mirror.fault, mirror.ping_status = None, 401
        until(lambda: reader.read_at(0, 10) == DATA[:10] and len(mirror.paths) > 2)
        assert "in use again" in caplog.text


def test_truncating_mirror_is_left_out(server, connect):
    with RegistryServer({BLOB: DATA}) as mirror:
        mirror.fault = "truncate"
        reader = connect(mirrors=(MirrorConfig(mirror.address, failure_limit=2),))
        data = b""
        # A ping at the start may forget one of the failures.
        for _ in range(4):
            with contextlib.suppress(ShortRead):
                data = reader.read_at(0, 1000)
        assert data == DATA[:1000]


def test_mirror_for_the_http_proxy_backend():
    with BlobServer({BLOB: DATA}) as mirror:
        config = HttpProxyConfig(
            "http://unreachable.invalid/blobs", mirrors=(MirrorConfig(mirror.address),)
        )
        backend = open_backend(config)
        assert backend.open(BLOB).read_at(0, 10) == DATA[:10]
        backend.close()


def test_not_both():
    with pytest.raises(BackendError, match="together"):
        open_backend(
            RegistryConfig(
                "h", "r", proxy=ProxyConfig("http://p"), mirrors=(MirrorConfig("http://m"),)
            )
        )


# Health


def health(ping=None, **options):
    options = {"interval": 0.01, "pause_elapsed": 60.0, "failure_limit": 2, **options}
    return Health("thing", ping, **options)


def test_without_pings_one_request_tries_again(monkeypatch):
    now = 100.0
    monkeypatch.setattr(health_module, "time", SimpleNamespace(monotonic=lambda: now))
    state = health(interval=0.2)
    state.note(False)
    assert state.ok()
    state.note(False)
    assert not state.ok()
    now += 0.2
    assert state.ok()
    assert not state.ok()
    state.note(True)
    assert state.ok()


def test_a_success_in_between_counts():
    state = health()
    for _ in range(5):
        state.note(False)
        state.note(True)
    assert state.ok()


def test_pings_bring_it_back_and_pause_when_idle():
    pings = []
    answer = [False]

    def ping():
        pings.append(1)
        return answer[0]

    state = health(ping, pause_elapsed=0.1)
    until(lambda: not state.ok())
    answer[0] = True
    until(state.ok)

    def paused():
        before = len(pings)
        time.sleep(0.2)
        return len(pings) == before

    until(paused)
    idle = len(pings)
    state.ok()
    until(lambda: len(pings) > idle)
    state.close()
