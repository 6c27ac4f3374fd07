"""Open a bootstrap and look up one path, many times; prints the seconds of one time.

Arguments: bootstrap, path.
"""

from __future__ import annotations

import os
import sys
import time

from erofs import open_bootstrap

_TIMES = 200


def main() -> None:
    bootstrap, path = sys.argv[1], os.fsencode(sys.argv[2])
    start = time.perf_counter()
    for _ in range(_TIMES):
        with open_bootstrap(bootstrap) as image:
            if image.lookup(path) is None:
                sys.exit(f"{path!r} is not there")
    print((time.perf_counter() - start) / _TIMES)


main()
