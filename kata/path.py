"""Paths and names that others put into options: what may be in them, and how they are escaped."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from kata.errors import OptionError

__all__ = ["check_container_id", "check_path", "escape_layer", "escape_option"]

_MAX_PATH_BYTES = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What Kata-Go expects between /rafs/ and /lowerdir (spec vm-runtimes 2.5); no dots alone.
_CONTAINER_ID = re.compile(r"(?!\.+\Z)[A-Za-z0-9_+.-]{1,128}\Z")


def check_path(path: str, what: str) -> str:
    """Return an absolute path in its plain form.

    Raises:
        OptionError: relative, with `.`, `..` or empty components, control characters, or
            longer than the kernel takes.
    """
    if not path.startswith("/"):
        raise OptionError(f"{what} is not an absolute path")
    if _CONTROL.search(path) or len(path.encode(errors="replace")) >= _MAX_PATH_BYTES:
        raise OptionError(f"{what} has control characters or is too long")
    if path != str(PurePosixPath(path)) or path.startswith("//") or ".." in path.split("/"):
        raise OptionError(f"{what} is not a plain path")
    return path


def check_container_id(name: str) -> str:
    """Return a container id that is safe as a component of a path, or raise `OptionError`."""
    if not _CONTAINER_ID.match(name):
        raise OptionError("not a container id", got=ascii(name[:64]))
    return name


def escape_option(path: str) -> str:
    """Escape a path for an option of overlayfs that holds one path."""
    return re.sub(r"([\\,])", r"\\\1", path)


def escape_layer(path: str) -> str:
    """Escape a path for the list of lower directories."""
    return re.sub(r"([\\,:])", r"\\\1", path)
