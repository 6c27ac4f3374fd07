"""Paths below a daemon's mount point, as clients give them."""

from __future__ import annotations

import os

from erofs.errors import NydusError

__all__ = ["Names", "PathError", "split"]

# A path below the mount point, without its slashes.
Names = tuple[bytes, ...]


class PathError(NydusError):
    """A path that nothing can be mounted at."""


def split(path: str) -> Names:
    """Return the names of a path that a client gave; none for the mount point itself.

    Raises:
        PathError: not absolute, or it has `..` or a NUL.
    """
    names = path.split("/")
    if not path.startswith("/") or ".." in names or "\0" in path:
        raise PathError("mount point is not an absolute path without '..'", path=path)
    return tuple(os.fsencode(name) for name in names if name not in ("", "."))
