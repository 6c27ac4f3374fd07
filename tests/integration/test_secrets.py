"""Secrets are nowhere: every place that takes one, every way to fail, every place that tells.

A daemon at log level trace is given credentials in each way that there is, against servers
that refuse, break off and redirect. Then everything that it said or wrote is searched.
"""

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from capabilities import requires
from fakes.object_store import ObjectStoreServer
from fakes.registry import REPO, ProxyServer, RegistryServer, StoreServer
from serving import build_image, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

READ = "import sys\ntry: open(sys.argv[1], 'rb').read()\nexcept OSError as e: sys.exit(e.errno)"
# Beside those of every mount: what a GET may be asked for.
ENDPOINTS = (
    "/api/v1/daemon", "/api/v2/daemon", "/api/v1/daemon/events", "/api/v1/config", "/metrics",
    "/api/v1/metrics/inflight", "/api/v1/metrics", "/nowhere",
)  # fmt: skip
OF_MOUNTS = (
    "/api/v1/daemon/backend?mountpoint={}", "/api/v1/metrics?id={}", "/api/v1/config?id={}",
    "/api/v1/metrics/files?id={}", "/api/v1/metrics/pattern?id={}",
    "/api/v1/metrics/backend?id={}", "/api/v1/metrics/blobcache?id={}",
)  # fmt: skip


class Secrets:
    """Words that must not be seen, in no form; each is asked for by its place."""

    def __init__(self):
        self.words = {}

    def word(self, place):
        # Nothing that is in a path, a log or the code by chance; `+` and `/` become %2B and %2F.
        word = f"zq{len(self.words):02d}+{place}/Xy%=s3cr3t"
        self.words[place] = word
        return word

    def pair(self, place):
        """Return base64 of user and password."""
        return base64.b64encode(f"robot:{self.word(place)}".encode()).decode()

    def forms(self):
        for place, word in self.words.items():
            yield place, word.encode()
            yield f"{place}, quoted", quote(word, safe="").encode()
            yield f"{place}, base64", base64.b64encode(word.encode())[:-4]
            pair = base64.b64encode(f"robot:{word}".encode())
            yield f"{place}, pair", pair
            yield f"{place}, as JSON", json.dumps(word).encode()[1:-1]
            # However the rest of it is cut or escaped.
            yield f"{place}, beginning", word.encode()[:5]
            yield f"{place}, beginning quoted", quote(word[:5], safe="").encode()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    top = tmp_path_factory.mktemp("secrets")
    (top / "source").mkdir()
    (top / "source/file").write_bytes(os.urandom(5000))
    return build_image(top / "source", top / "image")


class Client:
    """Asks the API and keeps every answer."""

    def __init__(self, sock):
        self.sock = sock
        self.answers = []

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(self.sock))
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        self.answers.append((f"{method} {path}", str(answer.headers).encode() + text))
        return answer.status

    def mount(self, path, bootstrap, config):
        if not isinstance(config, str):
            config = json.dumps(config)
        body = {"source": str(bootstrap), "fs_type": "rafs", "config": config}
        return self.ask("POST", f"/api/v1/mount?mountpoint={path}", json.dumps(body))


def v2(kind, backend, directory, **more):
    """A configuration of version 2, with a cache directory of its own."""
    cache = {"type": "blobcache", "filecache": {"work_dir": str(directory)}}
    return {"version": 2, "backend": {"type": kind, kind: backend}, "cache": cache, **more}


class Servers:
    """A registry for each way to refuse, its token service, a proxy, a store that signs."""

    def __init__(self, stack, blobs, secrets):
        def registry(auth):
            return stack.enter_context(RegistryServer(blobs, auth=auth))

        self.basic, self.bearer, self.breaking = map(registry, ("basic", "bearer", None))
        self.breaking.fault = "reset"
        self.token_fails = registry("bearer")
        self.token_fails.token_fault = 500
        self.proxy = stack.enter_context(ProxyServer({}))
        self.proxy.proxy_fault = (502, False)
        self.redirecting = registry(None)
        self.redirecting.store = stack.enter_context(StoreServer({}))
        self.redirecting.store.signatures = set()
        self.redirecting.location = (
            f"{self.redirecting.store.address}/store/x?signature={quote(secrets.word('signature'))}"
        )
        # They know other keys than the ones that they are asked with.
        self.buckets = [stack.enter_context(ObjectStoreServer(kind)) for kind in ("s3", "oss")]
        # Nobody listens there; the address itself holds a secret.
        self.lost = registry(None)
        self.lost.location = f"http://127.0.0.1:1/x?token={quote(secrets.word('redirect'))}"


def configurations(servers, secrets, cache):
    """Yield names and configurations, one for each place that takes a secret."""
    headers = {
        "X-Token": secrets.word("mirror-header"),
        "authorization": secrets.word("mirror-auth"),
    }

    def quoted(place):
        return quote(secrets.word(place), safe="")

    def registry(server, **more):
        return {"scheme": "http", "host": server.host, "repo": REPO, "retry_limit": 1, **more}

    def proxied(place):
        user, password = quoted(f"{place}-user"), quoted(place)
        return servers.proxy.address.replace("//", f"//{user}:{password}@")

    plain = {
        "basic": registry(servers.basic, auth=secrets.pair("auth-basic")),
        "bearer": registry(servers.bearer, auth=secrets.pair("auth-bearer")),
        "tokenfault": registry(servers.token_fails, auth=secrets.pair("auth-token")),
        "token": registry(servers.bearer, registry_token=secrets.word("registry-token")),
        "breaking": registry(servers.breaking, registry_token=secrets.word("breaking-token")),
        "redirect": registry(servers.redirecting, auth=secrets.pair("auth-redirect")),
        "lost": registry(servers.lost),
        "proxy": registry(
            servers.basic,
            proxy={"url": proxied("proxy"), "fallback": False, "ping_url": proxied("ping")},
        ),
        "gone-proxy": registry(
            servers.basic,
            proxy={"url": f"http://u:{quoted('gone')}@127.0.0.1:1", "fallback": True},
        ),
        "mirror": registry(
            servers.basic,
            mirrors=[{"host": servers.breaking.address, "headers": headers}],
            auth=secrets.pair("auth-mirror"),
        ),
    }
    for name, backend in plain.items():
        yield name, v2("registry", backend, cache / name)
    for bucket in servers.buckets:
        keys = {
            "access_key_id": secrets.word(f"{bucket.kind}-id"),
            "access_key_secret": secrets.word(f"{bucket.kind}-secret"),
        }
        yield bucket.kind, v2(bucket.kind, bucket.config(**keys), cache / bucket.kind)


def broken_configurations(servers, secrets, cache):
    """Yield configurations that are refused, with a secret where the mistake is."""
    host = {"host": servers.basic.host, "repo": REPO}
    good = v2("registry", {**host, "auth": secrets.pair("unclosed")}, cache)
    yield json.dumps(good)[:-2]
    table = 'version = 2\n[backend]\ntype = "registry"\n[backend.registry]\nauth = '
    yield table + secrets.word("toml")
    yield v2("registry", {**host, "auth": secrets.word("no-base64")}, cache)
    yield v2("registry", {**host, "auth": [secrets.word("list")]}, cache)
    yield v2("registry", {**host, "timeout": secrets.word("timeout")}, cache)
    yield v2("registry", {**host, "proxy": {"url": f"ftp://u:{secrets.word('ftp')}@h"}}, cache)
    yield v2("registry", {**host, "proxy": {"url": f"http://u:{secrets.word('port')}@h:x"}}, cache)
    yield v2("registry", {**host, "registry_token": secrets.word("newline") + "\n"}, cache)
    yield v2("http-proxy", {"addr": f"http://u:{secrets.word('addr-port')}@h:99999"}, cache)
    mirrors = [{"host": f"http://u:{secrets.word('mirror-host')}@h:x"}]
    yield v2("registry", {**host, "mirrors": mirrors}, cache)
    address = servers.breaking.address.replace("//", f"//robot:{quote(secrets.word('addr'))}@")
    yield v2("http-proxy", {"addr": address}, cache)
    yield v2("oss", {"access_key_secret": secrets.word("oss"), "endpoint": "e"}, cache)
    yield v2("s3", {"access_key_id": secrets.word("s3")}, cache)


def search(secrets, sources):
    """Return where a secret was found."""
    found = []
    for name, content in sources:
        for form, needle in secrets.forms():
            position = content.find(needle)
            if position >= 0:
                found.append(f"{form} in {name}: {content[max(0, position - 80) : position + 40]}")
    return found


def written(*directories):
    """Yield names and contents of all files below, of data files by their unmarked names."""
    for directory in directories:
        for path in directory.rglob("*"):
            yield "a name", str(path).encode()
            if path.is_file() and not path.parent.name.startswith("serve-"):
                yield str(path), path.read_bytes()


@pytest.fixture
def setting(serving, image, stack):
    """Servers, secrets, an environment and a daemon that waits for mounts."""
    secrets = Secrets()
    servers = Servers(stack, image.blobs(), secrets)
    home = serving.directory
    (home / "docker").mkdir()
    (home / "run").mkdir(mode=0o700)
    docker = {
        "auths": {servers.basic.host: {"auth": secrets.pair("docker")}},
        "HttpHeaders": {"X": secrets.word("docker-header")},
    }
    (home / "docker/config.json").write_text(json.dumps(docker))
    (home / "boot").write_bytes(image.bootstrap.read_bytes())
    serving.mountpoint("mnt")
    environment = {
        "DOCKER_CONFIG": str(home / "docker"),
        "NYDUS_HEADER_X-Api-Key": secrets.word("header-key"),
        "NYDUS_HEADER_Cookie": secrets.word("header-cookie"),
        "NYDUSD_RUN_DIR": str(home / "run"),
    }
    return serving, home, servers, secrets, environment


def start(serving, home, environment, *words):
    daemon = serving.nydusd(
        "fuse", "-M", "mnt", "-A", "api", "-l", "trace", "--prometheus", "0", *words,
        cwd=home, **environment,
    )  # fmt: skip
    wait_until(lambda: (home / "api").exists() or daemon.process.poll() is not None)
    client = Client(home / "api")
    wait_until(lambda: ready(client))
    return daemon, client


def ready(client):
    try:
        status = client.ask("GET", "/api/v1/daemon")
    except ConnectionRefusedError:
        return False  # the socket has its name, and nobody listens yet
    return status == 200 and b'"state":"RUNNING"' in client.answers[-1][1]


def read_all(serving, home, names):
    """Read from every mount, which has to fail: nothing of this backend works."""
    readers = [serving.child(READ, home / "mnt" / name / "file") for name in names]
    for reader in readers:
        assert reader.end()[0] != 0


def everything_told(daemon, client, names):
    """Yield all that the daemon says of itself, at the end of its life."""
    for path in ENDPOINTS:
        client.ask("GET", path)
    for name in names:
        for pattern in OF_MOUNTS:
            client.ask("GET", pattern.format(f"/{name}"))
    port = int(re.search(r"metrics at 127\.0\.0\.1, port (\d+)", daemon.stderr)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    yield "the metrics port", connection.getresponse().read()
    connection.close()
    daemon.send(signal.SIGUSR1)
    daemon.wait_for("Current thread")
    for pid in (daemon.process.pid, *holders(daemon)):
        yield f"command line of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes()
    yield from client.answers


def holders(daemon):
    """Return the processes that keep state for this daemon."""
    run = next(
        word
        for word in Path(f"/proc/{daemon.process.pid}/environ").read_bytes().split(b"\0")
        if word.startswith(b"NYDUSD_RUN_DIR=")
    )
    directory = run.partition(b"=")[2]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # Any of them may end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if directory in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("header", [False, True], ids=["credentials", "header"])
def test_secrets_of_configurations_and_environment(setting, header):
    serving, home, servers, secrets, environment = setting
    if header:
        # Goes before all credentials.
        environment["NYDUS_HEADER_authorization"] = secrets.word("header-authorization")
    daemon, client = start(serving, home, environment)
    names = []
    for name, config in configurations(servers, secrets, home / "cache"):
        assert client.mount(f"/{name}", home / "boot", config) == 204, client.answers[-1]
        names.append(name)
    for config in broken_configurations(servers, secrets, home / "cache/broken"):
        assert client.mount("/broken", home / "boot", config) >= 400
    read_all(serving, home, names)
    for auth in (secrets.pair("put"), secrets.word("put-no-base64"), 5):
        client.ask("PUT", "/api/v1/config", json.dumps({"registry_auth": auth}))
    client.ask("PUT", "/api/v1/config", json.dumps({"proxy_url": secrets.word("put-proxy")}))
    client.ask("PUT", "/api/v1/config", '{"registry_auth": "' + secrets.word("put-broken"))
    # The credentials of the last PUT that was good are used for these.
    time.sleep(1.1)
    read_all(serving, home, names)
    sent = [value for value in servers.basic.authorizations if value]
    used = base64.b64encode(f"robot:{secrets.words['put']}".encode()).decode()
    assert (secrets.words["header-authorization"] if header else f"Basic {used}") in sent
    told = list(everything_told(daemon, client, names))
    told += written(home / "cache", home / "run")
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0
    told.append(("standard error", daemon.stderr.encode()))
    # The failures are there, and told: only their secrets are not.
    assert daemon.stderr.count(" ERROR ") >= len(names)
    assert search(secrets, told) == []


def test_secrets_of_the_environment_alone(setting):
    """What replaces a configuration's credentials, and Docker's, where there are none."""
    serving, home, servers, secrets, environment = setting
    plain = {"scheme": "http", "host": servers.basic.host, "repo": REPO, "retry_limit": 1}
    for name in ("docker", "pull-auth"):
        extra = {} if name == "docker" else {"IMAGE_PULL_AUTH": secrets.pair("pull-auth")}
        daemon, client = start(serving, home, {**environment, **extra}, "-L", f"{name}.log")
        config = v2("registry", plain, home / f"cache-{name}")
        assert client.mount("/m", home / "boot", config) == 204
        read_all(serving, home, ["m"])
        used = base64.b64encode(f"robot:{secrets.words[name]}".encode()).decode()
        assert f"Basic {used}" in servers.basic.authorizations
        log = home / f"{name}.log"
        daemon.send(signal.SIGUSR1)
        wait_until(lambda log=log: "Current thread" in log.read_text())
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0
        with contextlib.suppress(FileNotFoundError):
            (home / "api").unlink()
        told = [*client.answers, (str(log), log.read_bytes()), ("stderr", daemon.stderr.encode())]
        told += written(home / f"cache-{name}", home / "run")
        assert search(secrets, told) == []


@pytest.mark.parametrize("variable", ["IMAGE_PULL_AUTH", "NYDUS_HEADER_X-Y"])
def test_secrets_that_cannot_be_used(setting, variable):
    serving, home, servers, secrets, environment = setting
    config = v2("registry", {"host": servers.basic.host, "repo": REPO}, home / "cache")
    (home / "config.json").write_text(json.dumps(config))
    value = secrets.word("unusable") + "\n"
    daemon = serving.nydusd(
        "erofs", "-B", "boot", "-M", "mnt", "-C", "config.json", "-l", "trace",
        cwd=home, **{**environment, variable: value},
    )  # fmt: skip
    assert daemon.end() == 1
    assert (
        f"environment '{variable}'" in daemon.stderr or f"environment {variable}" in daemon.stderr
    )
    assert search(secrets, [("standard error", daemon.stderr.encode())]) == []


def test_the_search_finds(setting):
    *_, secrets, _ = setting
    pair = secrets.pair("probe")
    word = secrets.words["probe"]
    for text in (word, quote(word, safe=""), f"Basic {pair}", json.dumps({"a": word}), repr(word)):
        assert search(secrets, [("here", b"x" * 100 + text.encode())])
    assert search(secrets, [("here", b"nothing")]) == []
