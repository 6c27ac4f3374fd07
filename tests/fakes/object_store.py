"""A bucket of S3 or OSS on loopback that looks at signatures; written from the documents.

Nothing of `fscache.backend.signing` is used: both have to come to the same.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
import uuid
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.fakes.blob_server import BlobServer, Handler

KEY, SECRET = "AKIDEXAMPLE", "s3cr3t+of/the.bucket"
BUCKET, REGION = "bucket-1", "eu-test-1"
MAX_SKEW = 900.0


def _sum(key, text):
    return hmac.digest(key, text.encode(), "sha256")


class _Handler(Handler):
    def _s3_fault(self, body):
        match = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/,]+)/(\d{8})/([^/]+)/s3/aws4_request,\s*"
            r"SignedHeaders=([^,]+),\s*Signature=([0-9a-f]{64})",
            self.headers.get("Authorization", ""),
        )
        if match is None:
            return "AccessDenied"
        key, day, region, names, signature = match.groups()
        stamp, payload = self.headers.get("x-amz-date", ""), self.headers["x-amz-content-sha256"]
        if key != KEY or region != REGION:
            return "InvalidAccessKeyId"
        if not {"host", "x-amz-date", "x-amz-content-sha256"} <= set(names.split(";")):
            return "AccessDenied"
        moment = time.strptime(stamp, "%Y%m%dT%H%M%SZ")
        if stamp[:8] != day or abs(time.time() - _seconds(moment)) > MAX_SKEW:
            return "RequestTimeTooSkewed"
        if payload != hashlib.sha256(body).hexdigest():
            return "XAmzContentSHA256Mismatch"
        parts = urlsplit(self.path)
        query = sorted(one if "=" in one else f"{one}=" for one in parts.query.split("&") if one)
        lines = [self.command, parts.path, "&".join(query)]
        lines += [f"{name}:{self.headers[name].strip()}" for name in names.split(";")]
        request = hashlib.sha256("\n".join([*lines, "", names, payload]).encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{day}/{region}/s3/aws4_request\n{request}"
        secret = _sum(_sum(_sum(f"AWS4{SECRET}".encode(), day), region), "s3")
        good = _sum(_sum(secret, "aws4_request"), text).hex()
        return None if hmac.compare_digest(good, signature) else "SignatureDoesNotMatch"

    def _oss_fault(self):
        match = re.fullmatch(r"OSS ([^:]+):(.+)", self.headers.get("Authorization", ""))
        if match is None or match[1] != KEY:
            return "InvalidAccessKeyId"
        date = self.headers.get("Date", "")
        if abs(time.time() - parsedate_to_datetime(date).timestamp()) > MAX_SKEW:
            return "RequestTimeTooSkewed"
        name, query = self._object(), urlsplit(self.path).query
        lines = [self.command, self.headers.get("Content-MD5", "")]
        lines += [self.headers.get("Content-Type", ""), date]
        resource = f"/{BUCKET}/{name}" + (f"?{unquote(query).removesuffix('=')}" if query else "")
        text = "\n".join([*lines, resource])
        good = base64.b64encode(hmac.digest(SECRET.encode(), text.encode(), "sha1")).decode()
        return None if hmac.compare_digest(good, match[2]) else "SignatureDoesNotMatch"

    def _object(self):
        """Return the object that is asked for, None for another bucket."""
        path = unquote(urlsplit(self.path).path)
        if self.headers["Host"].startswith(f"{BUCKET}."):
            return path[1:]
        return path.removeprefix(f"/{BUCKET}/") if path.startswith(f"/{BUCKET}/") else None

    def _route(self):
        fake = self.server.fake
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with fake.lock:
            fake.log.append(f"{self.command} {self.path}")
            fault = next((one for one in fake.faults if re.search(one[0], fake.log[-1])), None)
            if fault is not None:
                fake.faults.remove(fault)
        if fault is not None and isinstance(fault[1], int):
            self._status(fault[1])
            return
        if fault is not None and fault[1] == "reset":
            self._reset()
            return
        wrong = None
        if not fake.anonymous:
            wrong = self._s3_fault(body) if fake.kind == "s3" else self._oss_fault()
        name = self._object()
        if wrong is not None or name is None:
            self._error(404 if wrong is None else 403, wrong or "NoSuchBucket")
            return
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        if self.command in ("GET", "HEAD"):
            super().do_GET() if self.command == "GET" else super().do_HEAD()
        else:
            self._write_object(name, query, body)
            if fault is not None and fault[1] == "lose":
                self._reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _route  # noqa: N815

    def _write_object(self, name, query, body):
        fake = self.server.fake
        upload = query.get("uploadId", "")
        parts = fake.uploads.get(upload)
        if upload and parts is None:
            self._error(404, "NoSuchUpload")
        elif self.command == "DELETE":
            del fake.uploads[upload]
            self._answer(204, b"")
        elif self.command == "PUT" and upload:
            parts[int(query["partNumber"])] = body
            self._answer(200, b"", ETag=_tag(body))
        elif self.command == "PUT":
            fake.objects[name] = body
            self._answer(200, b"", ETag=_tag(body))
        elif "uploads" in query:
            upload = f"id&{uuid.uuid4().hex}"
            fake.uploads[upload] = {}
            text = f"<R><UploadId>{upload.replace('&', '&amp;')}</UploadId></R>"
            self._answer(200, text.encode())
        else:
            self._complete(name, upload, parts, body)

    def _complete(self, name, upload, parts, body):
        fake = self.server.fake
        wanted = re.findall(
            r"<Part><PartNumber>(\d+)</PartNumber><ETag>([^<]+)</ETag></Part>", body.decode()
        )
        small = [number for number, _ in wanted[:-1] if len(parts[int(number)]) < fake.least_part]
        if fake.late_error:
            # S3 may begin with 200 and find out afterwards.
            fake.late_error -= 1
            self._answer(200, b"<Error><Code>InternalError</Code></Error>")
            return
        tags = [(int(number), tag.replace("&quot;", '"')) for number, tag in wanted]
        if tags != [(number, _tag(data)) for number, data in sorted(parts.items())] or small:
            self._error(400, "InvalidPart")
            return
        fake.objects[name] = b"".join(data for _, data in sorted(parts.items()))
        del fake.uploads[upload]
        self._answer(200, b"<CompleteMultipartUploadResult/>")

    def _answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status, code):
        body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        self._answer(status, b"" if self.command == "HEAD" else body)


def _tag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


def _seconds(moment):
    import calendar

    return calendar.timegm(moment)


class ObjectStoreServer(BlobServer):
    """One bucket of `objects`.

    `faults` are pairs of a pattern for `METHOD path` and a status, `reset` or `lose` (done, and
    the connection closed instead of answering); each happens once.
    """

    handler = _Handler

    def __init__(self, kind="s3", objects=None, *, anonymous=False):
        self.kind = kind
        self.objects: dict[str, bytes] = dict(objects or {})
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.faults: list[tuple[str, int | str]] = []
        self.log: list[str] = []
        self.anonymous = anonymous
        self.least_part = 0
        self.late_error = 0
        super().__init__()

    def find(self, path):
        name = unquote(urlsplit(path).path)
        return self.objects.get(name.removeprefix(f"/{BUCKET}/").removeprefix("/"))

    def config(self, **more) -> dict[str, str]:
        """Return the configuration in nydusd's words."""
        found = {
            "endpoint": self.host, "bucket_name": BUCKET, "access_key_id": KEY,
            "access_key_secret": SECRET, "scheme": "http",
        }  # fmt: skip
        return found | ({"region": REGION} if self.kind == "s3" else {}) | more
