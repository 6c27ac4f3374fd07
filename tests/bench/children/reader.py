"""Read a file of a mount, in the process that the kernel lets wait.

Arguments: `sequential PATH STREAMS PASSES SHA256` reads everything so many times with so many
threads, and then compares unless the digest is `-`; `random PATH SEED COUNT` reads 4 KiB of
COUNT different chunks; `page PATH COUNT` reads the first 4 KiB so many times; `walk PATH PASSES`
asks for the attributes of all that is beside PATH and below. Prints the seconds of each pass or
read as a JSON list.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

_CHUNK = 1 << 20
_PAGE = 4096


def _read_part(path: str, start: int, end: int) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    fd = os.open(path, os.O_RDONLY)
    while start < end:
        count = os.preadv(fd, [buffer[: min(_CHUNK, end - start)]], start)
        if not count:
            raise SystemExit(f"{path} ends at {start}")
        start += count
    os.close(fd)


def read_all(path: str, streams: int) -> float:
    """Read a whole file by threads; return the seconds."""
    size = Path(path).stat().st_size
    share = -(-size // streams // _CHUNK) * _CHUNK
    parts = [(at, min(at + share, size)) for at in range(0, size, share)]
    threads = [threading.Thread(target=_read_part, args=(path, *part)) for part in parts]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def sequential(path: str, streams: str, passes: str, digest: str) -> list[float]:
    seconds = [read_all(path, int(streams)) for _ in range(int(passes))]
    if digest != "-":
        with open(path, "rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != digest:
            raise SystemExit(f"{path}: content is {got}, expected {digest}")
    return seconds


def scattered(path: str, seed: str, count: str) -> list[float]:
    """Read a page of so many chunks, each alone; return the seconds of each."""
    rng = random.Random(int(seed))
    size = Path(path).stat().st_size
    chunks = rng.sample(range(size // _CHUNK), int(count))
    pages = [chunk * _CHUNK + rng.randrange(_CHUNK // _PAGE) * _PAGE for chunk in chunks]
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    seconds = []
    for offset in pages:
        start = time.perf_counter()
        data = os.pread(fd, _PAGE, offset)
        seconds.append(time.perf_counter() - start)
        if len(data) != _PAGE:
            raise SystemExit(f"{path}: {len(data)} bytes at {offset}")
    os.close(fd)
    return seconds


def page(path: str, count: str) -> list[float]:
    fd = os.open(path, os.O_RDONLY)
    buffer = [bytearray(_PAGE)]
    os.preadv(fd, buffer, 0)
    seconds = []
    for _ in range(int(count)):
        start = time.perf_counter()
        os.preadv(fd, buffer, 0)
        seconds.append(time.perf_counter() - start)
    return seconds


def walk(path: str, passes: str) -> list[float]:
    seconds = []
    for _ in range(int(passes)):
        start = time.perf_counter()
        for directory, names, files in os.walk(Path(path).parent):
            for name in names + files:
                os.lstat(os.path.join(directory, name))
        seconds.append(time.perf_counter() - start)
    return seconds


KINDS = {"sequential": sequential, "random": scattered, "page": page, "walk": walk}
if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](*sys.argv[2:])))
