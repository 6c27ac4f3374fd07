"""`python -m builder.cli` is `nydus-image`."""

import sys

from builder.cli import main

sys.exit(main())
