"""The command line of `nydus-image`: words in, calls of the Python API, messages out.

Here is only what a process needs to tell its version, which callers ask for again and again:
the parser and the log take longer to load than the interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if list(words) in (["--version"], ["-V"]):
        from erofs.version import print_version

        print_version("")
        return 0
    try:
        from builder.cli.program import run

        return run(argv)
    except KeyboardInterrupt:
        # While it was loaded, or read its words.
        print("Error: interrupted before anything was begun", file=sys.stderr)
        return 130
