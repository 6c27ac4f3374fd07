"""A process that removes idle files from the kernel's cache, and ends.

`inuse` and `cull` take names in the working directory of the process that writes them (spec
ondemand 1.15), and a daemon must not change its own. Standard library only, and few of it: run by
path with the device's number and JSON pairs of directory and name; answers with a JSON list of
errno, 0 for a file that is gone.
"""

from __future__ import annotations

import json
import os
import sys


def _cull(device: int, directory: str, name: str) -> int:
    try:
        os.chdir(directory)
        for command in ("inuse", "cull"):
            os.write(device, f"{command} {name}".encode())
    except OSError as error:
        return error.errno or 5
    return 0


def main() -> None:
    """Do what the arguments say."""
    device, pairs = int(sys.argv[1]), json.loads(sys.argv[2])
    json.dump([_cull(device, directory, name) for directory, name in pairs], sys.stdout)


if __name__ == "__main__":
    main()
