"""Run the programs that the lab is made of, and say in one line what they complained about."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vmlab.errors import LabError

__all__ = ["CHECKOUT", "install", "need", "run"]

CHECKOUT = Path(__file__).resolve().parents[2]
_EXTRA_DIRECTORIES = ("/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu", "/bin")


def need(program: str, package: str) -> str:
    """Return the path of a program; `LabError` names the Debian package that has it."""
    for directory in (None, *_EXTRA_DIRECTORIES):
        path = shutil.which(program, path=directory)
        if path is not None:
            return path
    raise LabError(f"{program} is not installed (Debian: apt-get install {package})")


def install(*packages: str) -> None:
    """Install Debian packages where this is root; what is still missing is told by `need`."""
    subprocess.run([CHECKOUT / ".ci" / "packages", *packages], check=False)


def run(words: Sequence[str | Path], cwd: Path | None = None, seconds: float = 600) -> str:
    """Return the standard output of a program.

    Raises:
        LabError: it cannot be started, failed, or took longer than `seconds`.
    """
    name = Path(words[0]).name
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except OSError as error:
        raise LabError(f"{name}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{name} took longer than {seconds:.0f} s") from error
    if done.returncode:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise LabError(f"{name} {words[1]}: status {done.returncode}: {last}")
    return done.stdout
