"""Rewrite the blobs of an image that was built over many generations (spec tools 2.7).

Blobs that hardly anything refers to are copied without their waste, small ones are joined,
unused ones dropped. What chunk dictionaries or layers are kept for others stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from builder.blobtable import BlobTable
from builder.chunkdict import ChunkDictionary, load_dictionary
from builder.chunkreader import BlobProvider
from builder.consistency import Profile
from builder.options import BuildResult
from builder.output import OutputFile
from builder.rewrite import BlobCopy, LoadedImage, is_encrypted, load_image
from erofs import Chunk
from erofs.blobmeta import CI_ALIGNMENT
from erofs.rafs import BlobEntry, BlobFeatures
from erofs.tree import iter_names
from erofs.view import align_up

__all__ = ["CompactOptions", "compact"]

logger = logging.getLogger(__name__)

BOOTSTRAP_MODE = 0o644
# Their data is not theirs alone, or not in chunks that could be copied.
_KEPT = (
    BlobFeatures.ZRAN
    | BlobFeatures.SEPARATE
    | BlobFeatures.EXTERNAL
    | BlobFeatures.IS_CHUNKDICT_GENERATED
)


@dataclass(frozen=True, slots=True)
class CompactOptions:
    """What is worth rewriting, and where it goes; sizes in bytes.

    Args:
        bootstrap: path of the new metadata.
        blob_dir: directory of the new blobs.
        min_used_ratio: percentage; a blob of which less is used is rewritten, 0 for never.
        compact_blob_size: blobs below are joined.
        max_compact_size: how large a joined blob may be.
        layers_to_compact: nothing is done to images with fewer blobs.
        chunk_dict: bootstrap whose blobs stay, and whose chunks are referred to instead.
        progress: called with the number of content bytes after each chunk that is copied.
    """

    bootstrap: Path
    blob_dir: Path
    min_used_ratio: int = 0
    compact_blob_size: int = 10 << 20
    max_compact_size: int = 100 << 20
    layers_to_compact: int = 0
    chunk_dict: Path | None = None
    progress: Callable[[int], None] | None = None


@dataclass(slots=True)
class _Group:
    """Blobs that become one; `size` is what is stored for the chunks that are in use."""

    members: list[int]
    size: int
    rewrite: bool = False


@dataclass(slots=True)
class _Usage:
    """Which chunks of each blob are referred to."""

    chunks: list[dict[int, Chunk]] = field(default_factory=list)

    def stored(self, index: int, blob: BlobEntry) -> int:
        """Return the bytes of a blob that are in use; batches count by their content."""
        if blob.features & BlobFeatures.BATCH:
            return self._content(index) * blob.compressed_size // max(1, blob.uncompressed_size)
        return sum(chunk.compressed_size for chunk in self.chunks[index].values())

    def _content(self, index: int) -> int:
        return sum(
            align_up(chunk.uncompressed_size, CI_ALIGNMENT) for chunk in self.chunks[index].values()
        )


class _Compactor:
    def __init__(self, image: LoadedImage, options: CompactOptions) -> None:
        self._image = image
        self._options = options
        self._dictionary: ChunkDictionary | None = None
        self._kept: set[bytes] = set()
        self._table = BlobTable(image.blobs)
        if options.chunk_dict is not None:
            profile = Profile(image.chunk_size, image.explicit_owners)
            self._dictionary = load_dictionary(options.chunk_dict, profile, image.digester)
            self._kept = {blob.blob_id for blob in self._dictionary.blobs}

    def refer_to_dictionary(self) -> None:
        """Replace chunks by those of the dictionary, where it has them."""
        if self._dictionary is None:
            return
        for _, _, node in iter_names(self._image.root):
            for number, chunk in enumerate(node.chunks):
                if self._image.blobs[chunk.blob_index].blob_id in self._kept:
                    continue
                found = self._dictionary.find(chunk.digest, chunk.uncompressed_size, self._table)
                if found is not None:
                    found.file_offset = chunk.file_offset
                    node.chunks[number] = found
        new = self._table.entries(None)[len(self._image.blobs) :]
        self._image.blobs += new
        self._image.ids += [blob.id for blob in new]

    def usage(self) -> _Usage:
        """Return what is referred to."""
        usage = _Usage([{} for _ in self._image.blobs])
        for _, _, node in iter_names(self._image.root):
            for chunk in node.chunks:
                usage.chunks[chunk.blob_index][id(chunk)] = chunk
        return usage

    def plan(self, usage: _Usage) -> list[_Group]:
        """Return which blobs there will be, in order; unused ones are in no group."""
        groups = []
        for index, blob in enumerate(self._image.blobs):
            if not usage.chunks[index]:
                logger.info("compactor: delete unused blob %s", blob.id)
                continue
            group = _Group([index], usage.stored(index, blob))
            groups.append(group)
            if self._is_kept(blob):
                continue
            ratio = min(100, group.size * 100 // max(1, blob.compressed_size))
            logger.info("compactor: original blob size %s, used data ratio %s%%", blob.id, ratio)
            group.rewrite = ratio < self._options.min_used_ratio
        return self._joined(groups)

    def _is_kept(self, blob: BlobEntry) -> bool:
        return blob.blob_id in self._kept or bool(blob.features & _KEPT)

    def _joined(self, groups: list[_Group]) -> list[_Group]:
        """Join small blobs, the smallest first, as long as the result is not too large."""
        small = []
        for group in groups:
            blob = self._image.blobs[group.members[0]]
            size = group.size if group.rewrite else blob.compressed_size or group.size
            if not self._is_kept(blob) and size < self._options.compact_blob_size:
                logger.info("compactor: try to merge blob %s size %s", blob.id, size)
                small.append((size, group))
        small.sort(key=lambda item: item[0])
        target: _Group | None = None
        for _, group in small:
            if target is None or target.size + group.size > self._options.max_compact_size:
                target = group
                continue
            target.members += group.members
            target.size += group.size
            target.rewrite = True
            groups = [other for other in groups if other is not group]
        return groups

    def carry_out(
        self, groups: Sequence[_Group], usage: _Usage, blobs: BlobProvider, stack: ExitStack
    ) -> tuple[list[BlobEntry], list[tuple[BlobCopy, BlobEntry]]]:
        """Copy chunks and renumber; return the blob table, and the blobs still to be named."""
        table: list[BlobEntry] = []
        copies = []
        for number, group in enumerate(groups):
            if not group.rewrite:
                blob = self._image.blobs[group.members[0]]
                logger.info("compactor: keep original data blob %s", blob.id)
                table.append(blob._replace(blob_index=number))
                continue
            copy, entry = self._rewritten(number, group, usage, blobs, stack)
            logger.info("compactor: successfully rebuild blob %s", entry.id)
            copies.append((copy, entry))
            table.append(entry)
        numbers = {
            member: number for number, group in enumerate(groups) for member in group.members
        }
        for index, chunks in enumerate(usage.chunks):
            for chunk in chunks.values():
                chunk.blob_index = numbers[index]
        return table, copies

    def _rewritten(
        self, number: int, group: _Group, usage: _Usage, blobs: BlobProvider, stack: ExitStack
    ) -> tuple[BlobCopy, BlobEntry]:
        """Copy the used chunks of a group, blob by blob, each in its order."""
        encrypted = any(is_encrypted(self._image.blobs[member]) for member in group.members)
        form, reader = self._image.form(encrypted=encrypted), self._image.reader(blobs)
        copy = stack.enter_context(
            BlobCopy(self._options.blob_dir, form, reader, self._options.progress)
        )
        # Blobs that become one may have chunks in common.
        twins: dict[tuple[bytes, int], Chunk] = {}
        moves = []
        for member in sorted(group.members):
            chunks = usage.chunks[member].values()
            for chunk in sorted(chunks, key=lambda chunk: chunk.uncompressed_offset):
                key = chunk.digest, chunk.uncompressed_size
                if key not in twins:
                    twins[key] = copy.copy(chunk, number)
                moves.append((chunk, twins[key]))
        entry = copy.seal()._replace(blob_index=number)
        for chunk, twin in moves:
            _move(chunk, twin)
        return copy, entry


def _move(chunk: Chunk, twin: Chunk) -> None:
    """Give a chunk the place of its copy."""
    chunk.flags = twin.flags
    chunk.compressed_size = twin.compressed_size
    chunk.compressed_offset = twin.compressed_offset
    chunk.uncompressed_offset = twin.uncompressed_offset
    chunk.chunk_index = twin.chunk_index


def compact(bootstrap: Path, blobs: BlobProvider, options: CompactOptions) -> BuildResult:
    """Rewrite the blobs of an image that waste space or are small, and its metadata.

    Old blobs stay where they are: others may refer to them. An image that has nothing to be
    compacted gets the metadata that it had.

    Args:
        bootstrap: the metadata of the image.
        blobs: where its data is, by blob id.
        options: what to do, and where results go.

    Raises:
        BuildError: the image, the dictionary or an output is at fault.
        NydusError: a chunk cannot be read, or is not what the image promises.
    """
    result = BuildResult()
    with result.timed("load_tree_from_bootstrap"):
        image = load_image(bootstrap)
    logger.info('load bootstrap "%s" successfully', bootstrap)
    result.compressor = image.compressor
    compactor = _Compactor(image, options)
    with ExitStack() as stack:
        table = list(image.blobs)
        copies: list[tuple[BlobCopy, BlobEntry]] = []
        if len(image.blobs) >= options.layers_to_compact:
            compactor.refer_to_dictionary()
            usage = compactor.usage()
            groups = compactor.plan(usage)
            table, copies = compactor.carry_out(groups, usage, blobs, stack)
        if copies:
            logger.info("compactor: successfully compacted blob")
        else:
            logger.info("compactor: no chance to compact data blobs")
        with result.timed("dump_bootstrap"):
            output = stack.enter_context(OutputFile(options.bootstrap, BOOTSTRAP_MODE))
            output.write(image.write(table))
            output.sync()
            for copy, entry in copies:
                copy.commit(entry)
            result.bootstrap = output.commit()
    result.blobs = [blob.id for blob in table]
    return result
