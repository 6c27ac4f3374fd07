"""The registry backend against a registry that misbehaves."""

import logging
import shutil
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes.registry import AUTH, REPO, RegistryServer, StoreServer, at_once, make_certificate

from fscache.backend import (
    AuthError,
    BackendError,
    Credentials,
    NotFound,
    RegistryConfig,
    Unavailable,
    open_backend,
)
from fscache.backend.retry import RetryPolicy

DATA = bytes(range(256)) * 1024  # 256 KiB
BLOB = "a" * 64
CREDENTIALS = Credentials.from_base64(AUTH)


@pytest.fixture
def server():
    with RegistryServer({BLOB: DATA}) as server:
        yield server


@pytest.fixture
def store():
    with StoreServer({BLOB: DATA}) as store:
        yield store


@pytest.fixture
def connect(server):
    opened = []

    def connect(**options):
        options = {"scheme": "http", "timeout": 0.5, **options}
        backend = open_backend(RegistryConfig(server.host, REPO, **options))
        opened.append(backend)
        return backend

    yield connect
    for backend in opened:
        backend.close()


def test_request_form(server, connect):
    backend = connect(headers={"X-Team": "blue"})
    assert backend.open(BLOB).size() == len(DATA)
    assert backend.open(BLOB).read_at(10, 20) == DATA[10:30]
    assert server.paths == [f"/v2/{REPO}/blobs/sha256:{BLOB}"] * 2
    headers = server.headers[0]
    assert headers["Range"] == "bytes=10-29"
    assert headers["User-Agent"] == "nydusd/1.0.0"
    assert headers["X-Team"] == "blue"
    assert "Authorization" not in headers
    assert server.connections == 1


# Credentials


def test_basic(server, connect):
    server.auth = "basic"
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    for _ in range(3):
        assert reader.read_at(0, 10) == DATA[:10]
    assert server.authorizations == [None, *[f"Basic {AUTH}"] * 3]
    with pytest.raises(AuthError):
        connect().open(BLOB).read_at(0, 10)


def test_bearer_by_post(server, connect):
    server.auth = "bearer"
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    for _ in range(3):
        assert reader.read_at(0, 10) == DATA[:10]
    method, form, _ = server.token_requests[0]
    assert (method, len(server.token_requests)) == ("POST", 1)
    assert form == {
        "service": "fake, really",
        "scope": f"repository:{REPO}:pull",
        "grant_type": "password",
        "username": server.user,
        "password": server.password,
        "client_id": "nydus-registry-client",
    }
    assert server.refusals == 1


def test_bearer_by_get(server, connect):
    server.auth, server.post_works = "bearer", False
    assert connect(credentials=CREDENTIALS).open(BLOB).read_at(0, 10) == DATA[:10]
    assert [request[0] for request in server.token_requests] == ["POST", "GET"]
    _, query, authorization = server.token_requests[1]
    assert authorization == f"Basic {AUTH}"
    assert query["scope"] == f"repository:{REPO}:pull"
    assert "password" not in query


IDENTITY = Credentials("<token>", "", "1dentity")


@pytest.mark.parametrize("rotates", [False, True])
def test_identity_token(server, connect, rotates):
    """A token of an earlier login buys tokens for repositories; the service may exchange it."""
    server.auth, server.rotates = "bearer", rotates
    reader = connect(credentials=IDENTITY).open(BLOB)
    for _ in range(3):
        assert reader.read_at(0, 10) == DATA[:10]
        server.revoke_tokens()
    assert [request[0] for request in server.token_requests] == ["POST"] * 3
    assert server.token_requests[0][1] == {
        "service": "fake, really", "scope": f"repository:{REPO}:pull",
        "grant_type": "refresh_token", "refresh_token": "1dentity",
        "client_id": "nydus-registry-client",
    }  # fmt: skip
    last = server.token_requests[-1][1]["refresh_token"]
    assert last == ("1dentity++" if rotates else "1dentity")


def test_identity_token_is_no_password(server, connect, caplog):
    caplog.set_level(logging.DEBUG)
    server.auth = "basic"
    with pytest.raises(AuthError):
        connect(credentials=IDENTITY).open(BLOB).read_at(0, 10)
    server.auth, server.identity_token = "bearer", "other"
    with pytest.raises(AuthError) as caught:
        connect(credentials=IDENTITY).open(BLOB).read_at(0, 10)
    assert [request[0] for request in server.token_requests] == ["POST"]
    assert not any((one or "").startswith("Basic") for one in server.authorizations)
    assert "1dentity" not in caplog.text + str(caught.value)


def test_anonymous(server, connect):
    server.auth, server.anonymous = "bearer", True
    assert connect().open(BLOB).read_at(0, 10) == DATA[:10]
    assert [request[::2] for request in server.token_requests] == [("GET", None)]


def test_registry_token_skips_all_this(server, connect):
    server.auth = "bearer"
    token = server.new_token()
    reader = connect(registry_token=token, credentials=CREDENTIALS).open(BLOB)
    assert reader.read_at(0, 10) == DATA[:10]
    server.revoke_tokens()
    with pytest.raises(AuthError):
        reader.read_at(0, 10)
    assert server.token_requests == []


def test_wrong_password(server, connect):
    server.auth = "bearer"
    reader = connect(credentials=Credentials(server.user, "wrong")).open(BLOB)
    with pytest.raises(AuthError) as caught:
        reader.read_at(0, 10)
    assert not caught.value.temporary
    assert "wrong" not in str(caught.value)
    assert len(server.token_requests) == 2


@pytest.mark.parametrize(
    ("fault", "kind", "temporary"), [(403, AuthError, False), (503, Unavailable, True)]
)
def test_token_service_fails(server, connect, fault, kind, temporary):
    server.auth, server.token_fault = "bearer", fault
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    with pytest.raises(kind, match="token service") as caught:
        reader.read_at(0, 10)
    assert caught.value.temporary is temporary
    server.token_fault = None
    assert reader.read_at(0, 10) == DATA[:10]


def test_one_token_serves_all_threads(server, connect):
    server.auth, server.token_delay = "bearer", 0.2
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    results = at_once(16, lambda number: reader.read_at(number, 10))
    assert results == [DATA[number : number + 10] for number in range(16)]
    assert len(server.token_requests) == 1


def test_a_token_that_fails_fails_for_all_who_wait(server, connect):
    server.auth, server.token_delay, server.token_fault = "bearer", 0.2, 403
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    results = at_once(8, lambda number: reader.read_at(number, 10))
    assert {type(result) for result in results} == {AuthError}
    assert len({id(result) for result in results}) == 8
    assert len(server.token_requests) <= 4


def test_a_token_that_ends_under_load_fails_no_read(server, connect):
    server.auth = "bearer"
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    stop = threading.Event()
    counts = [0] * 8

    def read(number):
        while not stop.is_set():
            assert reader.read_at(number, 100) == DATA[number : number + 100]
            counts[number] += 1

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, number) for number in range(8)]
        for _ in range(5):
            before = list(counts)
            # All go on with another token before that one ends.
            while not any(future.done() for future in readers) and any(
                count < old + 2 for count, old in zip(counts, before, strict=True)
            ):
                time.sleep(0.001)
            server.revoke_tokens()
        stop.set()
        for future in readers:
            future.result()
    assert backend_errors(reader) == 0
    assert len(server.token_requests) >= 5


def backend_errors(reader):
    return reader._metrics.as_dict()["read_errors"]


def test_a_token_is_renewed_ahead_of_its_end(server, connect):
    server.auth, server.token_life = "bearer", 600
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    assert reader.read_at(0, 10) == DATA[:10]
    token = known_token(reader)
    assert time.monotonic() < token.renew_at < token.expires_at
    object.__setattr__(token, "renew_at", 0.0)
    for _ in range(3):
        assert reader.read_at(0, 10) == DATA[:10]
    assert known_token(reader) is not token
    # Only the very first request was refused.
    assert server.refusals == 1
    assert len(server.token_requests) == 2


def known_token(reader):
    return reader._request.func.__self__._client._auth._token


def test_renewal_that_fails_leaves_the_old_token(server, connect, caplog):
    server.auth, server.token_life = "bearer", 600
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    assert reader.read_at(0, 10) == DATA[:10]
    server.token_fault = 503
    object.__setattr__(known_token(reader), "renew_at", 0.0)
    for _ in range(3):
        assert reader.read_at(0, 10) == DATA[:10]
    # One try, then a pause.
    assert len(server.token_requests) == 2
    assert "not renewed" in caplog.text


def test_credentials_are_replaced(server, connect):
    server.auth = "bearer"
    backend = connect(credentials=CREDENTIALS)
    reader = backend.open(BLOB)
    assert reader.read_at(0, 10) == DATA[:10]
    server.password = "another"
    server.revoke_tokens()
    with pytest.raises(AuthError):
        reader.read_at(0, 10)
    backend.set_credentials(Credentials(server.user, "another"))
    assert reader.read_at(0, 10) == DATA[:10]


def test_credentials_take_the_place_of_a_token_that_has_ended(server, connect):
    server.auth = "bearer"
    backend = connect(registry_token="ended")
    reader = backend.open(BLOB)
    with pytest.raises(AuthError):
        reader.read_at(0, 10)
    backend.set_credentials(CREDENTIALS)
    assert reader.read_at(0, 10) == DATA[:10]


@pytest.mark.parametrize("realm", ["ftp://x/", "nonsense", "http://", "http://a b/"])
def test_hostile_realms(server, connect, realm):
    server.auth, server.realm = "bearer", realm
    with pytest.raises(BackendError):
        connect(credentials=CREDENTIALS).open(BLOB).read_at(0, 10)


# Redirects


def test_redirect_target_is_remembered(server, store, connect):
    server.store, server.auth = store, "bearer"
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    for _ in range(5):
        assert reader.read_at(7, 10) == DATA[7:17]
    assert reader.size() == len(DATA)
    assert store.signed == 1
    # The store would refuse a request with the registry's header.
    assert store.authorizations == [None] * 6


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_redirect_is_followed(server, store, connect, status):
    server.store, server.redirect_status = store, status
    assert connect().open(BLOB).read_at(0, 10) == DATA[:10]


@pytest.mark.parametrize("status", [400, 401, 403])
def test_target_that_expires_costs_no_read(server, store, connect, status):
    server.store, store.expired_status = store, status
    reader = connect().open(BLOB)
    for turn in range(3):
        assert reader.read_at(0, 10) == DATA[:10]
        store.expire()
        assert reader.read_at(0, 10) == DATA[:10]
        assert store.signed == 2 * turn + 2 - turn
    assert backend_errors(reader) == 0


def test_target_that_says_when_it_ends(server, store, connect):
    server.store, store.life = store, 5  # less than the margin
    reader = connect().open(BLOB)
    for _ in range(2):
        assert reader.read_at(0, 10) == DATA[:10]
    assert store.signed == 2


def test_target_that_dies(server, store, connect):
    server.store = store
    reader = connect().open(BLOB)
    assert reader.read_at(0, 10) == DATA[:10]
    store.stop()
    with pytest.raises(Unavailable) as caught:
        reader.read_at(0, 10)
    assert caught.value.temporary
    server.store = None
    assert reader.read_at(0, 10) == DATA[:10]
    store.start()


@pytest.mark.parametrize(
    "location", ["", "ftp://x/", "http://", "//", "http://u:secret@h/", "http://[", "/round"]
)
def test_hostile_redirects(server, connect, location):
    server.location = location
    with pytest.raises(BackendError) as caught:
        connect().open(BLOB).read_at(0, 10)
    assert not caught.value.temporary
    assert "secret" not in str(caught.value)
    assert len(server.paths) <= 7


def test_redirect_at_home_keeps_the_header(server, connect):
    server.auth, server.location = "basic", f"/elsewhere/sha256:{BLOB}"
    reader = connect(credentials=CREDENTIALS).open(BLOB)
    redirect_for = server.redirect_for
    server.redirect_for = lambda path: None if "elsewhere" in path else redirect_for(path)
    assert reader.read_at(0, 10) == DATA[:10]
    assert server.authorizations == [None, f"Basic {AUTH}", f"Basic {AUTH}"]


def test_headers_for_all_leave_out_secrets_elsewhere(server, store, connect):
    server.store = store
    backend = connect(headers={"Authorization": "Custom x", "X-Team": "blue"})
    assert backend.open(BLOB).read_at(0, 10) == DATA[:10]
    assert store.headers[0]["X-Team"] == "blue"
    assert store.authorizations == [None]


def test_redirected_host_and_scheme_are_replaced(server, store, connect):
    server.location = f"https://unreachable.invalid/store/sha256:{BLOB}?signature=mine"
    store.signatures.add("mine")
    backend = connect(blob_url_scheme="http", blob_redirected_host=store.host)
    assert backend.open(BLOB).read_at(0, 10) == DATA[:10]


# Statuses and repetition


@pytest.mark.parametrize(
    ("status", "kind", "requests"),
    [
        (403, AuthError, 1),
        (404, NotFound, 1),
        (416, BackendError, 1),
        (408, Unavailable, 3),
        (429, Unavailable, 3),
        (500, Unavailable, 3),
        (503, Unavailable, 3),
        ("reset", Unavailable, 3),
        ("truncate", BackendError, 3),
    ],
)
def test_what_is_repeated(server, connect, status, kind, requests):
    reader = connect().open(BLOB)
    server.fault = status
    policy = RetryPolicy(attempts=3, first_delay=0.001)
    with pytest.raises(kind):
        policy.run(lambda: reader.read_at(0, 10), threading.Event())
    assert len(server.paths) == requests


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("999999", 3600.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None),
     ("Wed, 21 Oct 2015 07:28:00 +99999999999999", None), (None, None)],
)  # fmt: skip
def test_retry_after(server, connect, text, seconds):
    server.fault, server.retry_after = 429, text
    with pytest.raises(Unavailable) as caught:
        connect().open(BLOB).read_at(0, 10)
    assert caught.value.retry_after == seconds


# TLS


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program is missing")
    return make_certificate(tmp_path)


def tls_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return RegistryServer({BLOB: DATA}, tls=context)


def read_once(config):
    backend = open_backend(config)
    try:
        return backend.open(BLOB).read_at(0, 10)
    finally:
        backend.close()


@pytest.mark.parametrize("scheme", ["https", ""])
def test_tls_with_and_without_trust(certificate, scheme):
    with tls_server(certificate) as server:
        host = server.host
        trusting = RegistryConfig(host, REPO, scheme=scheme, ca_cert_files=(certificate,))
        assert read_once(trusting) == DATA[:10]
        assert read_once(RegistryConfig(host, REPO, scheme=scheme, skip_verify=True)) == DATA[:10]
        # A certificate that is not trusted is no reason to go without TLS.
        with pytest.raises(Unavailable, match="certificate") as caught:
            read_once(RegistryConfig(host, REPO, scheme=scheme))
        assert not caught.value.temporary


@pytest.mark.parametrize(
    ("scheme", "skip_verify", "works"),
    [("", False, True), ("https", True, True), ("https", False, False), ("http", False, True)],
)
def test_going_without_tls(server, connect, caplog, scheme, skip_verify, works):
    reader = connect(scheme=scheme, skip_verify=skip_verify).open(BLOB)
    if works:
        for _ in range(2):
            assert reader.read_at(0, 10) == DATA[:10]
        assert caplog.text.count("speaks no TLS") == (scheme != "http")
    else:
        with pytest.raises(Unavailable, match="TLS failure"):
            reader.read_at(0, 10)
        assert server.paths == []


def test_no_password_without_tls_after_tls(certificate):
    with tls_server(certificate) as server, RegistryServer() as plain:
        server.auth, server.realm = "bearer", f"{plain.address}/token"
        config = RegistryConfig(
            server.host, REPO, ca_cert_files=(certificate,), credentials=CREDENTIALS
        )
        with pytest.raises(AuthError, match="without TLS"):
            read_once(config)
        assert plain.token_requests == []


# Configurations


@pytest.mark.parametrize(
    ("host", "repo"),
    [("", "r"), ("http://h", "r"), ("h/path", "r"), ("u:secret@h", "r"), ("h:x", "r"),
     ("h", ""), ("h", "/"), ("h", "a/../b")],
)  # fmt: skip
def test_places_that_are_none(host, repo):
    with pytest.raises(BackendError) as caught:
        open_backend(RegistryConfig(host, repo))
    assert "secret" not in str(caught.value)


def test_nothing_secret_is_shown(server, store, connect, caplog):
    caplog.set_level(logging.DEBUG)
    server.store, server.auth, server.post_works = store, "bearer", False
    credentials = Credentials(server.user, server.password)
    backend = connect(credentials=credentials, headers={"X-Key": "h34d3r-v4lu3"})
    reader = backend.open(BLOB)
    texts = [repr(credentials), repr(backend._config)]

    def attempt():
        try:
            reader.read_at(0, 10)
        except BackendError as error:
            texts.extend([str(error), repr(error), repr(error.__cause__)])

    attempt()
    store.expire()
    for fault in (404, 500, "reset", "truncate", "wrong-range", "stall"):
        store.fault, store.fault_count = fault, 1
        attempt()
    server.revoke_tokens()
    store.expire()
    for server.token_fault in (503, 403):
        attempt()
    server.token_fault = None
    server.password = "changed"
    attempt()
    backend.set_credentials(Credentials(server.user, "changed"))
    attempt()
    store.stop()
    attempt()
    server.stop()
    attempt()
    shown = "\n".join([*texts, caplog.text])
    assert len(texts) > 20
    for secret in ("s3cr3t", AUTH, "t0k3n-", "s1gn4ture", "changed", "h34d3r-v4lu3"):
        assert secret not in shown
    store.start()
    server.start()
