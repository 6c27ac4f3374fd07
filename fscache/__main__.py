"""`python -m fscache` is `nydusd`."""

import gc
import signal
import sys


def main() -> int:
    """Run it; to look for garbage among what a start makes is a tenth of its time."""
    gc.disable()
    try:
        from fscache.cli.nydusd import main as nydusd

        return nydusd()
    except KeyboardInterrupt:
        # While it was loaded, or read its words.
        print("Error: interrupted before anything was begun", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
