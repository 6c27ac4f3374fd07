"""Run the programs that an image is made with, and say in one line what they complained about."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from guestimage.errors import GuestImageError

__all__ = ["run"]

_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"


def run(
    words: Sequence[str | Path],
    package: str,
    *,
    script: str = "",
    seconds: float = 60,
    environment: dict[str, str] | None = None,
) -> str:
    """Return the standard output of a program that reads a script.

    Raises:
        GuestImageError: it is not installed (`package` is Debian's), failed, or took too long.
    """
    program = shutil.which(words[0]) or shutil.which(words[0], path=_DIRECTORIES)
    name = Path(words[0]).name
    if program is None:
        raise GuestImageError(f"{name} is not installed (Debian: apt-get install {package})")
    try:
        done = subprocess.run(
            [program, *words[1:]],
            input=script,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env={**os.environ, **(environment or {})},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GuestImageError(f"{name} took longer than {seconds:.0f} s") from error
    if done.returncode:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise GuestImageError(f"{name}: status {done.returncode}: {last}")
    return done.stdout
