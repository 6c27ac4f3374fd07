"""What programs tell of themselves; nothing is imported for it."""

from __future__ import annotations

import sys

__all__ = ["GIT_COMMIT", "VERSION", "print_version"]

# That of pyproject.toml, which a test compares: to read an installed package's takes 20 ms.
VERSION = "0.1.0"
# The package does not know the commit that it was made of; the API says the same word.
GIT_COMMIT = "unknown"


def print_version(program: str) -> None:
    """Print what callers parse: a label, a tab and the value in each line (spec tools 2.1).

    nydus-snapshotter looks for the line of the commit.
    """
    print(f"{program} Version: \t{VERSION}")
    print(f"Git Commit: \t{GIT_COMMIT}")
    print("Build Time: \tunknown")
    print("Profile: \trelease")
    print(f"Python: \t{sys.version.split()[0]}")
    print()
