"""A registry with its token service and a store it redirects to; real sockets, many faults."""
# ruff: noqa: N802 - the names of http.server

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, urlsplit

from tests.fakes.blob_server import BlobServer, Handler

USER, PASSWORD = "robot", "s3cr3t-p4ssw0rd"
AUTH = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
REPO = "library/image"


def make_certificate(directory: Path) -> Path:
    """Make a certificate for 127.0.0.1 that is its own authority, with its key in one file."""
    key, cert = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    cert.write_bytes(cert.read_bytes() + key.read_bytes())
    return cert


class _RegistryHandler(Handler):
    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError, TimeoutError):
            if not self.server.fake.speaks_tls and self.connection.recv(1, 2) == b"\x16":
                # What a Go server answers to TLS on its plain port.
                self.wfile.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                self.close_connection = True
                return
            super().handle_one_request()
            return
        self.close_connection = True

    def _json(self, status, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        fake = self.server.fake
        form = dict(parse_qsl(self._body().decode()))
        fake.note_token("POST", form, self.headers)
        if not fake.post_works:
            self._status(405)
            return
        if form.get("grant_type") == "refresh_token":
            with fake.lock:
                known = form.get("refresh_token") == fake.identity_token
                if known and fake.rotates:
                    fake.identity_token += "+"
            self._token(known, fake.identity_token if fake.rotates else None)
            return
        self._token(form.get("username") == fake.user and form.get("password") == fake.password)

    def _token(self, allowed, identity=None):
        fake = self.server.fake
        if fake.token_delay:
            time.sleep(fake.token_delay)
        if fake.token_fault is not None:
            self._json(fake.token_fault, {"errors": []})
        elif not allowed:
            self._json(401, {"errors": [{"code": "UNAUTHORIZED"}]})
        else:
            answer = {"token": fake.new_token(), "expires_in": fake.token_life}
            self._json(200, answer | ({"refresh_token": identity} if identity else {}))

    def _allowed(self):
        fake = self.server.fake
        sent = self.headers.get("Authorization")
        with fake.lock:
            fake.authorizations.append(sent)
        if fake.auth is None:
            return True
        if fake.auth == "basic":
            wanted = base64.b64encode(f"{fake.user}:{fake.password}".encode()).decode()
            allowed = sent == f"Basic {wanted}"
            challenge = 'Basic realm="registry"'
        else:
            allowed = (sent or "").startswith("Bearer ") and fake.token_is_good(sent[7:])
            challenge = (
                f'Bearer realm="{fake.realm or fake.address + "/token"}",service="fake, really",'
                f'scope="repository:{REPO}:pull"'
            )
        if allowed:
            return True
        with fake.lock:
            fake.refusals += 1
        self._json(401, {"errors": []}, WWW_Authenticate=challenge)
        return False

    def do_HEAD(self):
        self._serve(super().do_HEAD)

    def do_GET(self):
        fake = self.server.fake
        parts = urlsplit(self.path)
        if parts.path == "/token":
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            fake.note_token("GET", query, self.headers)
            wanted = base64.b64encode(f"{fake.user}:{fake.password}".encode()).decode()
            sent = self.headers.get("Authorization")
            self._token(sent == f"Basic {wanted}" or (sent is None and fake.anonymous))
            return
        if parts.path in ("/v2", "/ping"):
            with fake.lock:
                fake.pings += 1
            self._status(fake.ping_status)
            return
        self._serve(super().do_GET)

    def _serve(self, serve):
        fake = self.server.fake
        with fake.lock:
            fake.paths.append(self.path)
        if not self._allowed():
            return
        location = fake.redirect_for(self.path)
        if location is None:
            serve()
            return
        self.send_response(fake.redirect_status)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()


class RegistryServer(BlobServer):
    """`BlobServer` behind the door of a registry; its blobs are named by plain ids.

    `auth` is None, "basic" or "bearer"; tokens live for `token_life` seconds as they say, and
    are refused after `revoke_tokens`. `store` is where it redirects to.
    """

    handler = _RegistryHandler

    def __init__(self, blobs=None, *, auth=None, tls=None):
        self.auth = auth
        self.speaks_tls = tls is not None
        self.user, self.password = USER, PASSWORD
        self.anonymous = False
        self.identity_token, self.rotates = "1dentity", False
        self.post_works = True
        self.realm = None
        self.token_life = 600
        self.token_fault = None
        self.token_delay = 0.0
        self.store: StoreServer | None = None
        self.redirect_status = 307
        self.location = None
        self.ping_status = 200
        self.pings = 0
        self.paths = []
        self.authorizations = []
        self.token_requests = []
        self.refusals = 0
        self._tokens = {}
        super().__init__({f"sha256:{name}": blob for name, blob in (blobs or {}).items()}, tls=tls)

    def note_token(self, method, query, headers):
        with self.lock:
            self.token_requests.append((method, query, headers.get("Authorization")))

    def new_token(self):
        with self.lock:
            token = f"t0k3n-{len(self._tokens)}"
            self._tokens[token] = time.monotonic() + self.token_life
            return token

    def token_is_good(self, token):
        with self.lock:
            return self._tokens.get(token, 0.0) > time.monotonic()

    def revoke_tokens(self):
        with self.lock:
            self._tokens = dict.fromkeys(self._tokens, 0.0)

    def redirect_for(self, path):
        if self.location is not None:
            return self.location
        return None if self.store is None else self.store.sign(path.rsplit("/", 1)[-1])


class _StoreHandler(Handler):
    def do_HEAD(self):
        self._check(super().do_HEAD)

    def do_GET(self):
        self._check(super().do_GET)

    def _check(self, serve):
        fake = self.server.fake
        parts = urlsplit(self.path)
        signature = dict(parse_qsl(parts.query)).get("signature")
        with fake.lock:
            fake.authorizations.append(self.headers.get("Authorization"))
            good = signature in fake.signatures
        if fake.refuse_authorization and self.headers.get("Authorization"):
            self._status(400)
            return
        if not good:
            self._status(fake.expired_status)
            return
        self.path = parts.path
        serve()


class StoreServer(BlobServer):
    """`BlobServer` that wants a signature in the query, as object storage does."""

    handler = _StoreHandler

    def __init__(self, blobs=None, *, life=None):
        self.life = life
        self.signatures = set()
        self.signed = 0
        self.expired_status = 403
        self.refuse_authorization = True
        self.authorizations = []
        super().__init__({f"sha256:{name}": blob for name, blob in (blobs or {}).items()})

    def sign(self, name):
        with self.lock:
            self.signed += 1
            signature = f"s1gn4ture-{self.signed}"
            self.signatures.add(signature)
        expires = "" if self.life is None else f"&Expires={int(time.time() + self.life)}"
        return f"{self.address}/store/{name}?signature={signature}{expires}"

    def expire(self):
        with self.lock:
            self.signatures.clear()


class _ProxyHandler(_RegistryHandler):
    def do_GET(self):
        fake = self.server.fake
        with fake.lock:
            fake.proxied.append((self.path, dict(self.headers)))
        if fake.proxy_fault is not None:
            status, dragonfly = fake.proxy_fault
            extra = {"X_Dragonfly_Error_Type": "proxy"} if dragonfly else {}
            self._json(status, {}, **extra)
            return
        parts = urlsplit(self.path)
        self.path = parts._replace(scheme="", netloc="").geturl()
        super().do_GET()


class ProxyServer(RegistryServer):
    """A proxy that has every blob itself; `proxy_fault` is (status, whether Dragonfly's)."""

    handler = _ProxyHandler

    def __init__(self, blobs=None):
        self.proxied = []
        self.proxy_fault = None
        super().__init__(blobs)


def at_once(count, work):
    """Run `work(number)` in threads that start together; return the results, errors included."""
    barrier = threading.Barrier(count)
    results = [None] * count

    def run(number):
        barrier.wait()
        try:
            results[number] = work(number)
        except Exception as error:  # noqa: BLE001 - the caller looks at it
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
