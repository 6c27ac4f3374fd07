"""`python -m guestimage`, which `vm-images/guest-image` starts."""

import sys

from guestimage.cli import main

sys.exit(main())
