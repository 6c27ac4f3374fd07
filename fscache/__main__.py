"""`python -m fscache` is `nydusd`."""

import gc
import sys


def main() -> int:
    """Run it; to look for garbage among what a start makes is a tenth of its time."""
    gc.disable()
    from fscache.cli.nydusd import main as nydusd

    return nydusd()


if __name__ == "__main__":
    sys.exit(main())
