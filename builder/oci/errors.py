"""Errors of images and the places that hold them."""

from __future__ import annotations

from erofs.errors import NydusError

__all__ = ["ImageError"]


class ImageError(NydusError):
    """An image, reference or place that cannot be used."""
