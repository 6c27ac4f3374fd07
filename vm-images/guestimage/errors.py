"""The one error of this package."""

from __future__ import annotations

from erofs.errors import NydusError

__all__ = ["GuestImageError"]


class GuestImageError(NydusError):
    """A guest image that cannot be made, or a program that is missing or failed."""
