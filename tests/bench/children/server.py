"""The blob server as a process: `/<milliseconds>/<blob id>` answers after that time.

Arguments: directories of blobs. Prints its port; each line of input is answered with the ranges
that were asked for since the last one, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.fakes.blob_server import BlobServer


class _SlowServer(BlobServer):
    def find(self, path: str) -> bytes | None:
        time.sleep(int(path.split("/")[1]) / 1000)
        return super().find(path)


def _ranges(server: BlobServer) -> list[tuple[int, int]]:
    """Return (offset, length) of the requests so far, and forget them."""
    with server.lock:
        texts = [text for _, text in server.ranges if text]
        server.ranges.clear()
        server.headers.clear()
    pairs = [text.removeprefix("bytes=").split("-") for text in texts]
    return [(int(first), int(last) - int(first) + 1) for first, last in pairs]


def main() -> None:
    blobs = {
        path.name: path.read_bytes()
        for directory in sys.argv[1:]
        for path in Path(directory).iterdir()
        if len(path.name) == 64
    }
    with _SlowServer(blobs) as server:
        print(server.address.rsplit(":", 1)[1], flush=True)
        for _ in sys.stdin:
            print(json.dumps(_ranges(server)), flush=True)


main()
