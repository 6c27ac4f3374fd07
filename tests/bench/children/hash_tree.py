"""Make the hash tree of a copy of a file and print the seconds; the copying is not counted.

Arguments: file, block size, path for the copy, which is gone afterwards.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from builder.hashtree import add_hash_tree
from builder.output import OutputDisk
from erofs.verity import TreeFormat

_READ_BYTES = 1 << 20


def main() -> None:
    path, block_size, target = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    with OutputDisk(target, 0o644) as disk:
        size = 0
        with path.open("rb") as source:
            while data := source.read(_READ_BYTES):
                disk.write_at(size, data)
                size += len(data)
        size -= size % block_size
        start = time.perf_counter()
        add_hash_tree(disk, size, TreeFormat(block_size))
        print(time.perf_counter() - start)


main()
