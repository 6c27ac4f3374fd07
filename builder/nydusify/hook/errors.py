"""The errors of hook plug-ins."""

from __future__ import annotations

from erofs.errors import NydusError

__all__ = ["PluginError"]


class PluginError(NydusError):
    """A plug-in that cannot be started or understood, or one that refuses."""
