"""`python -m fscache` is `nydusd`."""

import sys

from fscache.cli.nydusd import main

if __name__ == "__main__":
    sys.exit(main())
