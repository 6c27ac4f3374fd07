"""The image that another one is built on top of (spec rafs-v6 4.3, 5.4)."""

from __future__ import annotations

from pathlib import Path

from builder.bootstrap import load_tree, open_source_image
from builder.chunkdict import foreign_blobs
from builder.consistency import Profile, require_profile
from builder.overlay import apply_layer
from builder.source.options import WhiteoutSpec
from erofs import Chunk, Node
from erofs.rafs import BlobEntry, Digester
from erofs.tree import iter_names

__all__ = ["ParentImage", "load_parent"]


class ParentImage:
    """The tree, the blobs and the chunks of the image below.

    `known` has its chunks by digest and size, of equal ones the first in visiting order.
    """

    def __init__(self, root: Node, blobs: list[BlobEntry], digester: Digester) -> None:
        self.blobs = blobs
        self.known: dict[tuple[bytes, int], Chunk] = {}
        self._root = root
        self._nodes: set[int] = set()
        # What the parent's table has for each chunk: references from above change it.
        self._file_offsets: dict[int, int] = {}
        for _, _, node in iter_names(root):
            self._nodes.add(id(node))
            for chunk in node.chunks:
                self._file_offsets[id(chunk)] = chunk.file_offset
                if blobs[chunk.blob_index].digester == digester:
                    self.known.setdefault((chunk.digest, chunk.uncompressed_size), chunk)

    def overlaid(self, upper: Node, spec: WhiteoutSpec) -> Node:
        """Return the root of `upper` over this tree; both are used up."""
        return apply_layer(self._root, upper, spec)

    def settle_file_offsets(self, root: Node, chunk_size: int) -> int:
        """Give each chunk the offset of its last visited reference; count the names.

        References of the parent keep what its table says, whatever they are.
        """
        names = 0
        for _, _, node in iter_names(root):
            names += 1
            is_old = id(node) in self._nodes
            for number, chunk in enumerate(node.chunks):
                old = self._file_offsets.get(id(chunk)) if is_old else None
                chunk.file_offset = number * chunk_size if old is None else old
        return names


def load_parent(path: Path, profile: Profile, digester: Digester) -> ParentImage:
    """Load the image to build on.

    Raises:
        BuildError: it cannot be opened, or an image of that profile cannot be built on it.
        FormatError: it is no bootstrap.
    """
    with open_source_image(path, "parent bootstrap cannot be opened") as opened:
        image = require_profile(profile, opened, path)
        return ParentImage(load_tree(image), foreign_blobs(image, path), digester)
