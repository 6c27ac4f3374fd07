"""The registry backend with Debian's docker-registry as its peer; optional, no kernel needed."""

import hashlib
import re
import shutil
import subprocess

import pytest
import urllib3
from fakes.registry import AUTH, PASSWORD, USER, at_once, make_certificate
from serving import TIMEOUT, wait_until

from fscache.backend import AuthError, Credentials, NotFound, RegistryConfig, open_backend

DATA = bytes(range(256)) * 8192  # 2 MiB
BLOB = hashlib.sha256(DATA).hexdigest()
REPO = "team/image"
# bcrypt of PASSWORD; 5 rounds, nobody needs to wait for it
HASH = "$2b$05$abcdefghijklmnopqrstuuel.m2B90128I7Y73wVY/ooh6c6o8xd6"

pytestmark = pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="the program docker-registry is missing"
)


class Registry:
    """A docker-registry with one blob."""

    def __init__(self, directory, *, password=False, tls=False):
        self.certificate = make_certificate(directory) if tls else None
        self.directory = directory
        config = directory / "config.yml"
        config.write_text(self._config(password))
        log = directory / "log"
        with log.open("wb") as file:
            self.process = subprocess.Popen(["docker-registry", "serve", config], stderr=file)
        self.host = self._wait(log)
        self.http = urllib3.PoolManager(
            retries=False,
            headers={"Authorization": f"Basic {AUTH}"} if password else {},
            **({"ca_certs": str(self.certificate)} if tls else {}),
        )
        self.base = f"{'https' if tls else 'http'}://{self.host}/v2/"
        self._push()

    def _config(self, password):
        text = (
            "version: 0.1\nlog: {level: info}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.directory}/data}}}}\n"
            "http:\n  addr: 127.0.0.1:0\n"
        )
        if self.certificate is not None:
            key = self.certificate.with_name("key.pem")
            text += f"  tls: {{certificate: {self.certificate}, key: {key}}}\n"
        if password:
            users = self.directory / "users"
            users.write_text(f"{USER}:{HASH}\n")
            text += f"auth: {{htpasswd: {{realm: test, path: {users}}}}}\n"
        return text

    def _wait(self, log):
        """Return the address that it listens at, with the port that the kernel chose."""

        def found():
            return re.search(r'msg="listening on ([0-9.:]+)', log.read_text())

        wait_until(lambda: found() or self.process.poll() is not None)
        assert found(), log.read_text()
        return found()[1]

    def _push(self):
        begun = self.http.request("POST", f"{self.base}{REPO}/blobs/uploads/")
        assert begun.status == 202
        location = f"{begun.headers['Location']}&digest=sha256:{BLOB}"
        headers = {**self.http.headers, "Content-Type": "application/octet-stream"}
        done = self.http.request("PUT", location, body=DATA, headers=headers)
        assert done.status == 201

    def close(self):
        self.process.terminate()
        self.process.wait(TIMEOUT)


@pytest.fixture
def run(tmp_path):
    running = []

    def run(**options):
        running.append(Registry(tmp_path, **options))
        return running[-1]

    yield run
    for registry in running:
        registry.close()


def check(config):
    backend = open_backend(config)
    try:
        reader = backend.open(BLOB)
        assert reader.size() == len(DATA)
        for offset, length in ((0, 1), (4097, 300_000), (len(DATA) - 1, 1), (0, len(DATA))):
            assert reader.read_at(offset, length) == DATA[offset : offset + length]
        results = at_once(16, lambda number: reader.read_at(number * 1000, 1000))
        assert results == [DATA[n * 1000 : n * 1000 + 1000] for n in range(16)]
        with pytest.raises(NotFound):
            backend.open("b" * 64).read_at(0, 1)
        assert backend.metrics.as_dict()["read_errors"] == 1
    finally:
        backend.close()


@pytest.mark.parametrize("scheme", ["http", ""])
def test_anonymous(run, scheme):
    check(RegistryConfig(run().host, REPO, scheme=scheme))


def test_password(run):
    registry = run(password=True)
    good = Credentials(USER, PASSWORD)
    check(RegistryConfig(registry.host, REPO, scheme="http", credentials=good))
    for credentials in (None, Credentials(USER, "wrong")):
        config = RegistryConfig(registry.host, REPO, scheme="http", credentials=credentials)
        with pytest.raises(AuthError):
            open_backend(config).open(BLOB).read_at(0, 1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the program openssl is missing")
def test_tls(run):
    registry = run(tls=True, password=True)
    config = RegistryConfig(
        registry.host,
        REPO,
        ca_cert_files=(registry.certificate,),
        credentials=Credentials(USER, PASSWORD),
    )
    check(config)
