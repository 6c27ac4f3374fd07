"""The floor of `merge` and `check`: start with the same imports, read the inputs, write the output.

Arguments: output (`-` for none), its size, inputs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import builder.cli  # noqa: F401 -- its time is part of the floor


def main() -> None:
    target, size, *sources = sys.argv[1:]
    for source in sources:
        Path(source).read_bytes()
    if target != "-":
        with open(target, "wb") as out:
            out.write(bytes(int(size)))
            out.flush()
            os.fsync(out.fileno())


main()
