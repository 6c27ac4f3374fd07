"""`python -m vmlab`, which `vm-images/run` starts."""

import sys

from vmlab.cli import main

sys.exit(main())
