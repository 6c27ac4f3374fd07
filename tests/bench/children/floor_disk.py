"""The floor of hash trees and disks: the digest of each block, on all cores, nothing else.

Arguments: file, block size, and a target to copy the file to first, or "-". Prints the
seconds that it took; starting the interpreter is not counted.
"""

from __future__ import annotations

import os
import sys
import time
from hashlib import sha256

_READ_BYTES = 1 << 20


def _digest(descriptor: int, start: int, end: int, block_size: int) -> None:
    for offset in range(start, end, _READ_BYTES):
        data = memoryview(os.pread(descriptor, min(_READ_BYTES, end - offset), offset))
        b"".join(
            [sha256(data[at : at + block_size]).digest() for at in range(0, len(data), block_size)]
        )


def _digest_all(descriptor: int, size: int, block_size: int) -> None:
    cores = len(os.sched_getaffinity(0))
    share = -(-size // cores // _READ_BYTES) * _READ_BYTES
    children = []
    for start in range(0, size, share):
        child = os.fork()
        if not child:
            _digest(descriptor, start, min(start + share, size), block_size)
            os._exit(0)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit("a child has failed")


def _copy(source: int, target: int, size: int) -> None:
    offset = 0
    while offset < size:
        offset += os.sendfile(target, source, offset, size - offset)


def main() -> None:
    path, block_size, target = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    source = os.open(path, os.O_RDONLY)
    size = os.fstat(source).st_size
    start = time.perf_counter()
    if target == "-":
        _digest_all(source, size, block_size)
    else:
        copy = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _copy(source, copy, size)
        _digest_all(copy, size, block_size)
        # The disk is durable before it has its name.
        os.fsync(copy)
    print(time.perf_counter() - start)


main()
