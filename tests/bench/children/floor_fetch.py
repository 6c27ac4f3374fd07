"""The floor of a cold read: get ranges, decode, verify and write their chunks, nothing else.

Arguments: bootstrap, port, path of the blob at the server, ranges (JSON file), output, streams.
Prints as JSON the seconds of everything and of each range. The kernel and a reader have no part
in it; connections are open and tables are read before the clock runs.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

from erofs import open_bootstrap
from erofs.codec import compress, decompress
from erofs.digest import digest


class _Floor:
    def __init__(self, bootstrap: Path, target: int, port: int, path: str):
        with open_bootstrap(bootstrap) as image:
            self._blob = image.blobs[0]
            infos = sorted(image.chunk_infos, key=lambda info: info.compressed_offset)
        self._chunks = {info.compressed_offset: info for info in infos}
        self._target = target
        self._port = port
        self._path = path
        self.seconds: list[float] = []
        # Libraries are loaded on first use.
        digest(self._blob.digester, b"")
        compress(self._blob.compressor, bytes(64))

    def connect(self) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self._port)
        connection.connect()
        return connection

    def work(self, connection: HTTPConnection, ranges: list[tuple[int, int]]) -> None:
        for offset, length in ranges:
            start = time.perf_counter()
            self._store(self._get(connection, offset, length), offset)
            self.seconds.append(time.perf_counter() - start)

    def _get(self, connection: HTTPConnection, offset: int, length: int) -> memoryview:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        connection.request("GET", self._path, headers=headers)
        data = connection.getresponse().read()
        if len(data) != length:
            raise SystemExit(f"{len(data)} bytes for {headers}")
        return memoryview(data)

    def _store(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            info = self._chunks[offset + done]
            stored = data[done : done + info.compressed_size]
            plain = stored
            if info.flags & 1:
                plain = decompress(self._blob.compressor, stored, info.uncompressed_size)
            if digest(self._blob.digester, plain) != info.digest:
                raise SystemExit(f"wrong digest at {offset + done}")
            os.pwrite(self._target, plain, info.uncompressed_offset)
            done += info.compressed_size


def main() -> None:
    bootstrap, port, path, ranges_path, target, streams = sys.argv[1:]
    ranges = [tuple(pair) for pair in json.loads(Path(ranges_path).read_text())]
    count = int(streams)
    if count > 1:
        ranges.sort()
    share = -(-len(ranges) // count)
    with open(target, "wb", buffering=0) as out:
        floor = _Floor(Path(bootstrap), out.fileno(), int(port), path)
        threads = [
            threading.Thread(target=floor.work, args=(floor.connect(), ranges[at : at + share]))
            for at in range(0, len(ranges), share)
        ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = time.perf_counter() - start
    if len(floor.seconds) != len(ranges):
        raise SystemExit("a thread of the floor failed")
    print(json.dumps({"total": total, "each": floor.seconds}))


main()
