"""Files whose content is elsewhere: a tree and a bootstrap of their own (spec rafs-v6 4.11)."""

from __future__ import annotations

import stat
from typing import NamedTuple

from builder.attributes import Attributes, ExternalFile
from builder.errors import BuildError
from erofs import Chunk, Node
from erofs.blobmeta import CI_ENTRY_V1_SIZE, DIGEST_SIZE
from erofs.layout import BLOCK_SIZE
from erofs.rafs import (
    MAX_CHUNKS_PER_BLOB,
    BlobEntry,
    BlobFeatures,
    ChunkFlags,
    Compressor,
    Digester,
)
from erofs.tree import iter_names
from erofs.view import align_up

__all__ = ["ExternalTree", "split_external"]


class ExternalTree(NamedTuple):
    """The tree of external files and the blobs that have their content."""

    root: Node
    blobs: list[BlobEntry]


class _Blobs:
    """Numbers the external chunks of each blob and makes the blob table."""

    def __init__(self, chunk_size: int, digester: Digester) -> None:
        self._chunk_size = chunk_size
        self._digester = digester
        self._found: dict[int, tuple[ExternalFile, int]] = {}

    def chunks(self, node: Node, external: ExternalFile) -> list[Chunk]:
        """Return the chunks of a file; raise `BuildError`."""
        if external.chunk_size != self._chunk_size:
            raise BuildError(
                "external file in chunks of another size",
                expected=self._chunk_size,
                got=external.chunk_size,
            )
        if external.offset % BLOCK_SIZE or external.offset + node.size > external.blob_size:
            raise BuildError(
                "external content at an impossible place",
                expected=f"multiple of {BLOCK_SIZE}, up to {external.blob_size}",
                got=f"{node.size} bytes at {external.offset}",
            )
        count = -(-node.size // self._chunk_size)
        if external.crcs and len(external.crcs) != count:
            raise BuildError("number of CRCs", expected=count, got=len(external.crcs))
        first, start = self._found.get(external.blob_index, (external, 0))
        if (first.blob_id, first.blob_size) != (external.blob_id, external.blob_size):
            raise BuildError(
                f"two external blobs of number {external.blob_index}",
                expected=first.blob_id,
                got=external.blob_id,
            )
        if start + count > MAX_CHUNKS_PER_BLOB:
            raise BuildError("too many chunks for one external blob", blob=external.blob_id)
        self._found[external.blob_index] = (first, start + count)
        return [self._chunk(node, external, start, number) for number in range(count)]

    def _chunk(self, node: Node, external: ExternalFile, start: int, number: int) -> Chunk:
        file_offset = number * self._chunk_size
        size = min(self._chunk_size, node.size - file_offset)
        crc = external.crcs[number] if external.crcs else 0
        return Chunk(
            digest=bytes(DIGEST_SIZE),
            blob_index=external.blob_index,
            flags=ChunkFlags.HAS_CRC if crc else 0,
            compressed_size=size,
            uncompressed_size=size,
            compressed_offset=external.offset + file_offset,
            uncompressed_offset=external.offset + file_offset,
            file_offset=file_offset,
            chunk_index=start + number,
            crc32c=crc,
        )

    def table(self) -> list[BlobEntry]:
        """Return the blob table; raise `BuildError` when a number is missing."""
        missing = set(range(len(self._found))) - self._found.keys()
        if missing:
            raise BuildError("external blobs are not numbered one by one", got=sorted(self._found))
        return [self._entry(number) for number in range(len(self._found))]

    def _entry(self, number: int) -> BlobEntry:
        external, chunks = self._found[number]
        return BlobEntry(
            blob_id=external.blob_id.encode("ascii"),
            blob_index=number,
            chunk_size=self._chunk_size,
            chunk_count=chunks,
            compressor=Compressor.NONE,
            digester=self._digester,
            features=BlobFeatures.EXTERNAL | BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC,
            compressed_size=external.blob_size,
            uncompressed_size=align_up(external.blob_size, BLOCK_SIZE),
            blob_toc_size=0,
            # There is no such table, as the stored size says; readers want the plain one to
            # fit the number of chunks (spec 7.1).
            ci_compressor=Compressor.NONE,
            ci_offset=0,
            ci_compressed_size=0,
            ci_uncompressed_size=CI_ENTRY_V1_SIZE * chunks,
        )


def split_external(
    root: Node, attributes: Attributes, chunk_size: int, digester: Digester
) -> ExternalTree | None:
    """Take the external files out of a tree whose content is not read yet.

    The directories above them are in both trees.

    Returns:
        The tree of the external files; None when there are none.

    Raises:
        BuildError: a path names no regular file, or its content is at an impossible place.
    """
    files = dict(attributes.files)
    if not files:
        return None
    blobs = _Blobs(chunk_size, digester)
    top = root.copy()
    copies = {b"": top}
    taken: list[tuple[Node, bytes]] = []
    parents: dict[bytes, Node] = {b"": root}
    for directory, name, node in iter_names(root):
        path = directory + b"/" + name if name else b""
        if node.is_dir:
            parents[path] = node
        external = files.pop(path, None)
        if external is None:
            continue
        if not stat.S_ISREG(node.mode):
            raise BuildError("external, but no regular file", entry=path)
        copy = node.copy()
        if external.size is not None:
            copy.size = external.size
        try:
            copy.chunks = blobs.chunks(copy, external)
        except BuildError as error:
            error.add_context(entry=path)
            raise
        _directory(copies, parents, directory).entries[name] = copy
        taken.append((parents[directory], name))
    for parent, name in taken:
        del parent.entries[name]
    if files:
        raise BuildError("external file that is not in the directory", entry=min(files))
    return ExternalTree(top, blobs.table())


def _directory(copies: dict[bytes, Node], originals: dict[bytes, Node], path: bytes) -> Node:
    """Return the copy of a directory; those above it are made, too."""
    missing = []
    while path not in copies:
        missing.append(path)
        path = path.rpartition(b"/")[0]
    for path_below in reversed(missing):
        copy = originals[path_below].copy()
        parent, _, name = path_below.rpartition(b"/")
        copies[parent].entries[name] = copy
        copies[path_below] = copy
    return copies[missing[0] if missing else path]
