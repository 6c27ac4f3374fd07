"""Signatures of requests to object storage: AWS Signature Version 4, and version 1 of OSS.

Both are small and fixed for good, and the SDKs that have them load in 170 ms and more.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import format_datetime
from urllib.parse import quote

from fscache.backend.settings import Credentials

__all__ = ["EMPTY_DIGEST", "Query", "query_text", "sign_oss", "sign_s3"]

# Names and values of a query; a name with an empty value is written alone by OSS.
Query = Sequence[tuple[str, str]]

EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()
_ALGORITHM = "AWS4-HMAC-SHA256"


def query_text(query: Query) -> str:
    """Return a query in the order and quoting that is signed."""
    return "&".join(
        f"{name}={value}"
        for name, value in sorted((quote(one, safe=""), quote(two, safe="")) for one, two in query)
    )


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def sign_s3(
    keys: Credentials,
    region: str,
    method: str,
    path: str,
    query: Query,
    headers: Mapping[str, str],
    payload: str,
    moment: datetime,
) -> dict[str, str]:
    """Return the headers that sign a request to S3 (AWS Signature Version 4, service `s3`).

    Args:
        keys: access key and its secret.
        region: of the bucket.
        method: of HTTP.
        path: of the address, quoted.
        query: of the address.
        headers: to sign, `host` among them, in small letters.
        payload: SHA-256 of the body in hexadecimal digits.
        moment: now, in UTC.
    """
    stamp = moment.strftime("%Y%m%dT%H%M%SZ")
    signed = {**headers, "x-amz-content-sha256": payload, "x-amz-date": stamp}
    names = ";".join(sorted(signed))
    fields = "".join(f"{name}:{signed[name].strip()}\n" for name in sorted(signed))
    canonical = "\n".join((method, path, query_text(query), fields, names, payload))
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = "\n".join((_ALGORITHM, stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = _hmac(f"AWS4{keys.password}".encode(), stamp[:8])
    for word in (region, "s3", "aws4_request"):
        key = _hmac(key, word)
    signature = _hmac(key, text).hex()
    return {
        "x-amz-content-sha256": payload,
        "x-amz-date": stamp,
        "Authorization": (
            f"{_ALGORITHM} Credential={keys.username}/{scope},SignedHeaders={names},"
            f"Signature={signature}"
        ),
    }


def sign_oss(
    keys: Credentials,
    method: str,
    resource: str,
    query: Query,
    headers: Mapping[str, str],
    moment: datetime,
) -> dict[str, str]:
    """Return the headers that sign a request to OSS (version 1, spec tools 5.2).

    Args:
        keys: access key and its secret.
        method: of HTTP.
        resource: `/bucket/key`, not quoted.
        query: of the address; all of it are sub-resources.
        headers: to sign, in small letters: `content-md5`, `content-type`, `x-oss-…`.
        moment: now, in UTC.
    """
    date = format_datetime(moment, usegmt=True)
    fields = "".join(f"{n}:{headers[n]}\n" for n in sorted(headers) if n.startswith("x-oss-"))
    parts = [f"{name}={value}" if value else name for name, value in sorted(query)]
    canonical = resource + ("?" + "&".join(parts) if parts else "")
    content = (headers.get("content-md5", ""), headers.get("content-type", ""))
    text = "\n".join((method, *content, date, fields + canonical))
    signature = hmac.new(keys.password.encode(), text.encode(), hashlib.sha1).digest()
    code = base64.b64encode(signature).decode()
    return {"Date": date, "Authorization": f"OSS {keys.username}:{code}"}
