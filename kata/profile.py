"""Whose rules a value is checked against."""

from __future__ import annotations

from enum import Enum

__all__ = ["Profile"]


class Profile(Enum):
    """The three sets of rules that exist (spec vm-runtimes 2.3).

    Paths that are relative or climb, and types that nobody knows, are refused by all of them.
    """

    STRICT = "strict"
    """kata-types, which Kata's Rust runtime and agent use."""

    PRODUCER = "producer"
    """nydus-snapshotter, before it sends."""

    LENIENT = "lenient"
    """Kata's Go runtime, when it receives."""
