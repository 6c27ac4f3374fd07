"""The root of what the builder raises; leaves live beside the code that raises them."""

from __future__ import annotations

from erofs.errors import NydusError

__all__ = ["BuildError", "TarError"]


class BuildError(NydusError):
    """An image that cannot be built from its source.

    `path` names the source (host path or what the user called it), `entry` the
    in-image path that the error is about.
    """


class TarError(BuildError):
    """An archive that is damaged, or that uses what is not supported."""
