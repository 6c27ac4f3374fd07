"""Pull, unpack, digest, compress, push: what a converter cannot do without.

`python -m tests.bench.children.nydusify_floor HOST REPOSITORY WORK`
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import zstandard
from blake3 import blake3
from zlib_ng import zlib_ng

CHUNK = 1 << 20
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def _get(url: str, accept: str = "*/*"):
    return urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}))


def _plain(url: str) -> Iterator[bytes]:
    unpacker = zlib_ng.decompressobj(31)
    with _get(url) as answer:
        while piece := answer.read(CHUNK):
            yield unpacker.decompress(piece)


def _push(host: str, repository: str, path: Path) -> None:
    request = urllib.request.Request(
        f"http://{host}/v2/{repository}/blobs/uploads/", method="POST", data=b""
    )
    with urllib.request.urlopen(request) as answer:
        location = answer.headers["Location"]
    data = path.read_bytes()
    digest = f"sha256:{sha256(data).hexdigest()}"
    joint = "&" if "?" in location else "?"
    request = urllib.request.Request(
        f"{location}{joint}digest={digest}", method="PUT", data=data,
        headers={"Content-Type": "application/octet-stream"},
    )  # fmt: skip
    urllib.request.urlopen(request).close()


def main(host: str, repository: str, work: str) -> None:
    base = f"http://{host}/v2/source"
    index = json.load(_get(f"{base}/manifests/v1", INDEX))
    manifest = json.load(_get(f"{base}/manifests/{index['manifests'][0]['digest']}", MANIFEST))
    packer = zstandard.ZstdCompressor(3)
    for number, layer in enumerate(manifest["layers"]):
        path = Path(work, str(number))
        with path.open("wb") as out:
            buffer = b""
            for piece in _plain(f"{base}/blobs/{layer['digest']}"):
                buffer += piece
                while len(buffer) >= CHUNK:
                    chunk, buffer = buffer[:CHUNK], buffer[CHUNK:]
                    blake3(chunk).digest()
                    out.write(packer.compress(chunk))
            out.write(packer.compress(buffer))
        _push(host, repository, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
