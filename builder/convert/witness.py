"""Who sees the source's layers while they are converted; the proof does."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from builder.oci.records import Descriptor

__all__ = ["Follower", "Witness", "followed"]


class Follower(Protocol):
    """Gets a layer, unpacked, in the pieces in which the converter gets it."""

    def feed(self, piece: bytes) -> None:
        """Take the next piece; it waits while there is no room."""

    def end(self, error: BaseException | None = None) -> None:
        """Hear that this was all, or that the rest will not come."""


class Witness(Protocol):
    """Looks at source layers by its own means."""

    def follow(self, layer: Descriptor) -> Follower:
        """Return what is to see a layer that is converted now."""

    def read(self, layer: Descriptor) -> None:
        """Read a layer that the converter does not unpack."""


def followed(pieces: Generator[bytes], witness: Witness, layer: Descriptor) -> Generator[bytes]:
    """Yield the pieces of an unpacked layer, which somebody follows from the first one on."""
    follower = witness.follow(layer)
    try:
        for piece in pieces:
            follower.feed(piece)
            yield piece
    except BaseException as error:
        follower.end(error)
        raise
    finally:
        pieces.close()
    follower.end()
