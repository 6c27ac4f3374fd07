"""`python -m builder.nydusify`."""

import sys

from builder.nydusify.cli import main

if __name__ == "__main__":
    sys.exit(main())
