"""A registry of whole images, pulled and pushed, which misbehaves on request; real sockets."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from tests.fakes.registry import RegistryServer, _RegistryHandler

OCI_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass
class Fault:
    """What happens to the next requests that match: status, reset, lose, truncate, stall, damage.

    `expire` ends every token before it looks at that of the request; `lose` does what was
    asked for and closes the connection instead of answering; `skip` requests go well before.
    """

    method: str
    path: str
    what: int | str
    count: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class _Handler(_RegistryHandler):
    def _fault(self):
        fake = self.server.fake
        with fake.lock:
            for fault in fake.faults:
                if (
                    fault.count
                    and fault.method == self.command
                    and re.search(fault.path, self.path)
                ):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.count -= 1
                    return fault
        return None

    def _route(self):
        self.lost = self.damage = self.cut = False
        parts = urlsplit(self.path)
        if parts.path == "/token":
            if self.command == "GET":
                super().do_GET()
            else:
                super().do_POST()
            return
        self.body = self._body() if self.command in ("POST", "PATCH", "PUT") else b""
        fault = self._fault()
        if fault is not None and isinstance(fault.what, int):
            self._reply(fault.what, **fault.headers)
            return
        if fault is not None and fault.what == "reset":
            self._reset()
            return
        if fault is not None and fault.what == "stall":
            self.server.fake.released.wait(60)
            self.close_connection = True
            return
        if fault is not None and fault.what == "ignore-range":
            del self.headers["Range"]
        if fault is not None and fault.what == "expire":
            self.server.fake.revoke_tokens()
        self.lost = fault is not None and fault.what == "lose"
        self.damage = fault is not None and fault.what == "damage"
        self.cut = fault is not None and fault.what == "truncate"
        with self.server.fake.lock:
            self.server.fake.paths.append(self.path)
        if self._allowed():
            self._serve_image(parts)

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _route  # noqa: N815

    def _reply(self, status, body=b"", **headers):
        fake = self.server.fake
        with fake.lock:
            fake.log.append(f"{self.command} {self.path.partition('?')[0]} -> {status}")
        if self.lost:
            self._reset()
            return
        if self.damage and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if fake.drip:
            for start in range(0, len(body), fake.drip):
                self.wfile.write(body[start : start + fake.drip])
                time.sleep(0.001)
            return
        self.wfile.write(body)

    def _serve_image(self, parts):
        match = re.fullmatch(r"/v2/(.+?)/(blobs|manifests|referrers)/(.*)", parts.path)
        if match is None:
            self._reply(200 if parts.path == "/v2/" else 404)
            return
        repository = self.server.fake.repository(match[1])
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        name = match[3]
        if match[2] == "blobs" and name.startswith("uploads/"):
            self._upload(repository, match[1], name.removeprefix("uploads/"), query)
        elif match[2] == "blobs":
            self._blob(repository, name)
        elif match[2] == "manifests":
            self._manifest(repository, name)
        else:
            self._referrers(repository, name)

    def _blob(self, repository, digest):
        blob = repository.blobs.get(digest)
        if blob is None:
            self._reply(404)
            return
        if self.command == "HEAD":
            # Before the answer: who has it may look at once.
            with self.server.fake.lock:
                self.server.fake.log.append(f"HEAD {self.path} -> 200")
            self.send_response(200)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._reply(200, blob)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(blob)), len(blob) - 1)
        body = blob[first : last + 1]
        self._reply(206, body, Content_Range=f"bytes {first}-{last}/{len(blob)}")

    def _manifest(self, repository, name):
        fake = self.server.fake
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(self.body).hexdigest()}"
            with fake.lock:
                repository.manifests[digest] = (self.headers["Content-Type"], self.body)
                if not name.startswith("sha256:"):
                    repository.tags[name] = digest
            extra = {"OCI_Subject": "yes"} if fake.has_referrers else {}
            self._reply(201, Docker_Content_Digest=digest, **extra)
            return
        digest = repository.tags.get(name, name)
        found = repository.manifests.get(digest)
        if found is None:
            self._reply(404)
            return
        kind, data = found
        headers = {"Content_Type": kind, "Docker_Content_Digest": digest}
        if self.command == "HEAD":
            headers["length"] = str(len(data))
            with fake.lock:
                fake.log.append(f"HEAD {self.path} -> 200")
            self.send_response(200)
            for key, text in headers.items():
                self.send_header(
                    "Content-Length" if key == "length" else key.replace("_", "-"), text
                )
            self.end_headers()
            return
        self._reply(200, data, **headers)

    def _referrers(self, repository, digest):
        if not self.server.fake.has_referrers:
            self._reply(404)
            return
        import json

        found = []
        for name, (kind, data) in repository.manifests.items():
            value = json.loads(data)
            if (value.get("subject") or {}).get("digest") == digest:
                found.append(
                    {"mediaType": kind, "digest": name, "size": len(data),
                     "artifactType": value.get("artifactType", "")}
                )  # fmt: skip
        body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
        self._reply(200, json.dumps(body).encode(), Content_Type=OCI_INDEX)

    def _upload(self, repository, name, session, query):
        fake = self.server.fake
        if self.command == "POST":
            if "mount" in query and fake.mounts:
                blob = fake.repository(query["from"]).blobs.get(query["mount"])
                if blob is not None:
                    repository.blobs[query["mount"]] = blob
                    self._reply(201, Docker_Content_Digest=query["mount"])
                    return
            session = uuid.uuid4().hex
            fake.sessions[session] = bytearray()
            self._reply(202, Location=f"/v2/{name}/blobs/uploads/{session}?state=s1")
            return
        if session not in fake.sessions:
            self._reply(404)
            return
        data = fake.sessions[session]
        location = f"/v2/{name}/blobs/uploads/{session}?state=s{len(data)}"
        if self.command == "DELETE":
            del fake.sessions[session]
            self._reply(204)
        elif self.command == "GET":
            self._reply(204, Location=location, Range=f"0-{max(0, len(data) - 1)}")
        elif self.command == "PATCH":
            first = re.fullmatch(r"(\d+)-(\d+)", self.headers.get("Content-Range", "0-0"))
            if int(first[1]) != len(data):
                self._reply(416)
                return
            data += (
                self.body[: len(self.body) // 2]
                if fake.keeps_half.pop(session, None)
                else (self.body)
            )
            self._reply(202, Location=location, Range=f"0-{len(data) - 1}")
        else:
            data += self.body
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            if query.get("digest") != digest:
                self._reply(400)
                return
            repository.blobs[digest] = bytes(data)
            del fake.sessions[session]
            self._reply(201, Docker_Content_Digest=digest)


@dataclass
class Repo:
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add_blob(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blobs[digest] = data
        return digest

    def add_manifest(self, data: bytes, kind: str, tag: str = "") -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.manifests[digest] = (kind, data)
        if tag:
            self.tags[tag] = digest
        return digest


class OciRegistry(RegistryServer):
    """`RegistryServer` with repositories that images are pushed to; `faults` go first."""

    handler = _Handler

    def __init__(self, **options):
        self.repositories: dict[str, Repo] = {}
        self.sessions: dict[str, bytearray] = {}
        self.keeps_half: dict[str, bool] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.has_referrers = False
        self.mounts = True
        self.drip = 0
        super().__init__(**options)

    def repository(self, name: str) -> Repo:
        with self.lock:
            return self.repositories.setdefault(name, Repo())
