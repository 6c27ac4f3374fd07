"""A tar of one large file, written to standard output; argument: bytes of the file.

No two of its mebibytes are alike, and half of each does not compress.
"""

from __future__ import annotations

import random
import sys
import tarfile

_PIECE = 1 << 20


def main() -> None:
    info = tarfile.TarInfo("data")
    info.size = int(sys.argv[1])
    out = sys.stdout.buffer
    out.write(info.tobuf(tarfile.GNU_FORMAT))
    noise = random.Random(6).randbytes(_PIECE // 2)
    rest = bytes(_PIECE // 2 - 8)
    for number in range(info.size // _PIECE):
        out.write(number.to_bytes(8, "little") + noise + rest)
    out.write(bytes(2 * tarfile.BLOCKSIZE))


main()
