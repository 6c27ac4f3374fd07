"""Layers unpacked."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import BinaryIO, cast

from builder.oci.place import LayerSource, PieceReader
from builder.oci.records import Descriptor
from builder.source.opening import open_tar

__all__ = ["PIECE_BYTES", "plain_pieces"]

PIECE_BYTES = 1 << 20


def plain_pieces(source: LayerSource, layer: Descriptor) -> Generator[bytes]:
    """Yield a layer unpacked.

    Raises:
        BuildError: it is broken.
        NydusError: it cannot be read, or, at its end, is not what its descriptor promises.
    """
    with closing(source.pieces(layer)) as pieces:
        with open_tar(cast(BinaryIO, PieceReader(pieces, layer.digest))) as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece
        for _ in pieces:
            pass  # the digest of the layer is looked at behind its last byte
