"""Open a bootstrap and look up one path; prints the seconds, without those of imports.

Arguments: bootstrap, path.
"""

from __future__ import annotations

import os
import sys
import time

from erofs import open_bootstrap


def main() -> None:
    bootstrap, path = sys.argv[1], os.fsencode(sys.argv[2])
    start = time.perf_counter()
    with open_bootstrap(bootstrap) as image:
        found = image.lookup(path)
    print(time.perf_counter() - start)
    if found is None:
        sys.exit(f"{path!r} is not there")


main()
