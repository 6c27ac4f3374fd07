"""Export an image as a disk: metadata and all data in one file that the kernel mounts alone.

Bootstrap and uncompressed blobs lie where the bootstrap's device table places them (spec
rafs-v6 6.2), zeros between them; a hash tree for dm-verity may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path

from builder.blobfiles import BlobProvider, open_blob
from builder.blobspace import BlobSpace, Piece, open_space
from builder.bootstrap import blob_ids, open_any_bootstrap
from builder.hashtree import add_hash_tree, hash_workers
from builder.listing import log_features
from builder.output import OutputDisk
from builder.sharing import share_out
from erofs import Bootstrap, UnsupportedFeature
from erofs.errors import error_context
from erofs.flatdisk import Extent, blob_extents, disk_size
from erofs.rafs import ChunkInfo
from erofs.values import Value
from erofs.verity import DIGEST_SIZE, HASH_BLOCK_SIZE, HashTree, TreeFormat

__all__ = ["ExportOptions", "ExportResult", "VerityOptions", "export_block"]

DISK_MODE = 0o644
_COPY_BYTES = 1 << 20
_Progress = Callable[[int], None] | None


class VerityOptions(Value):
    """How a hash tree is made; the defaults are the real tool's, but for the filler.

    Args:
        salt, filler, superblock, uuid: see `erofs.verity.TreeFormat`.
    """

    salt: bytes = b""
    filler: bytes = bytes(DIGEST_SIZE)
    superblock: bool = False
    uuid: bytes = bytes(16)

    def format(self, block_size: int) -> TreeFormat:
        """Return the format of a tree over blocks of a filesystem."""
        return TreeFormat(
            block_size, HASH_BLOCK_SIZE, self.salt, self.filler, self.superblock, self.uuid
        )


class ExportOptions(Value):
    """How to export.

    Args:
        verity: append a hash tree.
        threads: that read and decompress; the bytes do not depend on it.
        progress: called by several threads with numbers of bytes: of data, then of what is
            digested.
    """

    verity: VerityOptions | None = None
    threads: int = 4
    progress: _Progress = None


class ExportResult(Value):
    """What was written: `size` counts the bytes of metadata and data, without a hash tree."""

    disk: Path
    size: int
    block_size: int
    blobs: Sequence[str] = ()
    tree: HashTree | None = None


class _Copier:
    """Copies the blobs of an image to their extents."""

    def __init__(self, disk: OutputDisk, extents: Sequence[Extent], progress: _Progress) -> None:
        self._disk = disk
        self._extents = extents
        self._progress = progress

    def pieces(
        self, image: Bootstrap, ids: Sequence[str], blobs: BlobProvider, bootstrap: Path
    ) -> Iterator[tuple[Extent, BlobSpace, Piece]]:
        """Yield what there is to copy, opening one blob after the other."""
        infos: list[list[ChunkInfo]] = [[] for _ in ids]
        if not image.is_tarfs:
            for info in image.chunk_infos:
                infos[info.blob_index].append(info)
        for blob, blob_id, extent in zip(image.blobs, ids, self._extents, strict=True):
            stored = blob._replace(blob_id=blob_id.encode("ascii", "backslashreplace"))
            files = open_blob(stored, blob_id, blobs, bootstrap)
            space = open_space(stored, files, infos[blob.blob_index])
            yield from zip(repeat(extent), repeat(space), space.pieces())

    def copy(self, pieces: Iterator[tuple[Extent, BlobSpace, Piece]]) -> None:
        """Copy pieces until there are none; blocks of zeros stay holes."""
        for extent, space, piece in pieces:
            for offset, data in space.read(piece):
                # A tar may end inside of a block, which is not part of the device.
                data = data[: extent.size - offset]
                if not _is_zero(data):
                    self._disk.write_at(extent.start + offset, data)
                if self._progress is not None:
                    self._progress(len(data))


def _is_zero(data: bytes | memoryview) -> bool:
    return not data or (not data[0] and not data[-1] and bytes(data) == bytes(len(data)))


def export_block(
    bootstrap: Path, output: Path, blobs: BlobProvider, options: ExportOptions | None = None
) -> ExportResult:
    """Write the disk of a merged image, of a layer, or of tarfs.

    Every chunk is verified before it is written; a tar has no digests. The disk appears whole
    or not at all. The same image gives the same bytes anywhere.

    Args:
        bootstrap: the metadata, or a blob that carries it.
        output: a path; what is there must be a regular file, and is replaced.
        blobs: where the data is, by blob id.

    Raises:
        FormatError: the bootstrap is broken, or an image of this kind has no disk.
        IntegrityError: a blob is not what the bootstrap promises.
        BuildError: the disk cannot be written.
        NydusError: a blob is not there or cannot be read.
        OSError: the bootstrap cannot be read.
    """
    options = options or ExportOptions()
    with open_any_bootstrap(bootstrap, inlined=True) as image, error_context(path=bootstrap):
        log_features(image)
        if not isinstance(image, Bootstrap):
            raise UnsupportedFeature("a disk of RAFS v5")
        extents, ids = blob_extents(image), blob_ids(image, bootstrap)
        size = disk_size(image)
        with OutputDisk(output, DISK_MODE) as disk, ExitStack() as stack:
            disk.resize(size)
            form, workers = None, None
            if options.verity is not None:
                form = options.verity.format(image.block_size)
                # They start while the data is copied, which does not take all cores.
                workers = stack.enter_context(hash_workers(disk, size, form))
            for offset in range(0, image.view.length, _COPY_BYTES):
                # A copy: an error must not hold on to the mapping.
                disk.write_at(offset, bytes(image.view.data[offset : offset + _COPY_BYTES]))
            copier = _Copier(disk, extents, options.progress)
            share_out(copier.pieces(image, ids, blobs, bootstrap), [copier.copy] * options.threads)
            tree = None
            if form is not None:
                # The data reaches the disk while it is digested.
                with ThreadPoolExecutor(1, "sync") as thread:
                    synced = thread.submit(disk.sync)
                    tree = add_hash_tree(
                        disk, size, form, started=workers, progress=options.progress
                    )
                    synced.result()
            return ExportResult(disk.commit(), size, image.block_size, ids, tree)
